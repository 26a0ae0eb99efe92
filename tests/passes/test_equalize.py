from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, fx

from mpq_compiler.analysis import rewrite_search
from mpq_compiler.analysis.noise_power import noise_power
from mpq_compiler.frontend import denoiser as denoisers
from mpq_compiler.ir import ops
from mpq_compiler.ir.aten import aten
from mpq_compiler.ir.interpreter import run
from mpq_compiler.ir.program import InputSpec, Program, Stage, TensorStore
from mpq_compiler.ir.provenance import DECISIONS
from mpq_compiler.ir.verifier import verify
from mpq_compiler.passes import equalize
from mpq_compiler.passes.equalize import WIDEST, Equalize, dilation
from mpq_compiler.passes.rotate import Rotate
from mpq_compiler.pipeline import manager, options, parser
from mpq_compiler.pipeline.session import Session
from mpq_compiler.quantization.channel_scaling import Scaling
from tests.harness import programs, tiny

C = 16


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def program_of(build, **tensors: Tensor) -> Program:
    """A rewritten program of tokens x [B, 5, C] and values v of the same shape; ``build(call, get, x, v)``."""
    graph = fx.Graph()
    x, v = graph.placeholder("x"), graph.placeholder("v")
    graph.output(build(graph.call_function, graph.get_attr, x, v))
    specs = tuple(InputSpec(n, ("B", 5, C), torch.float32) for n in ("x", "v"))
    return Program(graph, TensorStore(tensors), specs, Stage.REWRITTEN)


LINEAR = {"w": random(C, C), "b": random(C, seed=1), "last": random(4, C, seed=2)}
FACTOR = torch.exp2(random(C, seed=3).round())


def linear(call, get, x, weight="w", bias="b"):
    return call(aten.linear.default, (x, get(weight), *([get(bias)] if bias else [])))


def last(call, get, x):
    return linear(call, get, x, "last", None)


def scaled(before: Program) -> tuple[Program, bool]:
    """The program with what its last layer reads scaled by `FACTOR`, and whether that went into what makes it."""
    program = before.fork()
    (reader,) = (n for n in program.quantizable if n.args[1].target == "last")
    scaling = Scaling(program)
    assert scaling.possible([reader])
    edge = reader.args[0].name
    folded = scaling.scale(reader.args[0], FACTOR, [reader])
    scaling.apply()
    verify(program)
    x = {n: random(3, 5, C, seed=i + 5) for i, n in enumerate("xv")}
    values = [{}, {}]
    outputs = [
        run(p, x, lambda node, value, i=i: values[i].__setitem__(node.name, value))
        for i, p in enumerate((before, program))
    ]
    assert torch.equal(*outputs), "powers of two change no bit"
    assert torch.equal(values[1][f"{edge}_scaled"], values[0][edge] * FACTOR)
    calls = {n.name for n in before.graph.nodes if n.op == "call_function"}
    for name in calls & {*values[1]}:
        assert torch.equal(values[0][name], values[1][name]), "what has the same name has the same values"
    return program, folded


def twice(call, operator, x):
    return call(operator, (x, x))


def muls(program: Program) -> int:
    return sum(n.target is aten.mul.Tensor for n in program.graph.nodes)


FOLDED = {
    "what is added to itself": lambda call, get, x, v: twice(call, aten.add.Tensor, linear(call, get, x)),
    "a norm": lambda call, get, x, v: call(aten.layer_norm.default, (x, [C], get("w0"), get("b"), 1e-5, False)),
    "a norm without bias": lambda call, get, x, v: call(ops.rms_norm, (x, get("w0"), 1e-5)),
    "a layer": lambda call, get, x, v: linear(call, get, x),
    "a layer and a relu": lambda call, get, x, v: call(aten.relu.default, (linear(call, get, x),)),
    "the values of an attention": lambda call, get, x, v: call(ops.attention, (x, x, linear(call, get, v), 2)),
    "a sum of parts": lambda call, get, x, v: call(
        aten.add.Tensor, (linear(call, get, x), linear(call, get, v, "w1", None))
    ),
    "values with a constant before": lambda call, get, x, v: call(
        ops.attention, (x, call(ops.prepend, (x, get("w0"))), call(ops.prepend, (linear(call, get, v), get("w0"))), 2)
    ),
}


