"""`bilevel compare`: the same model tuned on the mixes of several methods, and what is known about the differences."""
