"""Networks: backbones, the momentum encoder, the queue."""
