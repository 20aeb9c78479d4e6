"""Flax NNX models and their Hugging Face import and export."""
