"""Small problems whose answers are known in closed form, and data cleaning on a small real data set."""
