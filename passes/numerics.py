"""Chooses what attentions and float layers compute in, and what is stored between, where the plan stays as good."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, fx

from mpq_compiler import formats
from mpq_compiler.allocation.problem import Problem
from mpq_compiler.allocation.solver import solve
from mpq_compiler.analysis.noise_power import input_weights, mean_power, measurement_key, noise_power, rounded
from mpq_compiler.analysis.perturbation import Ablation
from mpq_compiler.ir import costs, ops, provenance
from mpq_compiler.ir.edges import attention_arguments, input_edge
from mpq_compiler.ir.findings import ALLOCATION, ATTENTION_NUMERICS, STORED_HALVES
from mpq_compiler.ir.graph import function_of, operand, softmax
from mpq_compiler.ir.interpreter import Interpreter, run, shapes
from mpq_compiler.ir.program import Program
from mpq_compiler.pipeline.options import make
from mpq_compiler.pipeline.passes import Contract, Pass, Role
from mpq_compiler.pipeline.session import Session
from mpq_compiler.quantization.statistics import CALIBRATION
from mpq_compiler.support import cache
from mpq_compiler.support.errors import UserError
from mpq_compiler.support.execution import batches
from mpq_compiler.targets.numerics import BF16, F16, F32, INT8, LARGEST_HALF, NUMERICS

TIME = {F32: 1.0, BF16: 0.57, INT8: 0.42}
"""The time of an attention relative to float32: medians over the shapes of benchmarks/results/attention.json, Zen 5.

Models of ARM cores that reorder have 0.38 to 0.51 for 8 bits by sdot, of others 0.70 (benchmarks/arm_static.py)."""
LAYER_TIME = {F32: 1.0, BF16: 0.52}
"""The time of a layer relative to float32: medians over the shapes of benchmarks/results/float_kernels.json, Zen 5."""
PLAN = "plan"
"""The name of the plan's own noise among the results in the cache."""


@dataclass(frozen=True)
class Numerics(Pass):
    """Chooses the numerics of what stays float, under ``mode=fast``: the least time for little noise.

    Attentions may be in each numerics of ``kinds`` that the target has kernels for; linear layers and convolutions
    whose weight format has no integer kernel, in bf16. Each is measured in each, as `sensitivity` measures layers:
    relative noise power of the output over calibration inputs, which the cache keeps. All choices together may add a
    share of the noise of the plan, which is what `bit-allocation` predicts or, where it solved nothing, what the plan's
    rounding to nearest is measured to cost. Where the fastest numerics for all are beyond that, an integer program
    finds the fastest choice within it. `insert-fake-quant` writes it into the graph. 8 bits are those of SageAttention
    (arXiv 2410.02367); their meaning is in `ops.fast_attention`.

    Before that, where the target can store as float16 what its kernels hand on, all values are rounded so: if the noise
    is within that share, the artifact does it wherever no kernel needs more, and the others have what is left.

        %mid_block_attentions_0_scaled_dot_product_attention = mpq::attention(...)  f32[B,64,64]
      =>
        %mid_block_attentions_0_scaled_dot_product_attention = mpq::attention(...)  f32[B,64,64] ... numerics int8
    """

    contract: ClassVar[Contract] = Contract.IDENTICAL
    role: ClassVar[Role | None] = Role.CHOOSES_NUMERICS
    settings: ClassVar[Mapping[str, str]] = {"numerics": "mode"}
    requires: ClassVar[frozenset[str]] = frozenset({"plan"})
    provides: ClassVar[frozenset[str]] = frozenset({"numerics"})

    mode: Literal["portable", "fast"] = "portable"
    """portable: float32, the same bits on every CPU target; fast: what the target computes fastest."""
    noise: float = 0.05
    """Share of the plan's noise power that all choices together may add."""
    kinds: tuple[str, ...] = (BF16, INT8, F16)
    """Candidates besides float32. 8 bits are for attentions only, f16 for what is stored between kernels."""
    inputs: int = 4
    """Calibration inputs on which the output is compared."""

    def __post_init__(self) -> None:
        self.require("noise", 0)
        self.require("inputs", 1)
        for kind in self.kinds:
            if kind not in (known := (*NUMERICS, F16)):
                raise UserError(f"option 'kinds' of pass 'numerics' must be of {', '.join(known)}, not '{kind}'")

    def run(self, program: Program, session: Session) -> Program:
        program = program.fork()
        program.facts[ATTENTION_NUMERICS] = {}
        if self.mode == "portable":
            return program
        kinds = [kind for kind in self.kinds if kind in session.numerics]
        attentions = [n for n in program.attentions if softmax(n.name) not in program.activations]
        calls = [*attentions, *(_float_layers(program) if BF16 in kinds else ())]
        if not kinds:
            program.note("numerics=fast changes nothing: the target has no kernels in bfloat16 or 8 bits")
        if not kinds or not (calls or F16 in kinds):
            return program
        measured = _Measured(self, program, session)
        most = left = self.noise * measured.of_plan()
        if F16 in kinds:
            power = measured.of_halves()
            halves = program.facts[STORED_HALVES] = power <= most
            left -= power if halves else 0.0
            provenance.note(program, provenance.PROGRAM, self.name(), halves=power)
            program.note(f"numerics=fast: {_said_of_halves(power, most)}")
        of_call = {n.name: [k for k in kinds if k in _times(n)] for n in calls}
        calls = [n for n in calls if of_call[n.name]]
        if not calls:
            return program
        quickest = {n.name: min(of_call[n.name], key=_times(n).__getitem__) for n in calls}
        losses = measured.of_calls([(n, quickest[n.name]) for n in calls])
        if sum(found[quickest[name]] for name, found in losses.items()) <= left:
            choices = dict(quickest)
        else:
            others = [(n, kind) for n in calls for kind in of_call[n.name] if kind != quickest[n.name]]
            for name, found in measured.of_calls(others).items():
                losses[name] = found | losses[name]
            choices = _fastest(program, calls, losses, left)
        chosen = {name: kind for name, kind in choices.items() if kind != F32}
        program.facts[ATTENTION_NUMERICS] = chosen
        provenance.note(program, provenance.PROGRAM, self.name(), most=most, losses=losses, chosen=chosen)
        said = _summary(attentions, choices, [kind for kind in kinds if kind != F16])
        program.note(f"numerics=fast: {said}; other targets than this one give other bits")
        return program