@pytest.mark.parametrize("case", FOLDED)
@pytest.mark.invariant("svdquant-4", "quest-4", "dilatequant-5")
def test_factors_go_into_what_makes_the_tensor(case):
    before = program_of(
        lambda call, get, x, v: last(call, get, FOLDED[case](call, get, x, v)),
        **LINEAR, w0=random(C, seed=4), w1=random(C, C, seed=6),
    )  # fmt: skip
    program, folded = scaled(before)
    assert folded and muls(program) == 0


@pytest.mark.invariant("dilatequant-5")
def test_half_of_a_geglu():
    """The factors are those of the value half of its layer's rows; the gate is as it was."""

    def build(call, get, x, v):
        both = linear(call, get, x, "both", "bias")
        value, gate = (call(aten.slice.Tensor, (both, 2, start, start + C)) for start in (0, C))
        return last(call, get, call(aten.mul.Tensor, (value, call(aten.gelu.default, (gate,)))))

    tensors = LINEAR | {"both": random(2 * C, C, seed=7), "bias": random(2 * C, seed=8)}
    program, folded = scaled(program_of(build, **tensors))
    assert folded and muls(program) == 1
    made = program.tensors["both:equalized"]
    assert torch.equal(made[C:], tensors["both"][C:])
    assert torch.equal(made[:C], tensors["both"][:C] * FACTOR[:, None])


EXPLICIT = {
    "an input": lambda call, get, x, v: x,
    "behind silu": lambda call, get, x, v: call(aten.silu.default, (linear(call, get, x),)),
    "a norm without weights": lambda call, get, x, v: call(aten.layer_norm.default, (x, [C], None, None, 1e-5, False)),
    "a product with channels of another": lambda call, get, x, v: call(aten.mul.Tensor, (x, get("w0"))),
    "keys that are the values": lambda call, get, x, v: call(ops.attention, (x, v, v, 2)),
    "a square": lambda call, get, x, v: twice(call, aten.mul.Tensor, linear(call, get, x)),
    "a norm over tokens too": lambda call, get, x, v: call(
        aten.layer_norm.default, (x, [5, C], get("whole"), None, 1e-5, False)
    ),
}


@pytest.mark.parametrize("case", EXPLICIT)
@pytest.mark.invariant("svdquant-4", "dilatequant-5")
def test_elsewhere_they_are_a_multiplication(case):
    before = program_of(
        lambda call, get, x, v: last(call, get, EXPLICIT[case](call, get, x, v)),
        **LINEAR, w0=random(C, seed=4), whole=random(5, C, seed=9),
    )  # fmt: skip
    program, folded = scaled(before)
    assert not folded and muls(program) == muls(before) + 1


def test_an_input_is_scaled_behind_it_whatever_stands_before():
    """Stored tensors may stand between the inputs of a text model."""
    graph = fx.Graph()
    x, bias, v = graph.placeholder("x"), graph.get_attr("bias"), graph.placeholder("v")
    both = graph.call_function(aten.add.Tensor, (x, v))
    mean = graph.call_function(aten.mean.dim, (graph.call_function(aten.add.Tensor, (both, bias)), [2], True))
    graph.output(graph.call_function(aten.add.Tensor, (last(graph.call_function, graph.get_attr, v), mean)))
    specs = tuple(InputSpec(n, ("B", 5, C), torch.float32) for n in ("x", "v"))
    program, folded = scaled(Program(graph, TensorStore(LINEAR | {"bias": random(C)}), specs, Stage.REWRITTEN))
    assert not folded and muls(program) == 1


def test_another_reader_keeps_what_it_reads():
    def build(call, get, x, v):
        edge = linear(call, get, x)
        return call(aten.add.Tensor, (last(call, get, edge), call(aten.mean.dim, (edge, [2], True))))

    program, folded = scaled(program_of(build, **LINEAR))
    assert not folded and muls(program) == 1


