from __future__ import annotations

import sys

import pytest
import torch

from mpq_compiler.analysis.perturbation import Ablation
from mpq_compiler.frontend import call_file
from mpq_compiler.frontend import denoiser as denoisers
from mpq_compiler.ir import batching
from mpq_compiler.ir.aten import aten
from mpq_compiler.ir.interpreter import run
from mpq_compiler.passes.trace import Trace
from mpq_compiler.pipeline import manager, parser
from mpq_compiler.pipeline.session import Session
from mpq_compiler.support.errors import UserError
from tests.harness import programs, tiny


@pytest.mark.parametrize("name", ["unet2d-class", "unet2d-17x23", "sdxl"])
def test_further_configurations_trace_bit_for_bit(name):
    denoiser = denoisers.wrap(tiny.model(name), name=name)
    program, _ = manager.run_pipeline(parser.parse("trace"), programs.empty(), Session(denoiser))
    for batch in (1, 2, 5):
        x = denoiser.random_inputs(batch, 7)
        assert torch.equal(run(program, x), denoiser(**x))


def test_nodes_are_named_by_weight_path():
    names = {n.name for n in programs.after("unet2d", "trace").graph.nodes}
    assert {"conv_in", "down_blocks_1_attentions_0_to_q", "mid_block_resnets_0_conv1", "conv_out"} <= names


def test_the_graph_holds_no_noise():
    """No assertion, dropout, or cast that changes nothing is left, and equal calls are merged."""
    for model in programs.MODELS:
        nodes = list(programs.after(model, "trace").graph.nodes)
        targets = [str(n.target) for n in nodes]
        assert not [t for t in targets if "assert" in t or "dropout" in t or "detach" in t]
        calls = [(str(n.target), repr(n.args), repr(n.kwargs)) for n in nodes if n.op == "call_function"]
        assert len({*calls}) == len(calls)


def test_tensors_are_shared_not_copied():
    program = programs.after("unet2d", "fuse-epilogues")
    parameters = dict(programs.denoiser("unet2d").module.model.named_parameters())
    weight = program.tensors["conv_in.weight"]
    assert weight.data_ptr() == parameters["conv_in.weight"].data_ptr()
    assert not weight.requires_grad


def test_a_model_that_cannot_be_traced_is_named():
    model = tiny.model("unet2d")

    def forward(sample, timestep, **_):
        return (sample * float(sample.sum()),)

    denoiser = denoisers.wrap(model, name="dynamic")
    model.forward = forward
    with pytest.raises(UserError, match="dynamic cannot be traced: UNet2DModel: "):
        trace(denoiser)


def trace(denoiser):
    return manager.run_pipeline(parser.parse("trace"), programs.empty(), Session(denoiser))[0]


def test_the_module_that_cannot_be_traced_is_named(capsys):
    class Gate(torch.nn.Module):
        """Turns around what another module gives where its mean is negative."""

        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, *args):
            y = self.inner(*args)
            return y if y.mean() > 0 else -y

    model = tiny.model("unet2d")
    model.mid_block.resnets[0] = Gate(model.mid_block.resnets[0])
    sentence = r"gated cannot be traced: module 'mid_block.resnets.0' \(Gate\): its control flow depends on the values"
    with pytest.raises(UserError, match=sentence) as found:
        trace(denoisers.wrap(model, name="gated"))
    assert "\n" not in str(found.value) and "aten" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda x: x + torch.randn_like(x), "randn_like draws random numbers"),
        (lambda x: x + torch.randn(x.shape[1:]), "randn draws random numbers"),
        (lambda x: torch.fft.fft2(x).real, "\\w+ computes with complex numbers"),
        (lambda x: x + x.flatten()[torch.nonzero(x.flatten() > 0)[:, 0]].sum(), "the size of what \\w+ gives depends"),
    ],
)
def test_what_is_no_function_of_real_tensors_is_refused(change, reason):
    class Before(torch.nn.Module):
        """Changes what another module reads."""

        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(change(x))

    model = tiny.model("unet2d")
    model.conv_in = Before(model.conv_in)
    with pytest.raises(UserError, match=rf"odd cannot be traced: module 'conv_in' \(Before\): {reason}"):
        trace(denoisers.wrap(model, name="odd"))


