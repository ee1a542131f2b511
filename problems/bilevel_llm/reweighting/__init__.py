"""The flagship problem: weights of training data, and whether to trust them."""
