"""Synthetic problems with closed forms."""
