"""The base of passes that try a rewrite on sampled rows and keep it where the output gains."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from mpq_compiler import formats
from mpq_compiler.ir import scratch
from mpq_compiler.ir.edges import RowGeometry, input_edge, row_geometry
from mpq_compiler.ir.graph import weight_of
from mpq_compiler.ir.interpreter import run
from mpq_compiler.ir.program import Program
from mpq_compiler.pipeline.demand import VALUE_PASSES, Asked, Demand, searching
from mpq_compiler.pipeline.passes import Contract, Pass
from mpq_compiler.pipeline.session import Session
from mpq_compiler.quantization.fitting import bias_of, some_rows
from mpq_compiler.quantization.rewrite_gain import (
    FITTED,
    HELD_BYTES,
    INTERVALS,
    Change,
    Layers,
    Rows,
    Samples,
    quantized,
)
from mpq_compiler.quantization.row_files import Windows
from mpq_compiler.quantization.statistics import input_rows, spread
from mpq_compiler.support.execution import BATCH, batches

FEW_INPUTS = 16
"""The number of inputs of which a large model's rows are taken."""
FEW_TOGETHER = 4
"""How many of them a thread runs at a time."""


@dataclass(frozen=True)
class RewriteSearch(Pass):
    """A pass that rewrites the layers which gain by it, both sides quantized."""

    contract: ClassVar[Contract] = Contract.REWRITE
    tried: ClassVar[int] = 1
    """Rewrites of a group of layers that are tried."""
    requires: ClassVar[frozenset[str]] = frozenset({"channels-last"})

    weights: str = "int4"
    """Weight format for which the error is reckoned."""
    activations: int = 8
    """Activation width for which the error is reckoned."""
    gain: float = 0.2
    """Least gain in dB for which layers are changed."""
    samples: int = 8
    """Trajectories on which channels are measured, where no inputs are given."""
    steps: int = 10
    """Steps of each."""
    rows: int = 512
    """Rows of each layer's input on which errors are measured; fewer where those of all layers exceed 512 MiB."""
    sampled: int = 1 << 23
    """Weights whose errors are measured; of a larger model some rows of each stand for all, on fewer inputs."""

    def __post_init__(self) -> None:
        formats.get(self.weights)
        self.require("activations", 2, 8)
        self.require("gain", 0)
        for option in ("samples", "steps", "rows", "sampled"):
            self.require(option, 1)

    def layers(self, program: Program, session: Session) -> list[Layers]:
        """Groups the layers by the edge that they read, in graph order, each with about `rows` sampled rows of input.

        Rows come from the session's calibration inputs, or else from the trajectories that the options name. Those of
        an edge that an earlier rewrite has sampled are known: what has the same name has the same values.
        """
        windows: dict[fx.Node, dict[RowGeometry, None]] = {}
        readers: dict[fx.Node, list[fx.Node]] = {}
        columns = 0
        for node in program.quantizable:
            shape = program.tensors[str(weight_of(node))].shape
            geometry = row_geometry(node, shape)
            readers.setdefault(input_edge(node), []).append(node)
            if geometry not in windows.setdefault(input_edge(node), {}):
                windows[input_edge(node)][geometry] = None
                columns += math.prod(shape[1:])
        rows = self._rows(columns)
        known = session.sampled.setdefault((*self.sampling, rows), {})
        missing = {
            edge: asked
            for edge, asked in windows.items()
            if edge.name not in known or known[edge.name].parts.keys() != asked.keys()
        }
        if missing:
            known |= self._known(program, session, missing, rows)
        return [Layers(edge, nodes, known[edge.name]) for edge, nodes in readers.items()]

    @property
    def sampling(self) -> tuple[int, ...]:
        """The options that rows depend on."""
        return self.samples, self.steps, self.rows, self.sampled

    def _known(self, program: Program, session: Session, windows: Windows, rows: int) -> dict[str, Samples]:
        """The samples of `_sampled`; those of a large model may be left by a run that was killed."""
        large, files = self.share(program) < 1, session.rows
        if files is None or not large:
            return self._sampled(program, session, windows, rows, large)
        from mpq_compiler.frontend.trajectories import deciding

        assert session.denoiser is not None
        given = session.denoiser, session.calibration, self.samples, self.steps, session.seed
        sampled, decided = deciding(*given)
        run = f"{rows} {FEW_INPUTS} {FEW_TOGETHER} {session.seed} {session.device} {sampled}"
        place = files.place(program, decided, windows, run)
        make = functools.partial(self._sampled, program, session, windows, rows, large)
        return files.known(place, make, session.reuse, program.note)

    def _sampled(
        self, program: Program, session: Session, windows: Windows, rows: int, large: bool
    ) -> dict[str, Samples]:
        """Runs the program and samples rows of some edges, by their names.

        Args:
            program: the program.
            session: with the inputs.
            windows: the edges, and the geometries of the layers that read each.
            rows: about how many rows of each.
            large: whether few inputs do, a few at a time.
        """
        inputs = self._recorded(session) if session.calibration is None else session.calibration
        if large:
            inputs = spread(inputs, FEW_INPUTS)
        count = len(next(iter(inputs.values())))

        def sampled(batch: dict[str, Tensor], generator: torch.Generator) -> dict[str, Samples]:
            size, found = len(next(iter(batch.values()))), {}

            def watch(node: fx.Node, value: Any) -> None:
                if node in windows:
                    wanted = -(-rows * size // count)
                    parts = {g: [scratch.kept(input_rows(g, value, wanted, generator).cpu())] for g in windows[node]}
                    found[node.name] = Samples(value.abs().flatten(0, -2).amax(0).cpu(), parts)

            run(program, batch, watch, session.device)
            return found

        if large:  # few inputs at a time on every thread: activations of all are more than memory should hold
            parts = enumerate(batches(inputs, FEW_TOGETHER))
            found = session.map(lambda p: sampled(p[1], _generator(session.seed + p[0])), parts)
        else:
            generator = _generator(session.seed)
            found = [sampled(batch, generator) for batch in batches(inputs)]
        joined: dict[str, Samples] = {}
        for batch in found:
            for name, samples in batch.items():
                joined.setdefault(name, Samples()).add(samples)
        return joined

    def hand_on(self, session: Session, group: Layers, factor: Tensor) -> None:
        """Leaves the rows of an edge to the next rewrite, whose layers read it with its channels multiplied.

        Args:
            session: keeps the rows.
            group: the edge before, with its layers, which read what takes its place.
            factor: of the channels [C].
        """
        for known in session.sampled.values():
            for name in [name for name, samples in known.items() if samples is group.samples]:
                del known[name]
                known[input_edge(group.readers[0]).name] = group.samples.scaled(factor)

    def demand(self, asked: Asked) -> Demand:
        """Running on the inputs, then a trial for each candidate: quantized rows times quantized weights."""
        sizes = asked.sizes
        share = self._share(sizes.numbers)
        columns = sum(layer.columns for layer in sizes.layers)
        rows = self._rows(columns)
        ran = asked.running(FEW_INPUTS, FEW_TOGETHER) if share < 1 else asked.running(self.samples * self.steps, BATCH)
        if any(isinstance(other, RewriteSearch) and other.sampling == self.sampling for other in asked.earlier):
            ran = Demand()
        widest = max((layer.columns for layer in sizes.layers), default=0)
        tried = self.tried + 2
        edges = {layer.edge: layer.columns for layer in sizes.layers}
        fits = searching(sum(min(INTERVALS * FITTED, rows * width) for width in edges.values()))
        searched = Demand(
            products=2 * tried * rows * share * sizes.numbers,
            traffic=tried * 6 * (VALUE_PASSES * rows * columns + 6 * share * sizes.numbers),
            held=6 * 4 * (rows * widest + share * sizes.largest),
        )
        written = Demand(traffic=24 * sizes.numbers, disk=4 * rows * columns + 4 * sizes.numbers)
        return ran + searched + fits * tried + written

    def share(self, program: Program) -> float:
        """The share of the weights' rows on which errors are measured."""
        return self._share(sum(program.tensors[str(weight_of(node))].numel() for node in program.quantizable))

    def _share(self, numbers: int) -> float:
        return min(1.0, self.sampled / max(1, numbers))

    def _rows(self, columns: int) -> int:
        """The rows that are sampled of inputs with so many columns in all."""
        return max(1, min(self.rows, HELD_BYTES // (4 * max(1, columns))))

    def some_rows(self, program: Program, group: Layers, share: float) -> list[Tensor]:
        """The rows of the layers' weights that stand for all, f32 [R, ..., C] each; ``share``: of all rows."""
        stored = (program.tensors[str(weight_of(node))] for node in group.readers)
        return [w[some_rows(len(w), share)].to(torch.float32) for w in stored]

    def _recorded(self, session: Session) -> dict[str, Tensor]:
        """The inputs along the trajectories, recorded once in a session for all rewrites."""
        from mpq_compiler.frontend.trajectories import record_calibration

        known, asked = session.trajectories, (self.samples, self.steps)
        if asked not in known:
            assert session.denoiser is not None
            with session.track("sampling inputs for rewrites", self.steps) as step:
                known[asked] = record_calibration(session.denoiser, *asked, session.seed, lambda done, total: step(1))
        return known[asked]

    def error(self, group: Layers, rows: Rows, weights: list[Tensor], change: Change, undo: Change) -> float:
        """The relative squared error of the layers' outputs, summed over the layers, with both sides quantized.

        The outputs are those of the rows of the weights that are given.

        Args:
            group: the layers that read one edge.
            rows: sampled rows of their input.
            weights: the weight of each layer, [O, ..., C].
            change: the rewrite of the input.
            undo: the rewrite of the weights that undoes it.
        """
        planned = formats.get(self.weights)
        read = {
            geometry: quantized(change(x.unflatten(1, (-1, group.channels))).flatten(1), self.activations)
            for geometry, x in rows.items()
        }
        total = 0.0
        for w, reader in zip(weights, group.readers, strict=True):
            geometry = row_geometry(reader, w.shape)
            rounded = planned.start(undo(w)).dequantize().reshape(len(w), -1)
            y = rows[geometry] @ w.flatten(1).T
            wrong = read[geometry] @ rounded.T - y
            if bias_of(reader) is not None:  # which will take up the mean
                wrong = wrong - wrong.mean(0)
            total += float(wrong.square().sum() / y.square().sum().clamp_min(1e-30))
        return total


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