def _said_of_halves(power: float, most: float) -> str:
    """What was found of storing as float16 what kernels hand on, in words."""
    share = f"adds {power:.1e} to the output's noise, and may add {most:.1e}"
    if power <= most:
        return f"what kernels hand on is stored in f16, which {share}"
    return f"what kernels hand on stays in f32: f16 {share}"


def _summary(attentions: list[fx.Node], choices: dict[str, str], kinds: list[str]) -> str:
    """The numbers of attentions and layers in each numerics, in words."""
    calls = {node.name for node in attentions}
    layers = [kind for name, kind in choices.items() if name not in calls]
    found = []
    if calls:
        own = [kind for name, kind in choices.items() if name in calls]
        found = [f"of {len(own)} attentions " + ", ".join(f"{own.count(kind)} in {kind}" for kind in (F32, *kinds))]
    return ", ".join([*found, *([f"of {len(layers)} float layers {layers.count(BF16)} in bf16"] if layers else [])])


def _float_layers(program: Program) -> list[fx.Node]:
    """The linear layers and convolutions whose weight or activation has no integer format, in graph order."""
    plans, found = program.weights, []
    for n in program.quantizable:
        plan, activation = plans.get(str(costs.weight_path(n))), program.activations.get(input_edge(n).name)
        if plan is None or not formats.get(plan.format).integer or activation is None or program.reads_floats(n):
            found.append(n)
    return found


def _times(node: fx.Node) -> dict[str, float]:
    return TIME if node.target is ops.attention else LAYER_TIME


