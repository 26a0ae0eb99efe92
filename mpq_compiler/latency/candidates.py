"""The time that a weight format costs a layer on a target, by candidate plans and latency tables (`latency.table`).

A candidate plan has one format for every layer. It is packed with weights of the right form and any value, and lowered
to kernels as a compilation lowers it. It is not compiled: its kernels are looked up in a table. A table is measured by
compiling the candidate plans and running them whole, in turns, with every kernel timed in place (`mpqc bench --kernels`
does the same). A kernel that ran alone would find its operands in caches where a model does not have them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

from mpq_compiler import formats
from mpq_compiler.artifact import bundle
from mpq_compiler.artifact.bundle import Artifact
from mpq_compiler.formats import base, low_rank
from mpq_compiler.frontend.denoiser import Denoiser
from mpq_compiler.ir.costs import weight_path
from mpq_compiler.ir.edges import input_edge
from mpq_compiler.ir.findings import ATTENTION_NUMERICS
from mpq_compiler.ir.graph import weight_of
from mpq_compiler.ir.program import PARAMETERS, Program, TensorStore
from mpq_compiler.latency import kernel_schedule
from mpq_compiler.latency.measure import measured, versions
from mpq_compiler.latency.table import CALL, Table, timed_as
from mpq_compiler.pipeline import realize
from mpq_compiler.pipeline.backend import BuildRequest, TimedBackend, backend_of
from mpq_compiler.pipeline.passes import Pass, Role
from mpq_compiler.pipeline.session import Session
from mpq_compiler.quantization.fitting import REST, FitCache
from mpq_compiler.quantization.statistics import CALIBRATION
from mpq_compiler.runtime.compiled_denoiser import CompiledDenoiser
from mpq_compiler.support.cache import Results, digest
from mpq_compiler.support.errors import UserError
from mpq_compiler.support.execution import tracked
from mpq_compiler.support.files import encode_json
from mpq_compiler.support.host import cpu, identity
from mpq_compiler.targets import table as targets
from mpq_compiler.targets.numerics import F32
from mpq_compiler.targets.table import Target

QUANTIZED = "_q"
"""The suffix of a node that yields the codes of an edge."""


@dataclass(frozen=True)
class Costs:
    """The time of a call of the model in microseconds, split into a fixed part and one for each layer and format."""

    fixed: float
    """The time of everything that no weight format changes."""
    layers: Mapping[str, Mapping[str, float]]
    """The time of each layer (the parameter's path) in each format.

    A format that leaves the activation in float changes the kernels that produce it; that difference is divided among
    the layers that read it.
    """
    nodes: Mapping[str, float] = field(default_factory=dict)
    """What of the fixed time each node of the program takes."""


@dataclass(frozen=True)
class Row:
    """A kernel call of a lowered plan."""

    node: str
    layer: str | None
    kernel: str


def require_kernels(target: Target) -> None:
    """Raises a UserError where the target's kernels cannot be timed."""
    if not backend_of(target).capabilities(target).times:
        raise UserError(
            f"times are those of kernels for CPUs, and '{target.name}' has none of ours: leave --latency out"
        )


@dataclass
class Latency:
    """The times of candidate plans on one target."""

    target: Target
    denoiser: Denoiser
    passes: Sequence[Pass]
    """The passes of the compilation."""
    table: Table | None = None
    """The latency table; None measures one here, which the cache keeps for this machine and these kernels."""
    batch: int = 1
    threads: int = 1
    kinds: tuple[str, ...] = (F32,)
    """The numerics that attentions may have, the fastest last."""
    jobs: int = 1
    cache: Path | None = None
    progress: Any = None
    fits: FitCache = field(default_factory=FitCache)
    """Fits of activations, which all plans share."""
    _known: dict[Any, Costs] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require_kernels(self.target)
        self.backend = cast(TimedBackend, backend_of(self.target))

    def costs(self, program: Program, names: Sequence[str], dynamic: bool = False) -> Costs:
        """The times of each layer in each format.

        Args:
            program: calibrated, with its time groups.
            names: the formats.
            dynamic: whether edges that only linear layers read have dynamic quantizers.

        Raises:
            UserError: the table lacks a kernel; the sentence names the format.
        """
        key = tuple(names), dynamic, len(program.graph.nodes)
        if key not in self._known:
            rows = {name: list(self._rows(program, name, self.kinds[-1], dynamic)) for name in names}
            if self.table is None:
                self.table = self._measured(program, rows, dynamic)
            self._known[key] = self._costs(program, rows, self.table)
        return self._known[key]

    def _costs(self, program: Program, rows: Mapping[str, Sequence[Row]], table: Table) -> Costs:
        readers: dict[str, list[str]] = {}
        for node in program.quantizable:
            readers.setdefault(input_edge(node).name, []).append(str(weight_path(node)))
        fixed: dict[str, float] = {}
        nodes: dict[str, float] = {}
        edges: dict[str, dict[str, float]] = {}
        layers: dict[str, dict[str, float]] = {path: {} for paths in readers.values() for path in paths}
        usual = next((name for name in rows if formats.get(name).integer), next(iter(rows)))
        for name, calls in rows.items():
            own = edges.setdefault(name, dict.fromkeys(readers, 0.0))
            fixed[name] = 0.0
            for row in calls:
                spent = self._time(table, row, name)
                edge = row.node.removesuffix(QUANTIZED)
                if row.layer in layers:
                    layers[row.layer][name] = layers[row.layer].get(name, 0.0) + spent
                elif edge in own:
                    own[edge] += spent
                else:
                    fixed[name] += spent
                if row.layer not in layers and name == usual:
                    nodes[edge] = nodes.get(edge, 0.0) + spent
        for name, own in edges.items():
            for edge, paths in readers.items():
                for path in paths:
                    layers[path].setdefault(name, 0.0)
                    layers[path][name] += (own[edge] - edges[usual][edge]) / len(paths)
        return Costs(fixed[usual] + sum(edges[usual].values()), layers, nodes)

    def _time(self, table: Table, row: Row, name: str) -> float:
        found = table.microseconds(row.kernel)
        if found is None:
            raise UserError(
                f"the latency table lacks weights in '{name}': it has no time for the {row.kernel.partition(' ')[0]} "
                f"kernel of '{row.layer or row.node}'; measure it with `mpqc latency MODEL --formats {name}`, of the "
                "model and with the recipe that are compiled"
            )
        return found

    # ------------------------------------------------------------------------------------------ candidate plans

    def _packed(self, program: Program, name: str, kind: str, dynamic: bool) -> Program:
        """Packs the program with all weights in one format and all attentions in one kind of numerics."""
        calibration = program.facts[CALIBRATION]
        start = program.fork(tensors=TensorStore(program.tensors))
        start.facts[CALIBRATION] = replace(calibration, grams={}, means={})
        index = next(i for i, step in enumerate(self.passes) if step.role is Role.ALLOCATES)
        plan = realize.uniform(name, type(self.passes[index]), dynamic=dynamic)
        steps = [plan, *(step for step in self.passes[index:] if step.decides_kernels)]
        fits = replace(self.fits, forms=_forms(program, formats.get(name)), weights={})
        session = Session(self.denoiser, fits=fits)
        for step in steps:
            start = step.run(start, session)
            if step is plan and kind != F32:
                start.facts[ATTENTION_NUMERICS] = {node.name: kind for node in start.attentions}
        return start

    def _rows(self, program: Program, name: str, kind: str, dynamic: bool) -> Iterator[Row]:
        packed = self._packed(program, name, kind, dynamic)
        for row in kernel_schedule.describe(packed, self.backend.kernel_calls(packed, self.batch)):
            layer = row["layer"] and str(row["layer"]).split(":")[0]  # the factors of a low-rank branch too
            yield Row(row["node"], layer, row["kernel"])

    # ------------------------------------------------------------------------------------------ measuring

    def measure(self, program: Program, names: Sequence[str], dynamic: bool = False) -> Table:
        """Measures the latency table of a model on this machine, by its plans with weights in each of these formats."""
        with self.plans(program, names, dynamic) as plans:
            return measured(runnable(plans, self.threads), self.batch, self.threads, self.progress)

    @contextmanager
    def plans(
        self, program: Program, names: Sequence[str], dynamic: bool = False, emit: str | None = None
    ) -> Iterator[list[Artifact]]:
        """Compiles candidate plans, with weights in each format and attentions in each of ``kinds``, as artifacts.

        The artifacts are removed when the context ends.

        Args:
            program: calibrated, with its time groups.
            names: the formats.
            dynamic: whether edges that only linear layers read have dynamic quantizers.
            emit: "c" adds the C program for a device.
        """
        plans = [(name, self.kinds[-1]) for name in names] + [(names[0], kind) for kind in self.kinds[:-1]]
        with tempfile.TemporaryDirectory(prefix="mpq-") as scratch:
            made = []
            track = tracked(self.progress, "candidate plans", len(plans))
            with track as advance:
                for index, (name, kind) in enumerate(plans):
                    packed = self._packed(program, name, kind, dynamic)
                    made.append(self._compiled(packed, Path(scratch, str(index)), emit))
                    advance(1)
            yield made

    def _measured(self, program: Program, rows: Mapping[str, Sequence[Row]], dynamic: bool) -> Table:
        """The table of at least the kernels in ``rows``, from the cache where it has all of them."""
        if missing := targets.missing_features(self.target):
            raise UserError(
                f"times for '{self.target.name}' cannot be measured here, for this machine lacks {', '.join(missing)}: "
                "give a table that was measured on such a machine (`mpqc latency --rpc`, --latency-table FILE)"
            )
        about = f"1 {self.target.name} {identity()} {self.threads} {self.batch} {version('apache-tvm')}"
        results = Results("latency", digest(about, self.backend.digest()), self.cache)
        others = (self._rows(program, next(iter(rows)), kind, dynamic) for kind in self.kinds[:-1])
        wanted = {timed_as(row.kernel) for calls in (*rows.values(), *others) for row in calls}
        if CALL not in results or any(kernel not in results for kernel in wanted):
            table = self.measure(program, list(rows), dynamic)
            for kernel, spent in {CALL: table.call_us, **table.kernels}.items():
                if kernel not in results:
                    results[kernel] = spent
        kernels = {kernel: results[kernel] for kernel in sorted(wanted)}
        machine = (self.target.name, cpu(), self.threads, self.batch)
        return Table(*machine, results[CALL], kernels, (self.denoiser.name,), versions())

    def _compiled(self, packed: Program, place: Path, emit: str | None) -> Artifact:
        """Builds an artifact of a packed program that is good for running only: most of its manifest is missing."""
        request = BuildRequest((self.batch,), jobs=self.jobs, cache=self.cache, emit=emit)
        built = self.backend.build(packed, self.target, request)
        rows = encode_json(kernel_schedule.describe(packed, built.facts["schedule"]))
        manifest: dict[str, Any] = {
            "name": self.denoiser.name,
            "target": {"backend": "tvm", "name": self.target.name, "arch": self.target.arch, "features": []},
            "model": {"class": "", "config": {}, "parameters": packed.facts[PARAMETERS]},
            "functions": built.functions,
            "tensors": built.entries,
            "parts": built.parts,
            "prepare": built.prepare,
            "versions": versions(),
        }
        bundle.write(place, manifest, {**built.files, bundle.SCHEDULE: rows}, built.tensors)
        return bundle.read(place)


def runnable(plans: Sequence[Artifact], threads: int = 1) -> list[CompiledDenoiser]:
    """Loads candidate plans on this machine for timing, without results kept between calls."""
    return [CompiledDenoiser(plan, threads, reuse_bytes=0) for plan in plans]


def _forms(program: Program, planned: base.Format) -> dict[tuple[str, str], base.Fit]:
    """Makes fits of all weights, of the right form and any value, by weight and format."""
    found: dict[tuple[str, str], base.Fit] = {}
    for node in program.quantizable:
        name = str(weight_of(node))
        form = found[name, planned.name] = planned.form(program.tensors.read(name))
        if isinstance(form, low_rank.LowRankWeight) and isinstance(planned, low_rank.LowRankFormat):
            found[f"{weight_path(node)}:{REST}", planned.base.name] = form.base
    return found
