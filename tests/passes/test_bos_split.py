from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, fx

from mpq_compiler.analysis.noise_power import noise_power
from mpq_compiler.analysis.perturbation import Ablation
from mpq_compiler.api import compile
from mpq_compiler.frontend import denoiser as denoisers
from mpq_compiler.ir import ops
from mpq_compiler.ir.aten import aten
from mpq_compiler.ir.edges import input_edge
from mpq_compiler.ir.findings import ASSUMPTIONS
from mpq_compiler.ir.graph import weight_of
from mpq_compiler.ir.interpreter import run
from mpq_compiler.ir.program import NOTES, TIME_GROUPS, Program
from mpq_compiler.passes.bos_split import BosSplit
from mpq_compiler.pipeline import manager, parser
from mpq_compiler.pipeline.session import Session
from mpq_compiler.quantization.fitting import activation_parameters
from mpq_compiler.runtime import compiled_denoiser
from mpq_compiler.support import tensorfile
from mpq_compiler.support.errors import UserError
from tests.harness import programs, tiny

TEXT = "encoder_hidden_states"
PLANNED = "calibrate,time-groups,bit-allocation{uniform=int8},insert-fake-quant"


@functools.cache
def text_model() -> denoisers.Denoiser:
    return denoisers.load("fashion-text")


def prompts(count: int, loudness: float = 1.0) -> dict[str, Tensor]:
    """Inputs with the bundled model's own texts, their first token times ``loudness``."""
    x = text_model().random_inputs(count, 5)
    x[TEXT] = torch.from_numpy(text_model().default_conditions(count)[TEXT])
    x[TEXT][:, 0] *= loudness
    x["timestep"] = torch.linspace(999, 0, count).round().long()
    return x


@functools.cache
def traced() -> Program:
    return continued(programs.empty(), "trace,layout")


def continued(program: Program, pipeline: str, loudness: float = 1.0) -> Program:
    passes = parser.parse(pipeline)
    have = {p for step in programs.steps("unet2d") for p in step.step.provides}
    session = Session(text_model(), prompts(32, loudness))
    return manager.run_pipeline(passes, program, session, present=have)[0]


@functools.cache
def split() -> Program:
    return continued(traced(), "bos-split")


