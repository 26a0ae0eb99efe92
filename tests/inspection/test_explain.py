"""What passes decided, and why a layer is as it is."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch

from mpq_compiler import schemas
from mpq_compiler.allocation import costs, pose
from mpq_compiler.allocation.problem import Problem
from mpq_compiler.allocation.solver import solve
from mpq_compiler.analysis.noise_power import noise_power
from mpq_compiler.analysis.teacher_forcing import Forced
from mpq_compiler.artifact import bundle
from mpq_compiler.cli import mpqc
from mpq_compiler.driver.instruments import observe
from mpq_compiler.inspection import explain
from mpq_compiler.inspection.dumps import Dump, read_dumps
from mpq_compiler.ir import provenance
from mpq_compiler.ir.findings import SENSITIVITY
from mpq_compiler.ir.interpreter import run
from mpq_compiler.pipeline import manager, parser
from mpq_compiler.pipeline.session import Session
from mpq_compiler.quantization.statistics import CALIBRATION, Calibration
from mpq_compiler.support import svg, terminal
from mpq_compiler.support.errors import UserError
from mpq_compiler.support.files import encode_json
from tests.harness import programs
from tests.inspection.test_bisect import INT4, clean

LAYER = "transformer_blocks.1.attn1.to_v"


def document(model: str = "pixart", pipeline: str = programs.MIXED) -> dict:
    found = json.loads(encode_json(provenance.document(programs.steps(model, pipeline)[-1].after)))
    assert schemas.check(found, "decisions") is None
    return found


@pytest.fixture(scope="module")
def dumps() -> list[Dump]:
    return read_dumps(clean("pixart", programs.MIXED)[0])


@pytest.mark.parametrize("model", ["pixart", "unet2d"])
def test_every_layer_has_its_decisions(model):
    found = document(model)
    program = programs.after(model, "bit-allocation")
    assert {*found["layers"]} == {*program.weights}
    for path, passes in found["layers"].items():
        plan = program.weights[path]
        assert passes["bit-allocation"]["format"] == plan.format
        assert passes["calibrate"]["call"] in plan.sites
        assert passes["fold-fake-quant"]["operator"] in ("mpq::quant_linear", "mpq::quant_conv2d")
        assert {*passes["sensitivity"]["weights"]} == {"int2", "int2+b", "int8"}
        assert ("branch" in passes.get("residual-branch", {})) == (plan.format == "int2+b")
    total = sum(p["bit-allocation"]["bytes"] for p in found["layers"].values())
    assert 0 < total < found["program"]["bit-allocation"]["bytes"]


def test_statistics_are_those_of_calibration():
    said = document()["layers"][f"{LAYER}.weight"]
    calibration: Calibration = programs.after("pixart", "calibrate").facts[CALIBRATION]
    edge = calibration.edges[said["calibrate"]["edge"]]
    assert said["calibrate"]["low"] == pytest.approx(float(edge.low.min()), rel=1e-5)
    assert said["calibrate"]["outliers"] * said["calibrate"]["rms"] == pytest.approx(
        float(torch.maximum(edge.low.abs(), edge.high.abs()).max()), rel=1e-4
    )
    siblings = {f"transformer_blocks.1.attn1.to_{x}.weight" for x in "qk"}
    assert {*said["calibrate"]["shared_with"]} == siblings
    assert len(said["time-groups"]["ranges"]) == len(said["bit-allocation"]["scale"]) == 3


def test_a_pass_leaves_what_it_likes_and_nothing_of_others_is_lost():
    program = programs.after("pixart", "layout").fork()
    before = program.facts[provenance.DECISIONS]
    provenance.note(program, LAYER, "mine", ratio=1 / 3, kind="x")
    provenance.note(program, LAYER, "mine", table=torch.tensor([1, 2]))
    assert program.facts[provenance.DECISIONS][LAYER]["mine"] == {"ratio": 0.333333, "kind": "x", "table": [1, 2]}
    assert program.facts[provenance.DECISIONS][provenance.PROGRAM] == before[provenance.PROGRAM]
    assert LAYER not in before


def test_decisions_are_the_same_bytes_in_every_run():
    texts = []
    for _ in range(2):
        session = Session(programs.denoiser("pixart"), programs.calibration("pixart"))
        program, _ = manager.run_pipeline(parser.parse(INT4), programs.empty(), session, [observe])
        texts.append(encode_json(provenance.document(program), indent=None))
    assert texts[0] == texts[1]


def test_a_layer_is_found_by_any_of_its_names():
    found = document()
    for name in (LAYER, f"{LAYER}.weight", LAYER.replace(".", "_")):
        assert explain.find(found, name) == f"{LAYER}.weight"
    misspelt = "transformer_block.1.attn1.to_v"
    with pytest.raises(UserError, match=rf"there is no layer '{misspelt}': did you mean '{LAYER}'\?"):
        explain.find(found, misspelt)


def test_the_choice_is_explained_with_what_else_there_was(dumps):
    found = explain.why(document(), LAYER, dumps)
    assert schemas.check(json.loads(json.dumps(found)), "inspect") is None
    (chosen,) = [row for row in found["choices"] if row["chosen"]]
    assert chosen["format"] == programs.after("pixart", "bit-allocation").weights[f"{LAYER}.weight"].format
    assert [row["bytes"] for row in found["choices"]] == sorted(row["bytes"] for row in found["choices"])
    for row in found["choices"]:
        if row["saves"] is not None:
            gained = row["saves"] * (row["bytes"] - chosen["bytes"])
            assert gained == pytest.approx(chosen["loss"] - row["loss"], rel=1e-6)
    text = " ".join(explain.sentences(found))
    assert f"bit-allocation took {chosen['format']}" in text and "they share its quantizer" in text
    lengths = {row["format"]: row["bytes"] - chosen["bytes"] for row in found["choices"]}
    told = re.findall(r"; (\S+) would (free|take) (\d+) (?:bytes|more), and (lose|gain) [\d.,]+ times their", text)
    assert told and all((verb, moved) in (("free", "lose"), ("take", "gain")) for _, verb, _, moved in told)
    assert all(lengths[name] == (int(count) if verb == "take" else -int(count)) for name, verb, count, _ in told)
    assert explain.headline(found).startswith(f"weight {chosen['format']}, activation u8 in 3 time groups")


def test_settled_codes_are_told_of_in_words(dumps):
    found = document()
    layer = next(path for path, said in found["layers"].items() if "branch" in said.get("residual-branch", {}))
    text = " ".join(explain.sentences(explain.why(found, layer, dumps)))
    assert re.search(r"scales are on average [\d.]+ of those that span the largest weights", text)
    assert re.search(r"a binary branch adds or subtracts \d+ steps of the table", text)


def test_moved_budgets_are_solved_again():
    found = document()
    moved, reason = explain.moved_budgets(found)
    assert reason is None
    allocation = found["program"]["bit-allocation"]
    (size,) = [b for b in moved if b.cost == "bytes"]
    assert size.less is not None and size.more is not None
    assert size.less.objective >= allocation["objective"] >= size.more.objective
    assert size.binding and size.price > 0
    problem = allocation["problem"]
    budgets = [{**b, "max": 1.05 * b["max"]} if b["cost"] == "bytes" else b for b in problem["budgets"]]
    assert size.more.choices == solve(Problem.from_json({**problem, "budgets": budgets})).choices
    row = next(b for b in explain.why(found, LAYER, (), (moved, reason))["budgets"] if b["cost"] == "bytes")
    assert row["more"] == {"loss": size.more.objective, "choice": size.more.choices[f"{LAYER}.weight"]}


def test_what_was_chosen_fits_though_numbers_are_written_rounded():
    """Thirds of edges that three layers share: six digits of each sum to more than the budget that they fill."""
    found = document("unet2d")
    moved = {budget.cost: budget for budget in explain.moved_budgets(found)[0]}
    assert moved["activation_bits"].used > moved["activation_bits"].max
    assert moved["bytes"].less is not None and moved["bytes"].more is not None and moved["bytes"].price > 0


def test_budgets_of_groups_are_those_of_their_layers():
    """In decibels too, whose sums are negative."""
    program = programs.after("sd15", "sensitivity")
    table = program.facts[SENSITIVITY] | costs.describe(program)
    terms = pose.Terms(decibels=True, ratio=0.9)
    problem = pose.problem(table, int(5.0 * table["parameters"] / 8), terms=terms)
    allocation = solve(Problem.from_json(problem))
    found = document("sd15")
    found["program"]["bit-allocation"] |= {**allocation.to_json(), "problem": problem}
    content, quality = (b for b in explain.moved_budgets(found)[0] if b.cost == "bytes")
    assert (content.group, quality.group) == ("content", "quality")
    assert not {*content.layers} & {*quality.layers} and content.used <= content.max and quality.used <= quality.max
    assert math.isclose(content.used + quality.used, allocation.costs["bytes"])
    assert content.price > 0 and content.price != quality.price
    layer = next(name for name in content.layers if ".ff." in name).removesuffix(".weight")
    explained = explain.why(found, layer)
    assert explained["price"] == content.price
    assert [b["cost"] for b in explained["budgets"]] == ["bytes of content layers", "bytes of quality layers"]


def test_a_given_plan_has_no_budgets():
    found = explain.why(document("pixart", INT4), LAYER)
    assert found["budgets"] == [] and found["choices"] == [] and found["price"] is None
    assert found["budgets_reason"] == "no program was solved: the plan was given"
    assert any("one format for every layer" in sentence for sentence in explain.sentences(found))


def test_noise_is_that_of_the_layer_alone(dumps):
    rows = {row["pass"]: row for row in explain.why(document(), LAYER, dumps)["noise"]}
    inputs = dict(programs.inputs("pixart", 2))
    planned, rounded = (programs.after("pixart", name) for name in ("bit-allocation", "round-weights"))
    values: dict[str, torch.Tensor] = {}
    run(planned, inputs, lambda node, value: values.__setitem__(node.name, value))
    call = LAYER.replace(".", "_")
    natural = Forced(rounded, {})
    with torch.no_grad():
        natural.run(inputs)
    forced = Forced(rounded, values)
    with torch.no_grad():
        forced.run(inputs)
    own = 10 * math.log10(forced.departures[call].noise)
    assert rows["round-weights"]["own_db"] == pytest.approx(own, abs=1e-6)
    gathered = 10 * math.log10(noise_power(natural.values[call], values[call]))
    assert own < gathered  # what comes before adds to it
    assert rows["layout"]["planned_db"] is None and rows["round-weights"]["planned_db"] is not None


# --- charts and files ---------------------------------------------------------------------------------------


def test_charts_keep_their_marks_inside_the_frame():
    points = [svg.Point(x, y, f"{x}") for x, y in ((0.1, 3), (20, 400), (1000, 2))]
    charts = [
        svg.log_log(points, {"roof": [(0.1, 1), (10, 500), (1000, 500)]}, "t", ("x", "y")),
        svg.boxes([svg.Row("a", (-2, 0, 1, 2, 3), (1, 2)), svg.Row("b", 5 * (1,), (0, 0))], "t", "s", ("x", "y")),
        svg.boxes([svg.Row("a", (5, 5, 5, 5, 5), ())], "t", "s"),
    ]
    for chart in charts:
        width, height = map(int, re.search(r'viewBox="0 0 (\d+) (\d+)"', chart).groups())
        for name, value in re.findall(r' (x|y|cx|cy|x1|x2|y1|y2)="(-?[\d.]+)"', chart):
            assert 0 <= float(value) <= (width if "x" in name else height), (name, value)


def test_decisions_are_read_of_a_zip(tmp_path):
    """Whose files last as long as they are read."""
    folder = packed_like(tmp_path / "a.mpq")
    shutil.make_archive(str(tmp_path / "a"), "zip", folder)
    assert explain.load(tmp_path / "a.zip") == explain.load(folder) == document()


def packed_like(path: Path) -> Path:
    """An artifact with decisions and not much else."""
    from tests.artifact import test_bundle

    encoded = encode_json(provenance.document(programs.steps("pixart", programs.MIXED)[-1].after), indent=None)
    files = {**test_bundle.FILES, bundle.DECISIONS: encoded}
    test_bundle.write(path, files=files)
    return path


def test_an_artifact_of_before_has_no_decisions(tmp_path):
    Path(tmp_path, "decisions.json").write_text('{"version": 2}')
    with pytest.raises(UserError, match="no record of decisions"):
        explain.load(tmp_path)
    with pytest.raises(UserError, match=r"holds no readable decisions\.json; compile it again"):
        explain.load(tmp_path / "missing")


@pytest.mark.parametrize("column", ["layer", "weight", "activation", "bytes", "loss"])
def test_layers_are_sorted_and_the_first_are_printed(column, capsys, monkeypatch):
    monkeypatch.setattr(terminal.output, "width", terminal.WIDTH)  # a worker's may be 80, in which names are folded
    folder = str(clean("pixart", programs.MIXED)[0])
    assert mpqc.main(["inspect", folder, "--layers"]) == 0
    everything = capsys.readouterr().out
    assert mpqc.main(["inspect", folder, "--layers", "--sort", column, "--top", "4"]) == 0
    printed = capsys.readouterr().out
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.splitlines() if line[0] == "│"]
    values = [row[("layer", "weight", "activation", "bytes", "share", "loss").index(column)] for row in cells]
    assert len(values) == 4 and all(f"│ {row[0]} " in everything for row in cells)
    if column in ("bytes", "loss"):
        numbers = [float(value) for value in values]
        assert numbers == sorted(numbers, reverse=True)
    else:
        assert values == sorted(values)
    assert "4 of " in printed and "loss: noise" in printed and "+b: and a binary branch" in everything


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--sort", "loss"], "--sort and --top are of the table of --layers: add that, or leave them out"),
        (["--layers", "--top", "0"], "--top 0 must be 1 or more"),
    ],
)
def test_an_order_that_cannot_be_is_refused(arguments, sentence, capsys):
    assert mpqc.main(["inspect", str(clean("pixart", programs.MIXED)[0]), *arguments]) == 1
    assert capsys.readouterr().err == f"mpqc: {sentence}\n"
