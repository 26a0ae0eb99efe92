"""Rules of the graph: its structure, which the other rules take for granted, its operators and its shapes."""

from __future__ import annotations

import operator
from collections import Counter
from typing import Any

import torch
from torch import Tensor, fx

from mpq_compiler.ir import ops, views
from mpq_compiler.ir.aten import aten, interior_permutes
from mpq_compiler.ir.program import Stage
from mpq_compiler.ir.reuse import REUSE
from mpq_compiler.ir.verifier.view import BATCHES, CHANNELS_LAST, QUANTIZED, Findings, Rules, View
from mpq_compiler.sampling.reuse import SLOTS

RULES = Rules()


@RULES.add("order", structural=True)
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


@RULES.add("unique-names", structural=True)
def _unique_names(view: View) -> Findings:
    for name, count in Counter(n.name for n in view.nodes).items():
        if count > 1:
            yield name, f"{count} nodes have this name"


@RULES.add("stored-attributes", structural=True)
def _stored_attributes(view: View) -> Findings:
    """Every get_attr names a tensor of the store."""
    for node, name in view.reads:
        if name not in view.program.tensors:
            yield node, f"the store has no tensor '{name}'"


@RULES.add("regions", structural=True)
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


@RULES.add("no-dead-nodes")
def _no_dead_nodes(view: View) -> Findings:
    inner = [n for g in view.program.regions.values() for n in g.nodes if n.op != "placeholder"]
    for node in (*view.nodes, *inner):
        if not node.users and node.op not in ("placeholder", "output"):
            yield node.name, "nothing reads it"


@RULES.add("inputs")
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
    ops.keep,
    ops.upsample_nearest2d,
    ops.for_each_sample,
    ops.prepend,
    ops.row_of_token,
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
    Stage.FLOAT: {ops.for_each_sample, ops.row_of_token},
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
"""Channels-first operators: `layout` rewrites them, or lists them with the reason why not."""


@RULES.add("dialect")
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


@RULES.add("shapes")
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


@RULES.add("kept-values")
def _kept_values(view: View) -> Findings:
    """One value at most is kept from step to step, f32 of every sample; steps read what earlier ones computed."""
    schedule, nodes = view.program.facts.get(REUSE), [call for call in view.calls if call.target is ops.keep]
    for node in nodes:
        if len(nodes) > 1 or (schedule is not None and node.name != schedule.node):
            yield node.name, f"it is kept beside %{nodes[0].name if schedule is None else schedule.node}"
        for batch, found in view.shapes.items() if isinstance(view.shapes, dict) else ():
            value = found.get(node.name)
            if not isinstance(value, Tensor) or value.dtype != torch.float32 or value.shape[:1] != (batch,):
                yield node.name, f"at batch {batch} what is kept is no f32 tensor of that batch"
    if schedule is None:
        return
    for step, sources in enumerate(schedule.sources):
        if any(schedule.sources[source] for source, _ in sources if source < step) or len(sources) > SLOTS:
            yield schedule.node, f"step {step} takes values that no step keeps"
        if any(source >= step for source, _ in sources):
            yield schedule.node, f"step {step} takes a value of a later one"


@RULES.add("rows-of-samples", QUANTIZED)
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


@RULES.add("finite")
def _finite(view: View) -> Findings:
    for node, name in view.reads:
        if not view.program.tensors.finite(name):
            yield node, f"'{name}' holds values that are not finite"


@RULES.add("permutes", CHANNELS_LAST)
def _permutes(view: View) -> Findings:
    """A permute between two kernels is listed among the fallbacks."""
    for node in interior_permutes(view.program.graph):
        if node.name not in view.program.fallbacks:
            yield node.name, "data is permuted between two kernels and no fallback says why"


@RULES.add("reasons")
def _reasons(view: View) -> Findings:
    for name, reason in view.program.fallbacks.items():
        if not reason.strip():
            yield name, "it is listed as a float leftover without a reason"
