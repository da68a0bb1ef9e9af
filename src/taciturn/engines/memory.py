"""Memory from the system: freed blocks that are kept, and address space that is taken up as it is written.

Blocks of clients need the same few large tensors again and again. glibc gives tensors of some megabytes back to the system
as soon as they are freed, and the system clears every page when they are asked for again; here that costs more than the
arithmetic on them.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)  # named since Python 3.13
_KEEP = 1 << 30  # bytes; larger blocks still go back


@functools.cache
def keep_freed_memory() -> bool:
    """Ask glibc, once a process, not to return freed blocks of up to 1 GiB. False where there is no glibc."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _KEEP)) and bool(mallopt(_M_TRIM_THRESHOLD, _KEEP))


def reserve(size: int, kind: int) -> mmap.mmap:
    """Address space of `size` bytes whose pages exist once they are written; kind: `mmap.MAP_PRIVATE` or `MAP_SHARED`."""
    return mmap.mmap(-1, size, flags=kind | mmap.MAP_ANONYMOUS | _NORESERVE)