def values(program: Program, x: dict[str, Tensor]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    run(program, x, lambda node, value: found.__setitem__(node.name, value))
    return found


@pytest.mark.invariant("mixdq-1")
def test_keys_and_values_are_the_same_bits_before_quantization():
    assert len(split().facts[ASSUMPTIONS]) == 1 and NOTES not in split().facts
    x = prompts(6)
    old, new = values(traced(), x), values(split(), x)
    names = [n.name for n in split().graph.nodes if n.target is ops.prepend]
    assert len(names) == 8 and all("attn2_to_" in name for name in names)
    for name in names:
        assert torch.equal(old[name], new[name])


@pytest.mark.invariant("mixdq-1", "mixdq-2")
def test_quantized_the_first_token_is_still_exact_and_out_of_the_range():
    quiet, loud = (continued(split(), PLANNED, loudness) for loudness in (1, 10))
    edge = quiet.activations[f"{TEXT}_rest"]
    for table in (edge.scale, edge.zero_point):
        assert torch.equal(quiet.tensors[table], loud.tensors[table])
    x = prompts(6)
    exact, simulated = values(traced(), x), values(quiet, x)
    for name in (n.name for n in quiet.graph.nodes if n.target is ops.prepend):
        assert torch.equal(simulated[name][:, 0], exact[name][:, 0])
        assert not torch.equal(simulated[name][:, 1:], exact[name][:, 1:])


@functools.cache
def calibrated() -> list[tuple[Program, Ablation, str]]:
    """Without and with the split: the program, its values on some inputs, and the text edge."""
    found = []
    for program, edge in ((traced(), TEXT), (split(), f"{TEXT}_rest")):
        program = continued(program, "calibrate,time-groups{groups=1}")
        found.append((program, Ablation(program, prompts(12)), edge))
    return found


@pytest.mark.parametrize("bits, gain_db", [(6, 8), (4, 10)])
def test_the_text_loses_far_less(bits, gain_db):
    """Noise of the output when nothing but the text is quantized, with and without its first token in the range."""
    noise = []
    for program, ablation, edge in calibrated():
        group = ops.time_group(prompts(12)["timestep"], program.facts[TIME_GROUPS])
        scale, zero = activation_parameters(program, edge, bits)
        changed = ops.fake_quantize(ablation.value(program.node(edge)), scale, zero, group, bits)
        readers = [n for n in program.quantizable if input_edge(n).name == edge]
        noise.append(noise_power(ablation.output(operands=dict.fromkeys(readers, changed)), ablation.reference))
    assert noise[0] > 10 ** (gain_db / 10) * noise[1]


def session(text: Tensor | None) -> Session:
    return Session(calibration=None if text is None else {TEXT: text})


def text(*first: float) -> Tensor:
    rows = torch.randn(len(first), 77, 32, generator=torch.Generator().manual_seed(2))
    rows[:, 0] = torch.tensor(first)[:, None]
    return rows


@pytest.mark.parametrize(
    "given, reason",
    [
        (None, "no prompts to compare"),
        (text(1.0), "all its prompts are the same one"),
        (text(1.0, 1.0)[[0, 0]], "all its prompts are the same one"),
        (text(1.0, 1.0, 1.0000001), "do not all begin with the same token"),
        (text(1.0, 1.0)[:, :1], "single token"),
    ],
)
@pytest.mark.invariant("mixdq-3")
def test_it_is_refused_where_the_first_token_is_no_constant(given, reason):
    before = programs.after("sd15", "layout")
    after = BosSplit().run(before, session(given))
    assert [n.name for n in after.graph.nodes] == [n.name for n in before.graph.nodes]
    assert len(after.facts[NOTES]) == 1 and reason in after.facts[NOTES][0]
    assert TEXT in after.facts[NOTES][0] and ASSUMPTIONS not in after.facts


@pytest.mark.invariant("mixdq-3")
def test_nothing_happens_and_nothing_is_said_without_a_text():
    before = programs.after("unet2d", "layout")
    after = BosSplit().run(before, Session(programs.denoiser("unet2d")))
    assert [n.name for n in after.graph.nodes] == [n.name for n in before.graph.nodes]
    assert NOTES not in after.facts


def test_layers_in_a_row_keep_one_constant():
    """PixArt's caption goes through two linear layers and an activation before keys and values are made of it."""
    step = programs.step("pixart", "bos-split")
    names = {n.name for n in step.after.graph.nodes}
    assert {"caption_projection_linear_1_rest", "caption_projection_linear_2_rest"} <= names
    joined = [n for n in step.after.graph.nodes if n.target is ops.prepend]
    assert len(joined) == 4 and all("attn2_to_" in n.name for n in joined), "two blocks, keys and values"
    constants = [n for n in step.after.graph.nodes if n.op == "get_attr" and str(n.target).endswith("_bos")]
    assert len(constants) == 4
    paths = {weight_of(n) for n in step.before.quantizable}
    assert {weight_of(n) for n in step.after.quantizable} == paths, "weights keep their names"


def test_what_mixes_tokens_ends_it():
    """A layer behind a mean over the tokens reads all of them, and so does a sum with positions."""
    graph = fx.Graph()
    given = graph.placeholder(TEXT)
    call = graph.call_function
    placed = call(aten.add.Tensor, (given, graph.get_attr("positions")))
    pooled = call(aten.mean.dim, (call(aten.linear.default, (placed, graph.get_attr("w"))), [1]))
    both = call(aten.add.Tensor, (call(aten.linear.default, (given, graph.get_attr("w"))), graph.get_attr("scale")))
    graph.output(call(aten.add.Tensor, (call(aten.mean.dim, (both, [1])), pooled)))
    generator = torch.Generator().manual_seed(1)
    tensors = {"w": (8, 32), "positions": (77, 32), "scale": (8,)}
    base = programs.after("sd15", "layout")
    spec = next(s for s in base.inputs if s.name == TEXT)
    store = {name: torch.randn(*shape, generator=generator) for name, shape in tensors.items()}
    before = base.fork(graph=graph, inputs=(spec,), tensors=type(base.tensors)(store))
    after = BosSplit().run(before, session(text(3.0, 3.0)))
    x = {TEXT: text(3.0, 3.0, 3.0)}
    torch.testing.assert_close(run(after, x), run(before, x), rtol=1e-6, atol=1e-5)
    linears = [n for n in after.graph.nodes if n.target is aten.linear.default]
    assert sorted(n.args[0].name for n in linears) == ["add_tensor", f"{TEXT}_rest"]
    (joined,) = (n for n in after.graph.nodes if n.target is ops.prepend)
    assert joined.name == "add_tensor_1", "the constant stands behind what is done token by token"


def test_prompts_of_the_denoiser_are_compared_where_nothing_is_recorded():
    """Empty prompt and guidance included: the bundled text model begins all with the same token."""
    after = BosSplit().run(traced(), Session(text_model()))
    first = torch.tensor(after.facts[ASSUMPTIONS][0]["values"])
    assert torch.equal(first, prompts(1)[TEXT][0, 0])
    unknown = denoisers.wrap(tiny.model("sd15"), name="sd15")
    after = BosSplit().run(programs.after("sd15", "layout"), Session(unknown))
    assert "no prompts to compare" in after.facts[NOTES][0]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory) -> Path:
    """A text model whose pixels and channels are few, compiled with the split on recorded texts."""
    folder = tmp_path_factory.mktemp("artifact")
    denoiser = denoisers.wrap(tiny.model("sd15", sample_size=8), name="sd15", tokens=tiny.TOKENS)
    rows = denoiser.random_inputs(6, 1)
    rows[TEXT][:, 0] = torch.linspace(-8, 8, 32)
    with (folder / "rows.safetensors").open("wb") as stream:
        tensorfile.save(stream, {name: value.numpy() for name, value in rows.items()})
    report = compile.compile(
        denoiser,
        folder / "sd15.mpq",
        target="reference",
        calibration=folder / "rows.safetensors",
        pipeline="trace,layout,bos-split,calibrate,time-groups,bit-allocation{uniform=int8},insert-fake-quant,"
        "round-weights,fold-fake-quant,fuse-epilogues",
    )
    assert not [note for note in report.notes if "bos-split" in note]
    return folder / "sd15.mpq"


def test_an_artifact_knows_its_first_token(artifact):
    compiled = compiled_denoiser.load(artifact)
    assert [a["input"] for a in compiled.manifest["assumptions"]] == [TEXT]
    first = np.linspace(-8, 8, 32, dtype=np.float32)
    x = {name: value.numpy() for name, value in programs.denoiser("sd15").random_inputs(3, 4).items()}
    x = {name: x[name][:, ..., :8, :8] if name == "sample" else x[name] for name in x}
    x[TEXT] = np.ascontiguousarray(x[TEXT][:, : tiny.TOKENS])
    x[TEXT][:, 0] = first
    plain = compiled.run(x)
    x[TEXT][:, 0] = first.astype(np.float16)  # of an encoder that ran in half precision
    np.testing.assert_array_equal(compiled.run(x), plain)
    x[TEXT][1, 0] = 0
    with pytest.raises(UserError, match=f"token 0 of '{TEXT}' in sample 1 is not the one .* without the pass 'bos-spl"):
        compiled.run(x)
