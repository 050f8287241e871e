"""Networks: backbones, the momentum twin, the queue."""
