"""Which attentions and layers leave float32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import fx

from mpq_compiler.analysis.time_weights import TIME_GAINS
from mpq_compiler.driver import resolve
from mpq_compiler.driver.options import Options
from mpq_compiler.ir import ops, printer
from mpq_compiler.ir.exact_interpreter import run_exact
from mpq_compiler.ir.findings import ATTENTION_NUMERICS, STORED_HALVES
from mpq_compiler.ir.graph import function_of
from mpq_compiler.ir.interpreter import run
from mpq_compiler.ir.program import NOTES, Program
from mpq_compiler.ir.provenance import DECISIONS
from mpq_compiler.passes import numerics
from mpq_compiler.passes.numerics import Numerics
from mpq_compiler.pipeline import parser
from mpq_compiler.pipeline.session import Session
from mpq_compiler.quantization.statistics import CALIBRATION
from mpq_compiler.support.errors import UserError
from mpq_compiler.support.execution import batches
from mpq_compiler.targets import table as targets
from mpq_compiler.targets.numerics import BF16, F16, INT8
from tests.harness import programs

MODEL = "unet2d"


def _after(mode: Numerics, kinds: tuple[str, ...] = (BF16, INT8)) -> tuple[dict[str, str], dict, tuple[str, ...]]:
    """(what was chosen, what was decided on, notes) for the planned program."""
    planned = programs.step(MODEL, "numerics", programs.FAST).before
    program = mode.run(planned, Session(numerics=kinds))
    said = program.facts.get(DECISIONS, {}).get("", {}).get("numerics", {})
    return program.facts[ATTENTION_NUMERICS], said, program.facts.get(NOTES, ())


def test_portable_changes_nothing() -> None:
    assert _after(Numerics()) == ({}, {}, ())


def test_eight_bits_where_they_cost_little() -> None:
    chosen, said, notes = _after(Numerics(mode="fast", inputs=3))
    assert set(chosen.values()) == {INT8} and set(chosen) == set(said["losses"])
    assert 0 < sum(losses[INT8] for losses in said["losses"].values()) <= said["most"]
    assert notes[-1].startswith("numerics=fast: of 4 attentions 0 in f32, 0 in bf16, 4 in int8")


def test_the_noise_allowed_decides() -> None:
    """With room for all in bfloat16 and one in 8 bits, that is what is chosen; with none, nothing is."""
    _, said, _ = _after(Numerics(mode="fast", inputs=3, noise=1e-9))
    losses = said["losses"]
    least = min(losses.values(), key=lambda loss: loss[INT8])
    room = sum(loss[BF16] for loss in losses.values()) + least[INT8] - least[BF16]
    share = 1e-9 * room / said["most"]
    chosen, tight, _ = _after(Numerics(mode="fast", inputs=3, noise=1.0001 * share))
    assert sum(tight["losses"][name][kind] for name, kind in chosen.items()) <= tight["most"]
    assert len(chosen) == 4 and sorted(chosen.values())[:2] == [BF16, BF16] and INT8 in chosen.values()
    assert _after(Numerics(mode="fast", inputs=3, noise=0.0))[0] == {}


def test_losses_are_measured_as_noise_at_the_output() -> None:
    step = programs.step(MODEL, "numerics", programs.FAST)
    node = step.before.attentions[0]
    calibration = step.before.facts[CALIBRATION].select(3)
    program = step.before.fork()
    program.node(node.name).kwargs = {"numerics": INT8}
    noise = []
    for i in range(3):
        x = {name: value[i : i + 1] for name, value in calibration.items()}
        y, exact = run(program, x).double(), run(step.before, x).double()
        noise.append(float((y - exact).square().sum() / exact.square().sum()))
    said = step.after.facts[DECISIONS][""]["numerics"]["losses"][node.name][INT8]
    assert said == pytest.approx(sum(noise) / 3, rel=1e-4)


def test_inputs_count_by_their_gains() -> None:
    """As in the noise of the plan, a share of which is allowed."""
    planned = programs.step(MODEL, "numerics", programs.FAST).before
    node, inputs = planned.attentions[0], planned.facts[CALIBRATION].select(3)
    said, alone = [], []
    for gains in ([(0, 1.0), (999, 1.0)], [(0, 1e6), (999, 1e-6)]):
        program = planned.fork()
        program.facts[TIME_GAINS] = gains
        measured = numerics._Measured(Numerics(inputs=3), program, Session())
        said.append(measured.of_calls([(program.node(node.name), INT8)])[node.name][INT8])
        alone = [measured.results[numerics._key(node, INT8, part)] for part in range(3)]
    first = alone[int(inputs["timestep"].argmin())]
    assert said == [pytest.approx(sum(alone) / 3, rel=1e-4), pytest.approx(first, rel=0.01)]


def test_a_target_without_kernels_says_so() -> None:
    chosen, _, notes = _after(Numerics(mode="fast"), ())
    assert not chosen and "the target has no kernels in bfloat16 or 8 bits" in notes[-1]


def test_halves_are_stored_where_they_cost_little() -> None:
    planned = programs.step(MODEL, "numerics", programs.FAST).before
    found = {}
    for noise in (0.05, 1e-9):
        program = Numerics(mode="fast", inputs=3, noise=noise).run(planned, Session(numerics=(F16,)))
        said = program.facts[DECISIONS][""]["numerics"]
        assert "losses" not in said and not program.facts[ATTENTION_NUMERICS]
        found[program.facts[STORED_HALVES]] = said["halves"], program.facts[NOTES][-1]
    assert found[True][0] == found[False][0] == pytest.approx(_halves(planned), rel=1e-4) and 0 < found[True][0] < 1e-5
    assert "what kernels hand on is stored in f16" in found[True][1] and "stays in f32" in found[False][1]


def _halves(program: Program) -> float:
    """The noise of the output with every value that has rows rounded to f16, by torch alone."""
    powers = []
    for x in batches(program.facts[CALIBRATION].select(3), 1):
        env = {}
        for node in program.graph.nodes:
            if node.op == "placeholder":
                env[node] = x[node.name]
            elif node.op == "get_attr":
                env[node] = program.tensors.read(str(node.target), "cpu")
            elif node.op == "output":
                y, exact = env[node.args[0]].double(), run(program, x).double()
                powers.append(float((y - exact).square().sum() / exact.square().sum()))
            else:
                value = function_of(node)(*fx.map_arg(node.args, env.get), **fx.map_arg(node.kwargs, env.get))
                rows = isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() > 2
                env[node] = value.half().float() if rows else value
    return sum(powers) / len(powers)


def test_what_is_beyond_a_half_counts_as_it_is_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clipped: with a largest number of 1 the output is another."""
    monkeypatch.setattr(numerics, "LARGEST_HALF", 1.0)
    planned = programs.step(MODEL, "numerics", programs.FAST).before
    program = Numerics(mode="fast", inputs=2).run(planned, Session(numerics=(F16,), cache=tmp_path))
    assert not program.facts[STORED_HALVES] and program.facts[DECISIONS][""]["numerics"]["halves"] > 0.01


