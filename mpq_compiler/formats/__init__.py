"""Weight formats: tables of one contract, ``W[i,k] = scale[i,j] * LUT[class(i)][code[i,k]] + offset[i]``, and beyond.

A format is found by its name: an entry of `FORMATS`, one of a package with an entry point in the group
`mpq_compiler.formats`, or one that a name spells out: ``int4g32`` has a scale for every 32 input channels, ``int4+r16``
a low-rank branch of rank 16. The allocator chooses among those that `sensitivity` measures.
"""

from __future__ import annotations

import functools
import importlib.metadata
import re
from collections.abc import Iterable

from mpq_compiler import entry_points
from mpq_compiler.errors import UserError, nearest
from mpq_compiler.formats.base import Fit, Format, QuantizedWeight, stored_type
from mpq_compiler.formats.codebook import CodebookFormat
from mpq_compiler.formats.floating import E2M1, EXPONENTS, NF4, Float8Format, Float8Weight
from mpq_compiler.formats.lowrank import LowRankFormat, LowRankWeight
from mpq_compiler.formats.residual import ResidualFormat
from mpq_compiler.formats.row_classes import RowClassFormat
from mpq_compiler.formats.table import TableFormat
from mpq_compiler.formats.uniform import UniformFormat

ENTRY_POINTS = "mpq_compiler.formats"

TABLES: dict[str, tuple[int, ...]] = {
    "int2": (-3, -1, 1, 3),
    "int3": tuple(range(-4, 4)),
    "int4": tuple(range(-8, 8)),
    "fp4": E2M1,
    "nf4": NF4,
}
"""The tables that K-groups may have. Without an offset two bits are better spent on both signs than on a zero: 1 dB."""

FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        UniformFormat("int2", bits=2),
        RowClassFormat("int2m", bits=2),
        TableFormat("int2g64", bits=2, table=TABLES["int2"], size=64),
        CodebookFormat("km2", bits=2),
        UniformFormat("int3", bits=3),
        RowClassFormat("int3m", bits=3),
        CodebookFormat("km3", bits=3),
        CodebookFormat("km3t", bits=3, tiled=True),
        TableFormat("int3g64", bits=3, table=TABLES["int3"], size=64),
        ResidualFormat("int2+b", bits=3, base_bits=2),
        UniformFormat("int4", bits=4),
        RowClassFormat("int4m", bits=4),
        CodebookFormat("km4", bits=4),
        CodebookFormat("km4t", bits=4, tiled=True),
        TableFormat("int4t", bits=4, table=TABLES["int4"], shared=True),
        TableFormat("fp4", bits=4, table=E2M1),
        TableFormat("fp4t", bits=4, table=E2M1, shared=True),
        TableFormat("nf4", bits=4, table=NF4),
        TableFormat("int4g64", bits=4, table=TABLES["int4"], size=64),
        ResidualFormat("int3+b", bits=4, base_bits=3),
        UniformFormat("int8", bits=8),
        Float8Format("fp8", bits=8),
        *(Float8Format(f"fp8e{exponent}", bits=8, exponent=exponent) for exponent in EXPONENTS),
    )
}
"""The formats with a name of their own."""


def get(name: str) -> Format:
    """The format of that name.

    UserError: no such name (with the nearest), one that is defined twice, a package that fails to import.
    """
    return _find(name, entry_points.of(ENTRY_POINTS))


def names(extra: Iterable[str] = ()) -> list[str]:
    """The built-in names, then third-party ones, then ``extra``, each once."""
    return list(dict.fromkeys([*FORMATS, *sorted({e.name for e in entry_points.of(ENTRY_POINTS)}), *extra]))


def version(name: str) -> str:
    """What a format of another package is, for keys of caches; empty for ours, whose changes the keys know."""
    if isinstance(chosen := get(name), LowRankFormat):
        return version(chosen.base.name)
    found = [e for e in entry_points.of(ENTRY_POINTS) if e.name == name]
    return f"{chosen} {entry_points.version(found[0])}" if found else ""


@functools.cache
def _find(name: str, external: tuple[importlib.metadata.EntryPoint, ...]) -> Format:
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


def _spelled(name: str) -> Format | None:
    """A built-in format, or what the name spells out."""
    if name in FORMATS:
        return FORMATS[name]
    if match := re.fullmatch(r"(.+)\+r([1-9]\d*)", name):
        base = get(match[1])
        if not base.integer or isinstance(base, LowRankFormat):
            raise UserError(f"weight format '{name}': a low-rank branch stands beside a table; '{base.name}' is none")
        return LowRankFormat(name, base.bits, base=base, rank=int(match[2]))
    if (match := re.fullmatch(r"(.+)g([1-9]\d*)", name)) and match[1] in TABLES:
        table = TABLES[match[1]]
        return TableFormat(name, (len(table) - 1).bit_length(), table=table, size=int(match[2]))
    return None


__all__ = [
    "FORMATS",
    "Fit",
    "Float8Format",
    "Float8Weight",
    "Format",
    "LowRankFormat",
    "LowRankWeight",
    "QuantizedWeight",
    "get",
    "names",
    "stored_type",
    "version",
]
