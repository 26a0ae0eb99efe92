"""What each layer costs in output quality at each format, measured one at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from mpq_compiler import cache, ops
from mpq_compiler.ablation import Ablation, noise_power
from mpq_compiler.calibration import GRAM, RANGE, VALUES, Calibration, batches, input_edge
from mpq_compiler.costs import weight_path
from mpq_compiler.fitting import activation_parameters, bias_of, corrected_bias, fitted
from mpq_compiler.pass_manager import Contract, Pass, Session
from mpq_compiler.program import Program, operand, shapes

HELD_BYTES = 4 << 30
"""Memory for the values of the unchanged program, from which each measurement starts."""
DIGITS = 6
"""Significant digits kept of a sensitivity, so that the last bits of a sum never decide an allocation."""


@dataclass(frozen=True)
class Sensitivity(Pass):
    """Relative noise power of the denoiser's output with one weight, or one activation, quantized at a time.

    ``sum (y_q - y)^2 / sum y^2`` over calibration inputs spread over time (MixDQ, arXiv 2405.17873, section 4.2,
    measures the same as an SQNR). Noise powers of independent errors add, which is what the allocation relies on. Each
    result goes to the cache as it is measured: a run that was killed goes on where it was.

        (no change; facts["sensitivity"] holds weights[path][format] and activations[edge][bits])
      =>
        (no change)
    """

    contract: ClassVar[Contract] = Contract.IDENTICAL
    requires: ClassVar[frozenset[str]] = frozenset({"calibration", "time-groups"})
    provides: ClassVar[frozenset[str]] = frozenset({"sensitivity"})
    statistics: ClassVar[frozenset[str]] = frozenset({RANGE, VALUES, GRAM})

    inputs: int = 32
    """Calibration inputs on which the output is compared."""
    formats: tuple[str, ...] = ("int2", "int3", "int2+b", "int4", "int3+b", "int8")
    """Weight formats to measure."""
    activations: tuple[int, ...] = (8,)
    """Activation widths to measure."""

    def run(self, program: Program, session: Session) -> Program:
        program = program.fork()
        if session.sensitivity is not None:
            program.facts["sensitivity"] = session.sensitivity
            return program
        calibration: Calibration = program.facts["calibration"]
        inputs = calibration.select(self.inputs)
        results = cache.Results("sensitivity", self.key(program, inputs), session.cache)
        tasks = self.tasks(program)
        parts = list(batches(inputs, _inputs_held(program)))
        missing = sum(_key(name, part) not in results for name, _, _ in tasks for part in range(len(parts)))
        if missing:
            with session.track("sensitivity", missing) as advance:
                for part, batch in enumerate(parts):
                    self._measure_part(program, batch, part, results, session, advance)
        table: dict[str, Any] = {"weights": {}, "activations": {}, "inputs": self.inputs}
        sizes = [len(part["timestep"]) for part in parts]
        for name, node, choice in tasks:
            powers = [results[_key(name, part)] for part in range(len(parts))]
            mean = sum(power * size for power, size in zip(powers, sizes, strict=True)) / sum(sizes)
            loss = float(f"{mean:.{DIGITS - 1}e}")
            if isinstance(choice, str):
                table["weights"].setdefault(weight_path(node), {})[choice] = loss
            else:
                table["activations"].setdefault(node.name, {})[str(choice)] = loss
        program.facts["sensitivity"] = table
        return program

    def _measure_part(
        self,
        program: Program,
        inputs: dict[str, Tensor],
        part: int,
        results: cache.Results,
        session: Session,
        advance: Callable[[int], None],
    ) -> None:
        """Measures on some of the inputs what ``results`` lacks, and adds it."""
        tasks = [task for task in self.tasks(program) if _key(task[0], part) not in results]
        if not tasks:
            return
        ablation = Ablation(program, inputs)
        lock = threading.Lock()

        def measure(task: tuple[str, fx.Node, str | int]) -> None:
            name, node, choice = task
            power = self.measure(program, ablation, inputs, node, choice)
            with lock:
                results[_key(name, part)] = float(f"{power:.{DIGITS - 1}e}")
                advance(1)

        session.map(measure, tasks)

    def tasks(self, program: Program) -> list[tuple[str, fx.Node, str | int]]:
        """(name of the result, call or edge, format or bits) in graph order; a shared weight or edge counts once."""
        found: dict[str, tuple[str, fx.Node, str | int]] = {}
        for node in program.quantizable:
            for f in self.formats:
                found.setdefault(f"w {weight_path(node)} {f}", (f"w {weight_path(node)} {f}", node, f))
            edge = input_edge(node)
            for bits in self.activations:
                found.setdefault(f"a {edge.name} {bits}", (f"a {edge.name} {bits}", edge, bits))
        return list(found.values())

    def key(self, program: Program, inputs: dict[str, Tensor]) -> str:
        """Everything a result depends on but its own task."""
        import platform

        tensors = {n: program.tensors[n].contiguous() for n in sorted(_read(program))}
        text = "\n".join(f"{n.name} {ops.name_of(n.target)} {n.args} {n.kwargs}" for n in program.graph.nodes)
        calibration: Calibration = program.facts["calibration"]
        edges = {n: e.values for n, e in calibration.edges.items()}
        grams = calibration.grams
        split = min(self.inputs, _inputs_held(program))
        versions = f"1 {split} {torch.__version__} {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
        return cache.digest(versions, text, str(program.facts["time-groups"]), tensors, inputs, edges, grams)

    def measure(
        self, program: Program, ablation: Ablation, inputs: dict[str, Tensor], node: fx.Node, choice: str | int
    ) -> float:
        if isinstance(choice, str):
            weight = operand(node, 1)
            name = str(weight.target)
            quantized = fitted(program, node, name, choice)
            values = {weight: quantized.dequantize().reshape(program.tensors[name].shape)}
            bias, corrected = bias_of(node), corrected_bias(program, node, name, quantized)
            if bias is not None and corrected is not None:
                values[bias] = corrected
            return noise_power(ablation.output(values=values), ablation.reference)
        group = ops.time_group(inputs["timestep"], program.facts["time-groups"])
        scale, zero = activation_parameters(program, node.name, choice)
        changed = ops.fake_quantize(ablation.value(node), scale, zero, group, choice)
        readers = [n for n in program.quantizable if input_edge(n) is node]
        return noise_power(ablation.output(operands=dict.fromkeys(readers, changed)), ablation.reference)


def _key(name: str, part: int) -> str:
    """Under which a result is kept: by its task alone where one part holds all inputs, as it mostly does."""
    return f"{name} part {part}" if part else name


def _inputs_held(program: Program) -> int:
    """How many inputs' values fit in memory at once; the measurement is split where that is not all of them."""
    values = [v for v in shapes(program, 1).values() if isinstance(v, Tensor)]
    return max(1, HELD_BYTES // sum(v.numel() * v.element_size() for v in values))


def _read(program: Program) -> set[str]:
    return {str(n.target) for n in program.graph.nodes if n.op == "get_attr"}
