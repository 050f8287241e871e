"""Evaluation of an encoder: features, kNN, linear probes, robustness and other measures."""
