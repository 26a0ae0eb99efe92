"""Formats of every family in one program: allocation among them, exact arithmetic, bytes, GPTQ."""

from __future__ import annotations

import pytest
import torch

from mpq_compiler import formats
from mpq_compiler.allocation import pose
from mpq_compiler.allocation.costs import format_costs
from mpq_compiler.formats.base import output_error
from mpq_compiler.ir import costs, ops, printer, stored_tensors
from mpq_compiler.ir.exact_interpreter import run_exact
from mpq_compiler.ir.findings import SENSITIVITY
from mpq_compiler.ir.interpreter import run
from mpq_compiler.ir.program import NOTES, Program
from mpq_compiler.pipeline.manager import run_pipeline
from mpq_compiler.pipeline.parser import parse
from mpq_compiler.pipeline.session import Session
from mpq_compiler.quantization import statistics
from mpq_compiler.quantization.fitting import Rounding, moments, rows_of
from mpq_compiler.quantization.settle import unsettled
from tests.harness import programs

MODEL = "pixart"
FAMILIES = ("int2+b", "km3t", "int4g12", "nf4", "int2+r2", "fp8")
MIXED = (
    f"{programs.FRONT},sensitivity{{inputs=3,formats={'/'.join(FAMILIES)}}},bit-allocation{{weights=7.5}},"
    "insert-fake-quant,residual-branch,low-rank,round-weights{method=gptq},fold-fake-quant,fuse-epilogues"
)


def after(name: str) -> Program:
    return programs.after(MODEL, name, MIXED)


def test_every_family_is_measured_with_the_rounding_that_the_pipeline_asks_for():
    program = after("sensitivity")
    losses = program.facts[SENSITIVITY]["weights"]
    assert all({*found} == {*FAMILIES} for found in losses.values())
    assert {key[2] for key in programs.step(MODEL, "sensitivity", MIXED).fits.weights} == {Rounding.GPTQ}


@pytest.mark.invariant("qua2sedimo-1")
def test_several_families_are_chosen_and_counted_to_the_byte():
    planned, packed = after("bit-allocation"), after("fuse-epilogues")
    chosen = {plan.format for plan in planned.weights.values()}
    assert len(chosen) > 2
    payload = sum(tensor.array.nbytes for tensor in stored_tensors.stored(packed).values())
    assert payload == costs.stored_bytes(planned) == printer.stored_bytes(after("round-weights"))
    assert payload == printer.stored_bytes(packed)


@pytest.mark.parametrize("batch", [1, 3])
def test_exact_mode_is_the_packed_program(batch):
    x = programs.inputs(MODEL, batch)
    assert torch.equal(run_exact(after("round-weights"), x), run(after("fuse-epilogues"), x))


@pytest.mark.parametrize("name", ["fp8", "fp8e5", "int2g12", "km4t", "int3+b+r3", "int8+r1", "nf4g16"])
@pytest.mark.invariant("svdquant-5", "mpq-dm-4")
def test_one_family_alone_is_exact_and_counted_to_the_byte(name):
    pipeline = f"{programs.FRONT},bit-allocation{{uniform={name}}},{programs.BACK}"
    pipeline = pipeline.replace("round-weights", "low-rank,round-weights")
    x = programs.inputs(MODEL, 2)
    simulated, packed = (programs.after(MODEL, step, pipeline) for step in ("round-weights", "fuse-epilogues"))
    assert torch.equal(run_exact(simulated, x), run(packed, x))
    payload = sum(tensor.array.nbytes for tensor in stored_tensors.stored(packed).values())
    assert payload == costs.stored_bytes(programs.after(MODEL, "bit-allocation", pipeline))
    values: dict[str, torch.Tensor] = {}
    run(simulated, x, lambda node, value: values.__setitem__(node.name, value))
    found = formats.get(name)
    for node in simulated.graph.nodes:
        if node.target in (ops.dequantize_weight, ops.dequantize_float8):
            level = values[node.name]
            groups = torch.split(level, list(found.segments(level.shape[-1])), -1)
            assert all(len(row.unique()) <= 2**found.bits for group in groups for row in group.flatten(1))


# --- GPTQ ---------------------------------------------------------------------------------------------------


def settled(method: str, format_name: str) -> programs.Step:
    pipeline = f"{programs.FRONT},bit-allocation{{uniform={format_name}}},{programs.BACK}"
    return programs.step(MODEL, "round-weights", pipeline.replace("round-weights", f"round-weights{{method={method}}}"))


@pytest.mark.parametrize(
    ("name", "method"), [("int3", "gptq"), ("int2+b", "gptq"), ("fp4", "learned"), ("int2+b", "learned")]
)
@pytest.mark.invariant("qdiffusion-8")
def test_chosen_codes_are_better_for_every_layer_and_the_output(name, method):
    """Plain tables, and residual branches, whose pass rounds as `round-weights` asks.

    GPTQ leaves each layer a smaller error, and rows of few levels less loud: outputs are of rows as loud as ever.
    """
    steps = [settled(each, name) for each in ("nearest", method)]
    steps.append(settled("gptq,scales=true", name) if method == "gptq" else steps[1])
    plan = f"{programs.FRONT},bit-allocation{{uniform={name}}},{programs.BACK}"
    before = programs.after(MODEL, "insert-fake-quant", plan)
    x = programs.inputs(MODEL, 4)
    y = run(programs.after(MODEL, "bit-allocation"), x)
    values: list[dict[str, torch.Tensor]] = [{} for _ in steps]
    noise = [
        float((run(s.after, x, lambda node, value, v=v: v.__setitem__(node.name, value)) - y).square().sum())
        for s, v in zip(steps, values, strict=True)
    ]
    assert noise[2] < (0.8 if method == "gptq" else 0.95) * noise[0], noise
    better = 0
    for weight in unsettled(before):
        w, gram = rows_of(before, weight.weight), moments(before, weight.call)
        a, b = (float(output_error(v[weight.quantizer.name].flatten(1) - w, gram).sum()) for v in values[:2])
        assert b <= a * (1 + 1e-6), weight.path
        better += b < 0.9 * a
    assert better > 10


