"""The benchmark of recipes: intervals, the best published recipe, refusals."""

from __future__ import annotations

import json
import pickle
import re
import shlex
from dataclasses import asdict, replace

import numpy as np
import pytest

from benchmarks import documents, quality, quality_cells, quality_tables
from benchmarks.quality_cells import CLAIM, Budget, Cell
from mpq_compiler.driver import options, resolve
from mpq_compiler.support.errors import BudgetError, UserError


def row(scale: float, seed: int, images: int = 200) -> dict[str, object]:
    draw = np.random.default_rng(seed)
    return {"errors": (scale * draw.lognormal(0, 0.1, images)).tolist()}


def test_intervals_are_over_images_and_seeds():
    """Seeds that differ widen an interval, the same ones do not; a difference of nothing is one of zero."""
    alike = [row(1.0, 0)] * 3
    apart = [row(scale, 0) for scale in (0.7, 1.0, 1.4)]
    other = [row(2.0, seed) for seed in (1, 2, 3)]
    (_, *narrow), (_, *wide) = (quality_tables.paired(rows, other) for rows in (alike, apart))
    assert wide[1] - wide[0] > 3 * (narrow[1] - narrow[0])
    assert wide[0] < 10 * np.log10(2 / 1.4) + 0.3 and wide[1] > 10 * np.log10(2 / 0.7) - 0.3
    assert quality_tables.paired(other, other) == quality_tables.paired_psnr(other, other) == (0, 0, 0)
    one = quality_tables.paired(alike[:1], other[:1])
    assert one[1] < one[0] == pytest.approx(10 * np.log10(2), abs=0.2) and one[0] < one[2]


def test_in_the_mean_of_psnr_all_images_count_alike():
    """One image that goes another way changes the sum of errors by far, and the mean of dB by its share."""
    usual = [row(1.0, 0)]
    lost = [{"errors": [1000.0, *usual[0]["errors"][1:]]}]
    ratio = 1000 / usual[0]["errors"][0]
    assert quality_tables.paired(usual, lost)[0] > 6
    found, low, high = quality_tables.paired_psnr(usual, lost)
    assert low <= found < high < 1 and found == pytest.approx(10 * np.log10(ratio) / 200)
    gained = [{"errors": [error / 2 for error in usual[0]["errors"]]}]
    assert quality_tables.paired_psnr(gained, usual) == pytest.approx([10 * np.log10(2)] * 3)


@pytest.fixture
def results(monkeypatch, tmp_path):
    monkeypatch.setattr(quality_cells, "RESULTS", tmp_path)

    def put(cell: Cell, **more: object) -> None:
        quality_cells.write(cell.file, {"cell": asdict(cell), **more})

    return put


def test_the_best_published_recipe_is_that_of_as_many_images_as_a_claim_has(results):
    few = {name: Cell("fashion-unet", "W2A8", name) for name in ("default", "packed", "mpq-dm", "fpq", "gptq")}
    many = {name: Cell("fashion-unet", "W2A8", name, images=CLAIM["images"]) for name in few}
    for name, db in {"default": 30, "packed": 29, "mpq-dm": 20, "fpq": 25, "gptq": 21}.items():
        results(few[name], image_sqnr_db=db, errors=[])
    cells = [*few.values()]
    assert quality_tables.best_other("fashion-unet", "W2A8", cells) == "fpq"
    results(many["fpq"], image_sqnr_db=19, errors=[])
    results(many["mpq-dm"], image_sqnr_db=22, errors=[])
    assert quality_tables.best_other("fashion-unet", "W2A8", cells) == "mpq-dm"


def test_a_result_says_what_computes_it_alone():
    """Of every result that is here, whichever process computed it."""
    rows = [json.loads(path.read_text()) for path in quality_cells.RESULTS.glob("*-W*.json")]
    known = [(row, Cell(**row["cell"])) for row in rows if "errors" in row]
    assert known
    for row, cell in known:
        *program, words = row["command"].split(" ", 3)
        asked = quality.arguments().parse_args(shlex.split(words))
        cells = quality_cells.cells_of(
            asked.model, asked.setting, asked.recipe, asked.minutes, asked.seed, asked.images
        )
        assert program == ["python", "-m", "benchmarks.quality"] and asked.all and cells == [cell]


