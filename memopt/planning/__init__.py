"""The memory that a run will need."""
