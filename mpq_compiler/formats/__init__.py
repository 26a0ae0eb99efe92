"""Weight formats: tables of one contract, ``W[i,k] = scale[i,j] * LUT[class(i)][code[i,k]] + offset[i]``, and beyond.

A format is found by its name: a built-in one of `plugins.toml`, one of a package with an entry point in the group
`mpq_compiler.formats`, or one that a name spells out: ``int4g32`` has a scale for every 32 input channels, ``int4+r16``
a low-rank branch of rank 16, ``ec1.7`` integers that are entropy-coded in 1.7 bits. The allocator chooses among those
that `sensitivity` measures.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable
from importlib.metadata import EntryPoint

from mpq_compiler.formats.base import Fit, Format, QuantizedWeight, stored_type
from mpq_compiler.formats.entropy import EntropyFormat
from mpq_compiler.formats.fixed_table import TABLES, TableFormat
from mpq_compiler.formats.floating import Float8Format, Float8Weight
from mpq_compiler.formats.low_rank import LowRankFormat, LowRankWeight
from mpq_compiler.support import plugins
from mpq_compiler.support.errors import UserError, nearest

ENTRY_POINTS = "mpq_compiler.formats"

FORMATS: dict[str, Format] = {entry.name: entry.load() for entry in plugins.built_in(ENTRY_POINTS)}
"""The built-in formats by name."""


def get(name: str) -> Format:
    """The format called `name`.

    Raises:
        UserError: there is no such name (the sentence has the nearest), it is defined twice, or its package fails to
            import.
    """
    return _find(name, plugins.of(ENTRY_POINTS))


def names(extra: Iterable[str] = ()) -> list[str]:
    """The built-in names, then third-party ones, then ``extra``, each once."""
    return list(dict.fromkeys([*FORMATS, *sorted({e.name for e in plugins.of(ENTRY_POINTS)}), *extra]))


def version(name: str) -> str:
    """The version of a third-party format, for the keys of caches; empty for a built-in one, which the keys cover."""
    if isinstance(chosen := get(name), LowRankFormat):
        return version(chosen.base.name)
    found = [e for e in plugins.of(ENTRY_POINTS) if e.name == name]
    return f"{chosen} {plugins.version(found[0])}" if found else ""


@functools.cache
def _find(name: str, external: tuple[EntryPoint, ...]) -> Format:
    found = [e for e in external if e.name == name]
    spelled = _spelled(name)
    if len(found) + (spelled is not None) > 1:
        owners = ", ".join(e.value for e in found)
        raise UserError(f"weight format '{name}' is defined more than once ({owners}); uninstall one of the packages")
    if spelled is not None:
        return spelled
    if not found:
        raise UserError(f"unknown weight format '{name}': {nearest(name, names())}")
    try:
        loaded = found[0].load()
    except Exception as error:
        raise UserError(f"weight format '{name}' ({found[0].value}) fails to import: {error}") from error
    if not isinstance(loaded, Format) or loaded.name != name:
        raise UserError(f"weight format '{name}' ({found[0].value}) is no instance of Format with that name")
    return loaded


def any_coded(names: Iterable[str]) -> bool:
    """Whether one of the formats is entropy-coded."""
    return any(isinstance(get(name), EntropyFormat) for name in names)


def _spelled(name: str) -> Format | None:
    """The built-in format called `name`, or the one that the name spells out; None where there is neither."""
    if name in FORMATS:
        return FORMATS[name]
    if match := re.fullmatch(r"(.+)\+r([1-9]\d*)", name):
        base = get(match[1])
        if not base.integer or isinstance(base, LowRankFormat):
            raise UserError(f"weight format '{name}': a low-rank branch stands beside a table; '{base.name}' is none")
        return LowRankFormat(name, base.bits, base=base, rank=int(match[2]))
    if match := re.fullmatch(r"ec((?:[1-7]|0(?=\.))(?:\.\d{1,2})?)", name):
        rate = float(match[1])
        return EntropyFormat(name, max(1, math.ceil(rate)), rate=rate)
    if (match := re.fullmatch(r"(.+)g([1-9]\d*)", name)) and match[1] in TABLES:
        table = TABLES[match[1]]
        return TableFormat(name, (len(table) - 1).bit_length(), table=table, size=int(match[2]))
    return None


__all__ = [
    "FORMATS",
    "TABLES",
    "EntropyFormat",
    "Fit",
    "Float8Format",
    "Float8Weight",
    "Format",
    "LowRankFormat",
    "LowRankWeight",
    "QuantizedWeight",
    "any_coded",
    "get",
    "names",
    "stored_type",
    "version",
]
