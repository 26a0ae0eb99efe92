from __future__ import annotations

import dataclasses
import math
import re
from collections import defaultdict

import pytest
import torch
from torch import fx

from mpq_compiler import formats
from mpq_compiler.allocation import solver
from mpq_compiler.allocation.ends import ends
from mpq_compiler.analysis import noise_power
from mpq_compiler.analysis.time_weights import TIME_GAINS, by_gains
from mpq_compiler.ir import costs, stored_tensors, views
from mpq_compiler.ir.aten import aten
from mpq_compiler.ir.edges import input_edge
from mpq_compiler.ir.exact_interpreter import run_exact
from mpq_compiler.ir.facts import Facts
from mpq_compiler.ir.findings import ALLOCATION, SENSITIVITY
from mpq_compiler.ir.interpreter import run
from mpq_compiler.ir.program import NOTES, PARAMETERS, InputSpec, Program, Stage, TensorStore
from mpq_compiler.passes import bit_allocation
from mpq_compiler.passes.bit_allocation import ADDITIVE_DB, BitAllocation
from mpq_compiler.pipeline import manager, parser
from mpq_compiler.pipeline.options import make as make_pass
from mpq_compiler.pipeline.session import Session
from mpq_compiler.quantization.statistics import CALIBRATION
from mpq_compiler.support.errors import UserError
from tests.harness import programs

MODEL = "unet2d"


def planned(**options) -> Program:
    return BitAllocation(**options).run(programs.after(MODEL, "sensitivity"), Session())


def loss(program: Program) -> float:
    table = program.facts[SENSITIVITY]["weights"]
    return sum(table[path][plan.format] for path, plan in program.weights.items())


def given(plan: dict[str, str] | None, **options) -> Program:
    """The program that takes a plan, of which nothing was measured."""
    program = programs.after(MODEL, "sensitivity").fork()
    del program.facts[SENSITIVITY]
    return BitAllocation(given=True, **options).run(program, Session(plan=plan))


def test_a_given_plan_is_taken_as_it_is():
    solved = planned(weights=5.0)
    taken = given(solved.facts[ALLOCATION]["choices"])
    assert {path: plan.format for path, plan in taken.weights.items()} == {
        path: plan.format for path, plan in solved.weights.items()
    }
    assert {edge: plan.bits for edge, plan in taken.activations.items()} == {
        edge: plan.bits for edge, plan in solved.activations.items()
    }
    assert costs.stored_bytes(taken) == costs.stored_bytes(solved)


def test_a_given_plan_of_another_model_or_of_no_choices():
    choices = planned(weights=5.0).facts[ALLOCATION]["choices"]
    first, *rest = choices
    edges = defaultdict(list)
    for node in programs.after(MODEL, "sensitivity").quantizable:
        edges[input_edge(node).name].append(str(costs.weight_path(node)))
    one, other = next(paths for paths in edges.values() if len(paths) > 1)[:2]
    for plan, sentence in (
        ({name: choices[name] for name in rest}, f"another model's: it lacks '{first}', of 1 layers"),
        (choices | {"b.weight": "int4 u8", "a.weight": "int4 u8"}, "it has 'a.weight', of 2 layers"),
        (choices | {first: "int4"}, f"'int4' for '{first}', which is no choice"),
        (choices | {first: "int4 u99"}, f"'int4 u99' for '{first}', which is no choice"),
        (choices | {first: "int44 u8"}, "int44"),
        (choices | {one: "int4 u8", other: "int4 u4"}, f"8 bits for what '{one}' reads, and 4 where '{other}'"),
        (None, "needs a plan"),
    ):
        with pytest.raises(UserError, match=re.escape(sentence)):
            given(plan)
    for option, value in (("uniform", "int8"), ("objective", "scores")):
        with pytest.raises(UserError, match=f"without bit-allocation{{{option}}}"):
            BitAllocation(given=True, **{option: value})


