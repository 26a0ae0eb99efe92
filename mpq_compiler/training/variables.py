"""Trainable variables: latent weights, scales, offsets, biases and adapters, each projected to its stored type."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from mpq_compiler.formats import contract
from mpq_compiler.formats.base import F16_MAX, F16_TINY
from mpq_compiler.formats.contract import WeightTables, rising
from mpq_compiler.ir import ops
from mpq_compiler.ir.aten import aten
from mpq_compiler.ir.graph import CONTRACTIONS, arguments, operand
from mpq_compiler.ir.program import Program

EDGE = 0.02
"""The least distance of an initial latent weight from the border of its cell, in steps of the table."""
UP, DOWN = 8.0, 80.0
"""The units of theta for adapters: theta = 1 is 8 steps of the table in B, and 80 times A's own initial size in A."""
WIDTHS = (64, 64, 64, 64, 1)
"""The widths of the network that produces scales from times: its input, and the outputs of its four layers."""


class Kind(StrEnum):
    """The kind of a variable, which decides its learning rate."""

    LATENT = "latent"
    """A float weight whose nearest level the program sees."""
    SCALE = "scale"
    """The scales of a weight."""
    OFFSET = "offset"
    """The offsets of a weight."""
    RANGE = "range"
    """The scales of an activation, one for each time group."""
    ZERO = "zero"
    """The zero points of an activation."""
    FLOAT = "float"
    """A bias, norm or embedding, or a factor of a low-rank branch."""


@dataclass(frozen=True)
class Variable:
    """A stored tensor, or a latent weight, as a function of theta."""

    kind: Kind
    start: Tensor
    """The value at theta = 0, f32."""
    unit: Tensor
    """The change that theta = 1 makes, f32 and broadcast over ``start``; not used for SCALE and RANGE."""
    dtype: torch.dtype
    """The type of the stored tensor."""
    most: int = 0
    """The largest code, for ZERO."""
    together: bool = False
    """Whether all rows of ``start``, which are alike, move together."""

    def zeros(self) -> Tensor:
        """The initial theta."""
        return torch.zeros_like(self.start[:1] if self.together else self.start)

    def moved(self, theta: Tensor) -> Tensor:
        """The value at theta, f32, before it is projected to the stored type."""
        if self.kind in (Kind.SCALE, Kind.RANGE):
            return self.start * theta.exp()
        return self.start + self.unit * theta

    def __call__(self, theta: Tensor) -> Tensor:
        """The value at theta as the program reads it, f32, projected to the stored type but for latent weights."""
        value = self.moved(theta)
        if self.kind == Kind.LATENT:
            return value
        if self.kind in (Kind.SCALE, Kind.RANGE):
            value = value.clamp(F16_TINY, F16_MAX)
        elif self.kind == Kind.ZERO:
            value = value.clamp(0, self.most)
            return value + (value.round() - value).detach()
        return value + (value.to(self.dtype).to(torch.float32) - value).detach()

    @torch.no_grad()
    def stored(self, theta: Tensor) -> Tensor:
        """The value at theta in the stored type; a latent weight in f32."""
        value = self(theta)
        return value.round().to(self.dtype) if self.kind == Kind.ZERO else value.to(self.dtype)


@dataclass(frozen=True, kw_only=True)
class Adapted(Variable):
    """A latent weight [O, K] that adapters of rank R move (QALoRA of EfficientDM, arXiv 2310.03270).

    The sum ``start + unit * B A / sqrt(R)`` is quantized. A convolution's A of k x k and B of 1 x 1 are one product of
    rows. Theta [O + K, R] stacks the changes of B and of the transpose of A, in units of `UP` and `DOWN`.

    Rates are scale-aware as in the paper, through the unit: B learns in steps of its row, and A has unit variance and
    learns in none. So theta moves twice the weight twice as far. (The paper's rates have the step in both factors, and
    this property only while A hardly moves.) The sum starts as the dequantized weight, as published, because adapters
    cannot choose which weights they move, and float weights near a border would change codes by chance.
    """

    up: Tensor
    """The initial B, f32 [O, R]; ``start`` is less by its product with the initial A."""

    down: Tensor
    """The transpose of the initial A, f32 [K, R]."""

    def zeros(self) -> Tensor:
        return torch.zeros(len(self.start) + len(self.down), self.down.shape[1])

    def moved(self, theta: Tensor) -> Tensor:
        up, down = theta.split([len(self.start), len(self.down)])
        product: Tensor = (self.up + UP * up) @ (self.down + DOWN * down).T / math.sqrt(self.down.shape[1])
        return self.start + self.unit * product


