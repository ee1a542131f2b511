"""One way to shard a module's parameters a file."""
