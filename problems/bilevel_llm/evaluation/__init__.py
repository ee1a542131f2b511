"""How well a language model does on held-out rows."""
