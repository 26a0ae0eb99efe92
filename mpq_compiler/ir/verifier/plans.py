"""Rules of the plans: formats, activations, numerics and time groups, and a graph that follows them."""

from __future__ import annotations

from collections import Counter

import torch
from torch import fx

from mpq_compiler.formats import activation
from mpq_compiler.ir import ops, views
from mpq_compiler.ir.edges import attention_edges
from mpq_compiler.ir.findings import ATTENTION_NUMERICS
from mpq_compiler.ir.graph import softmax, weight_of
from mpq_compiler.ir.program import TIME_GROUPS, ActivationPlan, Stage
from mpq_compiler.ir.verifier.view import PLANNED, QUANTIZED, Findings, Rules, View
from mpq_compiler.targets.numerics import F32, NUMERICS

RULES = Rules()


@RULES.add("plan-formats", PLANNED)
def _plan_formats(view: View) -> Findings:
    for path, plan in view.program.weights.items():
        if view.format(path) is None:
            yield path, f"there is no weight format '{plan.format}'"


@RULES.add("plan-sites", PLANNED)
def _plan_sites(view: View) -> Findings:
    """The sites of a weight plan are exactly the calls that multiply with that weight."""
    for path, plan in view.program.weights.items():
        sites = [name for name, p in view.paths.items() if p == path]
        if sorted(sites) != sorted(plan.sites):
            yield path, f"its plan names the calls {sorted(plan.sites)}, the graph has {sorted(sites)}"


@RULES.add("float-leftovers", PLANNED)
def _float_leftovers(view: View) -> Findings:
    """A linear or convolution that stays float is listed, by its name or its weight's, with a reason."""
    planned = view.program.weights if view.program.stage == Stage.PLANNED else {}
    for call in view.calls:
        if call.target not in views.FLOAT_LAYERS:
            continue
        path = view.paths.get(call.name, "")
        if views.lora_factor(path):
            continue  # `lora` says what it has to be
        integer = not view.computes_in_float(path)
        if integer and path in planned and weight_of(view.program.node(call.name)) is not None:
            continue
        if integer and any(layer.call.name == call.name and layer.levels for layer in view.layers):
            continue
        if call.name not in view.program.fallbacks and path not in view.program.fallbacks:
            yield call.name, "the layer stays float and no fallback says why"


@RULES.add("activation-plans", PLANNED)
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


@RULES.add("dynamic-activations", PLANNED)
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


@RULES.add("small-floats", PLANNED)
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


@RULES.add("numerics", PLANNED)
def _numerics(view: View) -> Findings:
    """Attentions and float layers are in float32, or in the numerics that were chosen for them, which exist."""
    chosen = view.program.facts.get(ATTENTION_NUMERICS, {})
    for name, kind in chosen.items():
        if kind not in NUMERICS:
            yield name, f"there are no numerics '{kind}'"
    if view.program.stage != Stage.PLANNED:
        for call in view.calls:
            own, wanted = call.kwargs.get("numerics", F32), chosen.get(call.name, F32)
            if call.target in (ops.attention, *views.FLOAT_LAYERS) and own != wanted:
                yield call.name, f"it computes in {own}, and {wanted} was chosen for it"


@RULES.add("activation-bits", PLANNED)
def _activation_bits(view: View) -> Findings:
    for edge, plan in view.program.activations.items():
        if not 2 <= plan.bits <= 8:
            yield edge, f"activations of {plan.bits} bits do not fit u8 codes"


@RULES.add("activation-scales", PLANNED)
def _activation_scales(view: View) -> Findings:
    for edge, plan in view.static_plans:
        scale = view.tensor(str(plan.scale))
        if scale.dtype != torch.float16 or not bool((scale > 0).all()):
            yield edge, f"its scales ({scale.dtype}) are not all positive halves"


@RULES.add("zero-points", PLANNED)
def _zero_points(view: View) -> Findings:
    for edge, plan in view.static_plans:
        if plan.zero_point is None:
            continue
        zero = view.tensor(plan.zero_point)
        if zero.dtype != torch.uint8 or int(zero.max()) >= 2**plan.bits:
            yield edge, f"its zero points ({zero.dtype}, up to {int(zero.max())}) are not u8 codes of {plan.bits} bits"


@RULES.add("group-tables", PLANNED)
def _group_tables(view: View) -> Findings:
    """A scale and a zero point for each time group: one more than there are boundaries."""
    groups = len(view.program.facts[TIME_GROUPS]) + 1
    for edge, plan in view.static_plans:
        for name in filter(None, (plan.scale, plan.zero_point)):
            if tuple(view.tensor(name).shape) != (groups,):
                yield edge, f"'{name}' {list(view.tensor(name).shape)} is not one value for each of {groups} groups"


@RULES.add("boundaries", PLANNED)
def _boundaries(view: View) -> Findings:
    """Group boundaries rise, and the graph reads those that the plan was made with."""
    planned = view.program.facts[TIME_GROUPS]
    read = planned if view.boundaries is None else view.boundaries
    if not torch.equal(read, planned) or not bool((read[1:] > read[:-1]).all()) or read.dtype != torch.float32:
        yield "g", f"the boundaries {read.tolist()} are not the rising f32 values of the plan {planned.tolist()}"


@RULES.add("one-time-group", QUANTIZED)
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
