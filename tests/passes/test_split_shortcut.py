from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx

from mpq_compiler.analysis.noise_power import noise_power
from mpq_compiler.analysis.perturbation import Ablation
from mpq_compiler.ir import ops
from mpq_compiler.ir.aten import aten
from mpq_compiler.ir.edges import input_edge
from mpq_compiler.ir.graph import weight_of
from mpq_compiler.ir.interpreter import run
from mpq_compiler.ir.program import TIME_GROUPS, InputSpec, Program, Stage, TensorStore
from mpq_compiler.ir.provenance import DECISIONS
from mpq_compiler.ir.verifier import verify
from mpq_compiler.passes.split_shortcut import SplitShortcut
from mpq_compiler.pipeline.session import Session
from mpq_compiler.quantization.fitting import activation_parameters
from tests.harness import programs


def program_of(build, *widths: int, **tensors: Tensor) -> Program:
    """A rewritten program of images a, b, ... [B, 5, 6, width]; ``build(call, get, a, b, ...)`` gives the output."""
    graph = fx.Graph()
    names = "abc"[: len(widths)]
    inputs = [graph.placeholder(n) for n in names]
    graph.output(build(graph.call_function, graph.get_attr, *inputs))
    specs = tuple(InputSpec(n, ("B", 5, 6, w), torch.float32) for n, w in zip(names, widths, strict=True))
    return Program(graph, TensorStore(tensors), specs, Stage.REWRITTEN)


