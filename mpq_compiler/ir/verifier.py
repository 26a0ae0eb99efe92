"""The rules that every program obeys, checked after each pass.

A rule is a small generator of (node name, what is wrong) with a name and the stages it holds in. Rules of the
structure come first: where one of them is broken the others are not asked, because they could not read the graph.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from mpq_compiler import formats
from mpq_compiler.formats import activation, contract, low_rank
from mpq_compiler.formats import base as formats_base
from mpq_compiler.formats.residual import ResidualFormat
from mpq_compiler.ir import ops, views
from mpq_compiler.ir.aten import aten, interior_permutes
from mpq_compiler.ir.costs import stored_dtype
from mpq_compiler.ir.edges import attention_edges
from mpq_compiler.ir.graph import softmax, weight_of
from mpq_compiler.ir.interpreter import shapes
from mpq_compiler.ir.program import ActivationPlan, Program, Stage
from mpq_compiler.ir.views import Call, Layer, Levels, Quantizer, stored
from mpq_compiler.support.errors import UserError
from mpq_compiler.targets.numerics import F32, NUMERICS

BATCHES = (2, 3)
"""The batch sizes at which shapes are compared."""
ACCUMULATOR = 2**31
LUT_SIZES = (4, 8, 16, 32)

ALL = frozenset(Stage)
CHANNELS_LAST = ALL - {Stage.FLOAT}
PLANNED = frozenset({Stage.PLANNED, Stage.FAKE_QUANTIZED, Stage.PACKED})
QUANTIZED = frozenset({Stage.FAKE_QUANTIZED, Stage.PACKED})
PACKED = frozenset({Stage.PACKED})
SIMULATED = frozenset({Stage.FAKE_QUANTIZED})


class VerificationError(Exception):
    """A pass made a program that breaks a rule: a fault of the compiler, not of its input."""


@dataclass(frozen=True)
class Violation:
    rule: str
    node: str
    what: str

    def __str__(self) -> str:
        return f"rule '{self.rule}' at %{self.node}: {self.what}"


Findings = Iterator[tuple[str, str]]


@dataclass(frozen=True)
class Rule:
    name: str
    stages: frozenset[Stage]
    structural: bool
    check: Callable[[View], Findings]


RULES: dict[str, Rule] = {}


def rule(
    name: str, stages: frozenset[Stage] = ALL, structural: bool = False
) -> Callable[[Callable[[View], Findings]], Callable[[View], Findings]]:
    def register(check: Callable[[View], Findings]) -> Callable[[View], Findings]:
        RULES[name] = Rule(name, stages, structural, check)
        return check

    return register


@dataclass(frozen=True)
class Branch:
    """A binary branch, by store names, and the base it is added to."""

    call: Call
    base: Levels | None
    signs: str | None
    scale: str | None
    alpha: str | None


class View:
    """A program and what the rules want to know of it, each found once."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.nodes: list[fx.Node] = list(program.graph.nodes)

    @cached_property
    def calls(self) -> list[Call]:
        return views.flatten(self.program)

    @cached_property
    def levels(self) -> list[Levels]:
        return views.levels_of(self.calls)

    @cached_property
    def quantizers(self) -> list[Quantizer]:
        return views.quantizers_of(self.calls)

    @cached_property
    def static_plans(self) -> list[tuple[str, ActivationPlan]]:
        """(edge, plan) of the activation plans that have tables."""
        return [(edge, plan) for edge, plan in self.program.activations.items() if plan.scale is not None]

    @cached_property
    def layers(self) -> list[Layer]:
        return views.layers_of(self.calls)

    @cached_property
    def paths(self) -> dict[str, str]:
        """Linear and conv2d call -> the parameter it multiplies with."""
        levels = {found.call.name: found for found in self.levels}
        named = {call.name: views.weight_path(call, levels) for call in self.calls}
        return {name: path for name, path in named.items() if path is not None}

    def format(self, path: str) -> formats_base.Format | None:
        """The planned format of a weight, where there is a plan and such a format."""
        plan = self.program.weights.get(path)
        try:
            return None if plan is None else formats.get(plan.format)
        except UserError:
            return None

    def computes_in_float(self, path: str) -> bool:
        """Whether the planned format has no integer kernel."""
        planned = self.format(path)
        return planned is not None and not planned.integer

    @cached_property
    def branches(self) -> list[Branch]:
        made = {levels.call.name: levels for levels in self.levels}
        added: dict[str, Levels | None] = {}
        for call in self.calls:
            if call.target is aten.add.Tensor:
                left, right = (getattr(a, "name", "") for a in call.args[:2])
                added[right] = made.get(left)
        return [
            Branch(call, added.get(call.name), stored(call.args[0]), stored(call.args[1]), stored(call.args[2]))
            for call in self.calls
            if call.target is ops.binary_branch
        ]

    @cached_property
    def shapes(self) -> dict[int, dict[str, Any]] | str:
        """Batch size -> node -> meta tensor, or why they do not fit."""
        found = {}
        for batch in BATCHES:
            try:
                found[batch] = shapes(self.program, batch)
            except Exception as error:
                reason = str(error).strip().splitlines()
                return f"at batch {batch} its shapes do not fit: {reason[0] if reason else type(error).__name__}"
        return found

    @cached_property
    def boundaries(self) -> Tensor | None:
        groups = [n for n in self.nodes if n.target is ops.time_group]
        name = stored(groups[0].args[1]) if groups else None
        return None if name is None else self.tensor(name)

    @cached_property
    def reads(self) -> list[tuple[str, str]]:
        """(node, store name) of everything the graph reads."""
        return [(n.name, str(n.target)) for n in self.nodes if n.op == "get_attr"]

    def tensor(self, name: str) -> Tensor:
        return self.program.tensors[name]


