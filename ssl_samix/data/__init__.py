"""Data sets, views and the data module; importing this package alone does not import torch."""