def weight(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def split(before: Program, **options) -> Program:
    after = SplitShortcut(**options).run(before, Session())
    verify(after)
    x = {s.name: torch.randn(s.sized(3), generator=torch.Generator().manual_seed(7)) for s in before.inputs}
    y = run(before, x)
    assert float((run(after, x) - y).abs().max()) <= 1e-5 * float(y.abs().max())
    return after


def names(program: Program) -> list[str]:
    return [n.name for n in program.graph.nodes if n.op == "call_function"]


def conv(call, get, x, name="w", bias=True):
    parameters = get(f"{name}.weight:ohwi"), get(f"{name}.bias") if bias else None
    return call(ops.conv2d, (x, *parameters, [1, 1], [1, 1, 1, 1]))


CONV = {"w.weight": weight(8, 36, 3, 3), "w.bias": weight(8)}
CONV["w.weight:ohwi"] = CONV["w.weight"].permute(0, 2, 3, 1)


@pytest.mark.invariant("mixdq-9")
def test_the_parts_are_the_concatenated_tensors_and_the_concatenation_is_gone():
    def build(call, get, a, b):
        return conv(call, get, call(aten.cat.default, ([a, b], 3)))

    before = program_of(build, 20, 16, **CONV)
    after = split(before)
    assert names(after) == ["conv2d_part0", "conv2d_part1", "conv2d"]
    first, second, total = (after.node(n) for n in names(after))
    assert [first.args[0].name, second.args[0].name] == ["a", "b"] and total.target is aten.add.Tensor
    assert first.args[2].target == "w.bias" and second.args[2] is None
    parts = [after.tensors[str(weight_of(n))] for n in (first, second)]
    assert torch.equal(torch.cat(parts, dim=3), CONV["w.weight:ohwi"])
    assert torch.equal(after.tensors["w_part1.weight"], CONV["w.weight"][:, 20:])
    assert names(before) == ["cat_default", "conv2d"], "the program given is left as it is"


@pytest.mark.invariant("qdiffusion-5")
def test_behind_a_norm_the_parts_are_slices_of_what_the_layers_read():
    """The norm is over the whole concatenation: its groups do not end where the parts do."""

    def build(call, get, a, b):
        norm = call(ops.group_norm, (call(aten.concat.default, ([a, b], -1)), 6, get("n.weight"), get("n.bias"), 1e-5))
        x = call(aten.silu.default, (norm,))
        return call(aten.add.Tensor, (conv(call, get, x), conv(call, get, x, "v", bias=False)))

    other = weight(8, 3, 3, 36, seed=4)
    tensors = CONV | {"v.weight:ohwi": other, "n.weight": weight(36), "n.bias": weight(36)}
    after = split(program_of(build, 20, 16, **tensors))
    slices = [n for n in after.graph.nodes if n.target is aten.slice.Tensor]
    assert [(n.name, n.args[2:]) for n in slices] == [("silu_default_part0", (0, 20)), ("silu_default_part1", (20, 36))]
    assert all(len(n.users) == 2 for n in slices), "both layers read the same slices"
    assert sum(n.target is ops.group_norm for n in after.graph.nodes) == 1


def test_linear_layers_of_tokens_behind_norm_modulation_and_reshape():
    def build(call, get, a, b, c):
        x = call(aten.reshape.default, (call(aten.cat.default, ([a, b, c], 3)), [-1, 30, 60]))
        x = call(aten.layer_norm.default, (x, [60], None, None, 1e-6, False))
        x = call(aten.gelu.default, (call(aten.mul.Tensor, (x, get("scale"))),))
        return call(aten.linear.default, (x, get("l.weight"), get("l.bias")))

    tensors = {"scale": weight(60), "l.weight": weight(8, 60), "l.bias": weight(8)}
    after = split(program_of(build, 24, 20, 16, **tensors))
    first, second, third = (f"linear_default_part{i}" for i in range(3))
    assert names(after)[-5:] == [first, second, "add_tensor", third, "linear_default"]
    assert [len(after.node(n).args) for n in (first, second, third)] == [3, 2, 2]


@pytest.mark.invariant("qdiffusion-5")
def test_what_stays_whole():
    def narrow(call, get, a, b):
        return conv(call, get, call(aten.cat.default, ([a, b], 3)))

    def rows(call, get, a, b):
        return conv(call, get, call(aten.cat.default, ([a, b], 1)))

    def mixed(call, get, a, b):  # a sum of two whole tensors is no concatenation any more
        joined = call(aten.cat.default, ([a, b], 3))
        return conv(call, get, call(aten.add.Tensor, (joined, call(aten.silu.default, (joined,)))))

    def halves(call, get, a):  # the two halves of a sinusoidal embedding
        waves = call(aten.cat.default, ([call(aten.sin.default, (a,)), call(aten.cos.default, (a,))], 3))
        swapped = [call(aten.slice.Tensor, (waves, 3, 18, 36)), call(aten.slice.Tensor, (waves, 3, 0, 18))]
        return conv(call, get, call(aten.cat.default, (swapped, 3)))

    for build, widths in ((narrow, (32, 4)), (rows, (36, 36)), (mixed, (18, 18)), (halves, (18,))):
        before = program_of(build, *widths, **CONV)
        assert names(split(before)) == names(before)
    assert "conv2d_part1" in names(split(program_of(narrow, 32, 4, **CONV), channels=4))


@pytest.mark.parametrize("same", [True, False])
def test_a_shared_weight_is_split_where_all_its_calls_agree(same):
    def build(call, get, a, b):
        left = conv(call, get, call(aten.cat.default, ([a, b], 3)))
        right = conv(call, get, call(aten.cat.default, ([b, a] if not same else [call(aten.neg.default, (a,)), b], 3)))
        return call(aten.add.Tensor, (left, right))

    after = split(program_of(build, 20, 16, **CONV))
    read = [str(n.target) for n in after.graph.nodes if n.op == "get_attr" and "weight" in str(n.target)]
    parts = {"w_part0.weight:ohwi", "w_part1.weight:ohwi"}
    assert set(read) == (parts if same else {"w.weight:ohwi"}) and len(read) == len(set(read))


@pytest.mark.invariant("qdiffusion-1")
def test_every_shortcut_of_the_bundled_unet_is_split():
    step = programs.step("fashion-unet", "split-shortcut")
    gone = {n.name for n in step.before.quantizable} - {n.name for n in step.after.quantizable}
    layers = ("conv1", "conv_shortcut")
    assert gone == {f"up_blocks_{b}_resnets_{r}_{layer}" for b in (0, 1) for r in (0, 1) for layer in layers}
    assert gone < {*names(step.after)}, "a sum has the name of the layer whose value it is"


@pytest.mark.invariant("qdiffusion-1")
def test_parts_end_where_the_model_joined_its_tensors(monkeypatch):
    """Of every concatenation that the model itself makes of images: the channels of what comes first."""
    model, joined, cat = programs.denoiser("fashion-unet"), [], torch.cat

    def watched(tensors, dim=0, **more):
        if dim == 1 and all(t.dim() == 4 for t in tensors):
            joined.append([t.shape[1] for t in tensors])
        return cat(tensors, dim, **more)

    monkeypatch.setattr(torch, "cat", watched)
    model(**programs.inputs("fashion-unet", 1))
    monkeypatch.undo()
    weights = programs.step("fashion-unet", "split-shortcut").after.tensors
    blocks = [f"up_blocks.{b}.resnets.{r}" for b in (0, 1) for r in (0, 1)]
    for layer in ("conv1", "conv_shortcut"):
        parts = [[weights[f"{b}.{layer}_part{i}.weight"].shape[1] for i in (0, 1)] for b in blocks]
        assert parts == joined


def test_parts_have_plans_of_their_own():
    program = programs.after("fashion-unet", "bit-allocation", programs.REWRITES)
    for layer in ("up_blocks.1.resnets.1.conv1", "up_blocks.1.resnets.1.conv_shortcut"):
        paths = [f"{layer}_part{i}.weight" for i in (0, 1)]
        assert f"{layer}.weight" not in program.weights and {*paths} <= {*program.weights}
        edges = [program.node(program.weights[p].sites[0]).args[0].name for p in paths]
        scales = [program.tensors[program.activations[e].scale] for e in edges]
        assert not torch.equal(*scales)
        assert program.facts[DECISIONS][paths[1]]["split-shortcut"] == {
            "part_of": f"{layer}.weight", "channels_until": 96
        }


@pytest.mark.invariant("qdiffusion-3")
def test_the_simulated_noise_falls():
    """Noise of the output when nothing is quantized but what the layers behind concatenations read."""
    denoiser, found = programs.denoiser("fashion-unet"), []
    x = denoiser.random_inputs(8, 5)
    for front in ("", "split-shortcut,"):
        program = programs.after("fashion-unet", "time-groups", f"trace,layout,{front}calibrate,time-groups")
        names = {n.name.partition("_part")[0]: n.name for n in program.quantizable}
        found.append((program, Ablation(program, x), names))
    layers = [name for name, part in found[1][2].items() if part != name]
    noise = []
    for program, ablation, _ in found:
        operands = {}
        group = ops.time_group(x["timestep"], program.facts[TIME_GROUPS])
        for node in program.quantizable:
            if node.name.partition("_part")[0] in layers:
                edge = input_edge(node)
                scale, zero = activation_parameters(program, edge.name, 8)
                operands[node] = ops.fake_quantize(ablation.value(edge), scale, zero, group, 8)
        noise.append(noise_power(ablation.output(operands=operands), ablation.reference))
    assert len(layers) == 8 and noise[1] < 0.5 * noise[0]

