"""Attentions in bfloat16 or in 8 bits, where the plan is not made worse by it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from torch import fx

from mpq_compiler import decisions, ops
from mpq_compiler.ablation import Ablation, noise_power
from mpq_compiler.allocation import Problem, solve
from mpq_compiler.calibration import Calibration, attention_arguments, batches
from mpq_compiler.errors import UserError
from mpq_compiler.numerics import BF16, F32, INT8, NUMERICS
from mpq_compiler.pass_manager import Contract, Pass, Session
from mpq_compiler.passes.insert_fake_quant import InsertFakeQuant
from mpq_compiler.program import Program, operand, run, shapes, softmax

TIME = {F32: 1.0, BF16: 0.6, INT8: 0.45}
"""Of an attention relative to float32: medians of benchmarks/attention.py on x86-64-avx512vnni."""
DIGITS = 6
"""Significant digits kept of a noise power, so that the last bits of a sum never decide."""


@dataclass(frozen=True)
class Numerics(Pass):
    """Chooses the numerics of each attention that stays float, under ``mode=fast``: the least time for little noise.

    Each attention is measured in each numerics of ``kinds`` that the target has kernels for, as `sensitivity` measures
    layers: relative noise power of the output over calibration inputs. All choices together may add a share of the
    noise of the plan, which is what `bit-allocation` predicts or, where it solved nothing, what the plan's rounding to
    nearest is measured to cost. Where the fastest numerics for all are beyond that, an integer program finds the
    fastest choice within it. `insert-fake-quant` writes it into the graph. 8 bits are those of SageAttention (arXiv
    2410.02367); their meaning is in `ops.fast_attention`.

        %mid_block_attentions_0_scaled_dot_product_attention = mpq::attention(...)  f32[B,64,64]
      =>
        %mid_block_attentions_0_scaled_dot_product_attention = mpq::attention(...)  f32[B,64,64] ... numerics int8
    """

    contract: ClassVar[Contract] = Contract.IDENTICAL
    requires: ClassVar[frozenset[str]] = frozenset({"plan"})
    provides: ClassVar[frozenset[str]] = frozenset({"numerics"})

    mode: Literal["portable", "fast"] = "portable"
    """portable: float32, the same bits on every CPU target; fast: what the target computes fastest."""
    noise: float = 0.05
    """Share of the plan's noise power that all attentions together may add."""
    kinds: tuple[str, ...] = (BF16, INT8)
    """What to choose from besides float32."""
    inputs: int = 4
    """Calibration inputs on which the output is compared."""

    def __post_init__(self) -> None:
        self.require("noise", 0)
        self.require("inputs", 1)
        for kind in self.kinds:
            if kind not in NUMERICS:
                raise UserError(f"option 'kinds' of pass 'numerics' must be of {', '.join(NUMERICS)}, not '{kind}'")

    def run(self, program: Program, session: Session) -> Program:
        program = program.fork()
        program.facts["numerics"] = {}
        if self.mode == "portable":
            return program
        kinds = [kind for kind in self.kinds if kind in session.numerics]
        calls = [n for n in program.attentions if softmax(n.name) not in program.activations]
        if not kinds:
            program.note("numerics=fast changes nothing: the target has no kernels in bfloat16 or 8 bits")
        if not kinds or not calls:
            return program
        calibration: Calibration = program.facts["calibration"]
        inputs = calibration.select(self.inputs)
        most = self.noise * self._noise_of_plan(program, inputs, session)
        quickest = min(kinds, key=TIME.__getitem__)
        losses = self._measured(program, inputs, calls, [quickest], session)
        if sum(found[quickest] for found in losses.values()) <= most:
            choices = dict.fromkeys(losses, quickest)
        else:
            others = self._measured(program, inputs, calls, [k for k in kinds if k != quickest], session)
            losses = {name: others[name] | found for name, found in losses.items()}
            choices = _fastest(program, calls, losses, most)
        chosen = {name: kind for name, kind in choices.items() if kind != F32}
        program.facts["numerics"] = chosen
        decisions.note(program, decisions.PROGRAM, self.name(), most=most, losses=losses, chosen=chosen)
        count = {kind: sum(c == kind for c in choices.values()) for kind in (F32, *kinds)}
        program.note(
            f"numerics=fast: of {len(calls)} attentions "
            + ", ".join(f"{n} in {kind}" for kind, n in count.items())
            + "; other targets than this one give other bits"
        )
        return program

    def _measured(
        self, program: Program, inputs: dict[str, Any], calls: list[fx.Node], kinds: list[str], session: Session
    ) -> dict[str, dict[str, float]]:
        """Relative noise power of the output with one attention at a time in other numerics."""
        powers: dict[str, dict[str, list[float]]] = {n.name: {kind: [] for kind in kinds} for n in calls}
        parts = list(batches(inputs, 1))
        with session.track("numerics", len(parts)) as advance:
            for batch in parts:
                ablation = Ablation(program, batch)

                def measure(task: tuple[fx.Node, str], ablation: Ablation = ablation) -> float:
                    node, kind = task
                    heads, scale, mask = attention_arguments(node.args)
                    q, k, v = (ablation.value(operand(node, i)) for i in range(3))
                    mask = ablation.value(mask) if isinstance(mask, fx.Node) else None
                    y = ops.attention(q, k, v, heads, scale, mask, kind)
                    return noise_power(ablation.output(values={node: y}), ablation.reference)

                tasks = [(node, kind) for node in calls for kind in kinds]
                for (node, kind), power in zip(tasks, session.map(measure, tasks), strict=True):
                    powers[node.name][kind].append(power)
                advance(1)
        return {
            name: {kind: float(f"{sum(found) / len(found):.{DIGITS - 1}e}") for kind, found in of_kind.items()}
            for name, of_kind in powers.items()
        }

    def _noise_of_plan(self, program: Program, inputs: dict[str, Any], session: Session) -> float:
        allocation = program.facts.get("allocation")
        if allocation is not None:
            return float(allocation["objective"])
        quantized = InsertFakeQuant().run(program, session)
        powers = [noise_power(run(quantized, batch), run(program, batch)) for batch in batches(inputs, 1)]
        return sum(powers) / len(powers)


def _fastest(
    program: Program, calls: list[fx.Node], losses: dict[str, dict[str, float]], most: float
) -> dict[str, str]:
    """The numerics of each attention: least time with at most that much noise in all."""
    sizes = shapes(program, 1)
    layers = []
    for node in calls:
        query, key = (sizes[operand(node, i).name].shape for i in (0, 1))
        macs = 2 * query.numel() * key[1]
        own = {F32: 0.0} | losses[node.name]
        choices = [{"name": kind, "loss": macs * TIME[kind], "costs": {"noise": loss}} for kind, loss in own.items()]
        layers.append({"name": node.name, "group": "attention", "choices": choices})
    problem = {"version": 1, "layers": layers, "budgets": [{"cost": "noise", "max": max(most, 0.0)}]}
    return dict(solve(Problem.from_json(problem)).choices)
