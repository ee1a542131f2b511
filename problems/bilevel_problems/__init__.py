"""First-party problems."""