# --- structure ----------------------------------------------------------------------------------------------


@rule("order", structural=True)
def _order(view: View) -> Findings:
    """Every operand is made before it is read; inputs come before calls, one output last."""
    seen: set[fx.Node] = set()
    for graph in (view.program.graph, *view.program.regions.values()):
        nodes = list(graph.nodes)
        for node in nodes:
            for source in node.all_input_nodes:
                if source not in seen:
                    yield node.name, f"it reads %{source.name} before that is made"
            seen.add(node)
        kinds = [n.op for n in nodes]
        if kinds.count("output") != 1 or kinds[-1] != "output":
            yield nodes[-1].name if nodes else "graph", "a graph ends with its one output"
        first = next((i for i, k in enumerate(kinds) if k not in ("placeholder", "get_attr")), len(kinds))
        for node in nodes[first:]:
            if node.op == "placeholder":
                yield node.name, "an input stands behind a call"


@rule("unique-names", structural=True)
def _unique_names(view: View) -> Findings:
    for name, count in Counter(n.name for n in view.nodes).items():
        if count > 1:
            yield name, f"{count} nodes have this name"


@rule("stored-attributes", structural=True)
def _stored_attributes(view: View) -> Findings:
    """Every get_attr names a tensor of the store."""
    for node, name in view.reads:
        if name not in view.program.tensors:
            yield node, f"the store has no tensor '{name}'"


@rule("regions", structural=True)
def _regions(view: View) -> Findings:
    """A region has one output, a placeholder for each operand, two calls or more, and one call site."""
    sites = Counter(str(n.target) for n in view.nodes if n.op == "call_module")
    for node in view.nodes:
        if node.op != "call_module":
            continue
        graph = view.program.regions.get(str(node.target))
        if graph is None:
            yield node.name, f"there is no region '{node.target}'"
            continue
        inner = list(graph.nodes)
        wanted = sum(n.op == "placeholder" for n in inner)
        if wanted != len(node.args) or node.kwargs:
            yield node.name, f"region '{node.target}' takes {wanted} operands, {len(node.args)} are given"
        if sum(n.op == "call_function" for n in inner) < 2 or any(
            n.op not in ("placeholder", "call_function", "output") for n in inner
        ):
            yield node.name, f"region '{node.target}' is not a chain of two operator calls or more"
        if not isinstance(inner[-1].args[0], fx.Node):
            yield node.name, f"region '{node.target}' has more than one output"
    for name in view.program.regions:
        if sites[name] != 1:
            yield name, f"the region is called {sites[name]} times"


# --- graph --------------------------------------------------------------------------------------------------


@rule("no-dead-nodes")
def _no_dead_nodes(view: View) -> Findings:
    inner = [n for g in view.program.regions.values() for n in g.nodes if n.op != "placeholder"]
    for node in (*view.nodes, *inner):
        if not node.users and node.op not in ("placeholder", "output"):
            yield node.name, "nothing reads it"


@rule("inputs")
def _inputs(view: View) -> Findings:
    """Placeholders are the inputs by name and order; the batch leads every shape and nothing else is symbolic."""
    names = [str(n.target) for n in view.nodes if n.op == "placeholder"]
    wanted = [s.name for s in view.program.inputs]
    if names != wanted:
        yield names[0] if names else "graph", f"the graph takes ({', '.join(names)}), the program ({', '.join(wanted)})"
    for spec in view.program.inputs:
        if not spec.shape or spec.shape[0] != "B" or not all(isinstance(d, int) for d in spec.shape[1:]):
            yield spec.name, f"its shape {list(spec.shape)} is not [B, ...] with fixed sizes"


