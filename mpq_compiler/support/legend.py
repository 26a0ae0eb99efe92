"""What the abbreviations in tables of layers mean."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable

MEANINGS = (
    (r"\bint\d", "int4: 4 bits, evenly spaced"),
    (r"\bkm\d", "km2: 2 bits, a table learned by k-means"),
    (r"\bec\d", "ec2.5: integers, entropy-coded in 2.5 bits"),
    (r"\bnf\d", "nf4: 4 bits, quantiles of the normal distribution"),
    (r"\bfp\d", "fp8: floats of 8 bits"),
    (r"\b\w+\dm\b", "int3m: a bit more or less by row"),
    (r"\b\w+\dt\b", "km3t, int4t: a table for every 16 rows, or one scale"),
    (r"\dg\d", "g64: a scale for every 64 input channels"),
    (r"\+b\b", "+b: and a binary branch"),
    (r"\+r\d", "+r16: and a float branch of rank 16"),
    (r"\bu\d", "u8: integers of 8 bits without a sign"),
    (r"\be\dm\d", "e4m3: floats of 4 bits of exponent and 3 of mantissa"),
    (r"/t\d", "/t4: with scales for each of 4 time groups"),
    (r"/token\b", "/token: with a scale for each token"),
    (r"\bloss\b", "loss: noise that it alone adds to the output, as a part of its power (1e-4 is 40 dB)"),
)
"""A pattern of names, and an example with its meaning."""


def legend(names: Iterable[str], width: int) -> str:
    """The meanings of what stands among the names, in lines of a width."""
    text = "\n".join(names)
    told = "; ".join(meaning for pattern, meaning in MEANINGS if re.search(pattern, text))
    return textwrap.fill(told, width, break_on_hyphens=False)
