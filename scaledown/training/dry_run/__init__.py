"""What a run would train, read and need, reported before it begins."""