@pytest.mark.invariant("fz-rmq-6")
def test_the_budget_is_met_and_used():
    previous = float("inf")
    for bits in (4.0, 5.0, 6.0, 8.0):
        program = planned(weights=bits)
        parameters = program.facts[PARAMETERS]
        assert costs.average_bits(costs.stored_bytes(program), parameters) <= bits
        assert loss(program) < previous
        previous = loss(program)
    assert costs.average_bits(costs.stored_bytes(planned(weights=6.0)), parameters) > 5.9


@pytest.mark.parametrize("model", programs.MODELS)
@pytest.mark.invariant("allocator-5", "compiler-7", "fz-rmq-6")
def test_stored_bytes_are_those_of_the_artifact(model):
    """To the byte: what the plan says is what the packed program stores."""
    plan = programs.after(model, "bit-allocation")
    assert any(layer.format.endswith("+b") for layer in plan.weights.values())
    for name in ("fold-fake-quant", "fuse-epilogues"):
        stored = stored_tensors.stored(programs.after(model, name))
        assert costs.stored_bytes(plan) == sum(s.array.nbytes for s in stored.values())


def test_a_budget_of_bytes_is_the_same_budget():
    parameters = programs.after(MODEL, "sensitivity").facts[PARAMETERS]
    by_bits, by_bytes = planned(weights=5.0), planned(bytes=int(5.0 * parameters / 8))
    assert by_bits.weights == by_bytes.weights


@pytest.mark.invariant("allocator-2")
def test_an_impossible_budget_names_the_least():
    with pytest.raises(UserError, match=r"cannot be met: the least .* is \d+ bytes \(\d\.\d+ bits\)") as caught:
        planned(weights=1.0)
    least = int(re.search(r"is (\d+) bytes", str(caught.value))[1])
    assert costs.stored_bytes(planned(bytes=least)) == least
    with pytest.raises(UserError, match="cannot be met"):
        planned(bytes=least - 1)


def test_activations_of_one_width_have_the_budgets():
    measured = programs.after(MODEL, "sensitivity")
    widths = {bits for losses in measured.facts[SENSITIVITY]["activations"].values() for bits in losses}
    width = min(map(int, widths))
    program = planned(weights=5.0, activations=float(width), mixed=False)
    assert {plan.bits for plan in program.activations.values()} == {width}
    with pytest.raises(UserError, match=r"mixed=false.* gives all activations 7 bits, which was not measured"):
        planned(weights=5.0, activations=7.0, mixed=False)


@pytest.mark.parametrize("uniform", [False, True])
def test_ends_have_their_bits_and_all_else_the_budgets(uniform):
    program = widths_open(programs.after(MODEL, "sensitivity"))
    budget = {"uniform": "int4"} if uniform else {"weights": 5.5, "mixed": False}
    found = BitAllocation(activations=4.0, ends=8, **budget).run(program, Session())
    kept = ends(program)
    layers = {str(costs.weight_path(node)): input_edge(node).name for node in found.quantizable}
    assert kept < layers.keys() and {formats.get(found.weights[path].format).bits for path in kept} == {8}
    assert {found.activations[layers[path]].bits for path in kept} == {8}
    assert {found.activations[layers[path]].bits for path in layers.keys() - kept} == {4}
    if not uniform:
        assert costs.stored_bytes(found) <= 5.5 * found.facts[PARAMETERS] / 8


def test_ends_that_were_not_measured_are_refused():
    program = widths_open(programs.after(MODEL, "sensitivity"))
    for bits, what in ((7, "a format of 7 bits, and none was measured"), (3, "ends 3 bits, which was not measured")):
        with pytest.raises(UserError, match=what):
            BitAllocation(weights=5.5, activations=4.0, mixed=False, ends=bits).run(program, Session())


def test_formats_fall_with_their_sensitivity():
    program = planned(weights=5.0)
    assert len({plan.format for plan in program.weights.values()}) > 1
    assert all(plan.format in formats.FORMATS for plan in program.weights.values())


