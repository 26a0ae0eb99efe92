"""Streaming vectors of SME2 of one length: Linux starts threads with a shorter one, and gives it to those that ask.

A process starts with 256 bits at most (Documentation/arch/arm64/sme.rst). Threads have the length of the one that
started them; a kernel asks again in each, since threads may be older than the artifact.
"""

from __future__ import annotations

import ctypes
import functools
import os

FEATURE = "sme2"
"""The flag of /proc/cpuinfo of CPUs with streaming vectors, whose tables are looked up in (LUTI)."""
LENGTH = 64
"""Bytes of a vector that kernels are compiled for, as those of Apple's M4 and Arm's C1 have."""
SET_LENGTH, LENGTH_MASK = 63, 0xFFFF
"""PR_SME_SET_VL of prctl, and the bits of its answer that are a length in bytes."""


@functools.cache
def refusal() -> str | None:
    """Why this machine has no streaming vectors of `LENGTH`, in words; None where it has. Linux is asked once."""
    library = ctypes.CDLL(None, use_errno=True)
    got = library.prctl(SET_LENGTH, LENGTH, 0, 0, 0)
    if got < 0:
        return os.strerror(ctypes.get_errno())
    length = got & LENGTH_MASK
    return None if length == LENGTH else f"the longest that it gives are of {8 * length}"
