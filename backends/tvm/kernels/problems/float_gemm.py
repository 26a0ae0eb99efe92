"""Linear layers and convolutions in floats, for what a plan leaves unquantized: any shape, with an epilogue.

Two forms, chosen by the problem alone (never by the target), say how weights lie in memory:

- *panel*: panels [vectors, terms, lanes] of output channels, which the kernel packs on every call, or which arrive
  packed once (`packed`: by `pack_weight` in NumPy, or by a kernel with `pack_arguments`);
- *dot*: for few outputs or few rows; weights are read where they are.

In bfloat16 (`numerics`) terms are words of two neighbouring channels, a last odd channel paired with zero.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from mpq_compiler.backends.tvm.kernels.problems.argument import BATCH, Argument, Shape
from mpq_compiler.backends.tvm.kernels.problems.epilogue import Epilogue, epilogue_arguments
from mpq_compiler.backends.tvm.kernels.problems.lanes import LANES, width
from mpq_compiler.targets.numerics import BF16, F32, PACKED

FEW_ROWS = 8
FEW_OUTPUTS = 8


@dataclass(frozen=True)
class Linear:
    """y = epilogue(x [B, positions, inputs] @ weight [outputs, inputs]^T + bias [outputs]).

    Arguments: x, weight (see `packed`), bias where `bias`, the epilogue's, y [B, positions, outputs].
    """

    positions: int
    inputs: int
    outputs: int
    bias: bool = True
    packed: bool = False
    epilogue: Epilogue = field(default_factory=Epilogue)
    time_groups: int = 1
    numerics: str = F32

    def __post_init__(self) -> None:
        _check_numerics(self)


@dataclass(frozen=True)
class Conv2d:
    """y = epilogue(conv2d(x [B, height, width, channels], weight [outputs, kh, kw, channels/groups]) + bias).

    padding: top, bottom, left, right, of zeros.
    Arguments: x, weight (see `packed`), bias where `bias`, the epilogue's, y [B, out_height, out_width,
    outputs].
    """

    height: int
    width: int
    channels: int
    outputs: int
    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (1, 1, 1, 1)
    groups: int = 1
    bias: bool = True
    packed: bool = False
    epilogue: Epilogue = field(default_factory=Epilogue)
    time_groups: int = 1
    numerics: str = F32

    def __post_init__(self) -> None:
        _check_numerics(self)
        if self.channels % self.groups or self.outputs % self.groups:
            raise ValueError(f"{self.channels} and {self.outputs} channels: {self.groups} groups do not divide")
        if self.out_height < 1 or self.out_width < 1:
            raise ValueError(f"kernel {self.kernel} does not fit into {self.height} x {self.width} pixels")

    @property
    def out_height(self) -> int:
        return (self.height + self.padding[0] + self.padding[1] - self.kernel[0]) // self.stride[0] + 1

    @property
    def out_width(self) -> int:
        return (self.width + self.padding[2] + self.padding[3] - self.kernel[1]) // self.stride[1] + 1


def _check_numerics(problem: Linear | Conv2d) -> None:
    if problem.numerics == F32:
        return
    if problem.numerics != BF16 or not problem.packed or getattr(problem, "groups", 1) != 1:
        raise ValueError(f"{problem.numerics}: only bf16 has a kernel, with packed weights, of one group")


@dataclass(frozen=True)
class Plan:
    """Both problems as one: `rows` of a sample, each with outputs that are sums over taps and inputs.

    group_inputs: values that lanes or words hold: channels of a group, or pairs of them in bfloat16.
    tap_steps: distance, in elements of the (bordered) image, of two kernel rows and of two kernel columns.
    form: ``panel``, ``depthwise`` (panels over all channels, whose inputs are vectors too) or ``dot``.
    """

    rows: int
    row_shape: tuple[int, ...]
    groups: int
    group_outputs: int
    group_inputs: int
    taps: tuple[int, int]
    tap_steps: tuple[int, int]
    form: str

    @property
    def terms(self) -> int:
        return self.taps[0] * self.taps[1] * self.group_inputs

    @property
    def outputs(self) -> int:
        return self.groups * self.group_outputs

    @property
    def lanes(self) -> int:
        if self.form == "dot":
            return 1  # of a packed weight
        return width(self.outputs if self.form == "depthwise" else self.group_outputs)

    @property
    def vectors(self) -> int:
        """Vectors of outputs of one group (of all channels, when depthwise)."""
        return -(-(self.outputs if self.form == "depthwise" else self.group_outputs) // self.lanes)


def plan_of(problem: Linear | Conv2d) -> Plan:
    """The sum that a product is: its rows, groups, and the terms of an output, in words of its numerics."""
    per_word = PACKED[BF16] if problem.numerics == BF16 else 1
    if isinstance(problem, Linear):
        return Plan(
            rows=problem.positions,
            row_shape=(problem.positions,),
            groups=1,
            group_outputs=problem.outputs,
            group_inputs=-(-problem.inputs // per_word),
            taps=(1, 1),
            tap_steps=(0, 0),
            form="dot" if _few(problem) else "panel",
        )
    group_inputs = -(-problem.channels // problem.groups // per_word)
    channels = group_inputs * problem.groups
    depthwise = problem.groups > 1 and problem.channels == problem.outputs == problem.groups
    return Plan(
        rows=problem.out_height * problem.out_width,
        row_shape=(problem.out_height, problem.out_width),
        groups=problem.groups,
        group_outputs=problem.outputs // problem.groups,
        group_inputs=group_inputs,
        taps=problem.kernel,
        tap_steps=((problem.width + problem.padding[2] + problem.padding[3]) * channels, channels),
        form="depthwise" if depthwise else "dot" if _few(problem) else "panel",
    )


def _few(problem: Linear | Conv2d) -> bool:
    """Whether rows or outputs are too few for panels; in bfloat16 vectors of a panel are whole."""
    rows = problem.positions if isinstance(problem, Linear) else FEW_ROWS
    if problem.numerics == BF16:
        return rows < FEW_ROWS or problem.outputs < LANES
    if problem.packed:
        return False
    if isinstance(problem, Linear):
        return rows < FEW_ROWS or problem.outputs <= FEW_OUTPUTS
    return problem.groups == 1 and problem.outputs <= FEW_OUTPUTS and problem.kernel[1] * problem.channels >= LANES


def panel_shape(problem: Linear | Conv2d) -> tuple[int, int, int]:
    """Shape of the packed weight: (vectors, terms, lanes)."""
    plan = plan_of(problem)
    groups = 1 if plan.form == "depthwise" else plan.groups
    return groups * plan.vectors, plan.terms, plan.lanes


def pack_weight(problem: Linear | Conv2d, weight: np.ndarray) -> np.ndarray:
    """The weight [outputs, ...] in panels, for a problem with `packed`."""
    rows = np.ascontiguousarray(weight, np.float32)
    if problem.numerics == BF16:
        bits = rows.view(np.uint32)
        halves = (bits + 0x7FFF + (bits >> 16 & 1) >> 16).astype(np.uint16)
        odd = [(0, 0)] * (halves.ndim - 1) + [(0, halves.shape[-1] % 2)]
        rows = np.ascontiguousarray(np.pad(halves, odd)).view(np.int32)
    rows = rows.reshape(weight.shape[0], -1)
    columns = [first + np.arange(plan_of(problem).lanes) for first in _columns(plan_of(problem))]
    return np.ascontiguousarray(rows[np.stack(columns)].transpose(0, 2, 1))


def _columns(plan: Plan) -> list[int]:
    """First output of every vector: within a group, the last vector ends at the end and may overlap."""
    size = plan.outputs if plan.form == "depthwise" else plan.group_outputs
    groups = 1 if plan.form == "depthwise" else plan.groups
    return [g * size + min(v * plan.lanes, size - plan.lanes) for g in range(groups) for v in range(plan.vectors)]


def arguments(problem: Linear | Conv2d) -> list[Argument]:
    """The kernel's buffers in calling order, output last."""
    plan = plan_of(problem)
    rows: Shape = (BATCH, *plan.row_shape)
    if isinstance(problem, Linear):
        x: Shape = (*rows, problem.inputs)
    else:
        x = (BATCH, problem.height, problem.width, problem.channels)
    return [
        Argument("x", x),
        _panel(problem, "weight") if problem.packed else Argument("weight", _weight_shape(problem)),
        *([Argument("bias", (plan.outputs,))] if problem.bias else []),
        *epilogue_arguments(problem.epilogue, rows, plan.outputs, problem.time_groups),
        Argument("y", (*rows, plan.outputs), problem.epilogue.out_dtype),
    ]


def _panel(problem: Linear | Conv2d, name: str) -> Argument:
    return Argument(name, panel_shape(problem), element_type(problem))


def element_type(problem: Linear | Conv2d) -> str:
    """Element type of what is multiplied."""
    return "int32" if problem.numerics == BF16 else "float32"


def _weight_shape(problem: Linear | Conv2d) -> Shape:
    if isinstance(problem, Linear):
        return (problem.outputs, problem.inputs)
    return (problem.outputs, *problem.kernel, problem.channels // problem.groups)


def pack_arguments(problem: Linear | Conv2d) -> list[Argument]:
    """The buffers of a kernel of `build_pack` in calling order: the weight, and the panel that it writes."""
    return [Argument("weight", _weight_shape(problem)), _panel(problem, "panel")]
