"""What the abbreviations in tables of layers mean."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable

MEANINGS = (
    (r"\bint(\d)", r"int\1: \1 bits, evenly spaced"),
    (r"\bkm(\d)", r"km\1: \1 bits, a table learned by k-means"),
    (r"\bec(\d(?:\.\d+)?)", r"ec\1: integers, entropy-coded in \1 bits"),
    (r"\bnf(\d)", r"nf\1: \1 bits, quantiles of the normal distribution"),
    (r"\bfp(\d)", r"fp\1: floats of \1 bits"),
    (r"\b(\w+\dm)\b", r"\1: a bit more or less by row"),
    (r"\b\w+\dt\b", "km3t, int4t: a table for every 16 rows, or one scale"),
    (r"\dg(\d+)", r"g\1: a scale for every \1 input channels"),
    (r"\+b\b", "+b: and a binary branch"),
    (r"\+r(\d+)", r"+r\1: and a float branch of rank \1"),
    (r"\bu(\d)", r"u\1: integers of \1 bits without a sign"),
    (r"\be(\d)m(\d)", r"e\1m\2: floats of \1 bits of exponent and \2 of mantissa"),
    (r"/t(\d+)", r"/t\1: with scales for each of \1 time groups"),
    (r"/token\b", "/token: with a scale for each token"),
    (r"\bloss\b", "loss: noise that it alone adds to the output, as a part of its power (1e-4 is 40 dB)"),
)
"""A pattern of names, and what the first that it finds means."""


def legend(names: Iterable[str], width: int) -> str:
    """The meanings of what stands among the names, in lines of a width."""
    text = "\n".join(names)
    found = ((re.search(pattern, text), meaning) for pattern, meaning in MEANINGS)
    told = "; ".join(match.expand(meaning) for match, meaning in found if match)
    return textwrap.fill(told, width, break_on_hyphens=False)
