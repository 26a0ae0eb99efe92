"""Weights in 8-bit floats: which tensors of a checkpoint are their scales, and what they stand for together.

Scales multiply, whatever their name says: ``W[i,k] = scale[block of i,k] * W8[i,k]``. Which tensor is a scale follows
from its name beside that of a tensor in 8-bit floats; one that stands beside no such tensor is a tensor as any other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from mpq_compiler.support.errors import UserError

STORED = ("F8_E4M3", "F8_E5M2")
"""The types of such weights, as safetensors spells them."""
BLOCK = (128, 128)
"""Rows and columns of a block with a scale, where config.json has no ``weight_block_size``."""
_SCALE_TYPES = ("F32", "BF16", "F16", "F64", "F8_E8M0")
_MARKER = "scaled_fp8"
_WEIGHT = ".weight"

Shape = tuple[int, ...]
Entries = Mapping[str, tuple[str, Shape]]
"""The type and shape of every tensor of a checkpoint, by name."""


@dataclass(frozen=True)
class Scales:
    """The tensors of a checkpoint that say how those in 8-bit floats are meant."""

    of: dict[str, str]
    """The name of the scale of each scaled tensor."""
    activations: tuple[str, ...]
    """Scales of what layers read: kernels in 8-bit floats need them, weights do not."""
    markers: tuple[str, ...]
    """What only says that weights are scaled, and has no values of its own."""

    @property
    def names(self) -> set[str]:
        """All these tensors; none of them is the model's."""
        return {*self.of.values(), *self.activations, *self.markers}


def scales(entries: Entries, block: tuple[int, int], where: str) -> Scales:
    """Finds the scales of a checkpoint.

    Args:
        entries: its tensors.
        block: rows and columns of a block with a scale.
        where: names the checkpoint in messages.

    Raises:
        UserError: a matrix has no scale where others have one, has two, or one of another shape or type.
    """
    small = {name: shape for name, (code, shape) in entries.items() if code in STORED}
    markers = [n for n, s in small.items() if n.rpartition(".")[2] == _MARKER and len(s) == 1 and math.prod(s) <= 2]
    weights = {name: shape for name, shape in small.items() if name not in markers}
    of: dict[str, str] = {}
    for name, shape in weights.items():
        found = [candidate for candidate in _scales_of(name) if candidate in entries]
        if len(found) > 1:
            raise UserError(
                f"the tensor '{name}' in {where} has two scales, '{found[0]}' and '{found[1]}'; give a checkpoint with "
                "one of them, or one in bfloat16"
            )
        if found:
            of[name] = found[0]
            _require_scale(name, shape, found[0], *entries[found[0]], block, where)
    if of or markers:
        says = f"'{next(iter(of))}' has one" if of else f"'{markers[0]}' says that weights have one"
        for name, shape in weights.items():
            if name not in of and len(shape) > 1:
                names = ", ".join(f"'{candidate}'" for candidate in _scales_of(name))
                raise UserError(
                    f"the tensor '{name}' in {where} is in 8-bit floats without a scale (none of {names}), "
                    f"where {says}; get the checkpoint again, or one in bfloat16"
                )
    markers += [n for n in (f"{_module(name)}.comfy_quant" for name in weights) if n in entries]
    activations = tuple(each for name in weights for each in _activation_scales_of(name) if each in entries)
    return Scales(of, activations, tuple(markers))


def _module(name: str) -> str:
    return name.removesuffix(_WEIGHT)


def _scales_of(name: str) -> Iterator[str]:
    yield f"{name}_scale"
    yield f"{name}_scale_inv"
    if name.endswith(_WEIGHT):
        yield f"{_module(name)}.scale_weight"


def _activation_scales_of(name: str) -> Iterator[str]:
    yield f"{name}_activation_scale"
    if name.endswith(_WEIGHT):
        yield from (f"{_module(name)}.{kind}" for kind in ("input_scale", "scale_input", "activation_scale"))


def _require_scale(
    name: str, shape: Shape, scale: str, code: str, given: Shape, block: tuple[int, int], where: str
) -> None:
    """UserError: `scale` is none of the tensor `name`."""
    if code not in _SCALE_TYPES:
        raise UserError(
            f"the scale '{scale}' in {where} has the type {code}, where a scale of '{name}' is a float; give the "
            "checkpoint in bfloat16"
        )
    if _spread(shape, given, block) is None:
        rows = shape[0] if shape else 1
        blocks = f", or [{', '.join(map(str, _blocks(shape, block)))}] for blocks of {block[0]} x {block[1]}"
        raise UserError(
            f"the scale '{scale}' in {where} is {list(given)}, and '{name}', which is {list(shape)}, takes one number, "
            f"[{rows}] for its rows{blocks if len(shape) == 2 else ''}; the two are not of one checkpoint"
        )


def _blocks(shape: Shape, block: tuple[int, int]) -> Shape:
    return tuple(-(-size // edge) for size, edge in zip(shape, block, strict=True))


def _spread(shape: Shape, scale: Shape, block: tuple[int, int]) -> tuple[int, int] | None:
    """The rows and columns that share a number of `scale`, 0 for all of them; None: it fits no tensor of `shape`."""
    if math.prod(scale) == 1:
        return 0, 0
    if not shape:
        return None
    if scale == (shape[0], *[1] * (len(scale) - 1)) and len(scale) <= len(shape):
        return 1, 0
    return block if len(shape) == 2 and scale == _blocks(shape, block) else None


def widened(values: torch.Tensor, scale: torch.Tensor | None, block: tuple[int, int]) -> torch.Tensor:
    """The weights that 8-bit floats and their scale stand for.

    They are float32, each rounded once, and bfloat16 where that holds every one of them: half the memory, the same
    weights. Without a scale it always does.
    """
    if scale is None:
        return values.bfloat16()
    wide, factor = values.float(), scale.float()
    spread = _spread(tuple(values.shape), tuple(scale.shape), block)
    assert spread is not None, "scales are checked when headers are read"
    rows, columns = spread
    if not rows:
        wide *= factor.reshape(())
    elif not columns:
        wide *= factor.reshape(-1, *[1] * (wide.dim() - 1))
    else:
        wide_factor = factor.repeat_interleave(columns, 1)[:, : wide.shape[1]]
        for row, first in enumerate(range(0, wide.shape[0], rows)):  # no factor as large as the weights
            wide[first : first + rows] *= wide_factor[row]
    half = wide.bfloat16()
    return half if torch.equal(half.float(), wide) else wide
