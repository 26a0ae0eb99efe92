"""Every operator of the ONNX emitter by itself, against the operator it stands for."""

from __future__ import annotations

import operator

import pytest
import torch

from mpq_compiler.backends.onnx.emit import EMITTERS
from mpq_compiler.ir import ops
from mpq_compiler.ir.aten import aten
from mpq_compiler.ir.interpreter import run
from mpq_compiler.support.errors import UserError
from tests.harness import onnx_models

B = 3


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


IMAGE, TOKENS, ROW, POSITIVE = normal(B, 6, 4, 8), normal(B, 5, 8), normal(B, 8), normal(B, 8).abs() + 0.5
VALUES = {
    "image": IMAGE,
    "image2": normal(B, 6, 4, 8, seed=1),
    "latent": normal(B, 8, 6, 4),
    "tokens": TOKENS,
    "tokens2": normal(B, 5, 8, seed=2),
    "more": normal(B, 7, 8, seed=3),
    "row": ROW,
    "row2": normal(B, 8, seed=4),
    "positive": POSITIVE,
    "index": torch.tensor([0, 4, 2]),
    "mask": normal(B, 1, 1, 7, seed=5),
    "heads": normal(B, 2, 5, 4, seed=6),
    "constant": normal(8, seed=7),
    "constant2": normal(8, seed=8),
    "matrix": normal(8, 8, seed=9),
    "table": normal(5, 8, seed=10),
    "filter": normal(10, 3, 3, 8, seed=11),
    "depthwise": normal(8, 3, 3, 1, seed=12),
    "filter2": normal(10, 8, 3, 3, seed=13),
    "bias": normal(10, seed=14),
    "order": torch.tensor([3, 1]),
    "words": torch.tensor([[7, 9, 9, 2, 2], [2, 2, 9, 0, 1], [1, 3, 5, 7, 7]]),
}
STORED = ("constant", "constant2", "matrix", "table", "filter", "depthwise", "filter2", "bias", "order")

UNARY = (
    *(aten.silu.default, aten.sigmoid.default, aten.tanh.default, aten.relu.default, aten.exp.default),
    *(aten.sin.default, aten.cos.default, aten.neg.default, aten.abs.default, aten.square.default, aten.erf.default),
    *(aten.floor.default, aten.ceil.default, aten.round.default),
)
OF_POSITIVE = (aten.log.default, aten.sqrt.default, aten.rsqrt.default, aten.reciprocal.default)
OF_TWO = (
    *(aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.rsub.Tensor),
    *(aten.maximum.default, aten.minimum.default),
)
OF_NUMBER = (aten.add.Scalar, aten.sub.Scalar, aten.mul.Scalar, aten.div.Scalar, aten.rsub.Scalar)
COMPARISONS = (aten.eq, aten.gt, aten.ge, aten.lt, aten.le)

