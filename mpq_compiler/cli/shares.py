"""What the parts of a pipeline got of one budget, as a table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from mpq_compiler.support import terminal

if TYPE_CHECKING:
    from mpq_compiler.artifact.pipeline import Share


def print_shares(title: str, shares: Mapping[str, Share]) -> None:
    """Print what the parts of a pipeline got of one budget, and what the next kilobyte would be worth in each."""
    total = sum(share["loss"] for share in shares.values())
    rows = [
        (
            name,
            terminal.size(share["bytes"]),
            _decibels(share["loss"]),
            f"{100 * share['worth'] / total:.3f} %",
            terminal.size(share["equal_bytes"]),
            _decibels(share["equal_loss"]),
        )
        for name, share in shares.items()
    ]
    headers = ("part", "bytes", "pictures", "next kB", "equal bits", "pictures")
    terminal.table(title, headers, rows, numeric=(1, 2, 3, 4, 5))


def _decibels(noise: float) -> str:
    return f"{-10 * math.log10(max(noise, 1e-20)):.1f} dB"
