"""Parts that methods share: the momentum twin and the queue."""
