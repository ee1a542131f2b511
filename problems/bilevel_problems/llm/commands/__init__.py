"""The commands of this package. Heavy imports are inside the functions, so that `bilevel --help` stays quick."""
