"""Losses: pure functions, tensors in, one value per sample out."""
