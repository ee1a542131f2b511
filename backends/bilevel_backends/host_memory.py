"""What the C library does with memory that tensors on a CPU have freed."""

import ctypes
import os
import platform
from functools import cache

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # as glibc's malloc.h numbers them
_SIZES = (1 << 30, 1 << 25)  # older versions of glibc take no more than the second


@cache
def keep_freed_memory() -> bool:
    """Let this process keep the memory that it frees, for the tensors of the next pass. Returns whether it does.

    By default, glibc hands back large pieces of memory at once, and the kernel has to fill with zeros, page by page, what
    the next pass asks for. The process's peak stays as it is, for it needs as much in every step. Where the environment has
    settings for malloc, they are left alone; so is any other C library.
    """
    asked = any(name.startswith("MALLOC_") for name in os.environ) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if asked or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    taken = any(mallopt(_MMAP_THRESHOLD, size) for size in _SIZES)
    return bool(taken and mallopt(_TRIM_THRESHOLD, (1 << 31) - 1))