class _Measured:
    """Measures relative noise powers of a program, means over ``inputs`` as `sensitivity` has them, and caches them."""

    def __init__(self, options: Numerics, program: Program, session: Session) -> None:
        self.program, self.session = program, session
        calibration = program.facts[CALIBRATION]
        inputs = calibration.select(options.inputs)
        self.parts, self.expected = list(batches(inputs, 1)), calibration.select_outputs(options.inputs).split(1)
        self.sizes = [float(input_weights(program, part).sum()) for part in self.parts]
        plan = str((sorted(program.weights.items()), sorted(program.activations.items())))
        tables = {n: program.tensors[n] for a in program.activations.values() for n in (a.scale, a.zero_point) if n}
        key = cache.digest("numerics 2", measurement_key(program, inputs, options.inputs), plan, tables)
        self.results = cache.Results("sensitivity", key, session.cache)

    def of_plan(self) -> float:
        """The noise power of the plan itself, with all rounding to nearest."""
        known = self.program.facts.get(ALLOCATION, {}).get("additivity")
        if known is not None:
            return float(known["expected"])
        if PLAN not in self.results:
            quantized = make("insert-fake-quant", {}).run(self.program, self.session)
            powers = [noise_power(run(quantized, batch), run(self.program, batch)) for batch in self.parts]
            self.results[PLAN] = mean_power(powers, self.sizes)
        return float(self.results[PLAN])

    def of_halves(self) -> float:
        """The noise power with every value stored as the nearest float16."""
        powers = []
        for number, (part, expected) in enumerate(zip(self.parts, self.expected, strict=True)):
            key = f"{F16} part {number}"
            if key not in self.results:
                with torch.no_grad():
                    self.results[key] = rounded(noise_power(_Halves(self.program).run(part), expected))
            powers.append(self.results[key])
        return mean_power(powers, self.sizes)

    def of_calls(self, tasks: list[tuple[fx.Node, str]]) -> dict[str, dict[str, float]]:
        """The noise powers with one call at a time in other numerics, by call and numerics."""
        left = [[task for task in tasks if _key(*task, part) not in self.results] for part in range(len(self.parts))]
        if any(left):
            with self.session.track("numerics", sum(map(len, left))) as advance:
                for part, own in enumerate(left):
                    if own:
                        self._measure(part, own, advance)
        found: dict[str, dict[str, float]] = {}
        for node, kind in tasks:
            powers = [self.results[_key(node, kind, part)] for part in range(len(self.parts))]
            found.setdefault(node.name, {})[kind] = mean_power(powers, self.sizes)
        return found

    def _measure(self, part: int, tasks: list[tuple[fx.Node, str]], advance: Any) -> None:
        ablation, lock = Ablation(self.program, self.parts[part]), threading.Lock()

        def measure(task: tuple[fx.Node, str]) -> None:
            node, kind = task
            args = fx.map_arg(node.args, ablation.value)
            if node.target is ops.attention:
                heads, scale, mask = attention_arguments(args)
                y = ops.attention(*args[:3], heads, scale, mask, kind)
            else:
                function = function_of(node)
                y = ops.NUMERICAL.get(function, function)(*args, numerics=kind)
            power = noise_power(ablation.output(values={node: y}), ablation.reference)
            with lock:
                self.results[_key(node, kind, part)] = rounded(power)
                advance(1)

        self.session.map(measure, tasks)


class _Halves(Interpreter):
    """Runs a program all of whose values are stored as kernels that may store halves do: more often than they will."""

    def call(self, node: fx.Node, args: object, kwargs: object) -> object:
        """Calls a node's operator, and stores its result."""
        value = super().call(node, args, kwargs)
        if not isinstance(value, Tensor) or value.dtype != torch.float32 or value.dim() <= 2:
            return value
        return value.clamp(-LARGEST_HALF, LARGEST_HALF).half().float()


def _key(node: fx.Node, kind: str, part: int) -> str:
    return f"{node.name} {kind} part {part}"


def _fastest(
    program: Program, calls: list[fx.Node], losses: dict[str, dict[str, float]], most: float
) -> dict[str, str]:
    """Chooses the numerics of each call: the least time with at most ``most`` noise in all."""
    sizes = shapes(program, 1)
    layers = []
    for node in calls:
        first, second = (sizes[operand(node, i).name].shape for i in (0, 1))
        if node.target is ops.attention:
            macs = 2 * first.numel() * second[1]
        else:
            macs = sizes[node.name].numel() * second[1:].numel()
        own, times = {F32: 0.0} | losses[node.name], _times(node)
        choices = [{"name": kind, "loss": macs * times[kind], "costs": {"noise": loss}} for kind, loss in own.items()]
        layers.append({"name": node.name, "group": "numerics", "choices": choices})
    problem = {"version": 1, "layers": layers, "budgets": [{"cost": "noise", "max": max(most, 0.0)}]}
    return dict(solve(Problem.from_json(problem)).choices)