# (operator, arguments), where a string names one of VALUES and a tuple is another call
CASES = [
    *((target, ("image",)) for target in UNARY),
    *((target, ("positive",)) for target in OF_POSITIVE),
    *((target, ("image", "image2")) for target in OF_TWO),
    *((target, ("image", 1.5)) for target in OF_NUMBER),
    *((each.Scalar, ("index", 2)) for each in COMPARISONS),
    *((each.Tensor, ("row", "row2")) for each in COMPARISONS),
    (aten.add.Tensor, ("image", "constant")),
    (aten.add.Tensor, ("image", (aten.reshape.default, ("row", [-1, 1, 1, 8])))),
    (aten.add.Tensor, ("row", "row2", {"alpha": 2})),
    (aten.mul.Tensor, ("row", (aten.unsqueeze.default, ("index", 1)))),
    (aten.pow.Tensor_Scalar, ("positive", 2.5)),
    (aten.pow.Tensor_Tensor, ("positive", "row")),
    (aten.gelu.default, ("image",)),
    (aten.gelu.default, ("image", {"approximate": "tanh"})),
    (aten.clamp.default, ("image", -0.5, 0.5)),
    (aten.clamp_min.default, ("image", 0.1)),
    (aten.clamp_max.default, ("image", 0.1)),
    (aten.to.dtype, ("index", torch.float32)),
    (aten._to_copy.default, ("index", {"dtype": torch.float32})),
    (aten.type_as.default, ("index", "row")),
    (aten.to.dtype_layout, ("index", {"dtype": torch.float32})),
    (aten.logical_not.default, ((aten.gt.Scalar, ("row", 0.0)),)),
    (aten.bitwise_not.default, ((aten.gt.Scalar, ("row", 0.0)),)),
    (aten.logical_and.default, ((aten.gt.Scalar, ("row", 0.0)), (aten.gt.Scalar, ("row2", 0.0)))),
    (aten.logical_or.default, ((aten.gt.Scalar, ("row", 0.0)), (aten.gt.Scalar, ("row2", 0.0)))),
    (aten.where.self, ((aten.gt.Scalar, ("row", 0.0)), "row2", "constant")),
    (aten.mean.dim, ("tokens", [1], True)),
    (aten.sum.dim_IntList, ("tokens", [1, 2])),
    (aten.amax.default, ("tokens", [-1])),
    (aten.amin.default, ("tokens", [-1], True)),
    (aten.softmax.int, ("tokens", -1)),
    (aten._softmax.default, ("tokens", 1, False)),
    (ops.group_norm, ("image", 4, "constant", "constant2", 1e-5)),
    (ops.group_norm, ("tokens", 2, None, None, 1e-6)),
    (ops.group_norm, ("row", 2, "constant", "constant2", 1e-6)),
    (aten.group_norm.default, ("latent", 4, "constant", "constant2", 1e-5)),
    (aten.layer_norm.default, ("tokens", [8], "constant", "constant2", 1e-5)),
    (aten.layer_norm.default, ("tokens", [8])),
    (ops.rms_norm, ("tokens", "constant", 1e-5)),
    (ops.rms_norm, ("tokens", None, 1e-5)),
    (ops.hadamard, ("image", 8)),
    (ops.hadamard, ("tokens", 4)),
    (ops.hadamard, ("row", 2)),
    (aten.linear.default, ("tokens", "matrix", "constant")),
    (aten.linear.default, ("row", "matrix")),
    (aten.matmul.default, ("heads", (aten.transpose.int, ("heads", -1, -2)))),
    (aten.bmm.default, ("tokens", (aten.permute.default, ("more", [0, 2, 1])))),
    (aten.mm.default, ("row", "matrix")),
    (ops.conv2d, ("image", "filter", "bias", [2, 1], [0, 1, 1, 1])),
    (ops.conv2d, ("image", "depthwise", None, [1, 1], [1, 1, 1, 1], 8)),
    (aten.conv2d.default, ("latent", "filter2", "bias", [2, 2], [1, 1])),
    (aten.einsum.default, ("bqc,bkc->bqk", ["tokens", "more"])),
    (ops.attention, ("tokens", "more", "more", 2)),
    (ops.attention, ("tokens", "more", "more", 4, 0.3, "mask")),
    (aten.scaled_dot_product_attention.default, ("heads", "heads", "heads")),
    (aten.reshape.default, ("image", [-1, 24, 8])),
    (aten.view.default, ((aten.contiguous.default, ("tokens",)), [-1, 8])),
    (aten._unsafe_view.default, ((aten.contiguous.default, ("tokens",)), [-1, 40])),
    (aten.flatten.using_ints, ("image", 1, 2)),
    (aten.unflatten.int, ("tokens", -1, [2, 4])),
    (aten.unsqueeze.default, ("row", 1)),
    (aten.squeeze.dim, ((aten.unsqueeze.default, ("row", 1)), 1)),
    (aten.squeeze.dims, ((aten.unsqueeze.default, ("row", 1)), [1])),
    (aten.contiguous.default, ("tokens",)),
    (aten.clone.default, ("tokens",)),
    (aten.permute.default, ("latent", [0, 2, 3, 1])),
    (aten.permute.default, ("image", [0, 2, 3, 1])),
    (aten.transpose.int, ("tokens", 1, 2)),
    (aten.swapaxes.default, ("tokens", 1, 2)),
    (aten.mm.default, ("row", (aten.t.default, ("matrix",)))),
    (aten.cat.default, (["image", "image2"], -1)),
    (aten.concat.default, (["tokens", "more"], 1)),
    (aten.stack.default, (["row", "row2"], 1)),
    (aten.slice.Tensor, ("image", 1, 1, 9223372036854775807, 2)),
    (aten.slice.Tensor, ("tokens", 0, 0, 9223372036854775807)),
    (aten.slice.Tensor, ("tokens", -1, -3)),
    (aten.select.int, ("tokens", 1, -2)),
    (operator.getitem, ((aten.chunk.default, ("tokens", 2, -1)), 1)),
    (operator.getitem, ((aten.split.Tensor, ("tokens", 2, 1)), 2)),
    (operator.getitem, ((aten.split_with_sizes.default, ("tokens", [1, 4], 1)), 1)),
    (operator.getitem, ((aten.unbind.int, ("tokens", 1)), 3)),
    (aten.expand.default, ((aten.unsqueeze.default, ("row", 1)), [-1, 4, -1])),
    (aten.broadcast_to.default, ((aten.unsqueeze.default, ("row", 1)), [-1, 4, -1])),
    (aten.repeat.default, ("row", [2, 1, 1])),
    (aten.pad.default, ("image", [0, 0, 0, 1, 2, 0])),
    (aten.constant_pad_nd.default, ("tokens", [1, 2], 0.5)),
    (ops.for_each_sample, ((aten.unsqueeze.default, ("constant", 0)), "tokens")),
    (ops.prepend, ("tokens", "constant")),
    (ops.row_of_token, ("tokens", "words", None)),
    (ops.row_of_token, ("tokens", "words", 2)),
    (aten.embedding.default, ("table", "index")),
    (aten.index_select.default, ("tokens", 1, "order")),
    (ops.upsample_nearest2d, ("image", [2, 3])),
    (aten.upsample_nearest2d.vec, ("latent", None, [2.0, 2.0])),
]
"""What the quantized operators compute is in test_integers.py."""
QUANTIZED = {
    *(ops.time_group, ops.quantize, ops.dynamic_quantize, ops.dequantize_weight, ops.dequantize_float8),
    *(ops.quant_linear, ops.quant_conv2d, ops.quant_attention, ops.fake_quantize_float),
}


