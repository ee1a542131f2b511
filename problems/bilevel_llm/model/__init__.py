"""The language model: its files, its forward pass, adapters, export and cost."""