@pytest.mark.parametrize("method", ["gptq", "learned"])
def test_layers_of_many_inputs_are_left_to_gptq_and_a_note_says_so(monkeypatch, method):
    """GPTQ works in the blocks of their moments; learned rounding does not, and its note names the layers."""
    monkeypatch.setattr(statistics, "GRAM_COLUMNS", 40)
    back = f"bit-allocation{{uniform=int3}},insert-fake-quant,round-weights{{method={method}}}"
    session = Session(programs.denoiser(MODEL), programs.calibration(MODEL))
    program, _ = run_pipeline(parse(f"{programs.FRONT},{back}"), programs.empty(), session)
    wide = [p for p, plan in program.weights.items() if program.tensors[p][0].numel() > 40]
    assert wide
    if method == "gptq":
        assert NOTES not in program.facts
        return
    (note,) = program.facts[NOTES]
    assert all(path in note for path in wide) and "codes are GPTQ's" in note
    assert not any(path in note for path in {*program.weights} - {*wide})


@pytest.mark.parametrize("method", ["gptq", "learned"])
def test_codes_stay_nearest_where_moments_cannot_be_kept_and_a_note_says_so(monkeypatch, method):
    """Of a layer whose number of inputs has no fitting divisor only the diagonal is kept."""
    monkeypatch.setattr(statistics, "_blocks", lambda columns: 1 if columns <= 40 else 0)
    back = f"bit-allocation{{uniform=int3}},insert-fake-quant,round-weights{{method={method}}}"
    session = Session(programs.denoiser(MODEL), programs.calibration(MODEL))
    program, _ = run_pipeline(parse(f"{programs.FRONT},{back}"), programs.empty(), session)
    (note,) = program.facts[NOTES]
    wide = [p for p, plan in program.weights.items() if program.tensors[p][0].numel() > 40]
    assert wide and all(path in note for path in wide) and "nearest levels" in note
    assert not any(path in note for path in {*program.weights} - {*wide})


# --- choices ------------------------------------------------------------------------------------------------

TABLE = {
    "version": 1,
    "model": "m",
    "parameters": 1000,
    "fixed_bytes": 10,
    "inputs": 2,
    "weights": {"a": {"int4": 0.1, "fp8": 0.01, "int4+r2": 0.02}, "b": {"int4": 0.1, "fp8": 0.05}},
    "activations": {"x": {"8": 0.4}},
    "elements": {"x": 50},
    "layers": [
        {
            "name": name,
            "edges": ["x"],
            "macs": 1000,
            "formats": {
                "int4": {"bits": 4, "bytes": 100},
                "fp8": {"bits": 8, "bytes": 200, "float": True},
                "int4+r2": {"bits": 4, "bytes": 120, "float_macs": 30},
            },
        }
        for name in "ab"
    ],
}


def test_floats_and_branches_are_choices_with_costs_of_their_own():
    problem = pose.problem(TABLE, 1000, activations=8)
    a, _ = problem["layers"]
    choices = {choice["name"]: choice for choice in a["choices"]}
    assert {*choices} == {"int4 u8", "fp8 float", "int4+r2 u8"}
    assert choices["fp8 float"]["loss"] == 0.01 and choices["int4 u8"]["loss"] == pytest.approx(0.1 + 0.4 / 2)
    assert choices["fp8 float"]["costs"] == {"bytes": 200, "activation_bits": 8 * 25, "bops": 1000 * 8 * 32}
    assert choices["int4+r2 u8"]["costs"]["bops"] == 1000 * 4 * 8 + 30 * 16 * 32
    assert choices["fp8 float"]["attributes"] == {"activation": "float"}


def test_readers_of_one_tensor_are_all_float_or_all_quantized():
    from mpq_compiler.allocation.problem import Problem
    from mpq_compiler.allocation.solver import solve

    whole = solve(Problem.from_json(pose.problem(TABLE, 410, activations=8)))
    assert whole.choices == {"a": "fp8 float", "b": "fp8 float"}
    less = solve(Problem.from_json(pose.problem(TABLE, 400, activations=8)))
    assert less.choices == {"a": "int4+r2 u8", "b": "int4 u8"}


def test_costs_of_a_format_are_those_of_its_parts():
    found = format_costs((24, 3, 3, 8), "int4g4+r2", operations=24 * 72 * 100)
    assert found == {
        "bits": 4,
        "bytes": formats.get("int4g4").stored_bytes(24, 3, 3, 8) + 2 * 2 * (24 + 72),
        "float_macs": 100 * 2 * (24 + 72),
    }
    assert format_costs((24, 8), "fp8", 5)["float"] is True
    assert {*format_costs((24, 8), "km4t", 5)} == {"bits", "bytes"}
