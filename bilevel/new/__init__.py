"""`bilevel new`: packages to start from, which pass their own tests as they are written."""
