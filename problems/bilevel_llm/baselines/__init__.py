"""Methods that find weights or select rows, with which learned weights are compared: one method per file."""
