"""The HTML report of `mpqc inspect --html`: charts, every layer's explanation, and what each pass changed.

The page is one file that loads nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from mpq_compiler.inspection import explain, score_report
from mpq_compiler.support import svg, terminal
from mpq_compiler.support.svg import Point

if TYPE_CHECKING:
    from mpq_compiler.inspection.dumps import Dump
    from mpq_compiler.ir.provenance import Decisions

STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 960px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .15rem .6rem .15rem 0; vertical-align: top; border-bottom: 1px solid #8883; }
td.n, th.n { text-align: right; }
tr.chosen { font-weight: 600; }
summary { cursor: pointer; }
details > div { margin: .4rem 0 1rem 1rem; }
pre { overflow-x: auto; font-size: 12px; line-height: 1.35; }
.gone { color: #b3261e; } .new { color: #1b7f3b; }
.quiet { opacity: .65; }
"""
DIFF_LINES = 400
"""The most lines of a pass's difference; the rest is in the dumps."""


def page(document: Decisions, source: str, dumps: Sequence[Dump] = ()) -> str:
    """Renders the page of the decisions in a dumps folder or an artifact.

    Args:
        document: the decisions.
        source: where they come from, for the title.
        dumps: the dumps, for noise and differences.
    """
    moved = explain.moved_budgets(document)
    layers = [explain.why(document, path, dumps, moved) for path in document["layers"]]
    title = f"{document['model']}: {source}"
    parts = [
        f"<h1>{escape(title)}</h1>",
        _summary(document),
        "<h2>Bits of each layer</h2>",
        _bits(layers),
        *_scores(document),
        *(_of_dumps(layers, dumps) if dumps else ()),
        "<h2>Layers</h2>",
        _table(layers),
        *(_differences(dumps) if dumps else ()),
    ]
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n' + "\n".join(parts) + "\n</body></html>\n"


def _summary(document: Mapping[str, Any]) -> str:
    whole = document["program"]
    plan: Mapping[str, Any] = next((said for said in whole.values() if "average_bits" in said), {})
    told = []
    if plan:
        told.append(f"{plan['average_bits']:.3f} true average bits, {plan['bytes']} bytes")
    if "objective" in plan:
        told.append(f"predicted loss {plan['objective']:.2e}")
    if together := plan.get("additivity"):
        told.append(terminal.additivity(together))
    groups: Sequence[float] = next((said["boundaries"] for said in whole.values() if "boundaries" in said), [])
    cut = f", cut at {', '.join(f'{b:g}' for b in groups)}" if groups else ""
    told.append(f"{len(groups) + 1} time groups{cut}")
    told.append(f"{len(document['layers'])} layers, {len(document['fallbacks'])} fallbacks")
    fallbacks = "".join(f"<li>{escape(n)}: {escape(r)}</li>" for n, r in document["fallbacks"].items())
    return f"<p>{escape('; '.join(told))}.</p>" + (f"<ul>{fallbacks}</ul>" if fallbacks else "")


def _bits(layers: Sequence[Mapping[str, Any]]) -> str:
    """A bar chart of the stored bits per weight of each layer, overheads included, colored by format."""
    names = sorted({explain.plan(layer).get("format", "float") for layer in layers})
    points = []
    for layer in layers:
        plan = explain.plan(layer)
        count = math.prod(next((said["shape"] for said in layer["passes"].values() if "shape" in said), [0]))
        bits = 8 * plan["bytes"] / count if plan and count else 16.0
        name = plan.get("format", "float")
        points.append(Point(0, bits, f"{layer['layer']}: {name}, {bits:.2f} bits a weight", names.index(name)))
    return svg.bars(points, "stored bits of each weight, layer by layer", "bits", names)


def _scores(document: Mapping[str, Any]) -> list[str]:
    if not score_report.known(document):
        return []
    charts = score_report.charts(score_report.explain(document))
    return [part for title, chart in charts.items() for part in (f"<h2>Scores and formats by {title}</h2>", chart)]