def test_halves_leave_the_rest_of_the_noise_to_the_others() -> None:
    """With room for halves alone all attentions stay in float32."""
    planned = programs.step(MODEL, "numerics", programs.FAST).before
    session = Session(numerics=(BF16, F16))
    whole = Numerics(mode="fast", inputs=3).run(planned, session).facts[DECISIONS][""]["numerics"]
    share = 0.05 * whole["halves"] / whole["most"]
    program = Numerics(mode="fast", inputs=3, noise=1.0001 * share).run(planned, session)
    assert program.facts[STORED_HALVES] and not program.facts[ATTENTION_NUMERICS]


def test_cpus_store_no_halves() -> None:
    planned = programs.step(MODEL, "numerics", programs.FAST).before
    for target in ("x86-64-avx512vnni", "x86-64-amx", "cuda-sm90"):
        program = Numerics(mode="fast", inputs=2).run(planned, Session(numerics=targets.numerics_of(target)))
        assert program.facts.get(STORED_HALVES) == (True if target == "cuda-sm90" else None)


FLOAT8 = programs.FAST.replace("uniform=int8", "uniform=fp8")


WEIGHT_ONLY = programs.FAST.replace("uniform=int8", "uniform=int4,activations=16")


@pytest.mark.parametrize(("pipeline", "weights"), [(FLOAT8, "fp8"), (WEIGHT_ONLY, "int4")])
def test_float_layers_in_bfloat16(pipeline: str, weights: str) -> None:
    """Layers whose weights, or whose activations, are no integers: listed, in the graph, and exact when packed."""
    step = programs.step(MODEL, "numerics", pipeline)
    chosen, layers = step.after.facts[ATTENTION_NUMERICS], {n.name for n in step.before.quantizable}
    assert layers and {chosen[name] for name in layers} == {BF16}
    said = step.after.facts[DECISIONS][""]["numerics"]["losses"]
    assert all(0 < said[name][BF16] < 1e-3 and INT8 not in said[name] for name in layers)
    assert f"of {len(layers)} float layers {len(layers)} in bf16" in step.after.facts[NOTES][-1]
    assert f"numerics bf16  w {weights}" in printer.text(step.after)
    simulated, packed = (programs.after(MODEL, name, pipeline) for name in ("round-weights", "fuse-epilogues"))
    own = {n.name: n for n in simulated.graph.nodes if n.name in layers}
    assert {n.target for n in own.values()} == {ops.linear, ops.conv2d}
    assert {n.kwargs["numerics"] for n in own.values()} == {BF16}
    x = programs.inputs(MODEL, 2)
    assert torch.equal(run_exact(simulated, x), run(packed, x))