def test_a_shared_weight_is_left_alone():
    def build(call, get, x, v):
        return call(aten.add.Tensor, (last(call, get, x), last(call, get, v)))

    program = program_of(build, **LINEAR)
    assert not Scaling(program).possible(program.quantizable[:1])


def test_a_layer_in_the_middle_is_scaled_on_both_sides_once():
    program = program_of(lambda call, get, x, v: last(call, get, linear(call, get, linear(call, get, x, "w1"))),
                         **LINEAR, w1=random(C, C, seed=6))  # fmt: skip
    first, middle, end = program.quantizable
    changed = program.fork()
    nodes = {n.name: n for n in changed.graph.nodes}
    scaling = Scaling(changed)
    for reader in (middle, end):
        assert scaling.scale(nodes[reader.args[0].name], FACTOR, [nodes[reader.name]])
    scaling.apply()
    assert [n for n in changed.tensors if n.startswith("w:")] == ["w:equalized"]
    x = {"x": random(2, 5, C), "v": random(2, 5, C)}
    assert torch.equal(run(changed, x), run(program, x))
    assert first.name == "linear_default"


# --- the search ---------------------------------------------------------------------------------------------


@pytest.mark.invariant("dilatequant-1", "dilatequant-2", "dilatequant-3", "dilatequant-4")
def test_dilation_widens_columns_as_far_as_rows_allow():
    """DilateQuant's invariants: ranges of rows stay, factors are at least 1 and maximal, a second run finds 1."""
    w = random(6, 3, 3, 20) * torch.exp(random(20, seed=1))
    w[..., 5] = 0
    s = dilation([w])
    wide = w * s
    rows, wider = w.flatten(1), wide.flatten(1)
    torch.testing.assert_close(wider.amax(1), rows.amax(1))
    torch.testing.assert_close(wider.amin(1), rows.amin(1))
    assert bool((s >= 1).all()) and s[5] == 1 and float(s.max()) > 1.5
    torch.testing.assert_close(dilation([wide]), torch.ones(20), rtol=1e-6, atol=0)
    two = dilation([w[:3], w[3:]])
    torch.testing.assert_close(two, s, msg="layers that read one tensor are bounded by all their rows")


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.invariant("mpq-dm-1")
def test_factors_are_on_their_grid(exact):
    step = Equalize(exact=exact)
    largest = torch.exp(4 * random(50))
    largest[3] = 0
    weights = [random(8, 50, seed=2), random(8, 3, 3, 50, seed=3)]
    found = [factor for _, factor in step.candidates(largest, weights)]
    assert len(found) == 13
    assert all(factor[3] == 1 for factor in found[:-1]), "a channel that is always zero says nothing"
    for factor in found:
        assert bool(torch.isfinite(factor).all())
        assert 1 / WIDEST <= float(factor.min()) <= float(factor.max()) <= WIDEST
        assert torch.equal(factor.to(torch.float16).float(), factor)
        mantissa = torch.frexp(factor).mantissa
        assert bool((mantissa == 0.5).all()) == exact


@pytest.mark.invariant("vidit-q-4")
def test_the_ends_of_alpha(monkeypatch):
    """SmoothQuant, eq. 4: alpha 0 leaves all of the spread to the activation, alpha 1 to the weights."""
    monkeypatch.setattr(equalize, "POWERS", (0.0, 1.0))
    largest, weights = torch.exp(random(50)), [random(8, 50, seed=2), random(6, 50, seed=3)]
    found = dict(Equalize(exact=False).candidates(largest, weights))
    columns = torch.cat(weights).abs().amax(0)
    for spread in (columns / found["alpha 0.0"], largest * found["alpha 1.0"]):
        torch.testing.assert_close(spread / spread.mean(), torch.ones(50), rtol=2e-3, atol=0)


