"""What is measured, each by a script of its own; a package, so that no installed one of this name stands in its place."""
