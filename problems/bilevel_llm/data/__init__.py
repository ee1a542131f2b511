"""Data files as rows, tokens and batches."""
