"""The formats that this package reads, one a file."""
