"""Memory-efficient optimizers for large models in JAX, as composable Optax chains."""
