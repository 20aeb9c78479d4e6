"""Measures memory, speed and tests of memopt on a GPU."""
