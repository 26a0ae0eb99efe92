"""Linear and convolution in float32, for what a plan leaves unquantized: any shape, with an epilogue.

Two forms, chosen by the problem alone (never by the target):

- *panel*: lanes are output channels; the sum of an output runs over its terms (kernel row, kernel column,
  channel) in order, one fused multiply-add each. Weights are read from panels [vectors, terms, lanes], which
  the kernel packs on every call, or which arrive packed once (`packed`: by `pack_weight` in NumPy, or by the
  kernel of `build_pack`).
- *dot*: for few outputs or few rows; lanes are neighbouring terms of the sum (16 virtual lanes, folded by
  halves) and weights are read where they are.

Convolutions read the image from a copy with its zero border, where there is a border.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tvm.script.ir_builder import tirx as T
from tvm.tirx import PrimFunc

from mpq_compiler.backends.tvm.kernels.epilogue import Epilogue
from mpq_compiler.backends.tvm.kernels.pointwise import sample_view
from mpq_compiler.backends.tvm.kernels.template import (
    BATCH,
    LANES,
    SHARES,
    Argument,
    Buffer,
    Buffers,
    Finish,
    Shape,
    each_vector,
    epilogue_arguments,
    fold,
    partial,
    primfunc,
    register_file,
    scratch,
    share,
    shares,
    span,
    store,
    unravel,
    width,
)
from mpq_compiler.backends.tvm.kernels.vmath import f32, fma, keep, splat

# of a panel tile: accumulators and, at most, vectors; of a dot tile: rows and outputs
PANEL_TILES = {"wide": (24, 4), "narrow": (6, 1)}
DOT_TILES = {"wide": (4, 4), "narrow": (2, 2)}
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

    def __post_init__(self) -> None:
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


@dataclass(frozen=True)
class _Plan:
    """Both problems as one: `rows` of a sample, each with outputs that are sums over taps and inputs.

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
        return width(self.outputs if self.form == "depthwise" else self.group_outputs)

    @property
    def vectors(self) -> int:
        """Vectors of outputs of one group (of all channels, when depthwise)."""
        return -(-(self.outputs if self.form == "depthwise" else self.group_outputs) // self.lanes)


def _plan(problem: Linear | Conv2d) -> _Plan:
    if isinstance(problem, Linear):
        few = problem.positions < FEW_ROWS or problem.outputs <= FEW_OUTPUTS
        return _Plan(
            rows=problem.positions,
            row_shape=(problem.positions,),
            groups=1,
            group_outputs=problem.outputs,
            group_inputs=problem.inputs,
            taps=(1, 1),
            tap_steps=(0, 0),
            form="dot" if few and not problem.packed else "panel",
        )
    kernel_width, channels, groups = problem.kernel[1], problem.channels, problem.groups
    group_outputs, group_inputs = problem.outputs // groups, channels // groups
    few = groups == 1 and problem.outputs <= FEW_OUTPUTS and kernel_width * channels >= LANES
    form = "dot" if few and not problem.packed else "panel"
    if groups > 1 and group_inputs == group_outputs == 1:
        form = "depthwise"
    return _Plan(
        rows=problem.out_height * problem.out_width,
        row_shape=(problem.out_height, problem.out_width),
        groups=groups,
        group_outputs=group_outputs,
        group_inputs=group_inputs,
        taps=problem.kernel,
        tap_steps=((problem.width + problem.padding[2] + problem.padding[3]) * channels, channels),
        form=form,
    )


def panel_shape(problem: Linear | Conv2d) -> tuple[int, int, int]:
    """Shape of the packed weight: (vectors, terms, lanes)."""
    plan = _plan(problem)
    groups = 1 if plan.form == "depthwise" else plan.groups
    return groups * plan.vectors, plan.terms, plan.lanes


def pack_weight(problem: Linear | Conv2d, weight: np.ndarray) -> np.ndarray:
    """The weight [outputs, ...] in panels, for a problem with `packed`."""
    rows = np.ascontiguousarray(weight, np.float32).reshape(weight.shape[0], -1)
    columns = [first + np.arange(_plan(problem).lanes) for first in _columns(_plan(problem))]
    return np.ascontiguousarray(rows[np.stack(columns)].transpose(0, 2, 1))


def _columns(plan: _Plan) -> list[int]:
    """First output of every vector: within a group, the last vector ends at the end and may overlap."""
    size = plan.outputs if plan.form == "depthwise" else plan.group_outputs
    groups = 1 if plan.form == "depthwise" else plan.groups
    return [g * size + min(v * plan.lanes, size - plan.lanes) for g in range(groups) for v in range(plan.vectors)]


def arguments(problem: Linear | Conv2d) -> list[Argument]:
    """The kernel's buffers in calling order, output last."""
    plan = _plan(problem)
    rows: Shape = (BATCH, *plan.row_shape)
    if isinstance(problem, Linear):
        x: Shape = (*rows, problem.inputs)
    else:
        x = (BATCH, problem.height, problem.width, problem.channels)
    return [
        Argument("x", x),
        Argument("weight", panel_shape(problem) if problem.packed else _weight_shape(problem)),
        *([Argument("bias", (plan.outputs,))] if problem.bias else []),
        *epilogue_arguments(problem.epilogue, rows, plan.outputs, problem.time_groups),
        Argument("y", (*rows, plan.outputs), problem.epilogue.out_dtype),
    ]


def _weight_shape(problem: Linear | Conv2d) -> Shape:
    if isinstance(problem, Linear):
        return (problem.outputs, problem.inputs)
    return (problem.outputs, *problem.kernel, problem.channels // problem.groups)


def build(problem: Linear | Conv2d, isa: str = "avx512vnni", name: str = "float_gemm") -> PrimFunc:
    """The kernel; `isa` chooses the tiles and no bit of the result."""
    plan = _plan(problem)
    return primfunc(name, arguments(problem), lambda batch, bufs: _Body(problem, plan, isa, bufs).emit(batch))


def build_pack(problem: Linear | Conv2d, name: str = "pack_weight") -> PrimFunc:
    """A kernel (weight, panel) that packs as `pack_weight` does."""
    plan = _plan(problem)
    buffers = [Argument("weight", _weight_shape(problem)), Argument("panel", panel_shape(problem))]

    def body(batch: Any, bufs: Buffers) -> None:
        del batch
        flat = T.decl_buffer((plan.outputs * plan.terms,), "float32", data=bufs["weight"].data)
        vectors, terms, lanes = panel_shape(problem)
        panel = T.decl_buffer((vectors * terms * lanes,), "float32", data=bufs["panel"].data)
        _pack(plan, flat, panel)

    return primfunc(name, buffers, body)


def _pack(plan: _Plan, weight: Buffer, panel: Buffer) -> None:
    """weight [outputs * terms] into panel [vectors * terms * lanes]; vectors of all groups in one row."""
    size = plan.outputs if plan.form == "depthwise" else plan.group_outputs
    groups = 1 if plan.form == "depthwise" else plan.groups
    with T.serial(0, groups) as g, T.serial(0, plan.vectors) as v:
        first = T.bind(g * size + T.min(v * plan.lanes, size - plan.lanes))
        with T.serial(0, plan.terms) as k:
            for lane in range(plan.lanes):
                target = ((g * plan.vectors + v) * plan.terms + k) * plan.lanes + lane
                store(panel, weight[(first + lane) * plan.terms + k], target)


class _Body:
    """The kernel's body."""

    def __init__(self, problem: Linear | Conv2d, plan: _Plan, isa: str, buffers: Buffers):
        self.problem, self.plan, self.buffers = problem, plan, buffers
        self.registers = register_file(isa)
        self.finish = Finish(problem.epilogue, buffers)

    def emit(self, batch: Any) -> None:
        problem, plan = self.problem, self.plan
        size = plan.outputs * plan.terms
        if problem.packed:
            vectors, terms, lanes = panel_shape(problem)
            self.weight = T.decl_buffer((vectors * terms * lanes,), data=self.buffers["weight"].data)
        else:
            self.weight = T.decl_buffer((size,), data=self.buffers["weight"].data)
            if plan.form != "dot":
                vectors, terms, lanes = panel_shape(problem)
                panel = scratch(vectors * terms * lanes, heap=True)
                _pack(plan, self.weight, panel)
                self.weight = panel
        self._prepare_border()
        if plan.form == "dot" and isinstance(problem, Linear) and problem.positions == 1:
            self._dot_over_samples(batch)
            return
        with T.serial(0, batch) as b:
            x, start = self._image(b)
            (self._dot if plan.form == "dot" else self._panels)(b, x, start)

    # ---------------------------------------------------------------------------------------- the image

    def _prepare_border(self) -> None:
        """A zeroed scratch image; its border stays zero, its interior is copied for every sample."""
        self.padded = None
        problem = self.problem
        if isinstance(problem, Conv2d) and any(problem.padding):
            top, bottom, left, right = problem.padding
            self.row = (problem.width + left + right) * problem.channels
            size = (problem.height + top + bottom) * self.row
            padded = scratch(size, heap=True)
            each_vector(size, lambda i, n: store(padded, f32(0.0, n), span(i, n)))
            self.padded = padded

    def _image(self, b: Any) -> tuple[Buffer, Any]:
        """A flat buffer that holds sample b, with its border, from the index returned."""
        problem, x = self.problem, self.buffers["x"]
        if isinstance(problem, Linear):
            return sample_view(x, (BATCH, problem.positions, problem.inputs), b)
        shape = (BATCH, problem.height, problem.width, problem.channels)
        flat, start = sample_view(x, shape, b)
        padded = self.padded
        if padded is None:
            return flat, start
        length = problem.width * problem.channels
        corner = problem.padding[0] * self.row + problem.padding[2] * problem.channels
        with shares(1, problem.height, problem.height * length / 16) as (_, top, end), T.serial(top, end) as h:
            source, target = start + h * length, corner + h * self.row
            each_vector(length, lambda i, n: store(padded, flat[span(source + i, n)], span(target + i, n)))
        return padded, 0

    def _origin(self, row: Any) -> Any:
        """Where the terms of output row `row` start within the image."""
        problem = self.problem
        if isinstance(problem, Linear):
            return row * problem.inputs
        line, channels = self.plan.tap_steps
        oh, ow = T.floordiv(row, problem.out_width), T.floormod(row, problem.out_width)
        return oh * (problem.stride[0] * line) + ow * (problem.stride[1] * channels)

    def _where(self, row: Any) -> tuple[Any, ...]:
        """Output row as the output's indices."""
        if isinstance(self.problem, Linear):
            return (row,)
        return T.floordiv(row, self.problem.out_width), T.floormod(row, self.problem.out_width)

    # ----------------------------------------------------------------------------------------------- panels

    def _panels(self, b: Any, x: Buffer, start: Any) -> None:
        plan = self.plan
        accumulators, most = PANEL_TILES[self.registers]
        blocks = -(-plan.vectors // most)
        per_block = -(-plan.vectors // blocks)
        depthwise = plan.form == "depthwise"
        size = plan.outputs if depthwise else plan.group_outputs
        groups = 1 if depthwise else plan.groups

        def blocks_of(base: int, number: int, count: int) -> None:
            """`number` blocks of `count` vectors, in every group, from vector `base` on."""
            rows = min(plan.rows, accumulators // count, 12)
            tiles = -(-plan.rows // rows)
            split = min(tiles, -(-SHARES // (groups * number)))  # of a block's rows
            macs = plan.rows * plan.terms * groups * number * count * plan.lanes
            with shares(1, groups * number * split, macs / 32) as (_, begin, end):
                quant = self.finish.quantizer(b)
                with T.serial(begin, end) as i:
                    g, index, part = unravel(i, number, split)
                    first = base + index * count
                    columns = [g * size + T.min((first + j) * plan.lanes, size - plan.lanes) for j in range(count)]
                    panels = [(g * plan.vectors + first + j) * (plan.terms * plan.lanes) for j in range(count)]
                    with T.serial(*share(tiles, part, split)) as tile:
                        row = T.bind(T.min(tile * rows, plan.rows - rows))
                        self._panel_tile(b, x, start + g * plan.group_inputs, quant, row, rows, columns, panels)

        full, rest = divmod(plan.vectors, per_block)
        if full:
            blocks_of(0, full, per_block)
        if rest:
            blocks_of(full * per_block, 1, rest)

    def _panel_tile(
        self,
        b: Any,
        x: Buffer,
        start: Any,
        quant: Any,
        row: Any,
        rows: int,
        columns: list[Any],
        panels: list[Any],
    ) -> None:
        plan, lanes = self.plan, self.plan.lanes
        sums = scratch(rows * len(columns) * lanes)
        cells = [(i, j, span((i * len(columns) + j) * lanes, lanes)) for i in range(rows) for j in range(len(columns))]
        for _, j, at in cells:
            bias = self.buffers["bias"][span(columns[j], lanes)] if self.problem.bias else f32(0.0, lanes)
            store(sums, bias, at)
        origins = [T.bind(start + self._origin(row + i)) for i in range(rows)]
        depthwise = plan.form == "depthwise"
        inner = 1 if depthwise else plan.group_inputs
        with T.serial(0, plan.taps[0]) as kh, T.serial(0, plan.taps[1]) as kw, T.serial(0, inner) as c:
            tap = kh * plan.tap_steps[0] + kw * plan.tap_steps[1] + c
            term = (kh * plan.taps[1] + kw) * inner + c
            for i, j, at in cells:
                where = origins[i] + tap
                element = x[span(where + columns[j], lanes)] if depthwise else splat(x[where], lanes)
                weight = self.weight[span(panels[j] + term * lanes, lanes)]
                store(sums, fma(element, weight, sums[at]), at)
        for i, j, at in cells:
            where = self._where(row + i)
            value = self.finish(sums[at], b, where, columns[j], quant)
            store(self.buffers["y"], value, b, *where, span(columns[j], lanes))

    # -------------------------------------------------------------------------------------------------- dot

    def _dot(self, b: Any, x: Buffer, start: Any) -> None:
        plan = self.plan
        rows = min(DOT_TILES[self.registers][0], plan.rows)
        tiles = -(-plan.rows // rows)
        with shares(1, tiles, self._nanoseconds) as (_, begin, end):
            quant = self.finish.quantizer(b)
            with T.serial(begin, end) as tile:
                row = T.bind(T.min(tile * rows, plan.rows - rows))
                where = [(b, start + self._origin(row + i), self._where(row + i), quant) for i in range(rows)]
                self._dot_rows(x, where, share_outputs=tiles == 1)

    @property
    def _nanoseconds(self) -> float:
        """Of a sample, at the rate of multiplication or of reading weights from memory."""
        return max(self.plan.rows / 16, 1 / 4) * self.plan.outputs * self.plan.terms

    def _dot_over_samples(self, batch: Any) -> None:
        """One row for each sample: tiles of samples, so that a batch reads the weights fewer times."""
        rows = DOT_TILES[self.registers][0]
        with T.serial(0, T.floordiv(batch, rows)) as tile:
            self._dot_samples([tile * rows + i for i in range(rows)])
        with T.serial(0, T.floormod(batch, rows)) as i:
            self._dot_samples([batch - T.floormod(batch, rows) + i])

    def _dot_samples(self, samples: list[Any]) -> None:
        images = [self._image(sample) for sample in samples]
        rows = [(b, start, (0,), self.finish.quantizer(b)) for b, (_, start) in zip(samples, images, strict=True)]
        self._dot_rows(images[0][0], rows, share_outputs=True)

    def _dot_rows(self, x: Buffer, rows: list[tuple[Any, Any, tuple[Any, ...], Any]], share_outputs: bool) -> None:
        """Output rows (sample, origin, where in the output, quantizer) through all outputs, which threads may share."""
        plan = self.plan
        outputs = min(DOT_TILES[self.registers][1], plan.outputs)
        results = scratch(len(rows) * plan.outputs, heap=plan.outputs > 4096)
        origins = [T.bind(origin) for _, origin, _, _ in rows]
        cost = self._nanoseconds if share_outputs else 0
        with shares(1, -(-plan.outputs // outputs), cost) as (_, begin, end), T.serial(begin, end) as part:
            first = T.bind(T.min(part * outputs, plan.outputs - outputs))
            self._dot_tile(x, origins, first, outputs, results)
        for i, (b, _, where, quant) in enumerate(rows):

            def finish(c: Any, lanes: int, i: int = i, b: Any = b, where: Any = where, quant: Any = quant) -> None:
                value = results[span(i * plan.outputs + c, lanes)]
                if self.problem.bias:
                    value = value + self.buffers["bias"][span(c, lanes)]
                store(self.buffers["y"], self.finish(value, b, where, c, quant), b, *where, span(c, lanes))

            each_vector(plan.outputs, finish)

    def _dot_tile(self, x: Buffer, origins: list[Any], first: Any, outputs: int, results: Buffer) -> None:
        """Sums of rows x outputs into `results` [rows, all outputs], without bias."""
        plan = self.plan
        run = plan.taps[1] * plan.group_inputs  # the columns of a kernel row and their channels are neighbours
        sums = scratch(len(origins) * outputs * LANES)
        cells = [(i, j, span((i * outputs + j) * LANES, LANES)) for i in range(len(origins)) for j in range(outputs)]
        for _, _, at in cells:
            store(sums, f32(0.0, LANES), at)

        def add(kh: Any, load: Any) -> None:
            images = [keep(load(x, origin + kh * plan.tap_steps[0])) for origin in origins]
            weights = [keep(load(self.weight, (first + j) * plan.terms + kh * run)) for j in range(outputs)]
            for i, j, at in cells:
                store(sums, fma(images[i], weights[j], sums[at]), at)

        with T.serial(0, plan.taps[0]) as kh:
            if run >= LANES:
                with T.serial(0, run // LANES) as v:
                    add(kh, lambda buffer, at: buffer[span(at + v * LANES, LANES)])
            if run % LANES:
                tail = run - run % LANES
                add(kh, lambda buffer, at: partial(buffer, (), at + tail, run % LANES)[0])
        for i, j, at in cells:
            store(results, fold(sums[at]), i * plan.outputs + first + j)