def test_layers_that_read_one_tensor_get_one_width():
    """Both widths are open, and the budget lies between them."""
    program = programs.after(MODEL, "sensitivity").fork()
    table = program.facts[SENSITIVITY]
    activations = {edge: {"4": 9 * losses["8"], "8": losses["8"]} for edge, losses in table["activations"].items()}
    program.facts[SENSITIVITY] = table | {"activations": activations}
    program = BitAllocation(weights=6.0, activations=6.0).run(program, Session())
    assert {plan.bits for plan in program.activations.values()} == {4, 8}
    elements = costs.activation_elements(program)
    total = sum(plan.bits * elements[edge] for edge, plan in program.activations.items())
    assert total <= 6.0 * sum(elements.values())
    readers = defaultdict(list)
    for node in program.quantizable:
        readers[input_edge(node).name].append(node.name)
    assert {*readers} == {*program.activations} and max(map(len, readers.values())) > 2


def test_bit_operations_are_a_budget():
    program = planned(weights=8.0)
    macs = costs.macs(program)

    def spent(p: Program) -> int:
        widths = {path: formats.get(plan.format).bits for path, plan in p.weights.items()}
        return sum(macs[n.name] * widths[str(costs.weight_path(n))] * 8 for n in p.quantizable)

    limit = 0.7 * spent(program)
    tight = planned(weights=8.0, bops=limit)
    assert spent(tight) <= limit < spent(program) and loss(tight) > loss(program)


def test_the_bit_operations_of_a_plan_are_those_that_it_was_chosen_by():
    """Attentions that are not chosen for are in float, and count beside."""
    program = planned(weights=6.0)
    others = sum(int(cost["macs"]) for cost in costs.attention_costs(program).values())
    bops, float_bops = costs.bops(program)
    assert bops == program.facts[ALLOCATION]["costs"]["bops"] + others * 32 * 32
    assert float_bops == (sum(costs.macs(program).values()) + others) * 32 * 32 > bops


def test_bit_operations_of_floats_attentions_and_branches():
    program = programs.after(MODEL, "time-groups").fork()
    macs, attentions = sum(costs.macs(program).values()), costs.attention_costs(program)
    inner = sum(int(cost["macs"]) for cost in attentions.values())

    def of(uniform: str) -> int:
        return costs.bops(BitAllocation(uniform=uniform).run(program.fork(), Session()))[0] - inner * 32 * 32

    assert of("int8") == macs * 8 * 8 and of("int3") == macs * 3 * 8
    assert of("km3") == of("nf4") == of("ec2") == of("int8") and of("ec1.5") == macs * 4 * 8
    assert of("fp8") == macs * 8 * 32
    branch = 0
    for node in program.quantizable:
        rows, *rest = program.tensors[str(node.args[1].target)].shape
        columns = math.prod(rest)
        branch += costs.macs(program)[node.name] // (rows * columns) * min(2, rows, columns) * (rows + columns)
    assert of("int3+r2") == of("int3") + branch * 16 * 32


def test_uniform_needs_no_table():
    program = programs.after(MODEL, "time-groups").fork()
    program = BitAllocation(uniform="int3").run(program, Session())
    assert {plan.format for plan in program.weights.values()} == {"int3"}
    with pytest.raises(UserError, match=r"did you mean 'int3(\+b)?'"):
        BitAllocation(uniform="int3b").run(program, Session())


def test_without_sensitivities_the_sentence_says_what_to_do():
    program = programs.after(MODEL, "time-groups", programs.RESIDUAL)
    with pytest.raises(UserError, match="put sensitivity before it, or set uniform=int8"):
        BitAllocation(weights=4.0).run(program, Session())


@pytest.mark.invariant("compiler-12")
def test_the_same_problem_twice_gives_the_same_plan():
    assert planned(weights=4.7).weights == planned(weights=4.7).weights
    assert dataclasses.asdict(BitAllocation())["activations"] == 8.0


