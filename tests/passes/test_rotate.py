from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, fx

from mpq_compiler.frontend import denoiser as denoisers
from mpq_compiler.ir import ops
from mpq_compiler.ir.aten import aten
from mpq_compiler.ir.graph import arguments, operand, weight_of
from mpq_compiler.ir.interpreter import run
from mpq_compiler.ir.program import NOTES, InputSpec, Program, Stage, TensorStore
from mpq_compiler.ir.provenance import DECISIONS
from mpq_compiler.ir.verifier import verify
from mpq_compiler.passes.rotate import Rotate
from mpq_compiler.pipeline import manager, parser
from mpq_compiler.pipeline.options import make as make_pass
from mpq_compiler.pipeline.session import Session
from mpq_compiler.support.errors import UserError
from tests.harness import programs, tiny

BLOCKS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
MODELS = ("unet2d", "sd15", "sd3")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rotations(program: Program) -> list[fx.Node]:
    return [n for n in program.graph.nodes if n.target is ops.hadamard]


def step(model: str) -> programs.Step:
    return programs.step(model, "rotate", "trace,layout,rotate{rule=everywhere,rows=8}")


# --- the operator -------------------------------------------------------------------------------------------


def matrix(block: int) -> Tensor:
    """By its definition: Sylvester's matrix, its columns with the signs of Golay, Rudin and Shapiro."""
    h = torch.ones(1, 1, dtype=torch.float64)
    while len(h) < block:
        h = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), h)
    pairs = [bin(i)[2:] for i in range(block)]
    signs = [(-1.0) ** sum(a == b == "1" for a, b in itertools.pairwise(p)) for p in pairs]
    return h * torch.tensor(signs, dtype=torch.float64) / math.sqrt(block)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.invariant("trdq-1")
def test_it_is_the_matrix_and_the_matrix_is_orthogonal(block):
    r = ops.hadamard(torch.eye(block, dtype=torch.float64), block)
    torch.testing.assert_close(r.T, matrix(block), rtol=0, atol=1e-15)
    torch.testing.assert_close(r @ r.T, torch.eye(block, dtype=torch.float64), rtol=0, atol=1e-14)
    x = random(3, 5, 2 * block)
    y = ops.hadamard(x, block)
    assert y.is_contiguous()  # what is done with it next is summed up in the order of its memory
    assert y.dtype == torch.float32 and y.shape == x.shape
    exact = (x.double().unflatten(-1, (2, block)) @ matrix(block).T).flatten(-2)
    assert float((y - exact).abs().max()) <= 1e-6 * float(exact.abs().max())