def test_claims_are_about_judges(results):
    """Of the settings that count there are two rivals and three seeds, all with the minutes of ``--effort best``."""
    cells = quality_cells.cells_of()
    for cell in cells:
        results(cell, image_sqnr_db=30 - quality_cells.COMPARED.index(cell.recipe), errors=[])
    pairs = quality_tables.claims(cells)
    assert {cell.model for sides in pairs for side in sides for cell in side} == {*quality_cells.JUDGED}
    long = [sides for sides in pairs if sides[0][0].minutes == quality_cells.BEST_MINUTES]
    assert len(long) == 2 * 2 * quality_cells.RIVALS
    assert {side[0].setting for sides in long for side in sides} == {*quality_cells.CLAIMED}
    assert {len(side) for sides in long for side in sides} == {CLAIM["seeds"]}
    short = [side for sides in pairs if sides not in long for side in sides]
    assert {(len(side), side[0].minutes) for side in short} == {(1, quality_cells.MINUTES)}
    places = sum(len(settings) for settings in quality_cells.JUDGED.values())
    assert len(short) == 2 * places
    _, usual, best = quality_tables.by_minutes(cells)[0]
    assert best in long[0][0] and usual == replace(best, minutes=quality_cells.MINUTES)


def test_claims_show_the_seeds_that_both_have(results):
    cells = quality_cells.cells_of(["emoji-dit"], ["W4A4"], ["default", "mpq-dm", "nearest"])
    more = {"psnr_db": 1, "frechet_to_float": None, "frechet_resamples": None, "class_accuracy": None}
    for cell, db in zip(cells, (30, 20, 10), strict=True):
        results(cell, **row(1, 0), image_sqnr_db=db, **more)
    assert quality_tables.claimed(cells) == []
    for seed in range(2):
        for recipe, scale in {"default": 1.0, "mpq-dm": 10.0}.items():
            name = Cell("emoji-dit", "W4A4", recipe, quality_cells.BEST_MINUTES, seed, CLAIM["images"])
            last = name, {**row(scale, 0, CLAIM["images"]), "image_sqnr_db": 10 - scale, **more}
            if (recipe, seed) != ("mpq-dm", 1):
                results(last[0], **last[1])
    for each in ("", "+10.00, +10.00"):
        (line,) = quality_tables.claimed(cells)
        shown = dict(zip(quality_tables.CLAIM_HEADERS, line, strict=True))
        assert (shown["minutes"], shown["best published"], shown["of each seed"]) == ("30", "mpq-dm", each)
        assert (shown["default, dB"], shown["other, dB"], shown["image SQNR, dB"][:6]) == ("9.00", "0.00", "+10.00")
        results(last[0], **last[1])


def test_rivals_have_the_minutes_that_are_better_for_them(results):
    """Longer training that makes images worse is not held against a recipe; a third one that is computed is shown."""
    names = ("default", "mpq-dm", "mpq-dmv2", "dilatequant")
    cells = quality_cells.cells_of(["emoji-dit"], ["W4A4"], names)
    more = {"psnr_db": 1, "frechet_to_float": None, "frechet_resamples": None, "class_accuracy": None}
    best = quality_cells.BEST_MINUTES
    usual = {"default": 9.0, "mpq-dm": 5.0, "mpq-dmv2": 4.0, "dilatequant": 3.0}
    for minutes, decibels in ((quality_cells.MINUTES, usual), (best, usual | {"default": 12.0, "mpq-dm": 4.5})):
        for name, db in decibels.items():
            if (name, minutes) != ("mpq-dmv2", best):
                cell = Cell("emoji-dit", "W4A4", name, minutes, 0, CLAIM["images"])
                results(cell, **row(10 ** (-db / 10), 0), image_sqnr_db=db, **more)
    for cell in cells:
        results(cell, image_sqnr_db=usual[cell.recipe], errors=[])
    table = [dict(zip(quality_tables.CLAIM_HEADERS, line, strict=True)) for line in quality_tables.claimed(cells)]
    columns = ("minutes", "best published", "its minutes", "image SQNR, dB")
    assert [tuple(line[name].split(" ")[0] for name in columns) for line in table] == [
        ("4", "mpq-dm", "4", "+4.00"), ("30", "mpq-dm", "4", "+7.00"), ("30", "dilatequant", "30", "+9.00"),
    ]  # fmt: skip


