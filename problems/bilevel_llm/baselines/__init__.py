"""Ways to weigh or select training data that learned weights are compared with: one method a file."""
