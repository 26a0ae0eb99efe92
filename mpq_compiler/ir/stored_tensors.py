"""The stored tensors of a packed program: what lies in `weights.safetensors`, to the byte of `costs.stored_bytes`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mpq_compiler.formats import contract
from mpq_compiler.formats.packing import pack_codes, pack_rows, unpack_codes, unpack_rows
from mpq_compiler.ir import costs, views
from mpq_compiler.ir.program import Program
from mpq_compiler.support.errors import UserError

CLASS_BITS = 2
"""Of the class of a row, where rows have several widths."""


@dataclass(frozen=True)
class Stored:
    """A tensor of the artifact. `bits` and `shape` (that of the codes) are set where codes are packed.

    Of rows of several widths `bits` are those of class 0, and `row_class` is the store name of their classes.
    """

    array: np.ndarray
    parameter: str
    bits: int | None = None
    shape: tuple[int, ...] | None = None
    row_class: str | None = None

    def entry(self, name: str) -> dict[str, Any]:
        """What the manifest says of it."""
        entry: dict[str, Any] = {"name": name, "parameter": self.parameter}
        if self.bits is not None and self.shape is not None:
            entry |= {"bits": self.bits, "original_shape": list(self.shape)}
        if self.row_class is not None:
            entry["row_class"] = self.row_class
        return entry


def code_bits(program: Program, lut: str | None) -> int:
    """Bits of codes: as many as number the entries of their table (a store name), 8 without one."""
    return 8 if lut is None else (int(program.tensors[lut].shape[1]) - 1).bit_length()


def class_bits(program: Program, lut: str | None) -> tuple[int, ...]:
    """Bits of the codes of each table (a store name), ascending; nothing without one."""
    return () if lut is None else contract.class_bits(program.tensors[lut])


def several_widths(program: Program, lut: str | None) -> bool:
    """Whether tables (a store name) differ in size, and so rows in the bits of their codes."""
    return len({*class_bits(program, lut)}) > 1


def stored(program: Program, *others: Program) -> dict[str, Stored]:
    """The tensors that the packed graph, or that of another over the same store, reads: by store name, as stored.

    UserError: a value that its stored type does not hold exactly (passes project what they set, so this is one
    that no pass has seen).
    """
    weights = [found for found in views.levels_of(views.flatten(program)) if found.codes and found.integer]
    bits = {found.codes: min(class_bits(program, found.lut), default=8) for found in weights}
    classes = {found.codes: found.row_class for found in weights if several_widths(program, found.lut)}
    bits |= dict.fromkeys(classes.values(), CLASS_BITS)
    result = {}
    read = (n for each in (program, *others) for n in each.graph.nodes if n.op == "get_attr")
    for name in sorted({str(n.target) for n in read}):
        tensor = program.tensors[name]
        parameter = name.split(":")[0]
        if name in bits:
            codes, row_class = tensor.contiguous().numpy(), classes.get(name)
            if row_class is None:
                packed = pack_codes(codes, bits[name])
            else:
                packed = pack_rows(codes, program.tensors[row_class].numpy(), bits[name])
            result[name] = Stored(packed, parameter, bits[name], tuple(tensor.shape), row_class)
            continue
        small = tensor.to(costs.stored_dtype(name, tensor))
        if not torch.equal(small.to(tensor.dtype), tensor):
            raise UserError(f"tensor '{name}' holds values that {small.dtype} does not: let insert-fake-quant round it")
        result[name] = Stored(small.contiguous().numpy(), parameter)
    return result


def restored(entry: dict[str, Any], arrays: Mapping[str, np.ndarray]) -> torch.Tensor:
    """A tensor as the graph's store holds it, from its entry of the manifest and the stored forms by name."""
    array = arrays[entry["name"]]
    if "row_class" in entry:
        rows, columns = entry["original_shape"]
        classes = unpack_codes(arrays[entry["row_class"]], (rows,), CLASS_BITS)
        array = unpack_rows(array, (rows, columns), classes, entry["bits"])
    elif "bits" in entry:
        array = unpack_codes(array, tuple(entry["original_shape"]), entry["bits"])
    return torch.from_numpy(np.array(array))