_FLOAT_OPS = {
    ops.conv2d,
    ops.group_norm,
    ops.rms_norm,
    ops.attention,
    ops.hadamard,
    ops.upsample_nearest2d,
    ops.prepend,
}
_SIMULATION = {
    ops.linear,
    ops.time_group,
    ops.fake_quantize,
    ops.dynamic_fake_quantize,
    ops.fake_quantize_float,
    ops.fake_quantize_attention,
    ops.fake_quantize_weight,
    ops.dequantize_weight,
    ops.binary_branch,
    *views.FLOAT8,
}
_PACKED = {
    ops.linear,
    ops.time_group,
    ops.quantize,
    ops.dynamic_quantize,
    ops.quant_attention,
    ops.fake_quantize_float,
    ops.dequantize_weight,
    ops.dequantize_float8,
    *views.PACKED_LAYERS,
}
_DIALECTS: dict[Stage, set[Any]] = {
    Stage.FLOAT: set(),
    Stage.REWRITTEN: _FLOAT_OPS,
    Stage.PLANNED: _FLOAT_OPS,
    Stage.FAKE_QUANTIZED: _FLOAT_OPS | _SIMULATION,
    Stage.PACKED: _FLOAT_OPS | _PACKED,
}
_REPLACED = {
    aten.conv2d.default,
    aten.group_norm.default,
    aten.rms_norm.default,
    aten.upsample_nearest2d.vec,
    aten.scaled_dot_product_attention.default,
}
"""What `layout` rewrites, or lists with the reason why not."""


@rule("dialect")
def _dialect(view: View) -> Findings:
    """Only the operators of the stage."""
    stage, fallbacks = view.program.stage, view.program.fallbacks
    for node in view.nodes:
        if node.op == "call_method" or (node.op == "call_module" and stage != Stage.PACKED):
            yield node.name, f"a {node.op} has no place in the {stage} stage"
    for call in view.calls:
        name = ops.name_of(call.target)
        if call.target in ops.OPS:
            if call.target not in _DIALECTS[stage]:
                yield call.name, f"{name} has no place in the {stage} stage"
        elif not views.is_aten(call.target) and call.target is not operator.getitem:
            yield call.name, f"{name} is no operator of the compiler"
        elif call.target in _REPLACED and stage != Stage.FLOAT and call.name not in fallbacks:
            yield call.name, f"{name} is channels-first and no fallback says why"


@rule("shapes")
def _shapes(view: View) -> Findings:
    """The program runs on shapes alone at two batch sizes, and gives one f32 output of that batch."""
    if isinstance(view.shapes, str):
        yield "graph", view.shapes
        return
    output = view.nodes[-1].args[0]
    for batch, found in view.shapes.items():
        value = found.get(output.name) if isinstance(output, fx.Node) else None
        if not isinstance(value, Tensor) or value.dtype != torch.float32 or value.shape[:1] != (batch,):
            yield view.nodes[-1].name, f"at batch {batch} the output is no f32 tensor of that batch"


@rule("rows-of-samples", QUANTIZED)
def _rows_of_samples(view: View) -> Findings:
    """The rows of a quantized tensor grow with the batch, so that row r belongs to sample r // (rows / B)."""
    if isinstance(view.shapes, str):
        return  # the rule 'shapes' speaks of it
    small, large = (view.shapes[b] for b in BATCHES)
    for q in view.quantizers:
        if q.edge in small and isinstance(small[q.edge], Tensor):
            rows = small[q.edge].shape[0], large[q.edge].shape[0]
            if rows[0] * BATCHES[1] != rows[1] * BATCHES[0]:
                yield q.call.name, f"%{q.edge} has {rows[0]} rows at batch {BATCHES[0]} and {rows[1]} at {BATCHES[1]}"


@rule("finite")
def _finite(view: View) -> Findings:
    for node, name in view.reads:
        tensor = view.tensor(name)
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            yield node, f"'{name}' holds values that are not finite"


@rule("permutes", CHANNELS_LAST)
def _permutes(view: View) -> Findings:
    """A permute between two kernels is listed among the fallbacks."""
    for node in interior_permutes(view.program.graph):
        if node.name not in view.program.fallbacks:
            yield node.name, "data is permuted between two kernels and no fallback says why"


@rule("reasons")
def _reasons(view: View) -> Findings:
    for name, reason in view.program.fallbacks.items():
        if not reason.strip():
            yield name, "it is listed as a float leftover without a reason"


# --- plans --------------------------------------------------------------------------------------------------


@rule("plan-formats", PLANNED)
def _plan_formats(view: View) -> Findings:
    for path, plan in view.program.weights.items():
        if view.format(path) is None:
            yield path, f"there is no weight format '{plan.format}'"


@rule("plan-sites", PLANNED)
def _plan_sites(view: View) -> Findings:
    """The sites of a weight plan are exactly the calls that multiply with that weight."""
    for path, plan in view.program.weights.items():
        sites = [name for name, p in view.paths.items() if p == path]
        if sorted(sites) != sorted(plan.sites):
            yield path, f"its plan names the calls {sorted(plan.sites)}, the graph has {sorted(sites)}"


