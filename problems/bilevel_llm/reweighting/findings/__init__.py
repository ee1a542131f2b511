"""What a careful reader should know before using learned weights: one kind of finding a file."""