def test_minutes_gain_over_those_before(results):
    cells = quality_cells.cells_of(["emoji-dit"], ["W4A4"])
    ((untrained, usual, best),) = quality_tables.by_minutes(cells)
    assert [cell.minutes for cell in (untrained, usual, best)] == [0, quality_cells.MINUTES, quality_cells.BEST_MINUTES]
    more = {"psnr_db": 1, "frechet_to_float": None, "class_accuracy": None, "true_bits": 4, "sqnr_db": 1}
    for cell, scale in ((untrained, 10.0), (best, 0.1)):
        results(cell, **row(scale, 0), image_sqnr_db=1, **more)
    lines = quality_tables.trained(cells)
    first, second = (dict(zip(quality_tables.MINUTES_HEADERS, line, strict=True)) for line in lines)
    assert first["gained, dB"] == "" and second["gained, dB"][:6] == second["gained, PSNR, dB"][:6] == "+20.00"
    results(usual, **row(1.0, 0), image_sqnr_db=1, **more)
    assert [line[-1][:6] for line in quality_tables.trained(cells)] == ["", "+10.00", "+10.00"]


def test_tables_of_documents_leave_columns_without_a_value_out():
    lines = [["a", "", "1"], ["b", "", ""]]
    assert documents.table(("name", "none", "some"), lines) == "| name | some |\n| --- | --- |\n| a | 1 |\n| b |  |"
    assert documents.table(("name", "none"), []) == "| name | none |\n| --- | --- |"


def test_tables_have_what_a_step_costs_where_artifacts_were_compared(results, monkeypatch, tmp_path):
    cells = quality_cells.cells_of(["emoji-dit"], ["W4A4"], ["default", "nearest"])
    judged = {"true_bits": 4, "sqnr_db": 1, "image_sqnr_db": 2, "psnr_db": 3, "frechet_to_float": None}
    for cell in cells:
        results(cell, **row(1.0, 0), **judged)
    monkeypatch.setattr(quality_tables, "COSTS", tmp_path / "costs.json")
    taken = {"ms": 1.234, "wall_ms": 9.0, "peak_bytes": 4_560_000, "bops": None, "float_bops": None}
    quality_cells.write(quality_tables.COSTS, {"emoji-dit": {"W4A4 default": taken}})
    quality_tables._step_costs.cache_clear()
    headers, _, *lines = quality_tables.markdown(cells).splitlines()
    quality_tables._step_costs.cache_clear()
    assert headers.endswith("| PSNR, dB | ms | memory, MB |")
    assert sorted(line.split("| 3.0 ")[1] for line in lines) == ["|  |  |", "| 1.23 | 4.56 |"]


def test_only_budgets_that_cannot_be_met_are_kept_as_refusals(results, monkeypatch, capsys):
    cell = Cell("fashion-unet", "W2A8", "fpq")

    def fails(error: UserError):
        def compute(*_: object) -> None:
            raise error

        monkeypatch.setattr(quality, "compute", compute)

    fails(UserError("the cache cannot be written: no space left"))
    with pytest.raises(UserError, match="no space"):
        quality.complete("cells", [cell], True, 1)
    assert not cell.is_there
    fails(BudgetError("a budget of 3 bytes cannot be met"))
    quality.complete("cells", [cell], True, 1)
    assert cell.is_there and cell.result() is None and "3 bytes" in capsys.readouterr().out


def test_cells_are_tasks_of_a_cluster_and_are_written_as_they_end(results, monkeypatch, capsys):
    """Each goes with its budget, and comes back as rows, images or a refusal, which are written here."""
    cells = [Cell("emoji-unet", "W2A8", name) for name in ("default", "fpq", "mixdq")]

    def compute(cell: Cell, jobs: int, counts: list[int], budget: Budget) -> quality.Outcome:
        if cell.recipe == "mixdq":
            raise BudgetError(f"a budget of {budget.bytes} bytes cannot be met")
        shared = {"image_sqnr_db": 3, "seconds": jobs}
        rows = [row(1, 0) | shared | {"cell": asdict(replace(cell, images=count))} for count in counts]
        return quality.Outcome(rows, [np.zeros((2, 1, 4, 4), np.float32)] * 2 if cell.strip else [])

    class Backwards:
        """Runs the last task first, on what pickle makes of all of it."""

        def run(self, task, shared, items, ended):
            for item in reversed(list(items)):
                ended(item, pickle.loads(pickle.dumps(task(*pickle.loads(pickle.dumps((shared, item)))))))
                assert item[0].is_there

    monkeypatch.setattr(quality, "compute", compute)
    monkeypatch.setattr(quality, "budget_of", lambda model, setting: Budget(7, 4.25))
    monkeypatch.setattr(quality, "float_strip", lambda model: quality_cells.RESULTS / "float.png")
    quality.complete("cells", cells, True, 8, Backwards())
    assert [cell.result() is None for cell in cells] == [False, False, True]
    assert all(replace(cell, images=CLAIM["images"]).is_there for cell in cells[:2])
    assert "7 bytes" in capsys.readouterr().out and (quality_cells.RESULTS / "float.png").exists()