@rule("float-leftovers", PLANNED)
def _float_leftovers(view: View) -> Findings:
    """A linear or convolution that stays float is listed, by its name or its weight's, with a reason."""
    planned = view.program.weights if view.program.stage == Stage.PLANNED else {}
    for call in view.calls:
        if call.target not in views.FLOAT_LAYERS:
            continue
        path = view.paths.get(call.name, "")
        integer = not view.computes_in_float(path)
        if integer and path in planned and weight_of(view.program.node(call.name)) is not None:
            continue
        if integer and any(layer.call.name == call.name and layer.levels for layer in view.layers):
            continue
        if call.name not in view.program.fallbacks and path not in view.program.fallbacks:
            yield call.name, "the layer stays float and no fallback says why"


@rule("activation-plans", PLANNED)
def _activation_plans(view: View) -> Findings:
    """One plan for each tensor edge that a quantized layer or attention reads, and one quantizer that follows it.

    A layer that is listed among the float leftovers may read what has none.
    """
    program = view.program
    if program.stage == Stage.PLANNED:
        paths = {p for p in program.weights if not view.computes_in_float(p)}
        small = {edge for edge, plan in program.activations.items() if plan.exponent is not None}
        listed = program.fallbacks
        read = ((c.args[0].name, c.name) for c in view.calls if view.paths.get(c.name) in program.weights)
        edges = {e for e, call in read if e in small or (view.paths[call] in paths and call not in listed)}
        for node in program.attentions:
            if softmax(node.name) in program.activations:
                edges |= {softmax(node.name), *(edge.name for edge in attention_edges(node))}
    else:
        edges = {q.edge for q in view.quantizers}
    for edge in sorted(edges ^ set(program.activations)):
        yield edge, "it is quantized without a plan" if edge in edges else "its plan belongs to no quantized edge"
    counts = Counter(q.edge for q in view.quantizers)
    for q in view.quantizers:
        plan = program.activations.get(q.edge)
        if counts[q.edge] > 1:
            yield q.call.name, f"%{q.edge} has {counts[q.edge]} quantizers"
        made = ActivationPlan(q.bits, q.scale, q.zero_point, q.dynamic, q.exponent)
        if plan is not None and made != plan:
            yield q.call.name, f"it does not follow the plan of %{q.edge}"


@rule("dynamic-activations", PLANNED)
def _dynamic_activations(view: View) -> Findings:
    """A dynamic plan has no tables and every other plan has them; linear layers alone read rows with own scales."""
    program = view.program
    dynamic = {edge for edge, plan in program.activations.items() if plan.dynamic}
    for edge, plan in program.activations.items():
        if plan.exponent is None and not plan.dynamic == (plan.scale is None) == (plan.zero_point is None):
            yield edge, "its plan is either dynamic or has a scale and a zero point for each time group"
    edges = {q.call.name: q.edge for q in view.quantizers}
    for call in view.calls:
        convolution = call.target in (ops.conv2d, ops.quant_conv2d) and view.paths.get(call.name) in program.weights
        attention = call.target in (ops.attention, *views.ATTENTIONS) and softmax(call.name) in program.activations
        for x in call.args[: 1 if convolution else 3 if attention else 0]:
            name = getattr(views.made_by(x), "name", "")
            edge = edges.get(name, "") if edges else name
            if edge in dynamic:
                yield call.name, f"it adds up rows of %{edge}, whose scales differ"


@rule("small-floats", PLANNED)
def _small_floats(view: View) -> Findings:
    """Activations in small floats have an encoding, scales and no zero points; a layer that reads them is listed.

    What is left of tables in the packed stage is read by such layers, and by others that are listed.
    """
    program = view.program
    small = {edge for edge, plan in program.activations.items() if plan.exponent is not None}
    for edge in small:
        plan = program.activations[edge]
        if plan.exponent not in activation.exponents(plan.bits):
            yield edge, f"floats of {plan.bits} bits have no {plan.exponent} bits of exponent"
        if plan.dynamic or plan.scale is None or plan.zero_point is not None:
            yield edge, "small floats have a scale for each time group, and no zero points"
    names = small | {q.call.name for q in view.quantizers if q.exponent is not None}
    for call in view.calls:
        if call.target in views.FLOAT_LAYERS and view.paths.get(call.name) in program.weights:
            reads = getattr(call.args[0], "name", "")
            if reads in names and call.name not in program.fallbacks:
                yield call.name, f"%{reads} is simulated and no fallback says so"
            table = isinstance(call.args[1], fx.Node) and call.args[1].target is ops.dequantize_weight
            listed = call.name in program.fallbacks
            if program.stage == Stage.PACKED and table and reads not in names and not listed:
                yield call.name, "its weight is a table, its operand holds no codes, and no fallback says why"


