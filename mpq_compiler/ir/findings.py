"""What passes measured and decided that dumps, costs and the manifest repeat: the facts without a room of their own."""

from __future__ import annotations

from typing import Any, NotRequired, TypedDict

from mpq_compiler.ir.facts import Fact

Losses = dict[str, float]
"""Relative noise power of the output, by weight format or by bits of activation."""


class LossTable(TypedDict):
    """What a pass measured: the losses of each layer's weight, of each edge and of each attention."""

    weights: dict[str, Losses]
    activations: dict[str, Losses]
    attention: NotRequired[dict[str, Losses]]
    inputs: NotRequired[int]
    """Calibration inputs on which it was measured."""
    dynamic: NotRequired[bool]
    """Whether the edges that linear layers alone read were quantized by row."""
    floating: NotRequired[bool]
    """Whether activations were small floats."""
    content: NotRequired[str]
    """The metric of content layers, where it is another than that of the others."""


class FormatCosts(TypedDict):
    """What a layer costs in a format."""

    bits: int
    """The bits of a weight as it is multiplied (`Format.operand_bits`)."""
    bytes: int
    float_macs: NotRequired[int]
    """Multiply-accumulates of a branch in float."""
    microseconds: NotRequired[float]
    float: NotRequired[bool]
    """Whether the layer computes in float then."""


class LayerCosts(TypedDict):
    """What an allocation needs to know of a layer besides its losses."""

    name: str
    group: NotRequired[str]
    weights: NotRequired[int]
    """Elements of its weight."""
    edges: list[str]
    macs: int
    formats: dict[str, FormatCosts]


class CostTable(TypedDict):
    """What costs are reckoned from."""

    version: int
    model: NotRequired[str]
    parameters: int
    fixed_bytes: int
    layers: list[LayerCosts]
    elements: dict[str, int]
    attention_costs: NotRequired[dict[str, dict[str, float]]]
    fixed_microseconds: NotRequired[float]


class SensitivityTable(LossTable, CostTable):
    """Losses and costs: the document that `mpqc sensitivity` writes (schemas/sensitivity.json)."""


SENSITIVITY = Fact[LossTable]("sensitivity")
NO_LOSSES: LossTable = {"weights": {}, "activations": {}}
"""The table of a program that was not measured."""
class ReusePlan(TypedDict):
    """What steps of a sampler reuse, as `bit-allocation` decided it."""

    node: str
    share: float
    """The share of the multiplications of a call that a step leaves out."""
    steps: int
    reused: int
    loss: float
    """The sum of the losses by which it was chosen."""
    measured: NotRequired[float]
    """What all of it loses together, in the float model."""
    noise: NotRequired[float]
    """The relative noise power of images that the plan's bits make, every step computed whole."""
    noise_reusing: NotRequired[float]
    """That of bits and reuse together."""
    saved_ms: float
    """Milliseconds of a step on average."""
    computed: list[int]
    """The steps that compute all, from 1."""


ALLOCATION = Fact[dict[str, Any]]("allocation")
"""The solution of `bit-allocation`, and its problem where a program was solved."""
LATENCY = Fact[dict[str, float | None]]("latency")
"""Milliseconds of a call of the planned program: ``ms``, on average of the steps where some reuse, ``whole_ms`` of one
that computes all, ``fixed_ms`` of that, and ``budget_ms`` if there is one."""
ATTENTION_NUMERICS = Fact[dict[str, str]]("numerics")
"""The numerics of attentions that are not computed in f32, by call node."""
STORED_HALVES = Fact[bool]("halves")
"""Whether what kernels hand on may be stored as the nearest float16."""
ASSUMPTIONS = Fact[tuple[dict[str, Any], ...]]("assumptions")
"""The tokens that are assumed: ``input``, ``token`` and its ``values``. The artifact's manifest repeats them, and the
runtime checks every call."""
