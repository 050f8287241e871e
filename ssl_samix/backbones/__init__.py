"""Backbones: torchvision, timm and narrow ResNets behind one face."""