@rule("numerics", PLANNED)
def _numerics(view: View) -> Findings:
    """Attentions and float layers are in float32, or in the numerics that were chosen for them, which exist."""
    chosen = view.program.facts.get("numerics", {})
    for name, kind in chosen.items():
        if kind not in NUMERICS:
            yield name, f"there are no numerics '{kind}'"
    if view.program.stage != Stage.PLANNED:
        for call in view.calls:
            own, wanted = call.kwargs.get("numerics", F32), chosen.get(call.name, F32)
            if call.target in (ops.attention, *views.FLOAT_LAYERS) and own != wanted:
                yield call.name, f"it computes in {own}, and {wanted} was chosen for it"


@rule("activation-bits", PLANNED)
def _activation_bits(view: View) -> Findings:
    for edge, plan in view.program.activations.items():
        if not 2 <= plan.bits <= 8:
            yield edge, f"activations of {plan.bits} bits do not fit u8 codes"


@rule("activation-scales", PLANNED)
def _activation_scales(view: View) -> Findings:
    for edge, plan in view.static_plans:
        scale = view.tensor(str(plan.scale))
        if scale.dtype != torch.float16 or not bool((scale > 0).all()):
            yield edge, f"its scales ({scale.dtype}) are not all positive halves"


@rule("zero-points", PLANNED)
def _zero_points(view: View) -> Findings:
    for edge, plan in view.static_plans:
        if plan.zero_point is None:
            continue
        zero = view.tensor(plan.zero_point)
        if zero.dtype != torch.uint8 or int(zero.max()) >= 2**plan.bits:
            yield edge, f"its zero points ({zero.dtype}, up to {int(zero.max())}) are not u8 codes of {plan.bits} bits"


@rule("group-tables", PLANNED)
def _group_tables(view: View) -> Findings:
    """A scale and a zero point for each time group: one more than there are boundaries."""
    groups = len(view.program.facts["time-groups"]) + 1
    for edge, plan in view.static_plans:
        for name in filter(None, (plan.scale, plan.zero_point)):
            if tuple(view.tensor(name).shape) != (groups,):
                yield edge, f"'{name}' {list(view.tensor(name).shape)} is not one value for each of {groups} groups"


# --- time groups --------------------------------------------------------------------------------------------


@rule("boundaries", PLANNED)
def _boundaries(view: View) -> Findings:
    """Group boundaries rise, and the graph reads those that the plan was made with."""
    planned = view.program.facts["time-groups"]
    read = planned if view.boundaries is None else view.boundaries
    if not torch.equal(read, planned) or not bool((read[1:] > read[:-1]).all()) or read.dtype != torch.float32:
        yield "g", f"the boundaries {read.tolist()} are not the rising f32 values of the plan {planned.tolist()}"


@rule("one-time-group", QUANTIZED)
def _one_time_group(view: View) -> Findings:
    """One time_group node on the timestep is the group operand of all that have tables; dynamic ones have none."""
    groups = [n for n in view.nodes if n.target is ops.time_group]
    for node in groups[1:]:
        yield node.name, f"%{groups[0].name} already gives the time groups"
    dynamic = {q.call.name for q in view.quantizers if q.dynamic}
    operands = [(q.call.name, q.group, q.dynamic) for q in view.quantizers]
    for layer in view.layers:
        if layer.call.target in views.PACKED_LAYERS:
            operands.append((layer.call.name, layer.group, getattr(views.made_by(layer.x), "name", "") in dynamic))
    for name, group, by_row in operands:
        if by_row and group is not None:
            yield name, "it has a group operand, and its scales are those of rows"
        elif not by_row and (not isinstance(group, fx.Node) or group.target is not ops.time_group):
            yield name, "its group operand is no time_group"


# --- quantized weights --------------------------------------------------------------------------------------


@rule("codes", QUANTIZED)
def _codes(view: View) -> Findings:
    """u8 codes of levels of their table, or int8 values within +-127 where there is none; of FP8 any u8."""
    for levels in view.levels:
        if levels.codes is None:
            continue
        codes = view.tensor(levels.codes)
        if not levels.integer:
            sound = codes.dtype == torch.uint8
        elif levels.lut is None:
            sound = codes.dtype == torch.int8 and int(codes.min()) >= -contract.LUT_MAX
        else:
            most = _levels_of_rows(view, levels, len(codes))
            sound = codes.dtype == torch.uint8 and bool((codes.amax(1) < most).all())
        if not sound:
            yield levels.call.name, f"'{levels.codes}' ({codes.dtype}) holds codes outside of their table"


def _levels_of_rows(view: View, levels: Levels, rows: int) -> Tensor:
    """How many levels the table of each row has; where classes are not sound (`row-classes`) the most of any table."""
    counts = 2 ** torch.tensor(contract.class_bits(view.tensor(str(levels.lut))))
    if levels.row_class is not None:
        classes = contract.row_classes(view.tensor(levels.row_class), rows)
        if len(classes) == rows and int(classes.max()) < len(counts):
            return counts[classes]
    return counts.max()


