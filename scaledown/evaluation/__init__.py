"""Evaluation of a ScaleDown model beside ways to answer without it."""
