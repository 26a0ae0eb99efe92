"""Bit allocation: an integer program gives every layer its format."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from torch import fx

from mpq_compiler import formats
from mpq_compiler.allocation import costs, lagrangian, pose, sensitivity_table
from mpq_compiler.allocation.ends import ends
from mpq_compiler.allocation.pose import SCORES, Terms
from mpq_compiler.allocation.problem import InfeasibleError, Problem, Solution
from mpq_compiler.allocation.rerank import Reranker, Solved
from mpq_compiler.allocation.reuse_choice import Candidate, candidates
from mpq_compiler.allocation.sensitivity_table import CONTENT, QUALITY
from mpq_compiler.allocation.solver import TIME_LIMIT, solve
from mpq_compiler.analysis.noise_power import PIECE, noise_of_program, usual_inputs
from mpq_compiler.analysis.reuse_losses import REUSE_LOSSES
from mpq_compiler.formats.activation import LEAST_FLOAT_BITS
from mpq_compiler.ir import provenance
from mpq_compiler.ir.costs import average_bits, stored_bytes, weight_path
from mpq_compiler.ir.edges import attention_edges, dynamic_edges, input_edge
from mpq_compiler.ir.findings import ALLOCATION, LATENCY, SENSITIVITY, Losses, LossTable, SensitivityTable
from mpq_compiler.ir.graph import CONTRACTIONS, softmax, weight_of
from mpq_compiler.ir.program import PARAMETERS, ActivationPlan, Program, Stage, TensorStore, WeightPlan
from mpq_compiler.ir.reuse import REUSE
from mpq_compiler.pipeline.demand import TRIAL, USUAL, Asked, Demand, fitting, searching
from mpq_compiler.pipeline.passes import Contract, Pass, Role
from mpq_compiler.pipeline.realize import realize
from mpq_compiler.pipeline.session import LayerTimes, Session, Times
from mpq_compiler.quantization.fitting import FitCache
from mpq_compiler.quantization.requests import Activations, Requests
from mpq_compiler.quantization.statistics import (
    CALIBRATION,
    GRAM,
    MOMENTS,
    RANGE,
    VALUES,
    VALUES_PER_EDGE,
    VALUES_PER_INPUT,
    Statistic,
)
from mpq_compiler.support.errors import BudgetError, UserError
from mpq_compiler.targets.numerics import FLOAT

ORTHOGONALITY = "orthogonality"
"""The name of the objective, and of the pass that it needs."""
ADDITIVE_DB = 3.0
"""The difference in dB between a plan's noise and the sum of its losses from which on there is a note.

