"""What a launcher (torchrun, deepspeed) tells a process about itself, by environment variables."""

import os


def launched() -> bool:
    """Whether a launcher started this process, as one of several or as one of one."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def rank() -> int:
    """This process among all; the first one, 0, writes and reports."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """This process among those of its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """How many processes were started."""
    return int(os.environ.get("WORLD_SIZE", "1"))
