"""A table of runs from one file: planned, trained, measured and put together."""
