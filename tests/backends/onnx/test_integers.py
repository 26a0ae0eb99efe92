"""Quantizers and layers on codes in onnxruntime, against the integer definitions: contract (a) of docs/ir.md."""

from __future__ import annotations

import operator
from collections import Counter

import numpy as np
import onnx
import pytest
import torch

from mpq_compiler import formats
from mpq_compiler.formats.packing import pack_codes
from mpq_compiler.ir import ops, stored_tensors
from mpq_compiler.ir.aten import aten
from mpq_compiler.ir.interpreter import run
from tests.harness import onnx_models, packed

G = 4
TIMESTEPS = torch.tensor([900, 10, 500, 10, 300])
BOUNDARIES = torch.tensor([100.0, 400.0, 700.0])


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def activation_tables(name, groups, seed=0):
    g = seeded(seed)
    scale = (torch.rand(groups, generator=g) * 0.05 + 0.01).half()
    return {f"{name}:scale": scale, f"{name}:zero": torch.randint(0, 200, (groups,), generator=g).to(torch.uint8)}


def weight(rows, columns, bits, *, classes=1, offset=True, segments=1, affine=False, seed=1):
    """Stored parts of a weight by name, as `storage` finds them."""
    g = seeded(seed)
    parts = {"w:scale": (torch.rand(rows, segments, generator=g) * 0.02 + 0.001).half()}
    if bits == 8:
        return parts | {"w:codes": torch.randint(-127, 128, (rows, columns), generator=g).to(torch.int8)}
    parts["w:codes"] = torch.randint(0, 1 << bits, (rows, columns), generator=g).to(torch.uint8)
    parts["w:lut"] = torch.randint(-127, 128, (classes, 1 << bits), generator=g).to(torch.int8)
    if affine:
        parts["w:lut"] = (torch.arange(1 << bits) - (1 << bits - 1)).to(torch.int8)[None]
    if classes > 1:
        parts["w:row_class"] = torch.randint(0, classes, (-(-rows // 16),), generator=g).to(torch.uint8)
    if offset:
        parts["w:offset"] = (torch.randn(rows, generator=g) * 0.01).half()
    return parts


def layer(target, x, tensors, groups, segments, bias=True, geometry=(), rows=False):
    """A program of one layer on codes, and its inputs; ``rows``: as rows of two dimensions, several to a sample."""
    inputs = {"timestep": TIMESTEPS, "x": x}
    tensors = dict(tensors)
    if bias:
        tensors["bias"] = torch.randn(tensors["w:scale"].shape[0], generator=seeded(5)).half()
    tensors["boundaries"] = BOUNDARIES[: groups - 1]
    edges = sorted({n.split(":")[0] for n in tensors if n.endswith(":zero")})
    edges = edges if len(edges) == len(segments) else edges * len(segments)

    def build(graph, n):
        group = graph.call_function(ops.time_group, (n["timestep"], n["boundaries"]))
        parts = [n.get(f"w:{part}") for part in ("codes", "scale", "offset", "lut", "row_class")]
        scales, zeros = ([n[f"{edge}:{part}"] for edge in edges] for part in ("scale", "zero"))
        codes = graph.call_function(aten.reshape.default, (n["x"], [-1, x.shape[-1]])) if rows else n["x"]
        arguments = (codes, group, *parts, scales, zeros, n.get("bias"), list(segments), *geometry)
        return graph.call_function(target, arguments)

    return onnx_models.graph_of(build, inputs, tensors), inputs


def check(program, inputs, folder, bound=1e-6):
    """onnxruntime agrees with the reference at batch 1 and more; what it makes of the model, by operator."""
    model = onnx_models.session(onnx_models.write(program, folder), folder / "optimized.onnx")
    for batch in (1, len(TIMESTEPS)):
        some = {name: value[:batch] for name, value in inputs.items()}
        (result,) = model.run(None, {name: value.numpy() for name, value in some.items()})
        expected = run(program, some)
        assert result.shape == tuple(expected.shape)
        error = float((torch.from_numpy(result) - expected).abs().max() / expected.abs().max())
        assert error <= bound, error
    return Counter(n.op_type for n in onnx.load(folder / "optimized.onnx", load_external_data=False).graph.node)


def codes(*shape, bits=8, seed=2):
    return torch.randint(0, 1 << bits, shape, generator=seeded(seed)).to(torch.uint8)


WEIGHTS = [
    {"bits": 8},
    {"bits": 2},
    {"bits": 3},
    {"bits": 4},
    {"bits": 5},
    {"bits": 2, "affine": True},
    {"bits": 3, "affine": True, "offset": False},
    {"bits": 4, "affine": True},
    {"bits": 3, "classes": 2},
    {"bits": 4, "classes": 3, "offset": False},
]


@pytest.mark.parametrize("groups", [1, G])
@pytest.mark.parametrize("form", WEIGHTS, ids=str)
def test_linear_layers_of_every_width(form, groups, tmp_path):
    """37 x 27 codes fill no whole bytes, 37 rows no whole tiles."""
    tensors = weight(37, 27, **form) | activation_tables("a", groups)
    program, inputs = layer(ops.quant_linear, codes(5, 7, 27), tensors, groups, [27])
    made = check(program, inputs, tmp_path)
    assert made["MatMulIntegerToFloat"] == 1 + ("w:offset" in tensors)
    assert not made["DequantizeLinear"] and not made["MatMul"], "an integer kernel reads the codes"
    assert not {"BitShift", "BitwiseOr", "Unsqueeze"} & made.keys(), "weights are decoded at load"


@pytest.mark.parametrize("name", ["int2m", "int3m", "int4m", "int2m+b", "int3m+b"])
def test_rows_of_several_widths(name, tmp_path):
    w = torch.randn(37, 27, generator=seeded(0))
    w[::3] = w[::3] ** 3
    fit = formats.get(name).fit(w)
    assert len(fit.row_class.unique()) == 3
    parts = {part: getattr(fit, part) for part in ("codes", "scale", "offset", "lut", "row_class")}
    tensors = {f"w:{part}": tensor for part, tensor in parts.items()} | activation_tables("a", G)
    program, inputs = layer(ops.quant_linear, codes(5, 7, 27), tensors, G, [27])
    made = check(program, inputs, tmp_path)
    assert made["MatMulIntegerToFloat"] == 2
    assert not {"BitwiseOr", "Concat"} & made.keys(), "weights are decoded at load"
    assert stored_tensors.stored(program)["w:codes"].array.nbytes == -(-37 * 27 * formats.get(name).bits // 8)


@pytest.mark.parametrize("groups", [1, G])
@pytest.mark.parametrize("rank", [2, 4])
def test_linear_layers_of_vectors_and_images(rank, groups, tmp_path):
    x = codes(5, 24) if rank == 2 else codes(5, 3, 2, 24)
    tensors = weight(16, 24, 8) | activation_tables("a", groups)
    made = check(*layer(ops.quant_linear, x, tensors, groups, [24], bias=rank == 2), tmp_path)
    assert made["MatMulIntegerToFloat"] == 1 and not made["Gemm"]


@pytest.mark.parametrize("groups", [1, G])
def test_rows_that_are_several_to_a_sample(groups, tmp_path):
    tensors = weight(16, 24, 3) | activation_tables("a", groups)
    check(*layer(ops.quant_linear, codes(5, 3, 24), tensors, groups, [24], rows=True), tmp_path)


@pytest.mark.parametrize("groups", [1, G])
@pytest.mark.parametrize("edges", [1, 2])
def test_segments(edges, groups, tmp_path):
    """K-groups share the tables of one edge; a concatenated input keeps those of two."""
    tensors = weight(16, 24, 4, segments=2)
    for i in range(edges):
        tensors |= activation_tables(f"a{i}", groups, seed=i)
    check(*layer(ops.quant_linear, codes(5, 3, 24), tensors, groups, [10, 14]), tmp_path)


CONVOLUTIONS = [
    ((3, 3), (1, 1), (1, 1, 1, 1)),
    ((3, 3), (2, 2), (0, 1, 0, 1)),
    ((3, 3), (1, 1), (0, 0, 0, 0)),
    ((1, 1), (1, 1), (0, 0, 0, 0)),
    ((1, 1), (2, 2), (0, 0, 0, 0)),
    ((2, 2), (2, 2), (0, 0, 0, 0)),
    ((3, 2), (2, 1), (2, 0, 1, 3)),
]


@pytest.mark.parametrize("groups", [1, G])
@pytest.mark.parametrize("geometry", CONVOLUTIONS, ids=str)
def test_convolutions(geometry, groups, tmp_path):
    tensors = weight(19, 6 * geometry[0][0] * geometry[0][1], 3) | activation_tables("a", groups)
    program, inputs = layer(ops.quant_conv2d, codes(5, 7, 5, 6), tensors, groups, [6], geometry=geometry)
    made = check(program, inputs, tmp_path)
    assert made["MatMulIntegerToFloat"] == 2 and not made["Conv"] and not made["Transpose"]


@pytest.mark.parametrize("groups", [1, G])
def test_convolutions_of_two_segments(groups, tmp_path):
    tensors = weight(19, 6 * 9, 3, segments=2) | activation_tables("a", groups) | activation_tables("b", groups, 3)
    geometry = ((3, 3), (1, 1), (1, 1, 1, 1))
    check(*layer(ops.quant_conv2d, codes(5, 7, 5, 6), tensors, groups, [4, 2], geometry=geometry), tmp_path)


def test_extreme_codes_do_not_saturate(tmp_path):
    """Pairs of products beyond 16 bits are where kernels without VNNI lose bits."""
    tensors = {
        "w:codes": torch.full((16, 64), 127, dtype=torch.int8),
        "w:scale": torch.ones(16, 1).half(),
        "a:scale": torch.ones(1).half(),
        "a:zero": torch.zeros(1, dtype=torch.uint8),
    }
    program, inputs = layer(ops.quant_linear, torch.full((5, 64), 255, dtype=torch.uint8), tensors, 1, [64], bias=False)
    check(program, inputs, tmp_path, bound=0.0)


def quantizer(bits, groups, x):
    tensors = activation_tables("a", groups) | {"boundaries": BOUNDARIES[: groups - 1]}

    def build(graph, n):
        group = graph.call_function(ops.time_group, (n["timestep"], n["boundaries"]))
        rows = graph.call_function(aten.reshape.default, (n["x"], [-1, x.shape[-1]]))
        return graph.call_function(ops.quantize, (rows, n["a:scale"], n["a:zero"], group, bits))

    return onnx_models.graph_of(build, {"timestep": TIMESTEPS, "x": x}, tensors), {"timestep": TIMESTEPS, "x": x}


@pytest.mark.parametrize("groups", [1, G])
@pytest.mark.parametrize("bits", [8, 6, 4])
def test_quantizers(bits, groups, tmp_path):
    """x / s and x * (1 / s) round alike but at ties: no code differs by more than 1, and few do."""
    zero = activation_tables("a", groups)["a:zero"]
    program, inputs = quantizer(bits, groups, torch.randn(5, 3, 200, generator=seeded(3)) * 4)
    if bits < 8:
        program.tensors = type(program.tensors)({**program.tensors, "a:zero": zero % (1 << bits)})
    result, expected = onnx_models.run(program, inputs, tmp_path), run(program, inputs)
    different = (result - expected).abs()
    assert different.max() <= 1 and (different > 0).float().mean() < 1e-3
    assert expected.max() == (1 << bits) - 1


@pytest.mark.parametrize("bits", [8, 5])
def test_dynamic_quantizers(bits, tmp_path):
    x = torch.randn(5, 6, 40, generator=seeded(4))
    x[1, 2] = 0.0
    inputs = {"timestep": TIMESTEPS, "x": x}
    tensors = weight(16, 40, 4)

    def build(graph, n):
        made = graph.call_function(ops.dynamic_quantize, (n["x"], bits))
        q, scale, zero = (graph.call_function(operator.getitem, (made, i)) for i in range(3))
        parts = [n.get(f"w:{part}") for part in ("codes", "scale", "offset", "lut", "row_class")]
        return graph.call_function(ops.quant_linear, (q, None, *parts, [scale], [zero], None, [40]))

    program = onnx_models.graph_of(build, inputs, tensors)
    assert packed.sqnr_db(onnx_models.run(program, inputs, tmp_path), run(program, inputs)) > 60


@pytest.mark.parametrize("groups", [1, G])
def test_attention_on_codes(groups, tmp_path):
    inputs = {"timestep": TIMESTEPS, "q": codes(5, 6, 8), "k": codes(5, 9, 8, seed=8), "v": codes(5, 9, 8, seed=9)}
    tensors = {"boundaries": BOUNDARIES[: groups - 1], "p:scale": torch.full((groups,), 1 / 255).half()}
    for edge in "qkv":
        tensors |= activation_tables(edge, groups, seed=ord(edge))
    tensors["p:zero"] = torch.zeros(groups, dtype=torch.uint8)
    tensors["mask"] = torch.randn(1, 1, 1, 9, generator=seeded(6)).half()

    def build(graph, n):
        group = graph.call_function(ops.time_group, (n["timestep"], n["boundaries"]))
        tables = [n[f"{edge}:{part}"] for edge in "qkvp" for part in ("scale", "zero")]
        return graph.call_function(ops.quant_attention, (n["q"], n["k"], n["v"], group, *tables, 2, None, n["mask"], 8))

    program = onnx_models.graph_of(build, inputs, tensors)
    assert packed.sqnr_db(onnx_models.run(program, inputs, tmp_path), run(program, inputs)) > 60


@pytest.mark.parametrize("exponent", [2, 3, 4, 5])
def test_float8_weights(exponent, tmp_path):
    inputs = {"x": torch.randn(5, 16, generator=seeded(7))}
    tensors = {"w:codes": torch.arange(256, dtype=torch.uint8).reshape(16, 16), "w:scale": torch.rand(16).half()}

    def build(graph, n):
        made = graph.call_function(ops.dequantize_float8, (n["w:codes"], n["w:scale"], [16, 16], exponent))
        return graph.call_function(aten.linear.default, (n["x"], made))

    program = onnx_models.graph_of(build, inputs, tensors)
    result, expected = onnx_models.run(program, inputs, tmp_path), run(program, inputs)
    assert (result - expected).abs().max() <= 2e-6 * expected.abs().max()


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("exponent, bits", [(2, 4), (2, 8), (3, 8), (4, 8), (5, 8)])
def test_activations_in_small_floats(exponent, bits, groups, tmp_path):
    x = torch.randn(6, 400, generator=seeded(9)) * torch.logspace(-4, 2, 400)
    x[:, ::7] = 2.0 ** torch.arange(-9, 49)[: len(x[0, ::7])].clamp(max=9)  # powers of two, where a logarithm errs
    inputs = {"x": x, "timestep": torch.tensor([0, 300, 301, 700, 900, 999])}
    tensors = {"s": (torch.rand(groups, generator=seeded(2)) + 0.1).half()}
    tensors["boundaries"] = torch.linspace(300, 800, groups - 1)

    def build(graph, n):
        group = graph.call_function(ops.time_group, (n["timestep"], n["boundaries"]))
        return graph.call_function(ops.fake_quantize_float, (n["x"], n["s"], group, exponent, bits))

    program = onnx_models.graph_of(build, inputs, tensors)
    assert torch.equal(onnx_models.run(program, inputs, tmp_path), run(program, inputs))


@pytest.mark.parametrize("form", WEIGHTS, ids=str)
def test_weights_that_float_layers_read(form, tmp_path):
    inputs, tensors = {"x": torch.randn(5, 26, generator=seeded(7))}, weight(37, 26, **form, segments=2)

    def build(graph, n):
        parts = [n.get(f"w:{part}") for part in ("codes", "scale", "offset", "lut", "row_class")]
        made = graph.call_function(ops.dequantize_weight, (*parts, [37, 26], [10, 16]))
        return graph.call_function(aten.linear.default, (n["x"], made))

    program = onnx_models.graph_of(build, inputs, tensors)
    result, expected = onnx_models.run(program, inputs, tmp_path), run(program, inputs)
    assert (result - expected).abs().max() <= 2e-6 * expected.abs().max()


def test_the_file_holds_the_packed_codes(tmp_path):
    """A model reads the bytes of the weight file where they are, in the width of the plan."""
    tensors = weight(37, 27, 3) | activation_tables("a", G)
    program, _ = layer(ops.quant_linear, codes(5, 7, 27), tensors, G, [27])
    path = onnx_models.write(program, tmp_path)
    model = onnx.load(path, load_external_data=False)
    (found,) = [t for t in model.graph.initializer if t.name == "w:codes"]
    place = {entry.key: entry.value for entry in found.external_data}
    data = (tmp_path / place["location"]).read_bytes()[int(place["offset"]) :][: int(place["length"])]
    assert data == pack_codes(tensors["w:codes"].numpy(), 3).tobytes()
    inside = sum(len(t.raw_data) for t in model.graph.initializer)
    assert inside < 4000, "constants within the model are shapes and tables of bits"
    assert stored_tensors.stored(program)["w:codes"].array.nbytes == len(data) == -(-37 * 27 * 3 // 8)


def test_codes_of_four_bits_are_of_a_type_of_onnx(tmp_path):
    program, _ = layer(ops.quant_linear, codes(5, 7, 27), weight(37, 27, 4) | activation_tables("a", G), G, [27])
    model = onnx.load(onnx_models.write(program, tmp_path))
    (found,) = [t for t in model.graph.initializer if t.name == "w:codes"]
    assert found.data_type == onnx.TensorProto.UINT4
    assert np.array_equal(onnx.numpy_helper.to_array(found).astype(np.uint8), program.tensors["w:codes"].numpy())
