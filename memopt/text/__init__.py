"""Text: documents, tokenizers, and batches of packed tokens."""
