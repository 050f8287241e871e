"""Comparison tables of several runs, and studies."""
