"""Loggers: progress on the terminal, TensorBoard events and plots. Each is a plugin like any other."""