@rule("table-range", QUANTIZED)
def _table_range(view: View) -> Findings:
    """int8 entries within +-127; a table may have fewer levels than entries, a power of two in front of the filling."""
    for levels in view.levels:
        if levels.lut is None:
            continue
        lut = view.tensor(levels.lut)
        filled = lut == contract.NO_LEVEL
        sizes = [len(table) - int(n) for table, n in zip(lut, filled.sum(1), strict=True)]
        behind = all(bool(f[n:].all()) for f, n in zip(filled, sizes, strict=True))
        if lut.dtype != torch.int8 or not behind or max(sizes) < lut.shape[1] or any(n < 2 or n & n - 1 for n in sizes):
            yield levels.call.name, f"'{levels.lut}' ({lut.dtype}) has entries outside of -127..127"


@rule("table-size", QUANTIZED)
def _table_size(view: View) -> Findings:
    """A table [classes, 2^bits] with the bits of the planned format, or of its base while there is a branch."""
    based = {b.base.call.name for b in view.branches if b.base is not None}
    for levels in view.levels:
        planned = view.format(levels.path)
        if planned is None:
            continue
        base = planned.base if isinstance(planned, low_rank.LowRankFormat) else planned
        bits = base.index_bits
        # an open weight has the base's table; that of a low-rank format the merged one, once its branch is in the graph
        beside = levels.codes is None and (base is planned or ":range." in (levels.lut or ""))
        if isinstance(base, ResidualFormat) and (beside or levels.call.name in based):
            bits = base.base_bits
        size = None if levels.lut is None else tuple(view.tensor(levels.lut).shape)
        if size is None:
            if bits != 8:
                yield levels.call.name, f"{planned.name} needs a table of {2**bits} entries and there is none"
        elif len(size) != 2 or size[1] != 2**bits or size[1] not in LUT_SIZES:
            yield levels.call.name, f"'{levels.lut}' has the shape {list(size)}; {planned.name} has {2**bits} levels"


@rule("weight-scales", QUANTIZED)
def _weight_scales(view: View) -> Findings:
    """Positive f16 scales [O, J], one for each row and K-segment; of FP8 [O]."""
    for levels in view.levels:
        if levels.scale is None:
            yield levels.call.name, "its scale is not in the store"
            continue
        scale = view.tensor(levels.scale)
        rows = len(view.tensor(str(levels.codes or levels.weight)))
        shape = (rows, levels.segments) if levels.integer else (rows,)
        if scale.dtype != torch.float16 or tuple(scale.shape) != shape or not bool((scale > 0).all()):
            kind = f"{list(scale.shape)} ({scale.dtype})"
            yield levels.call.name, f"'{levels.scale}' {kind} does not hold {list(shape)} positive halves"


@rule("offsets", QUANTIZED)
def _offsets(view: View) -> Findings:
    """Offsets [O] where the planned format has them, and only there."""
    for levels in view.levels:
        planned = view.format(levels.path)
        if planned is None:
            continue
        if (levels.offset is not None) != planned.has_offset:
            yield levels.call.name, f"{planned.name} has {'no ' if levels.offset else ''}offsets"
        elif levels.offset is not None:
            rows = len(view.tensor(str(levels.codes or levels.weight)))
            if tuple(view.tensor(levels.offset).shape) != (rows,):
                yield levels.call.name, f"'{levels.offset}' is not one offset a row"


def _nested(lut: Tensor) -> bool:
    """Whether each table has a bit more than the one before, and the last the entries of all, evenly spaced by 1."""
    bits, inside = contract.class_bits(lut), lut[lut != contract.NO_LEVEL]
    steps = bits == tuple(range(bits[0], bits[0] + len(bits))) and bool(lut[-1].diff().eq(1).all())
    return steps and bool(inside.ge(lut[-1, 0]).all()) and bool(inside.le(lut[-1, -1]).all())


