"""Measures of an encoder."""