@pytest.mark.invariant("allocator-8")
def test_layers_without_a_quantized_kernel_are_listed_and_stay_float():
    """A grouped convolution between two plain ones: everything else is packed, and all contracts hold."""
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "first.weight": torch.randn(8, 4, 3, 3, generator=generator),
        "grouped.weight": torch.randn(8, 2, 3, 3, generator=generator),
        "last.weight": torch.randn(4, 8, 1, 1, generator=generator),
    }
    graph = fx.Graph()
    x, _ = graph.placeholder("sample"), graph.placeholder("timestep")
    for name, groups in (("first", 1), ("grouped", 4), ("last", 1)):
        weight = graph.get_attr(f"{name}.weight")
        pad = 0 if name == "last" else 1
        x = graph.call_function(aten.conv2d.default, (x, weight, None, [1, 1], [pad, pad], [1, 1], groups))
        x.name = name
    graph.output(x)
    specs = InputSpec("sample", ("B", 4, 6, 6), torch.float32), InputSpec("timestep", ("B",), torch.int64)
    program = Program(graph, TensorStore(tensors), specs, Stage.FLOAT, facts=Facts({PARAMETERS: 464}))
    inputs = {"sample": torch.randn(8, 4, 6, 6, generator=generator), "timestep": torch.arange(8) * 100}
    steps = []
    pipeline = programs.RESIDUAL.removeprefix("trace,").replace("int2+b", "int3")
    manager.run_pipeline(
        parser.parse(pipeline),
        program,
        Session(programs.denoiser("pixart"), inputs),
        [lambda i, p, before, after: steps.append((p.name(), before, after))],
        present={"graph"},
    )
    after = {name: p for name, _, p in steps}
    assert {*after["bit-allocation"].weights} == {"first.weight", "last.weight"}
    assert "no quantized kernel" in after["bit-allocation"].fallbacks["grouped"]
    (before,) = (b for name, b, _ in steps if name == "fold-fake-quant")
    assert torch.equal(run_exact(before, inputs), run(after["fuse-epilogues"], inputs))
    stored = stored_tensors.stored(after["fuse-epilogues"])
    assert sum(s.array.nbytes for s in stored.values()) == costs.stored_bytes(after["bit-allocation"])


RATIOS = (0.8, 1.2)


def widths_open(program: Program) -> Program:
    """The program with 4-bit activations measured too, at nine times the noise of 8 bits."""
    program = program.fork()
    table = program.facts[SENSITIVITY]
    activations = {edge: {"4": 9 * losses["8"], "8": losses["8"]} for edge, losses in table["activations"].items()}
    program.facts[SENSITIVITY] = table | {"activations": activations}
    return program


def test_budgets_of_content_and_quality_are_those_of_the_ratio_that_draws_best():
    program = widths_open(programs.after("sd15", "sensitivity"))
    session = Session(programs.denoiser("sd15"))
    found = BitAllocation(weights=6.0, activations=6.0, ratios=RATIOS, activation_ratios=(0.9,)).run(program, session)
    (note,) = (text for text in found.facts[NOTES] if "candidates" in text)
    assert "nothing can be drawn" in note  # a text encoder is elsewhere
    allocation = found.facts[ALLOCATION]
    tried = [c["ratio"] for c in allocation["candidates"] if c["activation_ratio"] is None]
    assert tried[:3] == [None, *RATIOS]
    first = min(allocation["candidates"][:3], key=lambda c: c["noise"])
    assert min(c["noise"] for c in allocation["candidates"]) <= first["noise"]
    layers = {layer["name"]: layer for layer in allocation["problem"]["layers"]}
    for budget in allocation["problem"]["budgets"]:
        members = [x for x in layers.values() if budget.get("group") in (None, x["group"])]
        spent = [
            choice["costs"][budget["cost"]]
            for layer in members
            for choice in layer["choices"]
            if choice["name"] == allocation["choices"][layer["name"]]
        ]
        assert sum(spent) <= budget["max"] * (1 + 1e-9)
    assert costs.average_bits(costs.stored_bytes(found), found.facts[PARAMETERS]) <= 6.0


def test_without_content_layers_there_is_nothing_to_decouple():
    found = planned(weights=5.0, ratios=RATIOS)
    assert any("there is nothing to decouple" in note for note in found.facts[NOTES])
    assert found.weights == planned(weights=5.0).weights


def test_sums_of_decibels_report_the_noise_that_they_cost():
    noise, decibels = (planned(weights=5.0, objective=o) for o in ("noise", "paper-db"))
    assert noise.facts[ALLOCATION]["objective"] < decibels.facts[ALLOCATION]["objective"]
    assert costs.stored_bytes(decibels) <= 5.0 * decibels.facts[PARAMETERS] / 8


