"""Scores of formats, and allocation by them."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path

import pytest

from mpq_compiler import formats, schemas
from mpq_compiler.allocation.costs import describe
from mpq_compiler.allocation.pose import SCORES
from mpq_compiler.inspection import explain, score_report
from mpq_compiler.ir import costs, provenance, stored_tensors
from mpq_compiler.ir.findings import ALLOCATION
from mpq_compiler.ir.program import Program
from mpq_compiler.passes.bit_allocation import BitAllocation
from mpq_compiler.passes.predict_scores import PredictScores
from mpq_compiler.pipeline import manager, recipes
from mpq_compiler.pipeline.session import Session
from mpq_compiler.quantization.fitting import FitCache
from mpq_compiler.support import cache
from mpq_compiler.support.errors import UserError
from mpq_compiler.support.files import encode_json
from tests.harness import programs
from tests.harness.tree import ROOT

MODEL = "unet2d"
PASS = PredictScores(formats=("int3", "int4", "km3", "km4"), configurations=30, inputs=3, folds=2, epochs=20)
FITS = FitCache()
"""Of all runs, so that weights are fitted once."""


def before() -> Program:
    return programs.after(MODEL, "time-groups", programs.SCORED)


def scored(folder: Path | None = None, jobs: int = 1, **options) -> Program:
    session = Session(programs.denoiser(MODEL), cache=folder or cache.folder(), jobs=jobs, fits=FITS)
    return PredictScores(**PASS.options() | options).run(before(), session)


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Program:
    return scored(tmp_path_factory.mktemp("scores"))


@pytest.mark.invariant("qua2sedimo-6")
def test_every_variant_of_every_unit_has_a_score(program):
    """Invariant: units partition the weights, and each variant gives each of their weights one format."""
    units = program.facts[SCORES]["units"]
    paths = [path for unit in units for path in unit["layers"]]
    assert len(paths) == len({*paths}) and {*paths} == {str(costs.weight_path(n)) for n in program.quantizable}
    for unit in units:
        variants = {" ".join(v) for v in product(PASS.formats, repeat=len(unit["layers"]))}
        assert unit["variants"].keys() == variants and len({*unit["variants"].values()}) > 1
    assert max(len(unit["layers"]) for unit in units) == 4


def test_operations_are_units_without_hops(program):
    alone = scored(level="operation").facts[SCORES]["units"]
    assert all(len(unit["layers"]) == 1 for unit in alone)
    said = program.facts[provenance.DECISIONS]
    assert {path: said[path]["predict-scores"]["scores"].keys() for path in program.weights} == {
        unit["layers"][0]: unit["variants"].keys() for unit in alone if unit["layers"][0] in program.weights
    }


def test_jobs_change_nothing(program, tmp_path):
    assert scored(tmp_path, jobs=2).facts[SCORES] == program.facts[SCORES]


def test_what_took_time_is_kept(tmp_path, monkeypatch):
    """A second run measures and trains nothing; one with more configurations measures those alone, and trains."""
    from mpq_compiler.allocation.qua2sedimo.predictor import Learner
    from mpq_compiler.allocation.qua2sedimo.random_plans import Fits

    counted = {"measured": 0, "trained": 0}
    noise, fit = Fits.noise, Learner.fit

    def measuring(self, *arguments):
        counted["measured"] += 1
        return noise(self, *arguments)

    def training(self, *arguments):
        counted["trained"] += 1
        return fit(self, *arguments)

    monkeypatch.setattr(Fits, "noise", measuring)
    monkeypatch.setattr(Learner, "fit", training)
    first = scored(tmp_path).facts[SCORES]
    assert counted == {"measured": 30, "trained": 2}
    assert scored(tmp_path).facts[SCORES] == first
    assert counted == {"measured": 30, "trained": 2}
    scored(tmp_path, configurations=34)
    assert counted == {"measured": 34, "trained": 4}
    scored(tmp_path, epochs=1)
    assert counted == {"measured": 34, "trained": 6}


@pytest.mark.parametrize("objective", ["scores", "scores-program"])
def test_budgets_are_met_and_bits_rise_with_them(program, objective):
    """Invariant: bytes of the produced configuration are within the budget, and never fall where it grows."""
    stored = []
    table = describe(program)
    least = table["fixed_bytes"] + sum(
        min(layer["formats"][name]["bytes"] for name in PASS.formats) for layer in table["layers"]
    )
    for extra in (0, 1000, 3000, 10**6):
        planned = BitAllocation(objective=objective, bytes=least + extra).run(program, Session())
        stored.append(costs.stored_bytes(planned))
        assert stored[-1] <= least + extra
        assert {plan.format for plan in planned.weights.values()} <= {*PASS.formats}
        found = planned.facts[ALLOCATION]
        assert {path: plan.format for path, plan in planned.weights.items()} == found["choices"]
    assert stored == sorted(stored) and stored[0] == least < stored[-1]
    with pytest.raises(UserError, match=f"cannot be met: the least that the formats allow is {least} bytes"):
        BitAllocation(objective=objective, bytes=least - 1).run(program, Session())


def test_each_unit_takes_what_it_scores_most_for_where_bytes_are_free(program):
    planned = BitAllocation(objective="scores").run(program, Session())
    for unit in program.facts[SCORES]["units"]:
        chosen = " ".join(planned.weights[path].format for path in unit["layers"])
        assert unit["variants"][chosen] == max(unit["variants"].values())


@pytest.mark.parametrize(("asked", "bits"), [(8, 8), (6, 6), (16, 0), (32, 0)])
def test_activations_have_one_width_or_stay_float(program, asked, bits):
    planned = BitAllocation(objective="scores", activations=asked).run(program, Session())
    assert {plan.bits for plan in planned.activations.values()} == ({bits} if bits else set())
    if not bits:
        assert {n.name for n in planned.quantizable} <= planned.fallbacks.keys()
        assert "16 bits and more are not quantized" in planned.fallbacks[planned.quantizable[0].name]


@pytest.mark.invariant("qua2sedimo-1")
def test_sizes_are_those_of_what_is_stored():
    """Invariant: the summed sizes of a configuration are the bytes of what is packed."""
    steps = programs.steps(MODEL, programs.SCORED)
    planned, packed = (next(s.after for s in steps if s.step.name() == n) for n in ("bit-allocation", "fuse-epilogues"))
    assert costs.stored_bytes(planned) == sum(s.array.nbytes for s in stored_tensors.stored(packed).values())
    table = describe(programs.after(MODEL, "predict-scores"))
    sizes = {layer["name"]: layer["formats"] for layer in table["layers"]}
    chosen = planned.facts[ALLOCATION]["choices"]
    assert planned.facts[ALLOCATION]["costs"]["bytes"] == sum(sizes[p][f]["bytes"] for p, f in chosen.items())


def test_what_cannot_be_is_said():
    with pytest.raises(UserError, match="'configurations' of pass 'predict-scores' must be 20 or more"):
        PredictScores(configurations=5)
    with pytest.raises(UserError, match="two formats or more"):
        PredictScores(formats=("int4",))
    with pytest.raises(UserError, match="budget of bytes alone: leave 'bops' out"):
        BitAllocation(objective="scores", bops=1e9)
    with pytest.raises(UserError, match="needs 'scores': put predict-scores before it"):
        BitAllocation(objective="scores").run(before(), Session())


# --- what is said of it -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def document() -> dict:
    found = json.loads(encode_json(provenance.document(programs.steps(MODEL, programs.SCORED)[-1].after)))
    assert schemas.check(found, "decisions") is None
    return found


def test_scores_are_explained_by_operation_unit_and_block(document, capsys):
    found = score_report.explain(document)
    assert schemas.check(found, "inspect") is None
    planned = programs.after(MODEL, "bit-allocation", programs.SCORED)
    for kind in score_report.KINDS:
        rows = found["scores"][kind]
        assert sum(sum(row["formats"].values()) for row in rows) == len(planned.weights)
        assert all(row["box"] == sorted(row["box"]) for row in rows)
    operations = {row["name"]: row["formats"] for row in found["scores"]["operation"]}
    queries = [plan.format for path, plan in planned.weights.items() if path.endswith("to_q.weight")]
    assert operations["to_q"] == {name: queries.count(name) for name in {*queries}}
    score_report.show(found)
    printed = capsys.readouterr().out
    assert all(f"scores by {title}" in printed for title in score_report.KINDS.values()) and "to_out.0" in printed


def test_box_is_made_of_quartiles():
    assert score_report.box([3.0, 1.0, 2.0, 5.0, 4.0]) == [1, 2, 3, 4, 5]
    assert score_report.box([7.0]) == [7] * 5


def test_nothing_scored_is_said():
    plain = provenance.document(programs.after(MODEL, "bit-allocation"))
    with pytest.raises(UserError, match="nothing was scored here: compile with `mpqc compile --recipe qua2sedimo`"):
        score_report.explain(plain)


def test_layers_and_charts_tell_of_scores(document):
    name = next(path for path in document["layers"] if path.endswith("to_q.weight"))
    told = " ".join(explain.sentences(explain.why(document, name)))
    assert "the predictor scores it as 'to_q' of block" in told and "chosen together with those of its unit" in told
    charts = score_report.charts(score_report.explain(document))
    assert [*charts] == [*score_report.KINDS.values()] and all(chart.startswith("<svg") for chart in charts.values())


def test_the_recipe_is_the_papers_search_space():
    made = {each.name(): each.options() for each in recipes.load("qua2sedimo").passes()}
    names = made["predict-scores"]["formats"]
    assert [formats.get(name).bits for name in names] == [4, 4, 4, 3, 3, 3]
    assert made["bit-allocation"]["objective"] == "scores"
    text = (ROOT / "docs" / "recipes" / "qua2sedimo.md").read_text(encoding="utf-8")
    assert "# `qua2sedimo`" in text and "arXiv 2412.14628" in text
    manager.check(recipes.load("qua2sedimo").passes())
