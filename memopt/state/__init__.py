"""Storage, sharding and size of optimizer state."""
