"""The pieces chains are made of."""
