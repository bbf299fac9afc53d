"""Serving a ScaleDown model over HTTP, by the conventions that clients already have."""
