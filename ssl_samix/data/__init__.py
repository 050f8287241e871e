"""Data sets, views and the data module; importing only this package does not import torch."""
