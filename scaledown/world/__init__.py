"""The made-up world of the embedded model: its text, its questions, its models."""
