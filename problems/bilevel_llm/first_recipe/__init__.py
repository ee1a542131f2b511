"""`bilevel init`: look at a model and data, measure what can be measured, and write a recipe with its reasons."""
