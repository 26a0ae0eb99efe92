"""Every family of diffusers' denoisers through the whole compiler, tiny and with random weights."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mpq_compiler.api import compile
from mpq_compiler.driver.judge import AGREEMENT_DB
from mpq_compiler.driver.report import Report
from mpq_compiler.frontend import denoiser as denoisers
from mpq_compiler.frontend.denoiser import Denoiser
from mpq_compiler.ir import ops
from mpq_compiler.ir.aten import BINARY, UNARY, aten, interior_permutes
from mpq_compiler.ir.exact_interpreter import run_exact
from mpq_compiler.ir.graph import arguments, operand
from mpq_compiler.ir.interpreter import run
from mpq_compiler.ir.program import Program
from mpq_compiler.pipeline import manager, parser
from mpq_compiler.pipeline.session import Session
from tests.harness import families, programs, tiny

FAMILIES = pytest.mark.parametrize("family", tiny.ALL_FAMILIES)
ROWS = 24
"""Of calibration files: 18 to calibrate on, 6 to judge by."""

BITS = 5.0
"""What scales and tables cost weighs more in tiny layers: the recipe's own budget is below the least they can do."""

MOVEMENT = {aten.permute.default, aten.reshape.default, aten.slice.Tensor, aten.select.int, aten.cat.default}
FLOAT = {ops.conv2d, ops.group_norm, ops.rms_norm, ops.attention, ops.upsample_nearest2d}
OTHERS = {
    aten.linear.default,
    aten.layer_norm.default,
    aten.embedding.default,
    aten.concat.default,
    aten.constant_pad_nd.default,
    aten.einsum.default,
    aten.mean.dim,
    aten.where.self,
}
FORMATS = ["km2", "int3+b", "int8"]
"""Less than half of the recipe's, which take as long to measure as all else together."""
KNOWN = MOVEMENT | FLOAT | OTHERS | UNARY | BINARY


denoiser = functools.cache(families.denoiser)


@functools.cache
def front(family: str) -> tuple[Program, Program]:
    """The program after `trace` and after `layout`."""
    made: list[Program] = []
    passes, session = parser.parse("trace,layout"), Session(denoiser(family))
    manager.run_pipeline(passes, programs.empty(), session, [lambda i, step, before, program: made.append(program)])
    return made[0], made[1]


