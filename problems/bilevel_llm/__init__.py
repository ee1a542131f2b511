"""Data reweighting for language models."""
