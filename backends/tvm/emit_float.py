"""Operators in float32 whose kernels take an epilogue: norms, attention, and what a plan leaves unquantized."""

from __future__ import annotations

from torch import fx

from mpq_compiler.backends.tvm import emit_pointwise
from mpq_compiler.backends.tvm.emitter import Emitter, Epilogue, filled
from mpq_compiler.backends.tvm.lowered import BATCH, Kernel, Record, Value, record
from mpq_compiler.program import arguments


def _anchor(
    e: Emitter, template: str, problem: Record, operands: dict[str, Value | None], epilogue: Epilogue, out: Value
) -> Value:
    given = {k: v for k, v in operands.items() if v is not None}
    problem = problem.replace(epilogue=epilogue.record, time_groups=emit_pointwise.groups(e, epilogue))
    return e.call(Kernel(template, problem), given | emit_pointwise.finish(e, epilogue), {"y": out})[0]


def group_norm(e: Emitter, node: fx.Node, epilogue: Epilogue, out: Value) -> Value:
    source, groups, weight, bias, eps = arguments(node)
    x, gamma, beta = e.value(source), e.optional(weight), e.optional(bias)
    if (gamma is None) != (beta is None):
        raise e.refusal("it has a weight without a bias, or a bias without a weight")
    channels = x.inner[-1]
    problem = record(
        "norms.GroupNorm", positions=x.size // channels, channels=channels, groups=groups, eps=eps,
        affine=gamma is not None,
    )  # fmt: skip
    return _anchor(e, "norms", problem, {"x": x, "gamma": gamma, "beta": beta}, epilogue, out)


def layer_norm(e: Emitter, node: fx.Node, epilogue: Epilogue, out: Value) -> Value:
    source, shape, weight, bias, eps = filled(node, None, None, None, None, 1e-5)
    x, gamma, beta = e.value(source), e.optional(weight), e.optional(bias)
    if len(shape) != 1:
        raise e.refusal(f"it normalizes over {len(shape)} dimensions, and the kernel over one")
    channels = int(shape[0])
    problem = record(
        "norms.LayerNorm", positions=x.size // channels, channels=channels, eps=eps, scale=gamma is not None,
        shift=beta is not None,
    )  # fmt: skip
    return _anchor(e, "norms", problem, {"x": x, "gamma": gamma, "beta": beta}, epilogue, out)


def attention(e: Emitter, node: fx.Node, epilogue: Epilogue, out: Value) -> Value:
    q, k, v, heads, scale, mask = filled(node, None, None, None, None, None, None)
    query, key, additive = e.value(q), e.value(k), e.optional(mask)
    if len(query.inner) != 2 or len(key.inner) != 2:
        raise e.refusal("its operands are not [B, tokens, channels]")
    shape = None
    if additive is not None:
        own = additive.inner
        shape = (BATCH if additive.batched else 1, *[1] * (3 - len(own)), *(own if additive.batched else own[-3:]))
    problem = record(
        "attention.Attention", queries=query.inner[0], keys=key.inner[0], heads=heads, dim=query.inner[1] // heads,
        scale=scale, mask=shape,
    )  # fmt: skip
    operands = {"q": query, "k": key, "v": e.value(v), "mask": additive}
    return _anchor(e, "attention", problem, operands, epilogue, out)


def linear(e: Emitter, node: fx.Node, epilogue: Epilogue, out: Value) -> Value:
    source, weight, bias = filled(node, None, None, None)
    x, w, b = e.value(source), e.value(weight), e.optional(bias)
    if w.batched:
        raise e.refusal("its weight is computed from the inputs")
    outputs, inputs = w.inner
    problem = record(
        "float_gemm.Linear", positions=x.size // inputs, inputs=inputs, outputs=outputs, bias=b is not None
    )
    return _float_contraction(e, problem, x, w, b, epilogue, out)


def conv2d(e: Emitter, node: fx.Node, epilogue: Epilogue, out: Value) -> Value:
    source, weight, bias, stride, padding, groups = filled(node, None, None, None, (1, 1), (0, 0, 0, 0), 1)
    x, w, b = e.value(source), e.value(weight), e.optional(bias)
    if w.batched or len(x.inner) != 3:
        raise e.refusal("its weight is computed from the inputs, or its input is no image [B, H, W, C]")
    height, width, channels = x.inner
    outputs, *kernel, _ = w.inner
    problem = record(
        "float_gemm.Conv2d", height=height, width=width, channels=channels, outputs=outputs, kernel=kernel,
        stride=stride, padding=padding, groups=groups, bias=b is not None,
    )  # fmt: skip
    return _float_contraction(e, problem, x, w, b, epilogue, out)


def _float_contraction(
    e: Emitter, problem: Record, x: Value, weight: Value, bias: Value | None, epilogue: Epilogue, out: Value
) -> Value:
    """Weights that the kernel reads in panels are packed at load."""
    e.program.fallbacks.setdefault(e.task.anchor.name, "computed in float32: the plan leaves it unquantized")
    plain = problem.type == "float_gemm.Linear" and (problem.get("positions") < 8 or problem.get("outputs") < 4)
    if not plain and e.is_static(weight):
        problem = problem.replace(packed=True)
        panel = Value(f"{weight.name}|panel", (), "float32")
        weight = e.call(Kernel("pack", _without_size(problem)), {"weight": weight}, {"panel": panel})[0]
    return _anchor(e, "float_gemm", problem, {"x": x, "weight": weight, "bias": bias}, epilogue, out)


def _without_size(problem: Record) -> Record:
    """The problem with the smallest image there is: weights are packed alike for all sizes."""
    if problem.type == "float_gemm.Linear":
        return problem.replace(positions=1)
    height, width = problem.get("kernel")
    return problem.replace(height=height, width=width, padding=(0, 0, 0, 0), stride=(1, 1))
