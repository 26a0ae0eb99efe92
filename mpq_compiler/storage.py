"""The stored tensors of a packed program: what lies in `weights.safetensors`, to the byte of `costs.stored_bytes`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx

from mpq_compiler import costs, ops
from mpq_compiler.errors import UserError
from mpq_compiler.formats.packing import pack_codes, unpack_codes
from mpq_compiler.program import Program

CONTRACTIONS = (ops.quant_linear, ops.quant_conv2d)
CODES, LUT = 2, 5
"""Places of the codes and of the table among the arguments of a packed contraction."""


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


def contractions(program: Program) -> Iterator[tuple[fx.Node, tuple[Any, ...]]]:
    """The packed contractions, alone or in regions, with the arguments as nodes of the program's own graph."""
    for node in program.graph.nodes:
        if node.op == "call_function" and node.target in CONTRACTIONS:
            yield node, node.args
        elif node.op == "call_module":
            region = program.regions[str(node.target)]
            outer = dict(zip((n for n in region.nodes if n.op == "placeholder"), node.args, strict=True))
            for inner in region.nodes:
                if inner.op == "call_function" and inner.target in CONTRACTIONS:
                    yield inner, fx.map_arg(inner.args, lambda n, outer=outer: outer.get(n, n))


def code_bits(program: Program, arguments: tuple[Any, ...]) -> int:
    """Bits of the codes of a packed contraction: as many as number the entries of its table, 8 without one."""
    lut = arguments[LUT]
    return 8 if lut is None else (int(program.tensors[str(lut.target)].shape[1]) - 1).bit_length()


def stored(program: Program) -> dict[str, Stored]:
    """The tensors that the packed graph reads, by store name, in their stored form.

    UserError: a value that its stored type does not hold exactly (passes project what they set, so this is one
    that no pass has seen).
    """
    bits = {str(args[CODES].target): code_bits(program, args) for _, args in contractions(program)}
    result = {}
    for name in sorted({str(n.target) for n in program.graph.nodes if n.op == "get_attr"}):
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
