"""Data, the step, the loop and checkpoints."""
