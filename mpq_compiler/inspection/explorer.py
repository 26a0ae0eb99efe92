"""The explorer of `mpqc inspect --html`: everything that is known of a compilation, as one page that loads nothing.

`gather` makes a JSON document of dumps or an artifact, `page` a file of one or two of them. Graphs are compressed one
by one and opened as they are looked at, so that a page of thousands of calls opens at once.
"""

from __future__ import annotations

import base64
import gzip
import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpq_compiler.artifact import bundle
from mpq_compiler.frontend import checkpoint
from mpq_compiler.inspection import explain, score_report, stage_graph
from mpq_compiler.inspection.weight_histograms import histograms
from mpq_compiler.support import terminal
from mpq_compiler.support.errors import UserError

if TYPE_CHECKING:
    from mpq_compiler.allocation.problem import Solution
    from mpq_compiler.inspection.dumps import Dump
    from mpq_compiler.ir.provenance import Decisions

SUFFIX = ".weight"
Json = dict[str, Any]
"""A JSON object."""


def gather(path: Path, dumps: Sequence[Dump] = (), bench: Json | None = None, model: str | None = None) -> Json:
    """Gathers what a page or another explorer shows of dumps or an artifact.

    Args:
        path: the folder of the dumps, or the artifact.
        dumps: the dumps, in the order of the passes; none of an artifact.
        bench: the result of ``mpqc bench ARTIFACT --kernels --json``, for milliseconds and the roofline.
        model: the model that was compiled, for histograms of its weights beside an artifact's.

    Returns:
        ``source``, ``model`` and ``told`` of the whole; ``stages`` with their calls; ``layers``; ``prices`` of the
        budgets; ``boundaries`` of the time groups; ``kernels`` and ``peak``; charts of ``scores``; ``missing``, the
        sentences that stand where a part is not there.

    Raises:
        UserError: the decisions or a stage cannot be read; the artifact was made of another model.
    """
    document = explain.load(path)
    moved, reason = explain.moved_budgets(document)
    explained = [explain.why(document, name, dumps, (moved, reason)) for name in document["layers"]]
    kernels = [] if bench is None else bench["kernels"] or []
    drawn = {} if dumps else _histograms(path, document, model)
    whole = document["program"].values()
    boundaries: Sequence[float] = next((said["boundaries"] for said in whole if "boundaries" in said), [])
    return {
        "source": str(path),
        "model": document["model"],
        "told": _told(document, boundaries),
        "fallbacks": document["fallbacks"],
        "layers": [{**_layer(layer, kernels), "histogram": drawn.get(layer["parameter"])} for layer in explained],
        "time": "measured: mpqc bench" if kernels else "predicted by the latency table",
        "prices": [_price(budget, document) for budget in moved],
        "boundaries": boundaries,
        "kernels": kernels,
        "peak": None if bench is None else {**bench["peak"], "cpu": bench["cpu"]},
        "scores": score_report.charts(score_report.explain(document)) if score_report.known(document) else {},
        "stages": _stages(path, document, dumps),
        "missing": {
            "kernels": "no kernel was timed: mpqc bench ARTIFACT --kernels --json FILE, then inspect with --bench FILE",
            "passes": "an artifact has no noise of passes: mpqc compile --dumps DIR, then inspect DIR",
            "prices": reason or "the allocation had no budget",
            "histogram": "dumps hold no weights: mpqc inspect ARTIFACT --html draws the histogram of each",
            "float": "mpqc inspect ARTIFACT --html FILE --compare MODEL draws the float weight beside it",
            "samples": "nothing was drawn: mpqc inspect ARTIFACT --html FILE --compare MODEL draws with both",
            "formats": "no losses were measured: mpqc compile --weights BITS measures and allocates",
        },
    }


def _told(document: Decisions, boundaries: Sequence[float]) -> list[str]:
    plan = next((said for said in document["program"].values() if "average_bits" in said), {})
    told = [f"{plan['average_bits']:.3f} true average bits, {plan['bytes']:,} bytes"] if plan else []
    if "objective" in plan:
        told.append(f"predicted loss {plan['objective']:.2e}")
    if together := plan.get("additivity"):
        told.append(terminal.additivity(together))
    told.append(f"{len(boundaries) + 1} time groups")
    told.append(f"{len(document['layers'])} layers, {len(document['fallbacks'])} fallbacks")
    return told


def _layer(layer: Json, kernels: Sequence[Json]) -> Json:
    """A layer's row of the table and what its explanation shows."""
    plan = explain.plan(layer)
    said = {key: value for one in layer["passes"].values() for key, value in one.items()}
    count = math.prod(said.get("shape", [0]))
    own = [row["own_db"] for row in layer["noise"] if row["planned_db"] is not None and row["own_db"] is not None]
    chosen: Json = next((row for row in layer["choices"] if row["chosen"]), {})
    timed = [row["ms"] for row in kernels if row["layer"] in (layer["layer"], layer["parameter"])]
    return {
        "name": layer["layer"],
        "call": said.get("call"),
        "format": plan.get("format", "float"),
        "activation": explain.activation(plan),
        "weights": count,
        "macs": said.get("macs"),
        "bits": 8 * plan["bytes"] / count if plan and count else None,
        "bytes": plan.get("bytes"),
        "loss": plan.get("loss"),
        "ms": sum(timed) if timed else chosen.get("ms"),
        "noise": own[-1] if own else None,
        "told": explain.sentences(layer),
        "choices": layer["choices"],
        "price": layer["price"],
        "ranges": said.get("ranges"),
        "noises": layer["noise"],
    }


