"""Learned weights in the form that other trainers read."""
