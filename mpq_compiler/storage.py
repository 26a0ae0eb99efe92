"""The stored tensors of a packed program: what lies in `weights.safetensors`, to the byte of `costs.stored_bytes`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mpq_compiler import calls, costs
from mpq_compiler.errors import UserError
from mpq_compiler.formats.packing import pack_codes, unpack_codes
from mpq_compiler.program import Program


@dataclass(frozen=True)
class Stored:
    """A tensor of the artifact. `bits` and `shape` (that of the codes) are set where codes are packed."""

    array: np.ndarray
    parameter: str
    bits: int | None = None
    shape: tuple[int, ...] | None = None

    def entry(self, name: str) -> dict[str, Any]:
        """What the manifest says of it."""
        entry: dict[str, Any] = {"name": name, "parameter": self.parameter}
        if self.bits is not None and self.shape is not None:
            entry |= {"bits": self.bits, "original_shape": list(self.shape)}
        return entry


def code_bits(program: Program, lut: str | None) -> int:
    """Bits of codes: as many as number the entries of their table (a store name), 8 without one."""
    return 8 if lut is None else (int(program.tensors[lut].shape[1]) - 1).bit_length()


def stored(program: Program, *others: Program) -> dict[str, Stored]:
    """The tensors that the packed graph, or that of another over the same store, reads: by store name, as stored.

    UserError: a value that its stored type does not hold exactly (passes project what they set, so this is one
    that no pass has seen).
    """
    weights = calls.levels_of(calls.flatten(program))
    bits = {found.codes: code_bits(program, found.lut) for found in weights if found.codes and found.integer}
    result = {}
    read = (n for each in (program, *others) for n in each.graph.nodes if n.op == "get_attr")
    for name in sorted({str(n.target) for n in read}):
        tensor = program.tensors[name]
        parameter = name.split(":")[0]
        if name in bits:
            packed = pack_codes(tensor.contiguous().numpy(), bits[name])
            result[name] = Stored(packed, parameter, bits[name], tuple(tensor.shape))
            continue
        small = tensor.to(costs.stored_dtype(name, tensor))
        if not torch.equal(small.to(tensor.dtype), tensor):
            raise UserError(f"tensor '{name}' holds values that {small.dtype} does not: let insert-fake-quant round it")
        result[name] = Stored(small.contiguous().numpy(), parameter)
    return result


def restored(array: np.ndarray, entry: dict[str, Any]) -> torch.Tensor:
    """A tensor as the graph's store holds it, from its stored form and its entry of the manifest."""
    if "bits" in entry:
        array = unpack_codes(array, tuple(entry["original_shape"]), entry["bits"])
    return torch.from_numpy(np.array(array))
