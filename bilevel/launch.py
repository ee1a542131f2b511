"""Read the environment variables by which a launcher (torchrun, deepspeed) tells a process its place among all."""

import os


def launched() -> bool:
    """Whether a launcher started this process, alone or as one of several."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def rank() -> int:
    """The rank of this process among all. Process 0 writes and reports."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """The rank of this process among those of its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """The number of processes that were started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_world_size() -> int | None:
    """The number of processes that were started on this machine; None if the launcher does not say."""
    stated = os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE"))  # torchrun's name, and DeepSpeed's
    return None if stated is None else int(stated)
