"""What is trained: a loss, metrics and evaluation sums for each task."""