def test_measurements_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second run evaluates nothing, and another plan is measured anew."""
    session = Session(numerics=(BF16, INT8), cache=tmp_path)
    planned = programs.step(MODEL, "numerics", programs.FAST).before
    chosen = Numerics(mode="fast", inputs=2)
    first = chosen.run(planned, session).facts
    with monkeypatch.context() as patch:
        patch.setattr(numerics, "Ablation", None)
        patch.setattr(numerics, "run", None)
        again = chosen.run(planned, session).facts
    assert first[ATTENTION_NUMERICS] == again[ATTENTION_NUMERICS] and first[DECISIONS] == again[DECISIONS]
    other = programs.step(MODEL, "numerics", FLOAT8).before
    monkeypatch.setattr(numerics, "Ablation", None)
    with pytest.raises(TypeError):
        chosen.run(other, session)


BY_HAND = "trace,layout,calibrate,time-groups,bit-allocation{uniform=int8},numerics,insert-fake-quant"


def test_options() -> None:
    with pytest.raises(UserError, match="'kinds' of pass 'numerics' must be of f32, bf16, int8, f16, not 'fp4'"):
        Numerics(kinds=("fp4",))
    with pytest.raises(UserError, match="'mode' of pass 'numerics' is 'faster'"):
        parser.parse("numerics{mode=faster}")
    assert _mode(Options(recipe="w8a8", numerics="fast")) == "fast"
    assert _mode(Options(recipe="w8a8")) == "portable"
    assert _mode(Options(recipe="w8a8", target="cuda-sm90")) == "fast"
    assert _mode(Options(recipe="w8a8", target="cuda-sm90", numerics="portable")) == "portable"
    assert _mode(Options(pipeline=BY_HAND, target="cuda-sm90")) == "portable"
    with pytest.raises(UserError, match="has no pass 'numerics'"):
        resolve.resolve(Options(pipeline="trace,layout", numerics="fast"))
    resolve.resolve(Options(pipeline="trace,layout", numerics="portable"))


def test_a_recipe_may_say_portable_of_a_gpu(tmp_path) -> None:
    recipe = tmp_path / "own.toml"
    recipe.write_text('schema = 1\ndescription = "own"\nextends = "w8a8"\n[options.numerics]\nmode = "portable"\n')
    assert _mode(Options(recipe=str(recipe), target="cuda-sm90")) == "portable"


def _mode(options: Options) -> str:
    (found,) = (p for p in resolve.resolve(options) if isinstance(p, Numerics))
    return found.mode


def test_what_this_machine_can_do() -> None:
    lacking = targets.missing("x86_64", ["avx512_bf16"])
    assert (BF16 in targets.numerics_of("native")) == (not lacking and "avx512_vnni" in targets.host_features())
    assert targets.numerics_of("x86-64-avx512vnni") == (BF16, INT8)
    assert targets.numerics_of("x86-64-avx2") == targets.numerics_of("reference") == ()
    assert targets.numerics_of("x86-64-avxvnni") == targets.numerics_of("aarch64-dotprod") == (INT8,)
    assert targets.numerics_of("aarch64-i8mm") == targets.numerics_of("aarch64-sme2") == (BF16, INT8)
    assert targets.numerics_of("aarch64-neon") == ()