def parts(arguments):
    return [a for a in arguments if not isinstance(a, dict)], next((a for a in arguments if isinstance(a, dict)), {})


def names(arguments):
    for a in arguments:
        if isinstance(a, str) and a in VALUES:
            yield a
        elif isinstance(a, tuple):
            yield from names(a[1])
        elif isinstance(a, list):
            yield from names(a)


def call(graph, nodes, target, arguments):
    def made(a):
        if isinstance(a, str):
            return nodes.get(a, a)
        if isinstance(a, tuple):
            return call(graph, nodes, *a)
        return [made(x) for x in a] if isinstance(a, list) else a

    positional, keywords = parts(arguments)
    return graph.call_function(target, tuple(map(made, positional)), keywords)


def program_of(target, arguments, first=False):
    """(a program of the call, its inputs). ``first``: tensors of three and four dimensions lie channels-first."""
    used = list(dict.fromkeys(names(arguments)))
    inputs = {name: VALUES[name] for name in used if name not in STORED} or {"row": ROW}
    tensors = {name: VALUES[name] for name in used if name in STORED}
    turned = [name for name, value in inputs.items() if first and value.dim() > 2]

    def build(graph, nodes):
        for name in turned:
            rank = inputs[name].dim()
            nodes[name] = graph.call_function(aten.permute.default, (nodes[name], [0, *range(2, rank), 1]))
        return call(graph, nodes, target, arguments)

    given = {name: value.movedim(-1, 1).contiguous() if name in turned else value for name, value in inputs.items()}
    return onnx_models.graph_of(build, given, tensors), given


def identifier(case):
    return ops.name_of(case[0]) if case[0] is not operator.getitem else "getitem"


@pytest.mark.parametrize("first", [False, True], ids=["last", "first"])
@pytest.mark.parametrize("case", CASES, ids=identifier)
def test_operator(case, first, tmp_path):
    program, inputs = program_of(*case, first)
    stored = {n: onnx_models.stored_tensors.Stored(t.numpy(), n) for n, t in program.tensors.items()}
    model = onnx_models.session(onnx_models.write(program, tmp_path, stored))
    for batch in (1, B):
        some = {name: value[:batch] for name, value in inputs.items()}
        (result,) = model.run(None, {name: value.numpy() for name, value in some.items()})
        expected = run(program, some)
        assert result.shape == tuple(expected.shape)
        error = (torch.from_numpy(result) - expected).abs().max()
        assert error <= 2e-6 * max(1.0, float(expected.abs().max())), float(error)


def test_every_operator_has_a_case():
    def targets(call):
        yield call[0]
        for argument in call[1]:
            if isinstance(argument, tuple):
                yield from targets(argument)

    assert EMITTERS.keys() == {t for case in CASES for t in targets(case)} | QUANTIZED


REFUSED = [
    (aten.cumsum.default, ("tokens", 1), "it is not known here"),
    (aten.slice.Tensor, ("tokens", 0, 0, 1), "part of the batch"),
    (aten.select.int, ("tokens", 0, 0), "part of the batch"),
    (aten.pad.default, ("tokens", [1, 1], {"mode": "reflect"}), "padding by a constant"),
    (aten.rsub.Scalar, ("row", 1.0, 2.0), "multiplies by 2.0"),
]


@pytest.mark.parametrize(("target", "arguments", "reason"), REFUSED)
def test_what_cannot_be_said_names_node_operator_and_reason(target, arguments, reason, tmp_path):
    program, _ = program_of(target, arguments)
    node = next(n for n in program.graph.nodes if n.target is target)
    with pytest.raises(UserError) as caught:
        onnx_models.write(program, tmp_path, {})
    assert f"node '{node.name}' ({ops.name_of(target)}) cannot be exported to ONNX" in str(caught.value)
    assert reason in str(caught.value)