@dataclass(frozen=True, kw_only=True)
class Timed(Variable):
    """Scales of activations [G] that a network produces from the times of their groups (TDQ, arXiv 2306.02316).

    The scales are ``start * softplus(network(embedding))``. The softplus is 1 at the start, so that the network learns
    in units of the calibrated scales. Theta [P] is the change of its parameters; a layer's weights are in units of one
    over the number of its inputs.
    """

    embedding: Tensor
    """The embeddings of the groups' times, f32 [G, WIDTHS[0]]."""
    network: Tensor
    """The initial parameters of the network, f32 [P], layer by layer, weights before biases."""

    def zeros(self) -> Tensor:
        return torch.zeros_like(self.network)

    def moved(self, theta: Tensor) -> Tensor:
        parameters, x = self.network + self.unit * theta, self.embedding
        sizes = [size for inputs, outputs in pairwise(WIDTHS) for size in (inputs * outputs, outputs)]
        weights = parameters.split(sizes)
        for number, (weight, bias) in enumerate(zip(weights[::2], weights[1::2], strict=True)):
            x = F.linear(F.relu(x) if number else x, weight.reshape(len(bias), -1), bias)
        return self.start * F.softplus(x[:, 0])


@dataclass(frozen=True)
class Settled:
    """A weight whose codes are chosen: the node of its value, and the store names of its parts."""

    node: fx.Node
    codes: str
    tables: WeightTables[str]
    shape: tuple[int, ...]
    signs: str | None = None
    alpha: str | None = None

    @property
    def path(self) -> str:
        """The parameter's name in the model."""
        return self.codes.split(":")[0]

    def table(self, program: Program) -> Tensor | None:
        """The table int8 [classes, entries] with the branch merged in; None where the code is the value."""
        if self.tables.lut is None:
            return None
        lut = program.tensors[self.tables.lut]
        if self.signs is None:
            return lut
        codes = torch.zeros(1, dtype=torch.uint8)
        return contract.merge_branch(codes, lut, codes, program.tensors[str(self.alpha)])[1]

    def values(self, program: Program, read: Callable[[str], Tensor] | None = None) -> WeightTables[Tensor]:
        """The tables as tensors, the branch merged in; ``read`` gives the tensor of a name, by default the store's."""
        return self.tables.map(read or program.tensors.__getitem__)._replace(lut=self.table(program))

    def by_row(self, tables: WeightTables[Tensor]) -> bool:
        """Whether layers alone read it, and what they compute with a row of it is in proportion to one scale."""
        one = tables.offset is None and tables.scale.numel() == self.shape[0]
        return one and all(user.target in CONTRACTIONS and user.args[1] is self.node for user in self.node.users)

    def merged_codes(self, program: Program) -> Tensor:
        """The codes [O, K] in `table`, the branch merged in."""
        codes = program.tensors[self.codes]
        return codes if self.signs is None else codes * 2 + program.tensors[self.signs]


def settled(program: Program) -> list[Settled]:
    """The settled weights of a program, in graph order; base and branch of a residual format are one."""
    found = []
    branched = {
        operand(n, 0): n for n in program.graph.nodes
        if n.target is aten.add.Tensor and isinstance(n.args[1], fx.Node) and n.args[1].target is ops.binary_branch
    }  # fmt: skip
    for node in program.graph.nodes:
        if node.target is not ops.dequantize_weight:
            continue
        codes, scale, offset, lut, row_class, shape = arguments(node)[:6]
        segments = tuple(arguments(node)[6]) if len(node.args) > 6 and node.args[6] else None
        tables = WeightTables(scale, offset, lut, row_class, segments).map(lambda part: str(part.target))
        total, signs, alpha = node, None, None
        if node in branched:
            total = branched[node]
            signs_of, _, alpha_of, _ = arguments(operand(total, 1))
            signs, alpha = str(signs_of.target), str(alpha_of.target)
        found.append(Settled(total, str(codes.target), tables, tuple(shape), signs, alpha))
    return found


def ends(tables: WeightTables[Tensor], rows: int) -> tuple[Any, Any]:
    """The lower and upper ends of each row's table, half a step beyond its extreme entries."""
    lut = tables.lut
    if lut is None:
        return -contract.LUT_MAX - 0.5, contract.LUT_MAX + 0.5
    steps, levels = gaps(lut), rising(lut)[0][:, :1]
    span = steps.sum(1, keepdim=True)
    step = span / steps.gt(0).sum(1, keepdim=True).clamp_min(1)
    low, high = levels - step / 2, levels + span + step / 2
    if lut.shape[0] == 1:
        return low[0], high[0]
    assert tables.row_class is not None
    classes = contract.row_classes(tables.row_class, rows)
    return low[classes], high[classes]


def gaps(lut: Tensor) -> Tensor:
    """The distances of neighbouring levels, [classes, entries - 1]; zero behind the last level of a table."""
    levels, _ = rising(lut)
    return torch.where(levels[:, 1:].isfinite(), levels[:, 1:] - levels[:, :-1], 0)
