"""Training a ScaleDown model."""
