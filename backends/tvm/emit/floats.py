"""Emits operators in float32: norms, rotations, attention, products of activations, and unquantized layers."""

from __future__ import annotations

from typing import Any

from torch import fx

from mpq_compiler.backends.tvm.emit import movement, pointwise
from mpq_compiler.backends.tvm.emit.emitter import Emitter, Epilogue, filled
from mpq_compiler.backends.tvm.plan.calls import BATCH, Kernel, Record, Value, record
from mpq_compiler.backends.tvm.plan.views import whole
from mpq_compiler.ir.graph import arguments, operand
from mpq_compiler.targets.numerics import F32, ready_shapes


def _anchor(
    e: Emitter, template: str, problem: Record, operands: dict[str, Value | None], epilogue: Epilogue, out: Value
) -> Value:
    given = {k: v for k, v in operands.items() if v is not None}
    problem = problem.replace(epilogue=epilogue.record, time_groups=pointwise.groups(e, epilogue))
    return e.call(Kernel(template, problem), given | pointwise.finish(e, epilogue), {"y": out})[0]


def group_norm(e: Emitter, node: fx.Node, epilogue: Epilogue, out: Value) -> Value:
    """Emits a group norm of [B, ..., C] with its epilogue."""
    source, groups, weight, bias, eps = arguments(node)
    x, gamma, beta = e.value(source), e.optional(weight), e.optional(bias)
    if (gamma is None) != (beta is None):
        raise e.refusal("it has a weight without a bias, or a bias without a weight")
    if e.folds(node):
        raise e.refusal("a sample has several rows, each with statistics of its own")
    channels = x.inner[-1]
    problem = record(
        "norms.GroupNorm", positions=x.size // channels, channels=channels, groups=groups, eps=eps,
        affine=gamma is not None,
    )  # fmt: skip
    return _anchor(e, "norms", problem, {"x": x, "gamma": gamma, "beta": beta}, epilogue, out)


def layer_norm(e: Emitter, node: fx.Node, epilogue: Epilogue, out: Value) -> Value:
    """Emits a layer norm over the last dimension with its epilogue."""
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


