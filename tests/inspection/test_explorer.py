"""The explorer of `inspect --html` in a real browser: what it shows is what the compilation decided."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from mpq_compiler.cli import mpqc
from mpq_compiler.inspection import explain, explorer
from mpq_compiler.inspection.dumps import read_dumps
from tests.harness import programs
from tests.harness.browser import opened
from tests.inspection.test_bisect import INT4, clean

LAYER = "transformer_blocks.1.attn1.to_v"
COLOURS = "cy.nodes('[fill]').map(n => n.data('fill'))"
NAMES = "cy.nodes().map(n => n.id())"
BENCH = {
    "rows": [],
    "peak": {"gmacs": 500.0, "float_gmacs": 120.0, "gbytes": 70.0, "model_gmacs": 9.0, "reached": 0.1, "reason": None},
    "cpu": "a CPU",
}


def kernel(layer: str | None, node: str, ms: float, macs: int) -> dict:
    own = {"layer": layer, "node": node, "ms": ms, "macs": macs, "bytes": 4096, "template": "gemm", "share": 0.5}
    return {**own, "gmacs": macs / ms / 1e6}


@pytest.fixture(scope="module")
def gathered() -> dict:
    folder = clean("pixart", programs.MIXED)[0]
    bench = {**BENCH, "kernels": [kernel(LAYER, "x", 0.25, 10_000), kernel(None, "pos_embed", 0.5, 10**6)]}
    return explorer.gather(folder, read_dumps(folder), bench)


@pytest.fixture(scope="module")
def file(gathered, tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("page") / "page.html"
    made.write_text(explorer.page([gathered]), encoding="utf-8")
    return made


def ready(page):
    page.wait_for_selector("html[data-opened]", state="attached", timeout=60_000)
    return page


def rows(page, table: str) -> list[list[str]]:
    read = "rows => rows.map(r => [...r.cells].map(c => c.textContent))"
    return page.eval_on_selector_all(f"{table} tbody tr", read)


def test_what_is_gathered_is_what_was_decided(gathered):
    document = json.loads((clean("pixart", programs.MIXED)[0] / "decisions.json").read_text())
    assert [f"{layer['name']}.weight" for layer in gathered["layers"]] == list(document["layers"])
    for layer in gathered["layers"]:
        said = document["layers"][f"{layer['name']}.weight"]
        assert (layer["format"], layer["bytes"]) == tuple(said["bit-allocation"][k] for k in ("format", "bytes"))
        assert layer["bits"] == 8 * layer["bytes"] / layer["weights"]
        assert layer["ms"] == (0.25 if layer["name"] == LAYER else None)
        places = [n for stage in gathered["stages"] for n in stage["nodes"] if n["layer"] == layer["name"]]
        assert len(places) >= len(gathered["stages"])  # every stage has a call of it
    moved, _ = explain.moved_budgets(document)
    for budget, price in zip(moved, gathered["prices"], strict=True):
        assert price["price"] == budget.price and price["more"]["loss"] == budget.more.objective
        before = document["program"]["bit-allocation"]["choices"]
        for layer, was, now in price["more"]["changed"]:
            assert was == before[layer] != now == budget.more.choices[layer]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_loads_nothing_and_shows_every_view(file, scheme):
    with opened(file, scheme) as page:
        ready(page)
        for tab in page.query_selector_all("nav button"):
            tab.click()
            shown = page.query_selector(f"#view-{tab.get_attribute('id').removeprefix('tab-')}")
            assert shown.is_visible() and len(page.query_selector_all("section:visible")) == 1
            empty = ("tab-graph", "tab-samples", "tab-scores")  # of what nothing is known here, or drawn on a canvas
            assert tab.get_attribute("id") in empty or shown.query_selector("td, svg")
        body = "getComputedStyle(document.body).backgroundColor"
        assert (sum(map(int, re.findall(r"\d+", page.evaluate(body)))) < 200) == (scheme == "dark")


def test_blocks_unfold_and_fold(file):
    with opened(file) as page:
        ready(page)
        folded = page.evaluate(NAMES)
        assert "b:transformer_blocks.1" in folded and len(folded) < 30
        x, y = page.evaluate(
            "(() => { const at = cy.getElementById('b:transformer_blocks.1'); cy.center(at); const p = "
            "at.renderedPosition(), b = $('graph').getBoundingClientRect(); return [b.x + p.x, b.y + p.y]; })()"
        )
        page.mouse.dblclick(x, y)
        unfolded = page.evaluate(NAMES)
        assert "b:transformer_blocks.1/attn1" in unfolded
        parent = "cy.getElementById('b:transformer_blocks.1/attn1').parent().id()"
        assert page.evaluate(parent) == "b:transformer_blocks.1"
        page.click("#unfold")
        assert len(page.evaluate(NAMES)) > len(unfolded)
        page.click("#fold")
        assert page.evaluate(NAMES) == folded
        before = page.evaluate("cy.zoom()")
        page.click("#in")
        assert page.evaluate("cy.zoom()") > before
        page.click("#out")
        page.click("#fit")
        box = page.evaluate("cy.elements().renderedBoundingBox()")
        assert box["x1"] >= -1 and box["y1"] >= -1 and box["x2"] <= page.evaluate("cy.width()") + 1


def test_a_layer_is_found_by_the_keyboard(file, gathered):
    with opened(file) as page:
        ready(page)
        page.click("#tab-layers")
        page.keyboard.press("/")
        page.keyboard.type(LAYER)
        page.keyboard.press("Enter")
        index = int(page.evaluate("cy.nodes(':selected').id()").removeprefix("n:"))
        shown = gathered["stages"][page.evaluate("state.stage")]
        assert shown["nodes"][index]["layer"] == LAYER
        said = page.inner_text("#detail")
        layer = next(one for one in gathered["layers"] if one["name"] == LAYER)
        assert all(sentence in said for sentence in layer["told"]) and f"{LAYER}: {layer['format']}" in said
        assert page.query_selector("#detail svg")  # the ranges of its input over time
        middle = page.evaluate("cy.nodes(':selected').renderedPosition()")
        assert abs(middle["x"] - page.evaluate("cy.width() / 2")) < 2  # and it is where one looks


def lightness(fill: str) -> float:
    return sum(part * int(c) for part, c in zip((0.21, 0.72, 0.07), re.findall(r"\d+", fill), strict=True))


@pytest.mark.parametrize("colour", ["bits", "loss", "bytes", "ms"])
def test_colours_follow_the_values(file, gathered, colour):
    with opened(file) as page:
        ready(page)
        page.select_option("#colour", colour)
        page.evaluate("nodes.forEach(n => n.block.forEach((_, i) => state.open.add(key(n.block, i + 1)))), draw()")
        calls = "cy.nodes('.call').map(n => [nodes[n.id().slice(2)].layer, n.data('fill')])"
        seen = [(name, fill) for name, fill in page.evaluate(calls) if name]
        values = {layer["name"]: layer[colour] for layer in gathered["layers"]}
        assert {name for name, _ in seen} == {*values}
        known = [(values[name], lightness(fill)) for name, fill in seen if values[name] is not None]
        assert [light for _, light in sorted(known)] == sorted(light for _, light in known) != []
        assert {fill for name, fill in seen if values[name] is None} <= {page.evaluate("style('--none')")}
        assert page.inner_text("#scale").startswith(page.inner_text("#colour option:checked"))


def test_the_table_sorts_and_filters(file, gathered):
    with opened(file) as page:
        ready(page)
        page.click("#tab-layers")
        for column in ("bytes", "loss", "name"):
            page.click(f"[data-sort={column}]")
            first = [row[0] for row in rows(page, "#layers")]
            value = {layer["name"]: layer[column] for layer in gathered["layers"]}
            assert [value[n] for n in first] == sorted(value.values(), reverse=column != "name")
            page.click(f"[data-sort={column}]")
            assert [value[row[0]] for row in rows(page, "#layers")] == sorted(value.values(), reverse=column == "name")
        page.fill("#filter", "attn1.to_q")
        assert {row[0] for row in rows(page, "#layers")} == {n for n in value if "attn1.to_q" in n} != set()
        page.focus("#layers tbody tr")
        page.keyboard.press("Enter")
        assert "attn1.to_q" in page.inner_text("#why")
        page.click("#why button")
        assert page.is_visible("#graph") and "attn1.to_q" in page.inner_text("#detail")


def test_heat_maps_have_every_format_and_time_group(file, gathered):
    with opened(file) as page:
        ready(page)
        page.click("#tab-formats")
        formats = page.eval_on_selector_all("#view-formats thead th", "all => all.map(h => h.textContent)")[1:]
        chosen = page.eval_on_selector_all("#view-formats td.chosen", "all => all.map(c => c.cellIndex)")
        assert [formats[i - 1] for i in chosen] == [layer["format"] for layer in gathered["layers"]]
        assert {*formats} == {choice["format"] for layer in gathered["layers"] for choice in layer["choices"]}
        page.click("#tab-ranges")
        groups = len(gathered["boundaries"]) + 1
        assert all(len(row) == 1 + groups for row in rows(page, "#view-ranges"))


def test_prices_and_kernels(file, gathered):
    with opened(file) as page:
        ready(page)
        page.click("#tab-prices")
        budget = next(price for price in gathered["prices"] if price["binding"])
        said = page.inner_text("#view-prices")
        assert "a kilobyte is worth a loss of" in said and f"{len(budget['more']['changed'])} layers change" in said
        page.click("#tab-kernels")
        assert page.eval_on_selector_all("#view-kernels circle title", "all => all.map(t => t.textContent)") == [
            f"{LAYER}: 0.25 ms, 0.04 GMAC/s", "pos_embed: 0.5 ms, 2 GMAC/s",
        ]  # fmt: skip
        assert page.inner_text("#view-kernels h2").endswith("a CPU")


def test_two_stages_side_by_side(file, gathered):
    first, last = (next(s for s in gathered["stages"] if s["name"] == name) for name in ("trace", "layout"))
    with opened(file) as page:
        ready(page)
        page.click("#tab-diff")
        for select, stage in (("#before", first), ("#after", last)):
            page.select_option(select, f"0 {gathered['stages'].index(stage)}")
        before, after = ({n["name"]: n["text"] for n in stage["nodes"]} for stage in (first, last))
        page.wait_for_function(f"$('changes').textContent.includes('{len(after.keys() - before.keys())} new')")
        found = rows(page, "#diff")
        assert {b for a, b in found if not a} == {after[n] for n in after.keys() - before.keys()}
        assert {a for a, b in found if not b} == {before[n] for n in before.keys() - after.keys()}
        assert all(a != b for a, b in found)
        page.check("#all-lines")
        page.wait_for_function(f"document.querySelectorAll('#diff tbody tr').length > {len(found)}")


def test_two_compilations_side_by_side(gathered, tmp_path):
    other = clean("pixart", INT4)[0]
    both = tmp_path / "both.html"
    assert mpqc.main(["inspect", str(clean("pixart", programs.MIXED)[0]), str(other), "--html", str(both)]) == 0
    second = {layer["name"]: layer for layer in explorer.gather(other, read_dumps(other))["layers"]}
    with opened(both) as page:
        ready(page)
        page.click("#tab-layers")
        for name, *_, format_, size, _ in rows(page, "#layers"):
            assert (format_, size) == (second[name]["format"], f"{second[name]['bytes']:,}")
        page.click("#tab-diff")
        page.wait_for_selector("#diff td")
        assert "changed" in page.inner_text("#changes")
        page.click("#tab-graph")
        page.select_option("#stage", "1 0")
        page.wait_for_function("state.version === 1")
        assert page.evaluate(COLOURS)


def test_every_view_shows_both_compilations(gathered, tmp_path):
    folder = clean("pixart", INT4)[0]
    slow = {**BENCH, "cpu": "another CPU", "kernels": [kernel(LAYER, "x", 2.0, 10_000)]}
    second = {**explorer.gather(folder, read_dumps(folder), slow), "scores": {"unit": "<svg><text>scored</text></svg>"}}
    both = tmp_path / "both.html"
    both.write_text(explorer.page([gathered, second]), encoding="utf-8")
    assert second["layers"][0]["choices"] == [] != gathered["layers"][0]["choices"]  # one format for all: no losses
    with opened(both) as page:
        ready(page)
        headings = {}
        for tab in ("formats", "ranges", "kernels", "scores"):
            page.click(f"#tab-{tab}")
            headings[tab] = page.eval_on_selector_all(f"#view-{tab} h2", "all => all.map(h => h.textContent)")
            sources = page.eval_on_selector_all(f"#view-{tab} h2.source", "all => all.map(h => h.textContent)")
            assert sources == [gathered["source"], second["source"]]
        assert len(rows(page, "#view-formats .heat")) == len(gathered["layers"])
        assert second["missing"]["formats"] in page.text_content("#view-formats")
        assert len(rows(page, "#view-ranges .heat")) == len(gathered["layers"]) + len(second["layers"])
        assert [h for h in headings["kernels"] if "roofs" in h] == [
            f"kernels under the roofs of {cpu}" for cpu in ("a CPU", "another CPU")
        ]
        read = "all => all.map(c => [c.textContent, c.getAttribute('cy')])"
        dots = page.eval_on_selector_all("#view-kernels circle", read)
        assert [said.partition(":")[0] for said, _ in dots] == [LAYER, "pos_embed", LAYER]
        assert float(dots[0][1]) < float(dots[2][1])  # the slower one is lower: both have the same axes
        assert "nothing was scored" in page.text_content("#view-scores")
        assert page.text_content("#view-scores svg") == "scored"


def test_losses_of_two_compilations_have_one_scale(gathered, tmp_path):
    """Equal losses have equal colours, though each compilation has losses of its own range."""
    first = gathered["layers"][0]
    more = [{**choice, "loss": 100 * choice["loss"]} for choice in first["choices"]]
    second = {**gathered, "source": "other", "layers": [first, {**first, "name": "worse", "choices": more}]}
    both = tmp_path / "both.html"
    both.write_text(explorer.page([gathered, second]), encoding="utf-8")
    with opened(both) as page:
        ready(page)
        page.click("#tab-formats")
        seen = page.eval_on_selector_all(
            "#view-formats tbody tr", "all => all.map(r => [r.cells[0].textContent, r.cells[1].style.backgroundColor])"
        )
        mine = [colour for name, colour in seen if name == first["name"]]
        assert len(mine) == 2 and mine[0] == mine[1]
        assert lightness(dict(seen)["worse"]) > lightness(mine[0])


def test_thousands_of_calls_open_in_two_seconds(gathered, tmp_path):
    """As many layers and calls as Stable Diffusion XL has, a dozen stages of them."""
    stage = gathered["stages"][-1]
    size = len(stage["nodes"])
    copies = range(6000 // size)
    nodes = [
        {
            **node,
            "name": f"{node['name']}_{copy}",
            "block": [f"part.{copy}", *node["block"]],
            "layer": node["layer"] and f"{copy}.{node['layer']}",
            "reads": [read + copy * size for read in node["reads"]],
        }
        for copy in copies
        for node in stage["nodes"]
    ]
    layers = [{**layer, "name": f"{copy}.{layer['name']}"} for copy in copies for layer in gathered["layers"]]
    large = {**gathered, "layers": layers, "stages": [{**stage, "nodes": nodes}] * 12}
    file = tmp_path / "large.html"
    file.write_text(explorer.page([large]), encoding="utf-8")
    times = []
    for _ in range(3):  # the least: other work of the machine is none of the page's
        with opened(file) as page:
            times.append(int(ready(page).get_attribute("html", "data-opened")))
            page.fill("#search", f"{copies[-1]}.{LAYER}")
            page.keyboard.press("Enter")
            assert LAYER in page.inner_text("#detail")
    print("opened in", times, "ms")
    assert min(times) < 2000


def test_damage_is_one_sentence(tmp_path, capsys):
    folder, page = tmp_path / "dumps", tmp_path / "page.html"
    text, decisions = folder / "001-layout.txt", folder / "decisions.json"

    def altered(what: str, by: str) -> None:
        changed, count = re.subn(what, by, decisions.read_text())
        assert decisions.write_text(changed) and count

    for damage, sentence in (
        (lambda: text.write_text("// layout: rewritten stage"), "the dump of 'layout' in"),
        (lambda: text.write_bytes(b"\xff\xfe"), "cannot be read; write the dumps again"),
        (lambda: decisions.write_text("{"), "holds no readable decisions.json"),
        (lambda: altered(r'"low":[^,]+', '"low":"x"'), "was altered since it was written"),
        (lambda: altered(r'"ranges":\[\[[^,]+', '"ranges":[[NaN'), "was altered since it was written"),
        (lambda: shutil.rmtree(folder), "name an artifact, or a folder that"),
    ):
        shutil.copytree(clean("pixart", programs.MIXED)[0], folder, dirs_exist_ok=True)
        damage()
        assert mpqc.main(["inspect", str(folder), "--html", str(page)]) == 1
        said = capsys.readouterr().err
        assert sentence in " ".join(said.split()) and "Traceback" not in said and not page.exists()


def test_what_goes_with_the_page_only_is_refused(tmp_path, capsys):
    folder = str(clean("pixart", programs.MIXED)[0])
    assert mpqc.main(["inspect", folder, folder]) == 1
    assert "add --html FILE" in " ".join(capsys.readouterr().err.split())
    file = tmp_path / "bench.json"
    asked = ["inspect", folder, "--html", str(tmp_path / "a.html"), "--bench", str(file)]
    assert mpqc.main(asked) == 1 and "cannot be read" in " ".join(capsys.readouterr().err.split())
    file.write_text("{}")
    assert mpqc.main(asked) == 1 and "is no result of mpqc bench" in " ".join(capsys.readouterr().err.split())
    assert mpqc.main([*asked, "--bench", str(file)]) == 1
    assert "given 2 times for 1 DUMPS|ARTIFACT; give one for each" in " ".join(capsys.readouterr().err.split())