def outliers(factor: float) -> denoisers.Denoiser:
    """The tiny UNet with some loud channels before its attentions' layers, which computes the same."""
    model = tiny.model("unet2d")
    for module in model.modules():
        if type(module).__name__ == "Attention":
            loud = torch.ones(module.to_q.weight.shape[1])
            loud[[3, 11, 40]] = factor
            for part in (module.group_norm.weight, module.group_norm.bias):
                part.data *= loud
            for layer in (module.to_q, module.to_k, module.to_v):
                layer.weight.data /= loud
    return denoisers.wrap(model, name="unet2d")


def prepared(denoiser: denoisers.Denoiser, pipeline: str) -> Program:
    session = Session(denoiser, programs.calibration("unet2d"))
    return manager.run_pipeline(parser.parse(pipeline), programs.empty(), session)[0]


def test_loud_channels_are_found_and_undone():
    loud = outliers(40.0)
    program = prepared(loud, "trace,layout,equalize{rows=128,weights=int8}")
    names = {n.name for n in program.graph.nodes}
    norms = [n for n in names if n.endswith("attentions_0_group_norm_scaled")]
    assert len(norms) == len([n for n in names if n.endswith("attentions_0_to_q")]) == 3
    said = program.facts[DECISIONS]["mid_block.attentions.0.to_q.weight"]["equalize"]
    assert said["into"] == "producer" and said["gain_db"] > 3
    before = programs.after("unet2d", "layout")
    for name in norms:
        gain = program.tensors[str(program.node(name).args[2].target)]
        plain = before.tensors[str(before.node(name.removesuffix("_scaled")).args[2].target)]
        spread = [float(t.abs()[[3, 11, 40]].mean() / t.abs().median()) for t in (gain, plain)]
        assert spread[0] < 4 * spread[1]
    x = dict(programs.inputs("unet2d", 3))
    y = run(before, x)
    assert float((run(program, x) - y).abs().max()) <= 1e-5 * float(y.abs().max())


def attention_inputs(program: Program) -> dict[str, Tensor]:
    """q and k of every attention on some inputs."""
    found: dict[str, Tensor] = {}

    def watch(node: fx.Node, value: Tensor) -> None:
        if node.name.endswith(("to_q", "to_k")):
            found[node.name] = value

    run(program, programs.inputs("unet2d", 4), watch)
    return found


def test_the_simulated_noise_of_loud_channels_is_gone():
    """At q and k: in the output it drowns in the noise of the other layers."""
    exact = attention_inputs(programs.after("unet2d", "layout"))
    noise = {}
    for name, factor, front in (("plain", 1.0, ""), ("loud", 40.0, ""), ("undone", 40.0, "equalize{weights=int8},")):
        pipeline = f"trace,layout,{front}calibrate,time-groups,bit-allocation{{uniform=int8}},insert-fake-quant"
        found = attention_inputs(prepared(outliers(factor), pipeline))
        noise[name] = [noise_power(found[n], exact[n]) for n in exact]
    decibels = {name: 10 * math.log10(sum(noise[name]) / sum(noise["plain"])) for name in noise}
    assert len(exact) == 8 and decibels["loud"] > 10 and decibels["undone"] < 1, decibels


@pytest.mark.invariant("compiler-3")
def test_nothing_changes_where_nothing_gains():
    step = Equalize(gain=100.0, rows=64, samples=1, steps=2)
    before = programs.after("unet2d", "layout")
    after = step.run(before, Session(programs.denoiser("unet2d"), programs.calibration("unet2d")))
    assert [n.name for n in after.graph.nodes] == [n.name for n in before.graph.nodes]
    read = {str(n.target) for n in before.graph.nodes if n.op == "get_attr"}
    assert all(torch.equal(after.tensors[name], before.tensors[name]) for name in read)


def test_the_bundled_model_is_the_same_to_the_bit():
    step = programs.step("fashion-unet", "equalize")
    x = dict(programs.inputs("fashion-unet", 3))
    assert torch.equal(run(step.after, x), run(step.before, x))
    assert any(n.name.endswith("_scaled") for n in step.after.graph.nodes)