def test_latents_that_the_model_reads_in_another_shape_are_refused():
    """DiT takes every image for a square one."""
    with pytest.raises(UserError, match="takes no latents of 8x32, it gives 8x16x16 for them"):
        trace(denoisers.wrap(tiny.model("dit"), name="dit", size=(8, 32)))


def test_tied_parameters_have_one_name():
    model = tiny.model("dit")
    first, second = model.transformer_blocks
    second.ff.net[2].weight = first.ff.net[2].weight
    program = trace(denoisers.wrap(model, name="tied"))
    assert program.fallbacks == {}
    read = [str(n.target) for n in program.graph.nodes if n.op == "get_attr"]
    assert read.count("transformer_blocks.0.ff.net.2.weight") == 1
    assert "transformer_blocks.1.ff.net.2.weight" not in read


def assigned(h):
    h = h.clone()
    h[:, :4] = h[:, :4] * 1.5
    return h


def scaled_in_part(h):
    w = h.clone()
    w[:, :4].mul_(2)
    return w


def of_two_clones(h):
    u, v = h.clone(), h.clone()
    u.mul_(3)
    return u + v


def added_to(h):
    h = torch.sin(h)
    h += torch.cos(h)
    return h


@pytest.mark.parametrize("change", [assigned, scaled_in_part, of_two_clones, added_to])
def test_what_changes_in_place_becomes_a_function(change):
    """Nothing here expects a value to change after it was made: equal calls are merged, and values are kept."""

    class Behind(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return change(self.inner(x))

    model = tiny.model("unet2d")
    model.conv_in = Behind(model.conv_in)
    denoiser = denoisers.wrap(model, name="in place")
    traced, _ = manager.run_pipeline(parser.parse("trace,layout"), programs.empty(), Session(denoiser))
    x = denoiser.random_inputs(3, 7)
    y = denoiser(**x)
    assert torch.allclose(run(traced, x), y, atol=1e-5 * float(y.abs().max()))
    ablation = Ablation(traced, x)
    assert all(torch.equal(ablation.output(), ablation.reference) for _ in range(2))
    names = {n.name for n in traced.graph.nodes}
    assert {"conv_in_inner", "mid_block_resnets_0_conv1", "conv_out"} <= names


def test_parts_without_elements_are_left_out_and_what_is_made_of_one_parameter_has_its_name(tmp_path):
    class Parts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.turned = torch.nn.Parameter(torch.randn(6, 8))
            self.linear = torch.nn.Linear(8, 8)

        def forward(self, hidden_states, timestep):
            joined = torch.cat([hidden_states[:, :0], hidden_states, hidden_states[:, :0]], 1)
            joined = torch.cat([joined, hidden_states[:, :0], joined * timestep[:, None, None]], 1)
            return self.linear(joined[:, :6]) + torch.flip(self.turned, [1])

    model, file = Parts(), tmp_path / "calls.safetensors"
    call_file.write(file, model, [{"hidden_states": torch.randn(3, 6, 8), "timestep": torch.tensor([1.0, 2.0, 3.0])}])
    denoiser = denoisers.wrap_calls(model, file)
    program = trace(denoiser)
    assert [len(n.args[0]) for n in program.graph.nodes if "cat" in str(n.target)] == [2]
    assert "constant.turned" in {str(n.target) for n in program.graph.nodes if n.op == "get_attr"}
    x = denoiser.random_inputs(5, 7)
    assert torch.equal(run(program, x), denoiser(**x))


def test_a_graph_of_a_batch_that_is_not_the_model_is_noticed(tmp_path, monkeypatch):
    class One(torch.nn.Module):
        """Takes one sample at a time."""

        def forward(self, hidden_states, timestep):
            (sample,), (time,) = hidden_states, timestep
            return torch.sin(sample * time)[None]

    def wrong(graph):
        made = batching.with_batch(graph)
        for node in made.nodes:
            if node.target is aten.sin.default:
                node.target = aten.cos.default
        return made

    file = tmp_path / "calls.safetensors"
    call_file.write(file, One(), [{"hidden_states": torch.randn(1, 6, 8), "timestep": torch.tensor([2.0])}])
    trace(denoisers.wrap_calls(One(), file))
    monkeypatch.setattr(sys.modules[Trace.__module__], "with_batch", wrong)
    with pytest.raises(UserError, match="the graph of a batch departs from the model by"):
        trace(denoisers.wrap_calls(One(), file))