Destroyed networks are off by as much.
"""
UNQUANTIZED = 16
"""The fewest bits of activations that leave them float, where all have one width."""


@dataclass(frozen=True)
class BitAllocation(Pass):
    """Chooses a weight format and an activation width for every layer: least summed noise power under the budgets.

    A multiple-choice program solved to optimality with HiGHS (MixDQ, arXiv 2405.17873, section 4.3, in joint form). A
    choice is a pair of weight format and activation width, so that bit operations stay linear; layers that read one
    tensor are linked to one width. Bytes are those of the artifact, overheads included; times are those of the kernels
    that a layer becomes in each format (docs/latency.md). An attention is a choice between float, at 32 bits an
    activation, and q, k, v and probabilities of one width; an edge that a layer reads too has the layer's width.

    With ``ratios`` metrics are decoupled as in the paper: content layers (`mixdq_groups`) have a budget of their own,
    so many times the bits of the others. Of the programs that the ratios give, and of the one with a common budget,
    that is taken whose images are nearest to the float model's; then the same for ``activation_ratios``.

        %mid_block_attentions_0_to_q = aten.linear(%mid_block_attentions_0_group_norm, .weight, .bias)
      =>
        %mid_block_attentions_0_to_q = aten.linear(%mid_block_attentions_0_group_norm, ...)  ...  w int3  a u8/t3 ...
    """

    contract: ClassVar[Contract] = Contract.IDENTICAL
    role: ClassVar[Role | None] = Role.ALLOCATES
    settings: ClassVar[Mapping[str, str]] = {
        "weights": "weights",
        "bytes": "bytes",
        "activations": "activations",
        "bops": "bops",
        "latency": "latency",
        "objective": "objective",
        "plan": "given",
    }
    requires: ClassVar[frozenset[str]] = frozenset({"time-groups"})
    provides: ClassVar[frozenset[str]] = frozenset({"plan"})
    statistics: ClassVar[frozenset[Statistic]] = frozenset({RANGE, VALUES, MOMENTS})

    weights: float | None = None
    """Budget in true average bits: all stored bytes over the number of parameters."""
    bytes: int | None = None
    """Budget in stored bytes."""
    activations: float = 8.0
    """Budget in average bits of the activations that layers read, and attentions where they may be quantized."""
    mixed: bool = True
    """Chooses the width of each activation; else all have the budget's, a whole number of bits, as in most methods."""
    ends: int | None = None
    """Bits of weights and activations of the first and last layers and of the time's embedding (`allocation.ends`), as
    published methods have 8 there. With ``mixed`` they count in the average of activations; their bytes always count.
    None: what the budgets make of them."""
    bops: float | None = None
    """Budget in bit operations per sample and step."""
    latency: float | None = None
    """Budget in milliseconds of a call on the target."""
    uniform: str | None = None
    """One format for every layer, whatever it costs: no program is solved."""
    given: bool = False
    """The plan is given (`mpqc compile --plan`): no program is solved, and nothing needs measuring."""
    dynamic: bool = False
    """Scales for each token, computed at run time, for linear layers; edges that convolutions or quantized attentions
    read stay static."""
    attention: int | None = None
    """Bits of q, k, v and the probabilities of attentions; none leaves them float."""
    activation_format: Literal["int", "float"] = "int"
    """float: activations are small floats of so many bits, E2M1 of 4 and the best of E2M5 to E5M2 of 8 (arXiv
    2408.06995). Simulated: no target has kernels for them, and layers compute in float on what is rounded."""

    objective: Literal["noise", "paper-db", "scores", "scores-program", "orthogonality"] = "noise"
    """The sum over the layers that the plan is chosen by. ``noise``: noise power, made least. ``paper-db``: SQNR in
    dB, made largest as in the paper; it is no sum of any noise, and worse by far (docs/recipes/mixdq.md).
    ``scores``: the scores of `predict-scores`, where each unit takes the formats of the largest score less a price of
    its bytes, and the price is the least that meets the budget (Qua2SeDiMo). ``scores-program``: the same scores, and
    the integer program decides. With scores all activations have the same whole width, at most 8, or stay float from
    16 on. ``orthogonality``: the bits that layers lack, weighted by the importance that `orthogonality` gave them,
    without a sensitivity (docs/recipes/orthogonality.md)."""
    ratios: tuple[float, ...] = ()
    """Bits a weight of content layers over those of the other layers: each is tried, the best is taken. Empty: one
    budget."""
    activation_ratios: tuple[float, ...] = ()
    """Bits of the activations of content layers over those of the other layers: each is tried, the best is taken."""
    images: int = 8
    """Images that judge the ratios, each against the float model's from the same noise."""
    protected: float = 0.0
    """Share of the activations that are kept from the budget, those that lose most; at least one where it is not 0."""
    protected_as: Literal["float", "widest"] = "float"
    """Protected activations stay float, and their layers compute in float; or have the widest of the measured widths,
    which counts in the average."""

    def __post_init__(self) -> None:
        if self.uniform is not None:
            formats.get(self.uniform)
        for option, most in (("ratios", 16), ("activation_ratios", 16), ("protected", 1)):
            if getattr(self, option):
                self.require(option, 0 if option == "protected" else 1 / most, most)
        self.require("images", 1)
        given = {o: getattr(self, o) for o in ("bops", "ratios", "activation_ratios", "protected")}
        for option, asked in (given | {"objective": self.objective == "paper-db"}).items():
            if self.uniform is not None and asked:
                raise UserError(f"bit-allocation{{uniform}} solves no program, which '{option}' is an option of")
        if self.protected and self.protected_as == "float" and self.latency is not None:
            raise UserError("bit-allocation{protected}: layers of float activations have no times: protected_as=widest")
        if self._unquantized and self.latency is not None:
            raise UserError(
                f"bit-allocation{{activations={self.activations:g}}}: layers of float activations have no times, which "
                "a budget of them needs: 8 bits at most"
            )
        if self.given and (self.uniform is not None or self.scored):
            option = "uniform" if self.uniform is not None else "objective"
            raise UserError(f"a given plan decides on every layer: take a recipe without bit-allocation{{{option}}}")
        if self.scored:
            here = f"bit-allocation{{objective={self.objective}}}"
            others = ("bops", "latency", "ratios", "activation_ratios", "protected", "attention", "uniform", "ends")
            for option in others:
                if getattr(self, option):
                    raise UserError(f"{here} has a budget of bytes alone: leave '{option}' out")
        if self.objective == ORTHOGONALITY and (self.attention or self.uniform):
            option = "attention" if self.attention else "uniform"
            raise UserError(
                f"bit-allocation{{objective={ORTHOGONALITY}}} knows importances of layers alone: leave '{option}' out"
            )
        self.require("attention", 2, 8)
        self.require("ends", 2, 8)
        self.require("activations", 2)
        if self.alike and self.activations < UNQUANTIZED and self.activations % 1:
            raise UserError(
                f"bit-allocation{{activations={self.activations:g}}}: all activations have one width here; give "
                "a whole number of bits"
            )
        for option in ("weights", "bytes", "bops", "latency"):
            self.require(option, 0)
        if self.activation_format == "int":
            return
        self.require("activations", LEAST_FLOAT_BITS)
        for option in ("attention", "latency", "dynamic"):
            if getattr(self, option):
                raise UserError(
                    f"bit-allocation{{{option}}} and activation_format=float exclude each other: small floats are "
                    "simulated in the static inputs of layers, and have no times"
                )

    @property
    def alike(self) -> bool:
        """Whether all activations have one width, but for what options give another."""
        return self.uniform is not None or self.scored or not self.mixed

    @property
    def scored(self) -> bool:
        """Whether weights are chosen by the scores of `predict-scores`."""
        return self.objective.startswith("scores")

    @property
    def measures_together(self) -> bool:
        """Whether the whole plan is rounded and its noise measured, beside the sum of losses that chose it."""
        return self.uniform is None and not self.given and self.objective in ("noise", "paper-db")

    @property
    def _width(self) -> int:
        """The bits of the activations where all have one width; 0 leaves them float."""
        return 0 if self.activations >= UNQUANTIZED else int(min(self.activations, 8))

    @property
    def _unquantized(self) -> bool:
        """Whether a program leaves all activations float."""
        return not self.mixed and self.uniform is None and not self.scored and not self._width

    @property
    def floating(self) -> bool:
        """Whether activations are small floats."""
        return self.activation_format == "float"

    def requests(self) -> Requests:
        fine = self.uniform is not None and formats.get(self.uniform).bits >= 8  # whole moments gain nothing
        kind = Activations.FLOATING if self.floating else Activations.DYNAMIC if self.dynamic else Activations.STATIC
        statistics = self.statistics if fine else self.statistics | {GRAM}
        return Requests(statistics, activations=kind, attention=self.attention is not None)

    def demand(self, asked: Asked) -> Demand:
        sizes, edges = asked.sizes, len({layer.edge for layer in asked.sizes.layers})
        values = max(VALUES_PER_EDGE, asked.rows * VALUES_PER_INPUT)
        found = replace(searching(edges * values), serial=True)
        if self.measures_together:
            found += fitting(sizes.layers, [formats.get(USUAL)], asked.requests.rounding)
            count = min(usual_inputs(sizes.parameters), asked.rows)
            found += asked.running(count, PIECE)
            # weights are rounded for each piece
            found += Demand(traffic=TRIAL * sizes.numbers * -(-count // PIECE), disk=sizes.numbers)
        return found

    def run(self, program: Program, session: Session) -> Program:
        program = program.fork(stage=Stage.PLANNED)
        if self.uniform is not None:
            paths = {str(weight_path(node)) for node in program.quantizable}
            choices = dict.fromkeys(paths, (formats.get(self.uniform).name, self._width))
            if self.ends is not None:
                kept = formats.get(f"int{self.ends}").name, self._width and self.ends
                choices |= dict.fromkeys(ends(program), kept)
            quantized = {n.name for n in program.attentions if self.attention is not None}
        elif self.given:
            choices, quantized = self._by_plan(program, session.plan)
        elif self.scored:
            choices, quantized = self._by_scores(program), set()
        else:
            choices, quantized = self._solve(program, session)
        program = self._planned(program, choices, quantized, session.fits)
        if self.measures_together:
            self._measure_together(program, session)
            self._note_additivity(program, session)
        self._check_uniform(program)
        self._note_latencies(program, session)
        return program

    def _planned(
        self, program: Program, choices: dict[str, tuple[str, int]], quantized: set[str], fits: FitCache
    ) -> Program:
        """Writes the plans of choices into a copy of the program.

        choices: format and activation bits (0 for float) of each layer. quantized: the attentions to quantize.
        fits: the fits that are known.
        """
        program = program.fork()
        sites: dict[str, list[fx.Node]] = {}
        for node in program.quantizable:
            sites.setdefault(str(weight_path(node)), []).append(node)
        dynamic = dynamic_edges(program, self.attention is not None) if self.dynamic else frozenset()
        for path, nodes in sites.items():
            name, bits = choices[path]
            program.weights[path] = WeightPlan(name, tuple(n.name for n in nodes))
            for node in nodes:
                edge = input_edge(node).name
                if not bits and (formats.get(name).integer or self.floating):
                    share = f"its activation is protected, among the {self.protected:.0%} that lose most: "
                    reason = share if self.protected else "activations of 16 bits and more are not quantized: "
                    program.fallbacks[node.name] = f"{reason}it stays float, and the layer computes in float"
                    continue
                if self.floating:
                    _plan_floats(program, fits, edge, bits)
                    kind = program.activations[edge].kind
                    program.fallbacks[node.name] = (
                        f"{kind} activations are simulated: rounded to {kind} in float, and the layer computes in float"
                    )
                    continue
                if not formats.get(name).integer:
                    program.fallbacks[node.name] = f"{name} weights have no integer kernel: the layer computes in float"
                    continue
                _plan_activation(program, fits, edge, bits, edge in dynamic)
        if self.attention is not None:
            self._plan_attentions(program, fits, quantized, self.attention)
        for node in program.graph.nodes:
            if node.target in CONTRACTIONS and weight_of(node) is None:
                program.fallbacks[node.name] = "grouped convolutions and computed weights have no quantized kernel"
        return program

    def _plan_attentions(self, program: Program, fits: FitCache, quantized: set[str], bits: int) -> None:
        for node in program.attentions:
            if node.name not in quantized:
                program.fallbacks[node.name] = "attention in float: the budgets allow it, and it costs nothing"
                continue
            for name in (*(edge.name for edge in attention_edges(node)), softmax(node.name)):
                _plan_activation(program, fits, name, bits)

    def _solve(self, program: Program, session: Session) -> tuple[dict[str, tuple[str, int]], set[str]]:
        """Solves the program: weight format and activation bits of each layer, and the attentions to quantize."""
        measured = self._measured(program)
        table: SensitivityTable = {
            **measured,
            **costs.describe(program, self.dynamic, _formats(measured), self.floating),
        }
        table = self._with_given(table, program)
        table = self._with_latencies(table, program, session)
        table["attention"] = self._attention_losses(program, table.get("attention", {}))
        if self.dynamic != table.get("dynamic", False):
            kinds = ("dynamic", "static") if table.get("dynamic") else ("static", "dynamic")
            raise UserError(
                f"the sensitivities are those of {kinds[0]} activations, and bit-allocation plans {kinds[1]} ones: "
                f"measure them again with bit-allocation{{dynamic={str(self.dynamic).lower()}}} in the pipeline"
            )
        if self.floating != table.get("floating", False):
            kinds = ("small floats", "integers") if table.get("floating") else ("integers", "small floats")
            raise UserError(
                f"the sensitivities are those of activations in {kinds[0]}, and bit-allocation plans {kinds[1]}: "
                f"measure them again with bit-allocation{{activation_format={self.activation_format}}} in the pipeline"
            )
        limit = pose.byte_limit(table["parameters"], self.weights, self.bytes)
        spared = {e.name for n in program.attentions for e in attention_edges(n)} if self.attention is not None else ()
        share = 1.0 if self._unquantized else self.protected
        protected = pose.most_sensitive(table, share, spared)
        widest = max(int(bits) for losses in table["activations"].values() for bits in losses)
        kept = widest if self.protected_as == "widest" and not self._unquantized else None
        terms = Terms(self.objective == "paper-db", protected=dict.fromkeys(protected, kept))

        def posed(
            terms: Terms, table: SensitivityTable = table, latency: float | None = self.latency
        ) -> dict[str, Any]:
            width = self.activations if self.mixed else None
            return pose.problem(table, limit, width, self.bops, latency, terms)

        def solved(terms: Terms) -> Solved:
            def whole() -> Solved:
                return Solved(terms, problem := posed(terms), self._solved(problem, table))

            def reusing(candidate: Candidate) -> Solved:
                problem = candidate.added(posed(terms, candidate.table(table)))
                return Solved(terms, problem, self._solved(problem, table), candidate)

            return self._with_reuse(program, session, whole, reusing)

        def planned(solution: Solution) -> Program:
            return self._planned(program, *_choices_of(solution, table), session.fits)

        reranker = Reranker(program, session, self.images, planned)
        best = self._best(program, table, terms, solved, reranker)
        if not best.solution.optimal:
            program.note(
                f"the program was not solved to the end within {TIME_LIMIT:g} s: losses are within "
                f"{best.solution.gap:.1%} of the least, and another run may find another plan"
            )
        program.facts[ALLOCATION] = {
            **best.solution.to_json(),
            "objective": _noise(posed(replace(best.terms, decibels=False), latency=None), best.solution),
            "problem": best.problem,
            **({"candidates": reranker.judged} if reranker.judged else {}),
        }
        chosen, quantized = _choices_of(best.solution, table)
        self._note_reuse(program, best, {path: name for path, (name, _) in chosen.items()}, session)
        return chosen, quantized

    def _with_reuse(
        self,
        program: Program,
        session: Session,
        whole: Callable[[], Solved],
        reusing: Callable[[Candidate], Solved],
    ) -> Solved:
        """Solves for the bits, and for what steps reuse where that was measured and there is a budget of time.

        whole: solves without reuse. reusing: solves for a candidate. BudgetError: no solution keeps the budgets.
        """
        losses, known = program.facts.get(REUSE_LOSSES), self._layer_times(session)
        if self.latency is None or losses is None or known is None:
            return whole()
        if self.objective != "noise":
            raise UserError(
                f"bit-allocation{{objective={self.objective}}} sums something else than noise, which reuse is measured "
                "by: leave --reuse or the objective out"
            )
        best: Solved | None = None
        refusals: list[BudgetError] = []
        bounds: dict[str, float] = {}  # what bits lose at the least: where the most steps reuse
        for each in (None, *candidates(losses, self._times(program, known), program)):
            bound = -math.inf if each is None else bounds.get(each.cut.node, -math.inf) + each.least
            if best is not None and bound >= best.solution.objective:
                continue
            try:
                found = whole() if each is None else reusing(each)
            except BudgetError as error:
                refusals.append(error)
                continue
            if each is not None:
                bounds.setdefault(each.cut.node, found.solution.objective - each.loss(found.solution.choices))
            if best is None or found.solution.objective < best.solution.objective:
                best = found
        if best is None:
            raise refusals[1] if len(refusals) > 1 else refusals[0]
        return best

    def _note_reuse(self, program: Program, best: Solved, formats: Mapping[str, str], session: Session) -> None:
        """Notes what steps reuse, where a solution has them reuse anything."""
        program.facts.pop(REUSE, None)
        known, candidate, choices = self._layer_times(session), best.reuse, best.solution.choices
        if candidate is None or known is None or not (gaps := candidate.chosen(choices)):
            return
        schedule = candidate.losses.schedule(candidate.cut, gaps)
        program.facts[REUSE] = schedule
        steps, saved = len(schedule.timesteps), candidate.inside.saved(self._times(program, known), formats)
        program.facts[ALLOCATION] |= {
            "reuse": {
                "node": candidate.cut.node,
                "share": round(candidate.cut.share, 3),
                "steps": steps,
                "reused": schedule.reused,
                "loss": candidate.loss(choices),
                "saved_ms": schedule.reused / steps * saved / 1e3,
                "computed": [step + 1 for step, sources in enumerate(schedule.sources) if not sources],
            }
        }

    def _measured(self, program: Program) -> LossTable:
        """The table of the losses to sum. UserError: no pass has measured them."""
        fact = sensitivity_table.ORTHOGONALITY if self.objective == ORTHOGONALITY else SENSITIVITY
        if fact not in program.facts:
            name = fact.name
            raise UserError(f"pass 'bit-allocation' needs '{name}': put {name} before it, or set uniform=int8")
        return program.facts[fact]

    def _measure_together(self, program: Program, session: Session) -> None:
        """Measures the noise of the whole plan beside the sum of its losses."""
        if "content" in program.facts[SENSITIVITY]:
            return  # losses of two units are no noise together
        allocation, most = program.facts[ALLOCATION], program.facts[SENSITIVITY].get("inputs")
        if most is None:
            program.note(
                "whether the losses of the sensitivity table add up to the plan's noise is not checked: the table does "
                "not say on how many inputs it was measured"
            )
            return
        inputs = min(most, len(program.facts[CALIBRATION].timesteps))
        changed = realize(program.fork(tensors=TensorStore(program.tensors)), session)
        expected, measured = allocation["objective"], noise_of_program(program, changed, inputs, session)
        difference = 10 * math.log10(measured / expected) if min(measured, expected) > 0 else None
        program.facts[ALLOCATION] = allocation | {
            "additivity": {"expected": expected, "measured": measured, "difference_db": difference, "inputs": inputs}
        }

    def _note_additivity(self, program: Program, session: Session) -> None:
        """Notes where the noise of the whole plan and the sum of its losses are far apart."""
        together = program.facts[ALLOCATION].get("additivity", {})
        difference, inputs = together.get("difference_db"), together.get("inputs")
        if difference is not None and abs(difference) > ADDITIVE_DB:
            remedy = "give more bits (--weights, --activations), for large errors do not add up"
            if session.sensitivity is not None:
                remedy = "measure the table again, in this pipeline and on this calibration"
            elif difference < 0:
                remedy = f"measure on more inputs (sensitivity{{inputs={2 * inputs}}})"
            program.note(
                f"the noise of the plan is {difference:+.1f} dB from the sum of its losses, by which it was chosen, so "
                f"that another plan may be better: {remedy}"
            )

    def _by_plan(self, program: Program, plan: Mapping[str, str] | None) -> tuple[dict[str, tuple[str, int]], set[str]]:
        """Takes a given plan. UserError: there is none, or it is another model's."""
        if plan is None:
            raise UserError("bit-allocation{given} needs a plan: `mpqc compile --plan PLAN.json`")
        paths = {str(weight_path(node)): input_edge(node).name for node in program.quantizable}
        attentions = {n.name for n in program.attentions} & plan.keys()
        for lacking, what in ((paths.keys() - plan.keys(), "lacks"), (plan.keys() - paths.keys() - attentions, "has")):
            if lacking:
                raise UserError(f"the plan is another model's: it {what} '{min(lacking)}', of {len(lacking)} layers")
        split = {name: _split(name, choice) for name, choice in plan.items()}
        widths: dict[str, tuple[int, str]] = {}
        for path, edge in paths.items():
            if bits := split[path][1]:
                other, first = widths.setdefault(edge, (bits, path))
                if bits != other:
                    raise UserError(
                        f"the plan has {other} bits for what '{first}' reads, and {bits} where '{path}' reads it"
                    )
        quantized = {name for name in attentions if split[name][1]}
        if wrong := next((name for name in quantized if split[name][1] != self.attention), None):
            bits = split[wrong][1]
            raise UserError(f"the plan has '{wrong}' in {bits} bits: compile with bit-allocation{{attention={bits}}}")
        return {path: split[path] for path in paths}, quantized

    def _by_scores(self, program: Program) -> dict[str, tuple[str, int]]:
        """Chooses weight format and activation bits of each layer by the scores of `predict-scores`."""
        if SCORES not in program.facts:
            raise UserError(
                f"bit-allocation{{objective={self.objective}}} needs 'scores': put predict-scores before it"
            )
        units = program.facts[SCORES]["units"]
        table = costs.describe(program, self.dynamic, _scored(program), self.floating)
        limit = pose.byte_limit(table["parameters"], self.weights, self.bytes)
        document = pose.unit_problem(table, units, limit)
        problem = Problem.from_json(document)
        found = solve(problem) if self.objective == "scores-program" or limit is None else lagrangian.solve(problem)
        chosen = found.choices.items()
        names = {
            path: name for unit, all_ in chosen for path, name in zip(unit.split(" "), all_.split(" "), strict=True)
        }
        program.facts[ALLOCATION] = {**found.to_json(), "choices": names}
        if all(len(unit["layers"]) == 1 for unit in units):
            program.facts[ALLOCATION]["problem"] = document
        return {path: (name, self._width) for path, name in names.items()}

    def _best(
        self,
        program: Program,
        table: SensitivityTable,
        terms: Terms,
        solved: Callable[[Terms], Solved],
        reranker: Reranker,
    ) -> Solved:
        """Finds the best ratio of the weights' bits and then, with that one, of the activations' bits."""
        scans: dict[str, tuple[float, ...]] = {"ratio": self.ratios, "activation_ratio": self.activation_ratios}
        apart = "content" in table
        if apart and not all(scans.values()):
            raise UserError(
                "the losses of content layers are of another unit than those of quality layers, so that both need "
                "budgets of their own: give bit-allocation{ratios} and {activation_ratios}, or leave "
                "sensitivity{content} out"
            )
        if any(scans.values()) and {layer["group"] for layer in table["layers"]} != {CONTENT, QUALITY}:
            program.note(
                "there is nothing to decouple: the model has no content layers (feed-forward and cross-attention of "
                "transformer blocks) beside others, and one program is solved for all layers"
            )
            scans = {}
        if all(len(losses) == 1 for losses in table["activations"].values()):
            scans.pop("activation_ratio", None)  # of a single width nothing is to be shared out
        best = solved(replace(terms, ratio=1.0, activation_ratio=1.0) if apart else terms)
        for option, ratios in scans.items():
            found = [best]
            for ratio in ratios:
                try:
                    found.append(solved(replace(best.terms, **{option: ratio})))  # type: ignore[arg-type]
                except InfeasibleError:
                    continue  # the ratio leaves a group less than its least
            best = reranker.best(found)
        return best

    def _layer_times(self, session: Session) -> LayerTimes | None:
        """Where to ask for the times of layers; None where there are none. UserError: a budget without times."""
        if session.latency is not None and not self.floating:
            return session.latency
        if self.latency is not None:
            raise UserError(
                "a budget of time needs a target with kernels of ours and a latency table of it: compile with "
                "`mpqc compile --latency`"
            )
        return None

    def _with_latencies(self, table: SensitivityTable, program: Program, session: Session) -> SensitivityTable:
        """Adds the times of the formats to a table, where there are any. UserError: a budget without times."""
        if (known := self._layer_times(session)) is None:
            return table
        times = self._times(program, known)
        return sensitivity_table.with_latencies(table, times.fixed, times.layers)

    def _times(self, program: Program, latency: LayerTimes) -> Times:
        """The times of the formats to choose from."""
        if self.uniform is not None:
            names = [formats.get(self.uniform).name]
        else:
            names = _scored(program) if self.scored else _formats(self._measured(program))
        return latency.costs(program, names, self.dynamic)

    def _solved(self, problem: dict[str, Any], table: SensitivityTable) -> Solution:
        """Solves a problem. InfeasibleError: none; the sentence has the least latency within the other budgets."""
        try:
            return solve(Problem.from_json(problem))
        except InfeasibleError as error:
            least = next((value for budget, value in error.least.items() if budget.cost == "latency"), None)
            if least is None:
                raise
            whole = pose.up((least + table["fixed_microseconds"]) / 1e3)
            raise InfeasibleError(
                f"a latency of {self.latency:g} ms cannot be met together with the other budgets: with them kept the "
                f"smallest is {whole} ms",
                error.least,
            ) from error

    def _note_latencies(self, program: Program, session: Session) -> None:
        """Notes the time of the plan, whole and by layer. UserError: a uniform plan exceeds the budget."""
        if (known := self._layer_times(session)) is None:
            return
        times = self._times(program, known)
        total = (times.fixed + sum(times.layers[path][plan.format] for path, plan in program.weights.items())) / 1e3
        whole, total = total, total - program.facts.get(ALLOCATION, {}).get("reuse", {}).get("saved_ms", 0.0)
        if self.latency is not None and total > self.latency * (1 + 1e-9):
            raise UserError(
                f"uniform {self.uniform} takes {total:.4g} ms, more than the budget of {self.latency:g} ms; use the "
                "default recipe, which mixes formats"
            )
        fixed = times.fixed / 1e3
        program.facts[LATENCY] = {"ms": total, "whole_ms": whole, "fixed_ms": fixed, "budget_ms": self.latency}
        provenance.note(program, provenance.PROGRAM, self.name(), latency=program.facts[LATENCY])
        for path in program.weights:
            provenance.note(program, path, self.name(), microseconds=times.layers[path])

    def _with_given(self, table: SensitivityTable, program: Program) -> SensitivityTable:
        """Keeps the losses of what is left to choose: of ends those of their bits, of all activations one width's."""
        kept = set() if self.ends is None else ends(program)
        weights = dict(table["weights"])
        for path in kept:
            weights[path] = {name: x for name, x in weights[path].items() if formats.get(name).bits == self.ends}
            if not weights[path]:
                raise UserError(
                    f"bit-allocation{{ends={self.ends}}} gives '{path}' a format of {self.ends} bits, and none was "
                    f"measured: measure one with sensitivity{{formats=.../int{self.ends}}}, or leave the option out"
                )
        edges = {input_edge(n).name for n in program.quantizable if str(weight_path(n)) in kept}
        activations = {}
        for edge, losses in table["activations"].items():
            common = None if self.mixed else min(self.activations, 8)
            width = self.ends if edge in edges else common
            if width is not None and not self._unquantized:
                losses = self._of_width(losses, f"{width:g}", f"ends={width}" if edge in edges else "mixed=false")
            activations[edge] = losses
        return {**table, "weights": weights, "activations": activations}

    def _of_width(self, losses: Losses, width: str, option: str) -> Losses:
        """Keeps the loss of activations of a width. UserError: it was not measured."""
        if width not in losses:
            what = "all activations" if option == "mixed=false" else "the activations of the ends"
            raise UserError(
                f"bit-allocation{{{option}}} gives {what} {width} bits, which was not measured: measure it with "
                f"sensitivity{{activations={width}}}, or leave the option out"
            )
        return {width: losses[width]}

    def _attention_losses(self, program: Program, measured: dict[str, Losses]) -> dict[str, Losses]:
        """Keeps the measured losses of attentions at the width that is asked for only."""
        if self.attention is None:
            return {}
        width = str(self.attention)
        missing = [n.name for n in program.attentions if width not in measured.get(n.name, {})]
        if missing:
            raise UserError(
                f"the sensitivities hold no attention '{missing[0]}' at {width} bits: measure them with "
                f"sensitivity{{activations={width}}} before bit-allocation{{attention={width}}}"
            )
        return {n.name: {width: measured[n.name][width]} for n in program.attentions}

    def _check_uniform(self, program: Program) -> None:
        """Raises a UserError where a uniform plan exceeds a budget of bytes."""
        limit = pose.byte_limit(program.facts[PARAMETERS], self.weights, self.bytes)
        stored = stored_bytes(program)
        if limit is not None and stored > limit:
            bits = average_bits(stored, program.facts[PARAMETERS])
            raise UserError(
                f"uniform {self.uniform} takes {stored} bytes ({bits:.3f} true average bits), more than the budget of "
                f"{limit} bytes; use the default recipe, which mixes formats"
            )


def _formats(table: LossTable) -> list[str]:
    """The formats of which a table has losses."""
    return list(dict.fromkeys(name for losses in table["weights"].values() for name in losses))


def _scored(program: Program) -> list[str]:
    """The formats that have scores."""
    variants = (variant for unit in program.facts[SCORES]["units"] for variant in unit["variants"])
    return sorted({name for variant in variants for name in variant.split(" ")})


def _noise(problem: dict[str, Any], solution: Solution) -> float:
    """The summed loss of a solution's choices in another problem than its own."""
    losses = {(layer["name"], c["name"]): c["loss"] for layer in problem["layers"] for c in layer["choices"]}
    return math.fsum(losses[choice] for choice in solution.choices.items() if choice in losses)


def _split(layer: str, choice: str) -> tuple[str, int]:
    """Splits a choice of an allocation, "int4 u8", into format and width (0 for float); of an attention, "u8" too."""
    *name, width = choice.split(" ")
    if len(name) > 1 or not (width == FLOAT or re.fullmatch("[uf][2-8]", width)):
        raise UserError(f"the plan has '{choice}' for '{layer}', which is no choice as 'int4 u8' and 'fp8 float' are")
    return (formats.get(name[0]).name if name else "", 0 if width == FLOAT else int(width[1:]))


def _choices_of(solution: Solution, table: SensitivityTable) -> tuple[dict[str, tuple[str, int]], set[str]]:
    """Splits a solution into format and width (0 for float) of each layer, and the attentions to quantize."""
    quantized = {name for name in table["attention"] if solution.choices[name] != FLOAT}
    return {path: _split(path, solution.choices[path]) for path in table["weights"]}, quantized


def _plan_floats(program: Program, fits: FitCache, edge: str, bits: int) -> None:
    if edge not in program.activations:
        exponent, scale = fits.float_parameters(program, edge, bits)
        name = program.tensors.add(f"{edge}:scale", scale)
        program.activations[edge] = ActivationPlan(bits, name, None, exponent=exponent)


def _plan_activation(program: Program, fits: FitCache, edge: str, bits: int, dynamic: bool = False) -> None:
    if edge in program.activations:
        return
    if dynamic:
        program.activations[edge] = ActivationPlan(bits, None, None, dynamic=True)
        return
    scale, zero = fits.activation_parameters(program, edge, bits)
    program.activations[edge] = ActivationPlan(
        bits, program.tensors.add(f"{edge}:scale", scale), program.tensors.add(f"{edge}:zero_point", zero)
    )
