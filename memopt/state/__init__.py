"""Storage, placement and size of optimizer state."""
