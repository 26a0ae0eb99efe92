"""Weight formats: tables of one contract, ``W[i,k] = scale[i] * LUT[class(i)][code[i,k]] + offset[i]``.

A format is an entry of `FORMATS`; the allocator chooses among them by name.
"""

from __future__ import annotations

from mpq_compiler.errors import UserError, nearest
from mpq_compiler.formats.base import Format, QuantizedWeight, stored_type
from mpq_compiler.formats.residual import ResidualFormat
from mpq_compiler.formats.uniform import UniformFormat

FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        UniformFormat("int2", bits=2),
        UniformFormat("int3", bits=3),
        ResidualFormat("int2+b", bits=3, base_bits=2),
        UniformFormat("int4", bits=4),
        ResidualFormat("int3+b", bits=4, base_bits=3),
        UniformFormat("int8", bits=8),
    )
}


def get(name: str) -> Format:
    """The format of that name; UserError with the nearest one if there is none."""
    if name not in FORMATS:
        raise UserError(f"unknown weight format '{name}': {nearest(name, FORMATS)}")
    return FORMATS[name]


__all__ = ["FORMATS", "Format", "QuantizedWeight", "get", "stored_type"]
