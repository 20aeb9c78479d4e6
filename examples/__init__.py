"""Models of other libraries in memopt's training steps, see docs/own_models.md."""
