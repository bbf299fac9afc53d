"""Converts published OSCAR and PISCO checkpoints into ScaleDown models (docs/converting.md)."""
