"""Parses budgets as users write them: 3.7 bits, 40MB, 2.5T, 12ms."""

from __future__ import annotations

import re

from mpq_compiler.support.errors import UserError


def parse_latency(text: str | float | None) -> float | None:
    """Parses a latency, ``12``, ``"12ms"``, ``"800us"`` or ``"0.5s"``, to ms. UserError: malformed, or not above 0."""
    if text is None:
        return None
    match = re.fullmatch(r"\s*(-?[0-9]*\.?[0-9]+)\s*(us|ms|s)?\s*", str(text))
    if match is None:
        raise UserError(f"--latency '{text}' is no time: write 12ms, 800us or 0.5s")
    value = float(match[1]) * {"us": 1e-3, "ms": 1.0, "s": 1e3, None: 1.0}[match[2]]
    if value <= 0:
        raise UserError(f"--latency {text} leaves no time at all: a budget is more than 0 (12ms)")
    return value


def parse_bops(text: str | float | None) -> float | None:
    """Parses a number of bit operations, ``2.5e12``, ``"2.5T"`` or ``"800G"``. UserError: malformed, or not above 0."""
    if text is None:
        return None
    match = re.fullmatch(r"\s*([-+]?[0-9]*\.?[0-9]+(?:e[-+]?[0-9]+)?)\s*([kMGT])?\s*", str(text))
    value = 0.0 if match is None else float(match[1]) * 1000.0 ** " kMGT".index(match[2] or " ")
    if value <= 0:
        raise UserError(f"--bops '{text}' is no number of bit operations: write 2.5e12 or 2.5T")
    return value


def parse_budget(text: str | float | None) -> tuple[float | None, int | None]:
    """Parses a budget of weights, ``3.7`` bits or ``"40MB"``, ``"800kB"``, ``"2MiB"``.

    Returns:
        True average bits, and bytes; one of them is None.

    Raises:
        UserError: it is malformed, or not above 0.
    """
    if text is None:
        return None, None
    match = re.fullmatch(r"\s*(-?[0-9]*\.?[0-9]+)\s*([kMG]i?)?(B)?\s*", str(text))
    if match is not None and float(match[1]) <= 0:
        raise UserError(f"--weights {text} leaves no room at all: a budget is more than 0 bits (3.7), or bytes (40MB)")
    if match is None or (match[2] and not match[3]):
        raise UserError(f"--weights '{text}' is neither bits (3.7) nor bytes (40MB, 800kB)")
    if not match[3]:
        return float(match[1]), None
    return None, _bytes(match[1], match[2])


def parse_memory(text: str) -> int:
    """Parses an amount of memory, ``"8GB"``, ``"800MB"`` or ``"8GiB"``, to bytes. UserError: malformed, or 0."""
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([kMG]i?)B?\s*", str(text))
    if match is None or float(match[1]) <= 0:
        raise UserError(f"--memory-limit '{text}' is no amount of memory: write 8GB or 800MB")
    return _bytes(match[1], match[2])


def _bytes(number: str, unit: str | None) -> int:
    """Bytes of a number with a unit: ``k``, ``M``, ``G``, and with an ``i`` powers of 1024."""
    power = {"k": 1, "M": 2, "G": 3}[unit[0]] if unit else 0
    base = 1024 if unit is not None and unit.endswith("i") else 1000
    return round(float(number) * float(base) ** power)
