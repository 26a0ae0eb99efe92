"""Permission for the tiles of AMX: Linux gives it to a process that asks, and ends one that did not by a signal.

Their state is 8 KiB a thread, for which Linux has no room unless asked (Documentation/arch/x86/xstate.rst). Threads
have the permission of their process, started before or after; a forked process has that of its parent, another program
none.
"""

from __future__ import annotations

import ctypes
import functools
import os

FEATURE = "amx_tile"
"""The flag of /proc/cpuinfo of CPUs with tiles."""
ARCH_PRCTL, REQUEST, TILE_DATA = 158, 0x1023, 18
"""The system call on x86-64, ARCH_REQ_XCOMP_PERM, and the number of the tiles' state."""


@functools.cache
def refusal() -> str | None:
    """Why this process may not use tiles, in words; None where it may. Linux is asked once."""
    library = ctypes.CDLL(None, use_errno=True)
    if library.syscall(ARCH_PRCTL, REQUEST, TILE_DATA) == 0:
        return None
    return os.strerror(ctypes.get_errno())
