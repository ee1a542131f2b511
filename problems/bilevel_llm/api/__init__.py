"""For Python: learn weights by one function call, and use them."""
