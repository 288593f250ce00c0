"""Cost, metrics and evaluation."""