def _of_dumps(layers: Sequence[Mapping[str, Any]], dumps: Sequence[Dump]) -> list[str]:
    quantized = [d for d in dumps if d.about["stage"] in ("fake-quantized", "packed")]
    measured = [(i, d.name, d.sqnr_db) for i, d in enumerate(quantized) if d.sqnr_db is not None]
    gathered = [Point(i, value, f"{name}: {value:.1f} dB") for i, name, value in measured]
    noisy = [name for name in (d.name for d in dumps) if any(_own(layer, name) is not None for layer in layers)]
    series = [
        [
            Point(i, value, f"{layer['layer']} after {name}: {value:.1f} dB")
            for i, layer in enumerate(layers)
            if (value := _own(layer, name)) is not None
        ]
        for name in noisy
    ]
    parts = ["<h2>SQNR of the output after each pass</h2>"]
    parts.append(svg.lines([gathered], "SQNR of the output", "dB", (), [d.name for d in quantized]) if gathered else "")
    if series:
        parts.append("<h2>Noise of each layer by itself, after each pass that simulates</h2>")
        parts.append('<p class="quiet">On the float program\'s inputs: what a layer adds, not what it inherits.</p>')
        parts.append(svg.lines(series, "noise of each layer", "dB", noisy))
    return parts


def _own(layer: Mapping[str, Any], name: str) -> float | None:
    rows = (row for row in layer["noise"] if row["pass"] == name and row["planned_db"] is not None)
    return next((row["own_db"] for row in rows), None)


def _table(layers: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for layer in layers:
        plan = explain.plan(layer)
        own = next((row["own_db"] for row in reversed(layer["noise"]) if row["planned_db"] is not None), None)
        loss = plan.get("loss")
        cells = (
            plan.get("format", "float"),
            f"u{plan['activation_bits']}" if "activation_bits" in plan else "float",
            plan.get("bytes", ""),
            f"{100 * plan['share']:.2f} %" if plan else "",
            "" if loss is None else f"{loss:.1e}",
            "" if own is None else f"{own:.1f} dB",
        )
        told = "".join(f"<li>{escape(sentence)}</li>" for sentence in explain.sentences(layer))
        detail = f"<div><ul>{told}</ul>{_choices(layer)}{_budgets(layer)}</div>"
        name = f"<details><summary>{escape(layer['layer'])}</summary>{detail}</details>"
        rest = "".join(f'<td class="{"n" if i > 1 else ""}">{escape(str(c))}</td>' for i, c in enumerate(cells))
        rows.append(f"<tr><td>{name}</td>{rest}</tr>")
    head = ("layer", "weight", "activation", "bytes", "share", "loss", "noise")
    titles = "".join(f'<th class="{"n" if i > 2 else ""}">{h}</th>' for i, h in enumerate(head))
    return f"<table><thead><tr>{titles}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _choices(layer: Mapping[str, Any]) -> str:
    if not layer["choices"]:
        return ""
    rows = []
    for row in layer["choices"]:
        saves = "" if row["saves"] is None else f"{1e3 * row['saves']:.1e}"
        cells = (row["format"], row["bytes"], f"{row['loss']:.2e}", saves)
        inner = "".join(f'<td class="{"n" if i else ""}">{c}</td>' for i, c in enumerate(cells))
        rows.append(f'<tr class="{"chosen" if row["chosen"] else ""}">{inner}</tr>')
    head = "".join(
        f'<th class="{"n" if i else ""}">{h}</th>' for i, h in enumerate(("format", "bytes", "loss", "saves per kB"))
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _budgets(layer: Mapping[str, Any]) -> str:
    told = []
    for budget in layer["budgets"]:
        less, more = ((budget[key] or {}).get("choice") or "float" for key in ("less", "more"))
        fewer = less if budget["less"] else "nothing, for it cannot be met"
        binds = "binds" if budget["binding"] else "does not bind"
        told.append(f"<li>{escape(budget['cost'])} {binds}; with 5 % less: {fewer}, with 5 % more: {more}</li>")
    return f"<ul>{''.join(told)}</ul>" if told else ""


def _differences(dumps: Sequence[Dump]) -> list[str]:
    from mpq_compiler.ir import diff

    parts = ["<h2>What each pass changed</h2>"]
    before = ""
    for dump in dumps:
        text = diff.diff(before, dump.text) if before else ""
        before = dump.text
        lines = text.splitlines()
        body = "\n".join(_colored(line) for line in lines[:DIFF_LINES])
        if len(lines) > DIFF_LINES:
            body += f"\n... {len(lines) - DIFF_LINES} more lines: mpqc inspect DUMPS --diff {dump.name}"
        first = escape(dump.text.splitlines()[0].removeprefix("// "))
        parts.append(f"<details><summary>{first}</summary><pre>{body or 'no difference'}</pre></details>")
    return parts


def _colored(line: str) -> str:
    kind = {"-": "gone", "+": "new"}.get(line[:1])
    return f'<span class="{kind}">{escape(line)}</span>' if kind else escape(line)
