"""Predict the memory and the time that a run takes, before it is launched."""
