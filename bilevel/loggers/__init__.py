"""What follows a run: progress on the terminal, TensorBoard events, plots. Each is a plugin like any other."""