@pytest.mark.invariant("dilatequant-1", "dilatequant-3", "dilatequant-4")
def test_dilation_as_published_never_enlarges_a_row():
    """DilateQuant's factors alone: channels shrink, no row's range changes, and a second time nothing is left to do."""
    made = Equalize(rule="dilation")
    for seed in range(5):
        columns = torch.exp(random(C, seed=seed + 50) / 2)
        weights = [random(24, C, seed=seed) * columns, random(8, 3, 3, C, seed=seed + 9) * columns]
        weights[1][..., 2] = 0.0
        weights[0][:, 2] = 0.0
        factor = made._dilating(weights)
        assert (factor <= 1).all() and factor[2] == 1 and (factor < 1).any()
        for w in weights:
            before, after = (t.flatten(1) for t in (w, w / factor))
            assert torch.equal(before.amax(1), after.amax(1)) and torch.equal(before.amin(1), after.amin(1))
        again = made._dilating([w / factor for w in weights])
        assert (again > 0.995).all()


@pytest.mark.invariant("mpq-dm-1")
def test_rules_as_published_are_applied_everywhere():
    """To what the search leaves alone, too: a loss is not looked at."""
    found = [
        options.make("equalize", {"rule": rule, "samples": 2, "steps": 3, "rows": 64, "gain": 30.0})
        for rule in ("search", "dilation", "smoothquant")
    ]
    counts = []
    for made in found:
        before = programs.after("unet2d", "layout")
        after = made.run(before, Session(programs.denoiser("unet2d"), programs.calibration("unet2d")))
        said = [
            passes["equalize"]["rule"]
            for passes in after.facts[DECISIONS].values()
            if "rule" in passes.get("equalize", {})
        ]
        counts.append(len(said))
        assert set(said) <= {"dilation", "alpha 0.5"}
        x = dict(programs.inputs("unet2d", 2))
        assert float((run(after, x) - run(before, x)).abs().max()) <= 1e-5 * float(run(before, x).abs().max())
    assert counts[0] == 0 < counts[1] and counts[2] > 0


def test_one_input_is_enough_to_search_on():
    """Layers of the time embedding have one row then, to choose by and to judge by."""
    denoiser = programs.denoiser("unet2d")
    x = {name: value[:1] for name, value in programs.calibration("unet2d").items()}
    passes = parser.parse("trace,layout,equalize{rows=16}")
    program, _ = manager.run_pipeline(passes, programs.empty(), Session(denoiser, x))
    verify(program)


def test_the_next_rewrite_has_its_rows_without_a_run(monkeypatch):
    """Those that are handed on are what it would sample, of edges that are scaled in what makes them and behind it."""
    session = Session(outliers(40.0), programs.calibration("unet2d"))
    first, nothing = Equalize(rows=64, weights="int8"), Rotate(rows=64)
    after = first.run(manager.run_pipeline(parser.parse("trace,layout"), programs.empty(), session)[0], session)
    fresh = nothing.layers(after, Session(None, programs.calibration("unet2d")))
    monkeypatch.setattr(rewrite_search, "run", None)
    known = nothing.layers(after, session)
    changed = [group.edge.name for group in known if group.edge.name.endswith("_scaled")]
    assert len(changed) > 3 and {after.node(name).target for name in changed} >= {aten.mul.Tensor, ops.group_norm}
    for one, other in zip(fresh, known, strict=True):
        assert one.edge is other.edge and one.readers == other.readers
        assert torch.equal(one.largest, other.largest)
        for geometry, rows in one.rows().items():
            assert torch.equal(rows, other.rows()[geometry]), one.edge.name


def test_rows_of_other_options_are_sampled_anew():
    session = Session(programs.denoiser("unet2d"), programs.calibration("unet2d"))
    program = programs.after("unet2d", "layout")
    for rows in (64, 32):
        found = Rotate(rows=rows).layers(program, session)
        assert {len(part) for group in found for part in group.rows().values()} & {rows}
    assert len(session.sampled) == 2