def test_minutes_change_nothing_else_of_a_published_recipe():
    budget = Budget(500_000, 8.0)
    short, long = (Cell("fashion-unet", "W2A8", "mpq-dm", minutes).options(budget) for minutes in (4.0, 30.0))
    assert short | {"minutes": 30.0} == long
    best = Cell("fashion-unet", "W2A8", "default", 30.0).options(budget)
    assert best["effort"] == "best" and "minutes" not in best
    distill = resolve.resolve(options.Options(recipe="mpq-dm", effort="best"))[-3]
    assert (distill.minutes, distill.latent, distill.window) == (30.0, 1.0, 2)


def test_recipes_that_mix_activations_have_the_average_of_one_width_with_ends():
    """Others have the width itself, and ends of 8 bits over it; at 8 bits both are the same."""
    assert 4 < quality_cells.budget_of("emoji-unet", "W4A4").activations < 4.5
    assert quality_cells.budget_of("emoji-unet", "W2A8").activations == 8
    asked = {
        (recipe, setting): Cell("emoji-unet", setting, recipe).options(Budget(10**6, 4.25)).get("activations")
        for recipe in ("default", "mixdq", "mpq-dm", "qua2sedimo")
        for setting in ("W4A4", "W2A8")
    }
    assert asked == {
        ("default", "W4A4"): 4.25, ("default", "W2A8"): 8, ("mixdq", "W4A4"): 4.25, ("mixdq", "W2A8"): 8,
        ("mpq-dm", "W4A4"): 4, ("mpq-dm", "W2A8"): 8, ("qua2sedimo", "W4A4"): 4, ("qua2sedimo", "W2A8"): 8,
    }  # fmt: skip


def test_the_objective_of_the_paper_is_an_option():
    (plan,) = (p for p in resolve.resolve(options.Options(recipe="mixdq", objective="paper-db", bops="2T"))
               if p.name() == "bit-allocation")  # fmt: skip
    assert plan.objective == "paper-db" and plan.bops == 2e12


def test_an_effort_is_that_of_a_pipeline_by_hand_too():
    text = ",".join(p.text() for p in resolve.resolve(options.Options()))
    for effort in options.EFFORTS:
        named, by_hand = (resolve.resolve(options.Options(effort=effort, **o)) for o in ({}, {"pipeline": text}))
        assert [p.text() for p in named] == [p.text() for p in by_hand]


def test_few_steps_are_those_of_all_that_samples():
    found = {p.name(): p for p in resolve.resolve(options.Options(steps=4))}
    assert [found[n].steps for n in ("calibrate", "equalize", "rotate", "distill")] == [4, 4, 4, 4]
    usual = {p.name(): p for p in resolve.resolve(options.Options())}
    more = {p.name(): p for p in resolve.resolve(options.Options(steps=50))}
    assert [more[n].steps == usual[n].steps for n in ("equalize", "rotate", "distill")] == [True] * 3


def test_every_recipe_has_a_line_of_its_own():
    """No two have one color, nor does a mark depend on how many there are; axes say what they are, with units."""
    points = {name: [(2.2, 10.0 + place), (8.1, 30.0 + place)] for place, name in enumerate(quality_cells.COMPARED)}
    text = quality_tables.chart(points, "all")
    colors = re.findall(r'<polyline [^>]*stroke="(#\w+)"', text)
    assert len(colors) == len({*colors}) == len(points)
    assert "true average bits" in text and "dB</text>" in text
    assert {*re.findall(r">([\w-]+)</text>", text)} >= {*points}
    alone = quality_tables.chart({"packed": points["packed"]}, "one")
    assert re.search(r'<polyline [^>]*stroke="(#\w+)"', alone)[1] == colors[[*points].index("packed")]
    assert all(0 <= float(y) <= 440 for y in re.findall(r"translate\([\d.]+ ([\d.]+)\)", text))
