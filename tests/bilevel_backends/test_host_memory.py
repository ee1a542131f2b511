"""Memory that tensors have freed stays with the process, unless the user has settings of their own."""

import os
import platform
import subprocess
import sys

import pytest

# The faults of writing 64 MB again and again, after a first time.
FAULTS = """
import ctypes, resource, sys
from bilevel_backends.host_memory import keep_freed_memory

libc = ctypes.CDLL(None)
libc.malloc.restype, libc.memset.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]

def write():
    piece = libc.malloc(2**26)
    libc.memset(piece, 1, 2**26)
    libc.free(piece)

kept = keep_freed_memory()
write()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    write()
print(int(kept), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="settings of glibc")
@pytest.mark.parametrize("settings", [{}, {"MALLOC_TRIM_THRESHOLD_": "131072"}, {"GLIBC_TUNABLES": "glibc.malloc.check=0"}])
def test_freed_memory_is_kept_unless_the_environment_has_settings(settings: dict[str, str]) -> None:
    mine = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_") and name != "GLIBC_TUNABLES"}
    shown = subprocess.run([sys.executable, "-c", FAULTS], check=True, capture_output=True, env=mine | settings).stdout
    kept, faults = map(int, shown.split())
    assert kept == (not settings)
    pages = 3 * 2**26 // os.sysconf("SC_PAGE_SIZE")
    assert faults < pages / 10 if kept else faults > pages / 10
