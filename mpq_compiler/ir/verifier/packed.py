"""Rules of layers on codes: segments, operands, accumulators, and the types of what is stored."""

from __future__ import annotations

import operator

from torch import fx

from mpq_compiler.formats import contract
from mpq_compiler.ir import ops, views
from mpq_compiler.ir.aten import aten
from mpq_compiler.ir.costs import stored_dtype
from mpq_compiler.ir.verifier.view import BATCHES, PACKED, QUANTIZED, SIMULATED, Findings, Rules, View
from mpq_compiler.ir.views import stored

RULES = Rules()
ACCUMULATOR = 2**31


@RULES.add("segments", PACKED)
def _segments(view: View) -> Findings:
    """The segments partition the channels; scales and tables exist for each."""
    for layer in view.layers:
        if layer.call.target not in views.PACKED_LAYERS or layer.levels is None:
            continue
        codes, scale = view.tensor(str(layer.levels.codes)), view.tensor(str(layer.levels.tables.scale))
        taps = 1 if layer.call.target is ops.quant_linear else layer.call.args[11][0] * layer.call.args[11][1]
        channels = codes.shape[1] // taps
        if min(layer.segments, default=0) < 1 or sum(layer.segments) != channels:
            yield layer.call.name, f"the segments {list(layer.segments)} do not partition {channels} channels"
        count = len(layer.segments)
        if (scale.shape[-1], len(layer.act_scale), len(layer.act_zero)) != (count, count, count):
            yield layer.call.name, f"its scales or activation tables are not those of {count} segments"


@RULES.add("operand-tables", PACKED)
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


@RULES.add("simulated-operands", SIMULATED)
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


@RULES.add("accumulators", QUANTIZED)
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
        lut = None if levels.tables.lut is None else view.tensor(levels.tables.lut)
        classes = None if levels.tables.row_class is None else view.tensor(levels.tables.row_class)
        worst = 255 * int(contract.entries(codes, lut, classes).double().abs().sum(1).max())
        if max(worst, 255 * codes.shape[1]) >= ACCUMULATOR:
            yield levels.call.name, f"accumulators of {codes.shape[1]} terms may reach {worst}, beyond int32"


@RULES.add("stored-types", QUANTIZED)
def _stored_types(view: View) -> Findings:
    """Float leftovers are read in the type in which they are stored, or listed with the reason."""
    opened = {levels.weight for levels in view.levels}
    for node, name in view.reads:
        if name in opened or name in view.program.fallbacks or name.split(":")[0] in view.program.fallbacks:
            continue
        tensor = view.tensor(name)
        if tensor.is_floating_point() and tensor.dtype != stored_dtype(name, tensor):
            yield node, f"'{name}' is read as {tensor.dtype} and stored as {stored_dtype(name, tensor)}"
