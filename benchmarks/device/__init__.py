"""memopt on an accelerator: memory, speed and tests, measured in fifteen minutes."""