def rms_norm(e: Emitter, node: fx.Node, epilogue: Epilogue, out: Value) -> Value:
    """Emits an RMS norm over the last dimension with its epilogue."""
    source, weight, eps = arguments(node)
    x, gamma = e.value(source), e.optional(weight)
    channels = x.inner[-1]
    problem = record("norms.RmsNorm", positions=x.size // channels, channels=channels, eps=eps, scale=gamma is not None)
    return _anchor(e, "norms", problem, {"x": x, "gamma": gamma}, epilogue, out)


def hadamard(e: Emitter, node: fx.Node, epilogue: Epilogue, out: Value) -> Value:
    """Emits a block-wise Hadamard rotation of channels with its epilogue."""
    source, block = arguments(node)
    x = e.value(source)
    channels = x.inner[-1]
    problem = record("hadamard.Hadamard", positions=x.size // channels, channels=channels, block=block)
    return _anchor(e, "hadamard", problem, {"x": x}, epilogue, out)


def attention(e: Emitter, node: fx.Node, epilogue: Epilogue, out: Value) -> Value:
    """Emits an attention in its numerics with its epilogue; in reduced precision, keys and values are packed first."""
    q, k, v, heads, scale, mask = filled(node, None, None, None, None, None, None)
    query, key, additive = e.value(q), e.value(k), e.optional(mask)
    if len(query.inner) != 2 or len(key.inner) != 2:
        raise e.refusal("its operands are not [B, tokens, channels]")
    if query.inner[1] != e.value(v).inner[-1]:
        raise e.refusal("its values have other heads than its queries and keys")
    shape = None
    if additive is not None:
        own = additive.inner
        shape = (BATCH if additive.batched else 1, *[1] * (3 - len(own)), *(own if additive.batched else own[-3:]))
    problem = record(
        "attention.Attention", queries=query.inner[0], keys=key.inner[0], heads=heads, dim=query.inner[1] // heads,
        scale=scale, mask=shape,
    )  # fmt: skip
    kind = str(node.kwargs.get("numerics", F32))
    if kind == F32:
        operands = {"q": query, "k": key, "v": e.value(v), "mask": additive}
        return _anchor(e, "attention", problem, operands, epilogue, out)
    keys, heads, dim = (int(problem.get(name)) for name in ("keys", "heads", "dim"))
    ready = record("fast_attention.Ready", keys=keys, heads=heads, dim=dim, numerics=kind)
    results = {
        name: Value(f"{node.name}|{name}", (BATCH, *size), dtype)
        for name, (size, dtype) in ready_shapes(kind, keys, heads, dim).items()
    }
    made = e.call(Kernel("fast_attention", ready), {"k": key, "v": e.value(v)}, results)
    fast = record("fast_attention.FastAttention", numerics=kind, **dict(problem.fields))
    operands = {"q": query, **dict(zip(results, made, strict=True)), "mask": additive}
    return _anchor(e, "fast_attention", fast, operands, epilogue, out)


def linear(e: Emitter, node: fx.Node, epilogue: Epilogue, out: Value) -> Value:
    """Emits a linear layer on floats with its epilogue."""
    source, weight, bias = filled(node, None, None, None)
    x, w, b = e.value(source), e.value(weight), e.optional(bias)
    if w.batched:
        raise e.refusal("its weight is computed from the inputs")
    outputs, inputs = w.inner
    problem = record(
        "float_gemm.Linear", positions=x.size // inputs, inputs=inputs, outputs=outputs, bias=b is not None
    )
    return _float_contraction(e, node, problem, [x, w, b], epilogue, out)


def conv2d(e: Emitter, node: fx.Node, epilogue: Epilogue, out: Value) -> Value:
    """Emits a convolution of images [B, H, W, C] on floats with its epilogue."""
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
    return _float_contraction(e, node, problem, [x, w, b], epilogue, out)


def _float_contraction(
    e: Emitter, node: fx.Node, problem: Record, operands: list[Any], epilogue: Epilogue, out: Value
) -> Value:
    """Emits a float layer on (x, weight, bias); the weight is packed at load where the kernel reads it so."""
    x, weight, bias = operands
    kind = str(node.kwargs.get("numerics", F32))
    if kind == F32:
        e.program.fallbacks.setdefault(e.task.anchor.name, "computed in float32: the plan leaves it unquantized")
        plain = _reads_rows(problem)
    else:
        if not e.is_static(weight):
            raise e.refusal("its weight is computed, and products in bfloat16 read stored ones")
        problem, plain = problem.replace(numerics=kind), False
    if not plain and e.is_static(weight):
        problem = problem.replace(packed=True)
        panel = Value(f"{weight.name}|panel", (), "float32" if kind == F32 else "int32")
        weight = e.call(Kernel("pack", _without_size(problem)), {"weight": weight}, {"panel": panel})[0]
    return _anchor(e, "float_gemm", problem, {"x": x, "weight": weight, "bias": bias}, epilogue, out)


FEW_ROWS, FEW_OUTPUTS, LANES = 8, 8, 16
"""The limits of the kernels in `float_gemm`, whose modules import TVM."""


def _reads_rows(problem: Record) -> bool:
    """Whether the kernel in float32 is fastest with unpacked weights: for few rows or few outputs."""
    few = int(problem.get("outputs")) <= FEW_OUTPUTS
    if problem.type == "float_gemm.Linear":
        return few or int(problem.get("positions")) < FEW_ROWS
    wide = int(problem.get("kernel")[1] * problem.get("channels")) >= LANES
    return few and wide and int(problem.get("groups")) == 1


def _without_size(problem: Record) -> Record:
    """Reduces a problem to the smallest image, since weights are packed alike for all sizes of many rows, or of few."""
    if problem.type == "float_gemm.Linear":
        return problem.replace(positions=1 if problem.get("positions") < FEW_ROWS else FEW_ROWS)
    height, width = problem.get("kernel")
    return problem.replace(height=height, width=width, padding=(0, 0, 0, 0), stride=(1, 1))


# ------------------------------------------------------------------------------------ products of activations


def einsum(e: Emitter, node: fx.Node) -> Value:
    """Emits an einsum: a permute of one operand, or the product of two operands over one index."""
    equation, operands = str(node.args[0]).replace(" ", ""), arguments(node)[1]
    if len(operands) == 1:
        return movement.rearranged(e, node)
    names, _, target = equation.partition("->")
    sources = names.split(",")
    if len(operands) != 2 or any(len({*s}) != len(s) for s in (*sources, target)):
        raise e.refusal(f"einsum '{equation}' is no product of two matrices")
    return _product(e, node, [e.value(n) for n in operands], sources, target)


def matmul(e: Emitter, node: fx.Node) -> Value:
    """Emits a matrix product [..., M, K] x [..., K, N] of operands with equally many dimensions."""
    left, right = (e.value(n) for n in arguments(node))
    shape = e.shape(node)
    if not len(left.shape) == len(right.shape) == len(shape) or len(shape) > 8:
        raise e.refusal("its operands have different numbers of dimensions")
    heads = "abcdefgh"[: len(shape) - 2]
    return _product(e, node, [left, right], [f"{heads}mk", f"{heads}kn"], f"{heads}mn")


def mean(e: Emitter, node: fx.Node) -> Value:
    """Emits a mean over one dimension other than the batch, by the product with a row of 1/n."""
    x, dims = e.value(node.args[0]), list(filled(node, None, None)[1] or ())
    if len(dims) != 1 or (axis := e.axis(operand(node, 0), int(dims[0]))) == 0:
        raise e.refusal("only the mean over one dimension, not the batch, has a kernel")
    count = int(x.shape[axis])
    letters = "abcdefgh"[: len(x.shape)]
    rest = letters.replace(letters[axis], "")
    weights = e.constant((count,), "float32", 1.0 / count)
    made = _product(e, node, [weights, x], [letters[axis], letters], rest)
    return Value(made.name, e.shape(node), made.dtype)


def _product(e: Emitter, node: fx.Node, values: list[Value], letters: list[str], target: str) -> Value:
    """Emits ``einsum("letters[0],letters[1]->target")`` over one letter; the batch comes first where there is one.

    The last letter of the result numbers the columns; if one operand alone has it, that operand becomes the right one.
    A letter of the left operand alone numbers the rows. The other letters are heads, over which an operand without them
    repeats.
    """
    equation = f"{','.join(letters)}->{target}"
    views = [e.view(value) for value in values]
    summed = ({*letters[0]} | {*letters[1]}) - {*target}
    batch = target[0] if any(view.shape[:1] == (BATCH,) for view in views) else ""
    fits = all(len(s) == len(v.shape) and v.source.dtype == "float32" for s, v in zip(letters, views, strict=True))
    led = all((v.shape[:1] == (BATCH,)) == (bool(batch) and s[0] == batch) for s, v in zip(letters, views, strict=True))
    if not fits or not led or len(summed) != 1 or not summed <= {*letters[0]} & {*letters[1]}:
        raise e.refusal(f"'{equation}' is no product of float32 matrices, sample by sample")
    rest = target.removeprefix(batch)
    columns = "" if {*rest[-1:]} <= {*letters[0]} & {*letters[1]} else rest[-1]
    if columns and columns in letters[0]:
        views, letters = views[::-1], letters[::-1]
    rows = next((c for c in rest if c != columns and c in letters[0] and c not in letters[1]), "")
    heads = [c for c in rest if c not in (rows, columns)]
    strides = [dict(zip(s, v.strides, strict=True)) for s, v in zip(letters, views, strict=True)]
    extents = {c: n for s, v in zip(letters, views, strict=True) for c, n in zip(s, v.extents, strict=True)}
    strides.append(dict(zip(rest, whole(Value("", tuple(extents[c] for c in rest), "")).strides, strict=True)))
    (term,) = summed

    def access(which: int, *order: str) -> Record:
        steps = [strides[which].get(c, 0) for c in (*heads, *order)]
        if which == 2:
            return record("matmul.Access", shape=[extents[c] for c in rest] or (1,), strides=steps, batched=bool(batch))
        view = views[which]
        shape, batched = view.source.inner, view.source.batched
        return record("matmul.Access", shape=shape, strides=steps, offset=view.offset, batched=batched)

    problem = record(
        "matmul.Matmul", heads=[extents[c] for c in heads], rows=extents.get(rows, 1), terms=extents[term],
        columns=extents.get(columns, 1), left=access(0, rows, term), right=access(1, term, columns),
        result=access(2, rows, columns),
    )  # fmt: skip
    out = Value(node.name, e.shape(node), "float32")
    operands = {"left": views[0].source, "right": views[1].source}
    return e.call(Kernel("matmul", problem), operands, {"y": out})[0]
