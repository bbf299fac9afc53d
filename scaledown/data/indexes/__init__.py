"""Search in passages: in memory, and on the disk."""
