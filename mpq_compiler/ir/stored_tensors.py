"""The stored tensors of a packed program: the content of `weights.safetensors`, exactly `costs.stored_bytes` bytes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mpq_compiler import formats
from mpq_compiler.artifact import manifest
from mpq_compiler.formats import contract
from mpq_compiler.formats.entropy import integers
from mpq_compiler.formats.packing import pack_codes, pack_rows, packed_bytes, unpack_codes, unpack_rows
from mpq_compiler.ir import costs, scratch, views
from mpq_compiler.ir.graph import part_of
from mpq_compiler.ir.program import Program
from mpq_compiler.support import rans
from mpq_compiler.support.errors import UserError

RANS, REPEATED = "rans", "repeated"
"""Codings: integers in the form of `support.rans`; one row, of which all others are copies."""
TOGETHER = 64
"""Weights that are coded at a time."""
CLASS_BITS = 2
"""The stored bits of a row's class, where rows have several widths."""


@dataclass(frozen=True)
class Stored:
    """A tensor of the artifact."""

    array: np.ndarray
    parameter: str
    """The name in the model of the parameter that it belongs to."""
    bits: int | None = None
    """The bits of codes in memory, of class 0 where rows have several widths; None for other tensors."""
    shape: tuple[int, ...] | None = None
    """The shape of the tensor before packing or coding; None for other tensors."""
    row_class: str | None = None
    """The store name of the rows' classes, where rows have several widths."""
    coding: str | None = None
    """`RANS` or `REPEATED`, where the array is neither packed codes nor the tensor itself."""

    def entry(self, name: str) -> dict[str, Any]:
        """The manifest's entry for the tensor."""
        entry: dict[str, Any] = {"name": name, "parameter": self.parameter}
        if self.bits is not None and self.shape is not None:
            entry |= {"bits": self.bits, "original_shape": list(self.shape)}
        if self.coding is not None and self.shape is not None:
            entry |= {"coding": self.coding, "original_shape": list(self.shape)}
        if self.row_class is not None:
            entry["row_class"] = self.row_class
        return entry


def code_bits(program: Program, lut: str | None) -> int:
    """The bits of codes, just enough to number the entries of their table (a store name); 8 without a table."""
    return 8 if lut is None else (int(program.tensors[lut].shape[1]) - 1).bit_length()


def class_bits(program: Program, lut: str | None) -> tuple[int, ...]:
    """The bits of the codes of each table (a store name), ascending; () without a table."""
    return () if lut is None else contract.class_bits(program.tensors[lut])


def several_widths(program: Program, lut: str | None) -> bool:
    """Whether tables (a store name) differ in size, and thus rows in the bits of their codes."""
    return len({*class_bits(program, lut)}) > 1


def stored(program: Program, *others: Program, coded: bool = True) -> dict[str, Stored]:
    """Packs the tensors that a program reads, by store name.

    Args:
        program: the packed program.
        others: further packed programs over the same store.
        coded: whether entropy-coded weights are stored so; else their codes are packed, with a scale a row.

    Raises:
        UserError: a value that its stored type cannot hold exactly. Passes project what they set, so no pass has seen
            this value.
    """
    weights = [found for found in views.levels_of(views.flatten(program)) if found.codes and found.integer]
    bits = {found.codes: min(class_bits(program, found.tables.lut), default=8) for found in weights}
    classes = {found.codes: found.tables.row_class for found in weights if several_widths(program, found.tables.lut)}
    bits |= dict.fromkeys(classes.values(), CLASS_BITS)
    chosen: dict[str, formats.EntropyFormat] = {}
    for found in weights if coded else ():
        if found.codes and (format_ := entropy_format(program, found.path)) is not None:
            chosen[found.codes] = format_
    repeated = {found.tables.scale for found in weights if found.codes in chosen}
    streams = _streams(program, chosen)
    result = {}
    read = (n for each in (program, *others) for n in each.graph.nodes if n.op == "get_attr")
    for name in sorted({str(n.target) for n in read}):
        tensor = program.tensors[name]
        parameter = name.split(":")[0]
        if name in streams:
            shape = tuple(tensor.shape)
            result[name] = Stored(streams[name], parameter, chosen[name].index_bits, shape, coding=RANS)
            continue
        if name in repeated:
            if not torch.equal(tensor, tensor[:1].expand_as(tensor)):
                raise UserError(f"rows of '{parameter}' have scales of their own, which entropy-coded weights do not")
            result[name] = Stored(tensor[:1].numpy(), parameter, shape=tuple(tensor.shape), coding=REPEATED)
            continue
        if name in bits:
            codes, row_class = tensor.contiguous().numpy(), classes.get(name)
            if row_class is None:
                packed = pack_codes(codes, bits[name])
            else:
                packed = pack_rows(codes, program.tensors[row_class].numpy(), bits[name])
            result[name] = Stored(_kept(packed), parameter, bits[name], tuple(tensor.shape), row_class)
            continue
        small = tensor.to(costs.stored_dtype(name, tensor))
        if not torch.equal(small.to(tensor.dtype), tensor):
            raise UserError(f"tensor '{name}' holds values that {small.dtype} does not: let insert-fake-quant round it")
        result[name] = Stored(scratch.kept(small.contiguous()).numpy(), parameter)
    return result


