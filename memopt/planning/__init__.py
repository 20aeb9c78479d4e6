"""What a run will need."""