def within(program: Program, inputs: dict[str, Tensor], expected: Tensor) -> bool:
    return float((run(program, inputs) - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


@FAMILIES
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_traces_bit_for_bit(family: str, batch: int) -> None:
    inputs = denoiser(family).random_inputs(batch, 7)
    program = front(family)[0]
    assert torch.equal(run(program, inputs), denoiser(family)(**inputs))
    assert program.fallbacks == {}


@FAMILIES
def test_layout_knows_every_operator_and_needs_no_permutes(family: str) -> None:
    program = front(family)[1]
    inputs = denoiser(family).random_inputs(3, 7)
    assert within(program, inputs, denoiser(family)(**inputs))
    calls = [n for n in program.graph.nodes if n.op == "call_function"]
    assert {ops.name_of(n.target) for n in calls if n.target not in KNOWN} == set()
    assert interior_permutes(program.graph) == [] and program.fallbacks == {}
    assert sum(n.target is aten.permute.default for n in calls) == 2


def watched(program: Program, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    values: dict[str, Tensor] = {}
    run(program, inputs, lambda node, value: values.update({node.name: value}))
    return values


@FAMILIES
def test_rows_belong_to_their_samples(family: str) -> None:
    """A change of one sample changes only its share of the rows that a layer reads: time groups are per sample."""
    program = front(family)[1]
    inputs = denoiser(family).random_inputs(3, 7)
    another = denoiser(family).random_inputs(3, 8)
    changed = {name: torch.cat([v[:1], another[name][1:2], v[2:]]) for name, v in inputs.items()}
    edges = {operand(n, 0).name for n in program.quantizable}
    first, second = watched(program, inputs), watched(program, changed)
    for edge in edges:
        same = [torch.equal(a, b) for a, b in zip(first[edge].chunk(3), second[edge].chunk(3), strict=True)]
        assert same in ([True, False, True], [True, True, True]), edge
    unlike = {edge for edge in edges if not torch.equal(first[edge], second[edge])}
    assert len(unlike) >= len(edges) - 1  # the size of the image is the same for both


def compiled(family: str, folder: Path, **options: Any) -> Report:
    model = denoiser(family)
    file = families.calibration(model, folder / "calibration.safetensors", ROWS)
    return compile.compile(model, folder / "model.mpq", calibration=file, shapes=families.shapes(model), **options)


def depthwise(family: str) -> set[str]:
    """The layers that have no quantized kernel."""
    calls = [n for n in front(family)[1].graph.nodes if n.target is ops.conv2d]
    return {n.name for n in calls if arguments(n)[5] != 1}


@FAMILIES
def test_native_agrees_with_the_reference(family: str, tmp_path: Path) -> None:
    """Contract (c), at 8 bits, executed; what stays float are the depthwise convolutions alone."""
    report = compiled(family, tmp_path, recipe="w8a8", jobs=2)
    assert report.quality["executed_by"] == "artifact"
    assert abs(report.quality["agreement_db"]) <= AGREEMENT_DB
    assert report.quality["sqnr_db"] > 20
    assert {layer["name"] for layer in report.layers if layer["weight"] == "float"} >= depthwise(family)
    quantized = [layer for layer in report.layers if layer["weight"] == "int8"]
    assert len(quantized) == len(front(family)[1].quantizable)
    assert depthwise(family) <= report.fallbacks.keys()


@FAMILIES
def test_mixed_precision_on_the_reference(family: str, tmp_path: Path) -> None:
    """The default recipe: sensitivities, an allocation within a budget, tables and branches."""
    file = tmp_path / "few.toml"
    file.write_text(f'schema = 1\nextends = "default"\n[options.sensitivity]\nformats = {FORMATS}\n')
    report = compiled(family, tmp_path, target="reference", weights=BITS, recipe=str(file), jobs=2)
    assert report.weights["average_bits"] <= BITS
    assert len({layer["weight"] for layer in report.layers} - {"float"}) > 1
    assert report.quality["sqnr_db"] > 4


# --- a weight used twice ------------------------------------------------------------------------------------


def tied() -> Denoiser:
    """A DiT whose second block multiplies with weights of the first: one whole layer, and one weight alone."""
    model = tiny.model("dit")
    first, second = model.transformer_blocks
    second.attn1.to_q = first.attn1.to_q
    second.ff.net[2].weight = first.ff.net[2].weight
    return denoisers.wrap(model, name="tied")


@pytest.mark.parametrize("pipeline", [programs.MIXED, programs.RESIDUAL])
def test_a_weight_used_twice_has_one_plan_and_one_set_of_codes(pipeline: str) -> None:
    model = tied()
    inputs = model.random_inputs(12, 3)
    inputs["timestep"] = torch.tensor([t for t in programs.TIMESTEPS for _ in range(2)])
    steps: dict[str, tuple[Program, Program]] = {}
    session = Session(model, inputs)

    def observe(index: int, step: Any, before: Program, program: Program) -> None:
        steps[step.name()] = before, program

    passes = parser.parse(pipeline)
    final, _ = manager.run_pipeline(passes, programs.empty(), session, [observe])
    planned = steps["bit-allocation"][1]
    for name in ("attn1.to_q", "ff.net.2"):
        plan = planned.weights[f"transformer_blocks.0.{name}.weight"]
        assert len(plan.sites) == 2 and f"transformer_blocks.1.{name}.weight" not in planned.weights
        codes = [n for n in final.graph.nodes if str(n.target).startswith(f"transformer_blocks.0.{name}.weight:codes")]
        assert len({n.target for n in codes}) == 1 and sum(len(n.users) for n in codes) == 2
    given = model.random_inputs(3, 11)
    assert torch.equal(run_exact(steps["fold-fake-quant"][0], given), run(final, given))


# --- masks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["pixart", "sana", "hunyuan"])
def test_masks_are_inputs(family: str) -> None:
    """What a mask hides does not show: the texts of a batch have their own lengths."""
    program = front(family)[1]
    inputs = denoiser(family).random_inputs(3, 7)
    mask = next(name for name in inputs if "mask" in name)
    hidden, texts = inputs[mask] == 0, "encoder_hidden_states"
    assert hidden.any() and not hidden.all(1).any()
    other = {**inputs, texts: torch.where(hidden[..., None], torch.randn_like(inputs[texts]), inputs[texts])}
    assert torch.equal(run(program, inputs), run(program, other))
    shown = {**inputs, mask: torch.ones_like(inputs[mask])}
    assert not torch.allclose(run(program, inputs), run(program, shown))


# --- the table of docs/models.md ----------------------------------------------------------------------------


def test_the_table_of_models_names_every_family() -> None:
    text = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    table = text.partition("<!-- families: begin -->")[2].partition("<!-- families: end -->")[0]
    rows = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| `")]
    assert rows == [f"`{family}`" for family in tiny.ALL_FAMILIES]
    assert "python benchmarks/families.py" in text
