"""Optimizers compared, each tuned with the same budget."""