def together(program: Program, session: Session | None = None, **options) -> Program:
    """The program planned with a budget of 5 bits, whose noise is measured."""
    return BitAllocation(weights=5.0, **options).run(program, session or Session())


@pytest.mark.parametrize("gains", [None, [(0.0, 1.0), (400.0, 0.01), (999.0, 0.5)]])
@pytest.mark.invariant("allocator-12")
def test_noise_of_the_plan_is_that_of_the_program_that_is_made_of_it(gains):
    """Weights and activations together, on the table's inputs, each counted as it counts there."""
    program = programs.after(MODEL, "sensitivity").fork()
    if gains is not None:
        program.facts[TIME_GAINS] = gains
    planned = together(program)
    said = planned.facts[ALLOCATION]["additivity"]
    changed = make_pass("round-weights", {}).run(
        make_pass("insert-fake-quant", {}).run(planned, Session()), Session()
    )
    inputs = program.facts[CALIBRATION].select(program.facts[SENSITIVITY]["inputs"])
    outputs = [run(p, inputs).double() for p in (changed, program)]
    counts = torch.ones(len(outputs[0])) if gains is None else by_gains(inputs["timestep"], gains)
    error, power = (x.square().flatten(1).sum(1) @ counts.double() for x in (outputs[0] - outputs[1], outputs[1]))
    assert said["measured"] == pytest.approx(float(error / power), rel=1e-5)
    assert said["expected"] == planned.facts[ALLOCATION]["objective"]
    assert said["difference_db"] == pytest.approx(10 * math.log10(said["measured"] / said["expected"]))
    assert said["inputs"] == 3 and (gains is not None or abs(said["difference_db"]) < ADDITIVE_DB)


@pytest.mark.invariant("compiler-12")
def test_noise_of_the_plan_depends_on_no_jobs_and_leaves_no_tensors(monkeypatch):
    """Measured input by input, as where memory is short."""
    monkeypatch.setattr(noise_power, "HELD_BYTES", 1)
    program = programs.after(MODEL, "sensitivity")
    program = program.fork(tensors=TensorStore(program.tensors))
    before = {*program.tensors}
    one, two = (together(program, Session(jobs=jobs)).facts[ALLOCATION] for jobs in (1, 2))
    assert one == two and one["additivity"]["measured"] > 0
    assert {name.split(":")[1].split(".")[0] for name in program.tensors.keys() - before} <= {"scale", "zero_point"}


@pytest.mark.parametrize(
    ("factor", "given", "remedy"),
    [
        (0.1, False, r"\+\d+\.\d dB from the sum .*: give more bits \(--weights, --activations\)"),
        (10.0, False, r"-\d+\.\d dB from the sum .*: measure on more inputs \(sensitivity\{inputs=6\}\)"),
        (10.0, True, "measure the table again, in this pipeline"),
        (1.0, False, None),
        (0.0, False, None),
    ],
)
def test_losses_that_do_not_add_up_are_told_with_a_remedy(factor, given, remedy):
    program = programs.after(MODEL, "sensitivity").fork()
    table = program.facts[SENSITIVITY]
    scaled = {
        kind: {name: {choice: loss * factor for choice, loss in losses.items()} for name, losses in table[kind].items()}
        for kind in ("weights", "activations")
    }
    program.facts[SENSITIVITY] = table | scaled
    found = together(program, Session(sensitivity=program.facts[SENSITIVITY] if given else None))
    notes = [note for note in found.facts.get(NOTES, ()) if "sum of its losses" in note]
    assert [bool(re.search(remedy, note)) for note in notes] == [True] if remedy else notes == []
    if not factor:
        assert found.facts[ALLOCATION]["additivity"]["difference_db"] is None


def test_a_table_that_names_no_inputs_is_not_checked():
    program = programs.after(MODEL, "sensitivity").fork()
    table = {key: value for key, value in program.facts[SENSITIVITY].items() if key != "inputs"}
    program.facts[SENSITIVITY] = table
    found = together(program, Session(sensitivity=table))
    assert "additivity" not in found.facts[ALLOCATION]
    assert any("is not checked: the table does not say on how many inputs" in note for note in found.facts[NOTES])


