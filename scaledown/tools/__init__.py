"""Small programs around a model: demos, and taking models apart and together."""