def _histograms(path: Path, document: Decisions, model: str | None) -> Json:
    """The histograms of an artifact's weights on integer codes; those of FP8 have no table of levels."""
    weights = None if model is None else checkpoint.read_weights(checkpoint.locate(model).denoiser)
    segments = {
        layer: said["segments"]
        for layer, passes in document["layers"].items()
        for said in passes.values()
        if "segments" in said and "float8" not in said["operator"]
    }
    return histograms(bundle.read(path), segments, weights)


def _price(budget: explain.Moved, document: Decisions) -> Json:
    """A budget with what 5 % less or more of it would change."""
    chosen: Json = next((said["choices"] for said in document["program"].values() if "problem" in said), {})

    def otherwise(solution: Solution | None) -> Json | None:
        if solution is None:
            return None
        changed = [[layer, chosen[layer], now] for layer, now in solution.choices.items() if now != chosen.get(layer)]
        return {"loss": solution.objective, "changed": sorted(changed)}

    return {
        **{key: value for key, value in budget.of("").items() if key not in ("less", "more")},
        "loss": budget.objective,
        "less": otherwise(budget.less),
        "more": otherwise(budget.more),
    }


def _stages(path: Path, document: Decisions, dumps: Sequence[Dump]) -> list[Json]:
    """Every stage with its calls; of an artifact the packed program."""
    names = {name: path for path in document["layers"] for name in (path, path.removesuffix(SUFFIX))}
    for parameter, passes in document["layers"].items():
        names |= {said["call"]: parameter for said in passes.values() if "call" in said}
    blocks = stage_graph.blocks_of(document["layers"])
    if not dumps:
        text = bundle.read(path).file(bundle.IR).read_text(encoding="utf-8")
        return [_stage("packed", "packed", text, stage_graph.read(text, names, blocks), None, {})]
    stages = []
    for dump in dumps:
        try:
            nodes = stage_graph.read(dump.text, names, blocks)
        except UserError as error:
            raise UserError(f"the dump of '{dump.name}' in '{path}' has no graph: {error}") from error
        stages.append(_stage(dump.name, dump.about["stage"], dump.text, nodes, dump.sqnr_db, dump.sqnr))
    return stages


def _stage(
    name: str,
    kind: str,
    text: str,
    nodes: Sequence[stage_graph.Node],
    sqnr_db: float | None,
    sqnr: Mapping[str, float],
) -> Json:
    return {
        "name": name,
        "stage": kind,
        "told": text.partition("\n")[0].removeprefix("// "),
        "sqnr_db": sqnr_db,
        "nodes": [
            {
                "name": node.name,
                "operator": node.operator,
                "reads": node.reads,
                "block": list(node.block),
                "layer": None if node.layer is None else node.layer.removesuffix(SUFFIX),
                "type": node.type,
                "text": node.text,
                "sqnr": round(sqnr[node.name], 1) if math.isfinite(sqnr.get(node.name, math.inf)) else None,
            }
            for node in nodes
        ],
    }


# --- the page -----------------------------------------------------------------------------------------------


def page(versions: Sequence[Json]) -> str:
    """Writes the page of one compilation, or of two side by side (`gather`)."""
    title = " and ".join(f"{version['model']}: {version['source']}" for version in versions)
    scripts = []
    for index, version in enumerate(versions):
        for place, stage in enumerate(version["stages"]):
            scripts.append(_packed(f"stage-{index}-{place}", stage["nodes"]))
    bare = [{**v, "stages": [{k: s[k] for k in s if k != "nodes"} for s in v["stages"]]} for v in versions]
    scripts.append(_packed("document", bare))
    texts = {"title": escape(title), "data": "\n".join(scripts)}
    folder = resources.files(__package__) / "page"
    files = {"css": "explorer.css", "js": "explorer.js", "cytoscape": "cytoscape.min.js", "dagre": "dagre.min.js"}
    texts |= {key: (folder / file).read_text(encoding="utf-8") for key, file in files.items()}
    parts = (folder / "explorer.html").read_text(encoding="utf-8").split("{{")
    return parts[0] + "".join(texts[key] + rest for key, _, rest in (part.partition("}}") for part in parts[1:]))


def _packed(name: str, value: object) -> str:
    """A script tag with JSON that the page unpacks: compressed, in base64."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False).encode()
    data = base64.b64encode(gzip.compress(text, mtime=0)).decode()
    return f'<script type="application/gzip" id="{name}">{data}</script>'
