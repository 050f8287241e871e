"""Composing and checking configurations. Nothing here imports torch."""