@pytest.mark.parametrize("share", [0.01, 0.1])
@pytest.mark.invariant("mixdq-7", "allocator-8")
def test_protected_activations_get_no_quantizer(share):
    pipeline = programs.MIXED.replace("weights=5.5", f"weights=5.5,protected={share}")
    plan, packed = (programs.after(MODEL, name, pipeline) for name in ("bit-allocation", "fuse-epilogues"))
    edges = {input_edge(node).name for node in plan.quantizable}
    protected = edges - plan.activations.keys()
    assert len(protected) == max(1, round(share * len(edges)))
    losses = {e: plan.facts[SENSITIVITY]["activations"][e]["8"] for e in edges}
    assert min(losses[e] for e in protected) >= max(losses[e] for e in edges - protected)
    listed = {node.name for node in plan.quantizable if input_edge(node).name in protected}
    assert listed <= plan.fallbacks.keys() and all("protected" in plan.fallbacks[name] for name in listed)
    quantized = {q.edge for q in views.quantizers_of(views.flatten(packed))}
    assert not quantized & protected
    stored = stored_tensors.stored(packed)
    assert costs.stored_bytes(plan) == sum(s.array.nbytes for s in stored.values())
    inputs = programs.inputs(MODEL, 4)
    before = programs.step(MODEL, "fold-fake-quant", pipeline).before
    assert torch.equal(run_exact(before, inputs), run(packed, inputs))


def test_protected_activations_of_the_widest_width_count_in_the_average():
    program = widths_open(programs.after(MODEL, "sensitivity"))
    found = BitAllocation(activations=5.0, weights=6.0, protected=0.1, protected_as="widest").run(program, Session())
    losses = {edge: bits["4"] for edge, bits in program.facts[SENSITIVITY]["activations"].items()}
    most = sorted(losses, key=lambda edge: -losses[edge])[: round(0.1 * len(losses))]
    assert {found.activations[edge].bits for edge in most} == {8}
    assert costs.activation_bits(found) <= 5.0 and not any("protected" in r for r in found.fallbacks.values())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"uniform": "int4", "ratios": RATIOS}, "solves no program, which 'ratios'"),
        ({"uniform": "int4", "bops": 1e9}, "solves no program, which 'bops'"),
        ({"uniform": "int4", "activations": 5.5}, "one width here; give a whole number"),
        ({"mixed": False, "activations": 6.9}, "one width here; give a whole number"),
        ({"ends": 9}, "'ends' .* must be 2 to 8"),
        ({"objective": "scores", "ends": 8}, "budget of bytes alone: leave 'ends' out"),
        ({"protected": 1.5}, "'protected' .* must be 0 to 1"),
        ({"ratios": (0.0,)}, "'ratios' .* must be 0.0625 to 16"),
        ({"protected": 0.01, "latency": 1.0}, "protected_as=widest"),
    ],
)
def test_options_of_the_paper_that_do_not_fit(options, message):
    with pytest.raises(UserError, match=message):
        BitAllocation(**options)


def test_activations_of_one_width_are_float_from_16_bits_on():
    program = planned(weights=6.0, activations=16.0, mixed=False)
    assert not program.activations
    layers = {n.name for n in program.quantizable}
    assert {program.fallbacks[name] for name in layers} == {
        "activations of 16 bits and more are not quantized: it stays float, and the layer computes in float"
    }
    bits = costs.average_bits(costs.stored_bytes(program), program.facts[PARAMETERS])
    assert 5.8 < bits <= 6.0
    with pytest.raises(UserError, match="layers of float activations have no times"):
        BitAllocation(activations=16.0, mixed=False, latency=1.0)


def test_a_program_that_was_not_solved_to_the_end_says_so(monkeypatch):
    whole = solver.solve
    early = lambda problem: dataclasses.replace(whole(problem), gap=0.02, optimal=False)  # noqa: E731
    monkeypatch.setattr(bit_allocation, "solve", early)
    notes = planned(weights=6.0).facts[NOTES]
    assert any("not solved to the end within 60 s: losses are within 2.0% of the least" in note for note in notes)
