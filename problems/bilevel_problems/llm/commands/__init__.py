"""Commands of `bilevel` that this package brings."""