@pytest.mark.parametrize("block", BLOCKS)
def test_bits_and_gradients_are_those_of_its_steps(block):
    """More rows than are rotated together; gradients too have the bits of the steps, taken backwards."""
    x, g = random(ops.CACHED // block + 3, block).requires_grad_(), random(ops.CACHED // block + 3, block)
    y = x * ops.rotation_signs(block)
    for step in (1 << i for i in range(block.bit_length() - 1)):
        a, b = y.unflatten(1, (-1, 2, step)).unbind(2)
        y = torch.stack([a + b, a - b], 2).flatten(1)
    y = y * block**-0.5
    assert torch.equal(ops.hadamard(x, block), y)
    expected, found = (torch.autograd.grad(of, x, g)[0] for of in (y, ops.hadamard(x, block)))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("block", BLOCKS)
def test_an_outlier_and_a_common_mean_are_spread_evenly(block):
    """Without the signs a mean of 1 in all channels would be sqrt(block) in one of them."""
    one = torch.eye(block, dtype=torch.float64)
    assert torch.allclose(ops.hadamard(one, block).abs(), torch.full_like(one, block**-0.5))
    assert float(ops.hadamard(torch.ones(block), block).abs().max()) <= math.sqrt(2) + 1e-6


# --- the rewrite --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.invariant("trdq-3")
def test_blocks_are_the_largest_powers_of_two_that_divide_the_channels(model):
    found = rotations(step(model).after)
    assert found
    for node in found:
        block = arguments(node)[1]
        readers = list(node.users)
        channels = {step(model).after.tensors[str(weight_of(n))].shape[-1] for n in readers}
        assert len(channels) == 1
        (count,) = channels
        assert count % block == 0 and block & (block - 1) == 0
        assert block == 256 or count // block % 2 == 1


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.invariant("trdq-2")
def test_every_value_is_as_it_was(model):
    """Layers, convolutions with strides and padding too: what has the same name has the same values."""
    values: list[dict[str, Tensor]] = [{}, {}]
    for own, program in zip(values, (step(model).before, step(model).after), strict=True):
        run(program, programs.inputs(model, 2), lambda node, value, own=own: own.__setitem__(node.name, value))
    layers = [n.name for n in step(model).after.quantizable]
    turned = [n for n in layers if operand(step(model).after.node(n), 0).target is ops.hadamard]
    assert len(turned) > 10
    for name in layers:
        before, after = (own[name] for own in values)
        assert float((after - before).abs().max()) <= 1e-5 * float(before.abs().max()), name


@pytest.mark.invariant("trdq-4")
def test_layers_that_read_one_tensor_share_its_rotation():
    before, after = step("unet2d").before, step("unet2d").after
    shared = 0
    for node in rotations(after):
        edge = operand(node, 0).name
        readers = {n.name for n in before.quantizable if operand(n, 0).name == edge}
        assert {n.name for n in node.users} == readers and node.name == f"{edge}_rotated"
        shared += len(readers) > 1
    edges = [operand(n, 0).name for n in rotations(after)]
    assert shared >= 3 and len({*edges}) == len(edges)


@pytest.mark.invariant("trdq-4")
def test_what_else_reads_the_tensor_reads_it_as_it_was():
    after = step("unet2d").after
    turned = {operand(n, 0) for n in rotations(after)}
    others = [(n, u) for n in turned for u in n.users if u.target is not ops.hadamard]
    assert others and all(u.target in (aten.add.Tensor, aten.cat.default, ops.group_norm) for _, u in others)


def test_a_cap_on_the_blocks():
    before = programs.after("unet2d", "layout")
    rotate = make_pass("rotate", {"rule": "everywhere", "block": 8, "rows": 8})
    after = rotate.run(before, Session(programs.denoiser("unet2d"), programs.calibration("unet2d")))
    assert {arguments(n)[1] for n in rotations(after)} == {8}
    with pytest.raises(UserError, match="option 'block' of pass 'rotate' must be a power of two from 2 on, not 48"):
        make_pass("rotate", {"block": 48})


# --- the choice ---------------------------------------------------------------------------------------------


def loud(factor: float, channel: int = 11) -> denoisers.Denoiser:
    """The tiny UNet with a loud channel before its attentions' layers, which computes the same."""
    model = tiny.model("unet2d")
    for module in model.modules():
        if type(module).__name__ == "Attention":
            for part in (module.group_norm.weight, module.group_norm.bias):
                part.data[channel] *= factor
            for layer in (module.to_q, module.to_k, module.to_v):
                layer.weight.data[:, channel] /= factor
    return denoisers.wrap(model, name="unet2d")


def chosen(denoiser: denoisers.Denoiser, **options) -> Program:
    start = programs.empty()
    session = Session(denoiser, programs.calibration("unet2d"))
    passes = [*parser.parse("trace,layout"), Rotate(rows=128, **options)]
    return manager.run_pipeline(passes, start, session)[0]


def test_loud_channels_are_rotated_and_nothing_else():
    program = chosen(loud(40.0), weights="int8", activations=4, gain=3.0)
    names = [n.name for n in rotations(program)]
    assert len(names) >= 3 and all(n.endswith("group_norm_rotated") for n in names)
    said = program.facts[DECISIONS]["mid_block.attentions.0.to_q.weight"]["rotate"]
    assert said["block"] == 64 and said["gain_db"] > 3
    assert NOTES not in program.facts


def test_it_says_so_where_nothing_gains():
    before = programs.after("unet2d", "layout")
    after = Rotate(gain=100.0, rows=32).run(
        before, Session(programs.denoiser("unet2d"), programs.calibration("unet2d"))
    )
    assert [n.name for n in after.graph.nodes] == [n.name for n in before.graph.nodes]
    assert "rotate changes nothing" in after.facts[NOTES][-1] and "none gains 100 dB" in after.facts[NOTES][-1]


def test_odd_numbers_of_channels_and_shared_weights_are_left():
    graph = fx.Graph()
    x, v = graph.placeholder("x"), graph.placeholder("v")

    def linear(value, weight):
        return graph.call_function(aten.linear.default, (value, graph.get_attr(weight)))

    first, second, odd = linear(x, "shared"), linear(linear(v, "own"), "shared"), linear(linear(x, "to_odd"), "odd")
    graph.output(graph.call_function(aten.add.Tensor, (graph.call_function(aten.add.Tensor, (first, second)), odd)))
    shapes = {"shared": (4, 16), "own": (16, 16), "to_odd": (5, 16), "odd": (4, 5)}
    tensors = {name: random(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    specs = tuple(InputSpec(n, ("B", 3, 16), torch.float32) for n in ("x", "v"))
    before = Program(graph, TensorStore(tensors), specs, Stage.REWRITTEN)
    inputs = {"x": random(8, 3, 16, seed=5), "v": random(8, 3, 16, seed=6)}
    after = Rotate(rule="everywhere").run(before, Session(calibration=inputs))
    verify(after)
    assert [operand(n, 0).name for n in rotations(after)] == ["v"], "x is read with the shared weight as well"
    torch.testing.assert_close(run(after, inputs), run(before, inputs), rtol=0, atol=1e-4)
