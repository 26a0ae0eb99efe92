"""Weights that stay in codes on a GPU: those that `prepare` would decode for products in bfloat16 alone."""

from __future__ import annotations

from dataclasses import replace

from mpq_compiler.backends.tvm.plan.calls import Call, Kernel, Lowered, record
from mpq_compiler.targets.numerics import BF16

CHUNK = 8
"""Channels that have a scale in common (`cuda.float_products.VALUES`)."""


def keep_codes(lowered: Lowered) -> Lowered:
    """Keep weights in codes where products can decode them (`kernels.dequantize.WeightOnly`)."""
    makers = {name: call for call in lowered.preparation for _, name in call.results}
    sources: dict[str, Call] = {}
    """The calls that decode weights, by the names of the panels."""

    def packed(call: Call) -> Call:
        source = makers.get(dict(call.operands).get("weight", ""))
        if source is None or not _is_decodable(call.kernel, source.kernel):
            return call
        sources.update({name: source for _, name in call.results})
        codes = tuple((argument, name) for argument, name in source.operands if argument == "codes")
        return replace(call, kernel=_weight_only("pack_codes", call, source, lowered.integers), operands=codes)

    def product(call: Call) -> Call:
        source = sources.get(dict(call.operands).get("weight", ""))
        if source is None:
            return call
        stored = tuple((argument, name) for argument, name in source.operands if argument != "codes")
        kernel = _weight_only("weight_only", call, source, lowered.integers)
        return replace(call, kernel=kernel, operands=(*call.operands, *stored))

    preparation = tuple(map(packed, lowered.preparation))
    functions = tuple(function.mapped(product) for function in lowered.functions)
    return replace(lowered, preparation=preparation, functions=functions).linked()


def _weight_only(template: str, call: Call, source: Call, integers: frozenset[str]) -> Kernel:
    table = source.kernel.problem
    if table.get("bits") == 4 and dict(source.operands).get("tables") in integers:
        table = table.replace(integers=True)
    return Kernel(template, record("dequantize.WeightOnly", product=call.kernel.problem, table=table))


def _is_decodable(pack: Kernel, decode: Kernel) -> bool:
    """Whether a product can decode what it multiplies: all codes of a width, scales of equal groups of whole chunks."""
    if pack.template != "pack" or decode.template != "dequantize" or pack.numerics != BF16:
        return False
    first, *rest = decode.problem.get("segments")
    equal = all(size == first for size in rest[:-1]) and (not rest or (rest[-1] <= first and first % CHUNK == 0))
    return equal and not dict(decode.problem.fields).get("widths")
