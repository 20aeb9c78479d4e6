"""Memory, speed and tests of memopt, measured on a GPU."""
