"""`bilevel report`: show runs, and a comparison of methods, as one HTML file that needs nothing else."""
