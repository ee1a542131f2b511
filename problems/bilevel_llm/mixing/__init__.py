"""Weights -> a mixed data set, or the settings of another trainer."""