@rule("row-classes", QUANTIZED)
def _row_classes(view: View) -> Findings:
    """A class u8 below the number of tables for every 16 rows, where there are several tables.

    Where tables differ in size every row has a class, each table one bit more than the one before, and the last holds
    the others: a kernel looks all rows up in that one.
    """
    for levels in view.levels:
        classes = 1 if levels.lut is None else len(view.tensor(levels.lut))
        if levels.row_class is None:
            if classes != 1:
                yield levels.call.name, f"{classes} tables and no row classes"
            continue
        table, lut = view.tensor(levels.row_class), view.tensor(str(levels.lut))
        rows, kind = len(view.tensor(str(levels.codes or levels.weight))), "rows"
        if len({*contract.class_bits(lut)}) == 1:
            rows, kind = -(-rows // contract.TILE_ROWS), "tiles"
        elif not _nested(lut):
            yield levels.call.name, f"the tables of '{levels.lut}' are not each within the next, of one bit more"
        if table.dtype != torch.uint8 or tuple(table.shape) != (rows,) or int(table.max()) >= classes:
            yield levels.call.name, f"'{levels.row_class}' is not one of {classes} classes for each of {rows} {kind}"


@rule("branches", SIMULATED)
def _branches(view: View) -> Findings:
    """Signs 0 or 1, an int8 alpha, the base's scale, and a merged table within +-127."""
    for b in view.branches:
        call, base = b.call, b.base
        if base is None or base.lut is None or base.codes is None or b.signs is None or b.alpha is None:
            yield call.name, "it is not added to a base of its own"
            continue
        sign, step = view.tensor(b.signs), view.tensor(b.alpha)
        if sign.dtype != torch.uint8 or int(sign.max()) > 1 or sign.shape != view.tensor(base.codes).shape:
            yield call.name, f"'{b.signs}' is not a sign 0 or 1 for each code of its base"
        if b.scale != base.scale:
            yield call.name, "branch and base have different scales"
        if step.dtype != torch.int8 or step.numel() != 1:
            yield call.name, f"'{b.alpha}' is no int8 step of the table's grid"
        elif int(view.tensor(base.lut).to(torch.int16).abs().max()) + abs(int(step)) > contract.LUT_MAX:
            yield call.name, "base and branch together leave the range of int8"


@rule("low-rank", QUANTIZED)
def _low_rank(view: View) -> Findings:
    """A settled low-rank weight is read with both factors, halves [O, r] and [r, ...]; no other weight has any."""
    factors: dict[str, dict[str, str]] = {}
    for node, name in view.reads:
        part = views.factor(name)
        if part is None:
            continue
        path = name.split(":")[0]
        factors.setdefault(path, {})[part] = name
        if not isinstance(view.format(path), low_rank.LowRankFormat):
            yield node, f"'{name}' is a factor of a weight that is planned without a branch"
    for levels in view.levels:
        if levels.codes is None or not isinstance(view.format(levels.path), low_rank.LowRankFormat):
            continue
        names = factors.get(levels.path, {})
        if len(names) < len(views.FACTORS):
            yield levels.call.name, f"the low-rank branch of '{levels.path}' is not in the graph"
            continue
        up, down = (view.tensor(names[part]) for part in views.FACTORS)
        rows = len(view.tensor(levels.codes))
        if up.dtype != torch.float16 or down.dtype != torch.float16 or tuple(up.shape) != (rows, len(down)):
            yield levels.call.name, f"the factors {list(up.shape)} and {list(down.shape)} are not halves of one rank"


@rule("shared-weights", QUANTIZED)
def _shared_weights(view: View) -> Findings:
    """All calls that read a parameter read the same codes and scales."""
    parts: dict[str, set[Any]] = {}
    for levels in view.levels:
        made_of = (levels.weight, levels.codes, levels.scale, levels.offset, levels.lut, levels.row_class)
        parts.setdefault(levels.path, set()).add(made_of)
        if len(parts[levels.path]) > 1:
            yield levels.call.name, f"another call reads other codes of '{levels.path}'"


@rule("segments", PACKED)
def _segments(view: View) -> Findings:
    """The segments partition the channels; scales and tables exist for each."""
    for layer in view.layers:
        if layer.call.target not in views.PACKED_LAYERS or layer.levels is None:
            continue
        codes, scale = view.tensor(str(layer.levels.codes)), view.tensor(str(layer.levels.scale))
        taps = 1 if layer.call.target is ops.quant_linear else layer.call.args[11][0] * layer.call.args[11][1]
        channels = codes.shape[1] // taps
        if min(layer.segments, default=0) < 1 or sum(layer.segments) != channels:
            yield layer.call.name, f"the segments {list(layer.segments)} do not partition {channels} channels"
        count = len(layer.segments)
        if (scale.shape[-1], len(layer.act_scale), len(layer.act_zero)) != (count, count, count):
            yield layer.call.name, f"its scales or activation tables are not those of {count} segments"


@rule("operand-tables", PACKED)
def _operand_tables(view: View) -> Findings:
    """A packed layer or attention reads codes, and carries the tables of the quantizer that made them."""
    made = {q.call.name: (q.scale, q.zero_point) for q in view.quantizers if q.call.target is ops.quantize}
    dynamic = {q.call.name for q in view.quantizers if q.dynamic}
    for call in view.calls:
        if call.target is ops.quant_attention:
            for i, x in enumerate(call.args[:3]):
                tables = tuple(stored(a) for a in call.args[4 + 2 * i : 6 + 2 * i])
                if made.get(getattr(x, "name", "")) != tables:
                    yield call.name, f"it reads %{getattr(x, 'name', '?')} without the tables of its codes"
    for layer in view.layers:
        if layer.call.target not in views.PACKED_LAYERS:
            continue
        source = views.made_by(layer.x)
        if isinstance(source, fx.Node) and source.name in dynamic:
            parts = [(layer.x, 0), *((t, 1) for t in layer.call.args[7]), *((t, 2) for t in layer.call.args[8])]
            if any(part.target is not operator.getitem or part.args != (source, i) for part, i in parts):
                yield layer.call.name, f"it reads codes, scales or zero points of %{source.name} in other places"
            continue
        joined = isinstance(layer.x, fx.Node) and layer.x.target is aten.cat.default
        pairs = list(zip(layer.act_scale, layer.act_zero, strict=False))
        sources = list(layer.x.args[0]) if joined else [layer.x] * max(1, len(pairs))
        for j, source in enumerate(sources):
            name = getattr(source, "name", "")
            if name not in made:
                yield layer.call.name, f"its operand %{name} holds no codes"
            elif j < len(pairs) and pairs[j] != made[name]:
                yield layer.call.name, f"it reads %{name} with the scale or zero point of another edge"


@rule("simulated-operands", SIMULATED)
def _simulated_operands(view: View) -> Findings:
    """Quantized weights meet quantized activations, but in listed layers; an attention has three such operands."""
    for call in view.calls:
        if call.target is ops.fake_quantize_attention:
            for x in call.args[:3]:
                if x.target is not ops.fake_quantize:
                    yield call.name, f"its probabilities are quantized and its operand %{x.name} is not"
    for layer in view.layers:
        quantized = isinstance(layer.x, fx.Node) and layer.x.target in views.FAKE_QUANTIZERS
        listed = layer.call.name in view.program.fallbacks
        if layer.levels is not None and layer.levels.integer and not quantized and not listed:
            yield layer.call.name, f"its weight is quantized and its operand %{getattr(layer.x, 'name', '?')} is not"


@rule("accumulators", QUANTIZED)
def _accumulators(view: View) -> Findings:
    """``|sum (q - z) * w| < 2^31`` for any codes q: from K alone, or from the entries of each row where K is large.

    In an attention both factors are activations, and K is the width of a head, and the number of keys.
    """
    sizes = {} if isinstance(view.shapes, str) else view.shapes[BATCHES[0]]
    for call in view.calls:
        if call.target is ops.quant_attention and call.args[1].name in sizes:
            _, keys, width = sizes[call.args[1].name].shape
            terms = max(keys, width // call.args[12])
            if terms * 255 * 255 >= ACCUMULATOR:
                yield call.name, f"accumulators of {terms} products of codes may leave int32"
    for levels in view.levels:
        if levels.codes is None:
            continue
        codes = view.tensor(levels.codes)
        if codes.shape[1] * 255 * contract.LUT_MAX < ACCUMULATOR:
            continue
        lut = None if levels.lut is None else view.tensor(levels.lut)
        classes = None if levels.row_class is None else view.tensor(levels.row_class)
        worst = 255 * int(contract.entries(codes, lut, classes).double().abs().sum(1).max())
        if max(worst, 255 * codes.shape[1]) >= ACCUMULATOR:
            yield levels.call.name, f"accumulators of {codes.shape[1]} terms may reach {worst}, beyond int32"


@rule("stored-types", QUANTIZED)
def _stored_types(view: View) -> Findings:
    """Float leftovers are read in the type in which they are stored, or listed with the reason."""
    opened = {levels.weight for levels in view.levels}
    for node, name in view.reads:
        if name in opened or name in view.program.fallbacks or name.split(":")[0] in view.program.fallbacks:
            continue
        tensor = view.tensor(name)
        if tensor.is_floating_point() and tensor.dtype != stored_dtype(name, tensor):
            yield node, f"'{name}' is read as {tensor.dtype} and stored as {stored_dtype(name, tensor)}"


# --- the verifier -------------------------------------------------------------------------------------------


def check(program: Program, rules: Iterable[str] | None = None) -> list[Violation]:
    """Everything that is wrong with the program, in the order of the rules (all of them, or the named ones)."""
    view = View(program)
    chosen = [RULES[name] for name in (RULES if rules is None else rules)]
    found: list[Violation] = []
    for structural in (True, False):
        for r in chosen:
            if r.structural == structural and program.stage in r.stages:
                found += [Violation(r.name, node, what) for node, what in r.check(view)]
        if found:
            break
    return found


def verify(program: Program, after: str = "") -> None:
    """Raises VerificationError with the first violation; ``after`` names the pass that made the program."""
    if found := check(program):
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        where = f" after pass '{after}'" if after else ""
        raise VerificationError(f"{found[0]}{where}{more}; this is a fault of the compiler, please report it")
