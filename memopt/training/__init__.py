"""The training step, its compilation, the loop and checkpoints."""
