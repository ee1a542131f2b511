"""The commands that this package adds to `bilevel`. Light to import: what is heavy is imported inside."""