def entropy_format(program: Program, path: str) -> formats.EntropyFormat | None:
    """The entropy-coded format that a weight is planned to have, or None."""
    plan = program.weights.get(path)
    chosen = None if plan is None else formats.get(plan.format)
    return chosen if isinstance(chosen, formats.EntropyFormat) else None


def expanded_bytes(program: Program) -> int:
    """The bytes that entropy-coded weights of a packed program take beyond their plan where their codes are packed."""
    more = {}
    for found in views.levels_of(views.flatten(program)):
        if found.codes and (chosen := entropy_format(program, found.path)) is not None:
            rows, columns = program.tensors[found.codes].shape
            plain = packed_bytes(rows * columns, chosen.index_bits) - chosen.coded_bytes(rows * columns)
            more[found.codes] = plain + 2 * (rows - 1)
    return sum(more.values())


def _streams(program: Program, chosen: Mapping[str, formats.EntropyFormat]) -> dict[str, np.ndarray]:
    """Codes of entropy-coded formats, by store name, in as many bytes as planned."""
    names = list(chosen)
    found = {}
    for start in range(0, len(names), TOGETHER):  # so many that memory holds them before they go to files
        some = names[start : start + TOGETHER]
        for name, coded in zip(some, rans.encode_all([integers(program.tensors[n]) for n in some]), strict=True):
            try:
                array = rans.padded(coded, chosen[name].coded_bytes(program.tensors[name].numel()))
            except ValueError as error:
                of = f"the codes of '{name.split(':')[0]}' do not fit the bytes of {chosen[name].name}"
                raise UserError(f"{of}: {error}") from error
            found[name] = _kept(array)
    return found


def _kept(array: np.ndarray) -> np.ndarray:
    kept: np.ndarray = scratch.kept(torch.from_numpy(array)).numpy()
    return kept


def restored(entry: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> torch.Tensor:
    """Unpacks a tensor to the form of the program's store, given its manifest entry and the stored arrays by name."""
    array = arrays[entry["name"]]
    if entry.get("coding") == RANS:
        shape = entry["original_shape"]
        array = rans.decode(array, math.prod(shape)).reshape(shape)
        if entry["bits"] == 4:
            array = (array + 8).astype(np.uint8)
    elif entry.get("coding") == REPEATED:
        array = np.broadcast_to(array, entry["original_shape"])
    elif "row_class" in entry:
        rows, columns = entry["original_shape"]
        classes = unpack_codes(arrays[entry["row_class"]], (rows,), CLASS_BITS)
        array = unpack_rows(array, (rows, columns), classes, entry["bits"])
    elif "bits" in entry:
        array = unpack_codes(array, tuple(entry["original_shape"]), entry["bits"])
    return torch.from_numpy(np.array(array))


def by_parameter(
    entries: Iterable[manifest.Tensor], arrays: Mapping[str, np.ndarray]
) -> dict[str, dict[str, torch.Tensor]]:
    """Unpacks stored tensors, given their manifest entries: the tensors of each parameter, by `part_of` their names."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for entry in entries:
        found.setdefault(entry["name"].partition(":")[0], {})[part_of(entry["name"])] = restored(entry, arrays)
    return found
