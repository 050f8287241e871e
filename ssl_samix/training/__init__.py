"""Training: the run, its monitors, its guards and its files."""
