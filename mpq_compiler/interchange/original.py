"""The weights of an artifact as those of the model that was compiled: decoded, and every rewrite of passes undone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from mpq_compiler import formats
from mpq_compiler.artifact.bundle import REWRITES, Artifact
from mpq_compiler.formats import contract
from mpq_compiler.formats.entropy import EntropyFormat
from mpq_compiler.formats.floating import Float8Format
from mpq_compiler.interchange.container import Grid
from mpq_compiler.ir import stored_tensors
from mpq_compiler.ir.rewrites import bases
from mpq_compiler.ir.weight_basis import Basis
from mpq_compiler.support.errors import UserError

CHANNELS_LAST = "ohwi"
_KNOWN = {CHANNELS_LAST, "f16", "equalized", "rotated", "corrected", "trained"}
"""What passes call a parameter that they stored anew in the model's shape, or in `CHANNELS_LAST`."""


@dataclass(frozen=True)
class Original:
    """A parameter of the model as the artifact has it."""

    value: Tensor
    """Its value in the model's own shape and channels, f32."""
    format: str | None = None
    """The format of a quantized weight; None for a float."""
    bits: int | None = None
    """The bits that a code needs to be as fine; None for a float."""
    bytes: int = 0
    """The bytes of its stored tensors."""
    grid: Grid | None = None
    """The grid that the values lie on; None where passes rewrote channels, or the value is a sum of parts."""


def read(artifact: Artifact, model: Mapping[str, Tensor]) -> dict[str, Original]:
    """The parameters that an artifact has values of its own for, by name; of others those of the model hold.

    Args:
        artifact: made of the model.
        model: the parameters that were compiled, by name.

    Raises:
        UserError: the artifact was made of another model, or by a compiler that kept no `rewrites`.
    """
    manifest = artifact.manifest
    arrays = artifact.tensors()
    sizes: Counter[str] = Counter()
    for name, array in arrays.items():
        sizes[name.partition(":")[0]] += array.nbytes
    entries = manifest.get("rewrites")
    if entries is None:
        raise UserError(f"{artifact.path} is older, and does not say how passes rewrote channels: compile it anew")
    steps = bases(entries, artifact.tensors(REWRITES)) if entries else {}
    planned = {row["name"]: row["weight"] for row in manifest["plan"]["layers"]}
    found: dict[str, Original] = {}
    for path, tensors in stored_tensors.by_parameter(manifest["tensors"], arrays).items():
        basis = steps.get(path, Basis(path))
        if basis.origin not in model:
            continue  # a constant or the scales of an activation
        of = model[basis.origin]
        made: Original | None
        if "codes" in tensors:
            made = _decoded(artifact, path, tensors, planned[path], basis, of)
        else:
            made = next((Original(_undone(value, basis, of)) for value in _floats(tensors, of)), None)
        if made is not None:
            made = replace(made, bytes=sizes[path])
            found[basis.origin] = _joined(found.get(basis.origin), made)
    return found


def of_another(artifact: Artifact, why: str) -> UserError:
    """The error that the artifact was made of another model."""
    return UserError(f"{artifact.path} was made of another model: {why}; name the one that was compiled")


def _joined(known: Original | None, part: Original) -> Original:
    """Adds a part of a weight to those that are known; each has zeros for the channels of the others."""
    if known is None:
        return part
    format_ = known.format if known.format == part.format else f"{known.format}, {part.format}"
    bits = max(filter(None, (known.bits, part.bits)), default=None)
    return Original(known.value + part.value, format_, bits, known.bytes + part.bytes)


def _floats(tensors: Mapping[str, Tensor], of: Tensor) -> Iterator[Tensor]:
    """The forms of a float parameter that have its number of elements, in its order or with the channels last."""
    for part, tensor in tensors.items():
        if {*part.split(".")} - {""} <= _KNOWN and tensor.numel() == of.numel() and tensor.is_floating_point():
            yield tensor.float().reshape(_channels_last(of) if CHANNELS_LAST in part else of.shape)


def _channels_last(of: Tensor) -> tuple[int, ...]:
    """The shape of a weight of a layer, with the input channels last."""
    return (of.shape[0], *of.shape[2:], of.shape[1]) if of.dim() > 2 else tuple(of.shape)


def _undone(value: Tensor, basis: Basis, of: Tensor) -> Tensor:
    """The value [O, ..., C] in the model's channels and shape."""
    return _in_order(basis.undone(value, of.shape[1] if of.dim() > 1 else len(of)), of)


def _in_order(value: Tensor, of: Tensor) -> Tensor:
    """A value [..., C] with its channels where the model has them."""
    return value.movedim(-1, 1).contiguous() if of.dim() > 2 else value


def _decoded(
    artifact: Artifact, path: str, tensors: Mapping[str, Tensor], name: str, basis: Basis, of: Tensor
) -> Original:
    """The value of a quantized weight, its low-rank branch added."""
    codes, chosen = tensors["codes"], formats.get(name)
    taps = math.prod(of.shape[2:])
    if codes.shape[0] != of.shape[0] or codes.shape[1] % taps or codes.numel() > of.numel():
        raise of_another(artifact, f"its '{path}' is {list(codes.shape)}, the model's {list(of.shape)}")
    channels = codes.shape[1] // taps
    shape = (*_channels_last(of)[:-1], channels)
    segments, offset, exponent = chosen.segments(channels), tensors.get("offset"), None
    if isinstance(chosen, Float8Format):
        rows, exponent = _nearest_float8(tensors, chosen.exponents, rewritten(of, basis))
    else:
        tables = (tensors["scale"], offset, tensors.get("lut"), tensors.get("row_class"))
        rows = contract.dequantize_weight(codes, *tables, codes.shape, segments)
    branch: tuple[np.ndarray, np.ndarray] | None = None
    if "up" in tensors:
        up, down = tensors["up"], tensors["down"].flatten(1)
        rows = rows + up.float() @ down.float()
        branch = up.numpy(), _in_order(down.reshape(len(down), *shape[1:]), of).numpy()
    grid: Grid | None = None
    if not basis.steps:
        scale = tensors["scale"].float().reshape(len(rows), -1).numpy()
        grid = Grid(scale, segments, None if offset is None else offset.float().numpy(), exponent, branch)
    bits = math.ceil(chosen.bits) if isinstance(chosen, EntropyFormat) else chosen.index_bits
    return Original(_undone(rows.reshape(shape), basis, of), name, bits, grid=grid)


def rewritten(of: Tensor, basis: Basis) -> Tensor:
    """The rows [O, K] that a weight of the model was quantized from, channels last and as passes rewrote them."""
    return basis.rewritten(of.movedim(1, -1) if of.dim() > 2 else of).flatten(1)


def _nearest_float8(
    tensors: Mapping[str, Tensor], exponents: Sequence[int], weight: Tensor
) -> tuple[Tensor, int]:
    """Decodes 8-bit floats; of the encodings that a format chooses from, that which gives the model's weight.

    Returns the rows and the bits of exponent.
    """
    scale, codes = tensors["scale"].flatten(), tensors["codes"].view(torch.uint8)
    found = [(contract.dequantize_float8(codes, scale, codes.shape, e), e) for e in exponents]
    return min(found, key=lambda decoded: float((decoded[0] - weight).square().sum()))
