"""How optimizer state is stored and counted."""
