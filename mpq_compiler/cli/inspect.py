"""`mpqc inspect`: the dumps of a compilation, pass by pass, or the plan in an artifact."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mpq_compiler.cli import options, output, shares
from mpq_compiler.support import terminal
from mpq_compiler.support.errors import UserError, nearest
from mpq_compiler.support.execution import require_counts
from mpq_compiler.support.files import check_place
from mpq_compiler.support.legend import legend

if TYPE_CHECKING:
    from mpq_compiler.artifact.pipeline import Pipeline
    from mpq_compiler.inspection.explorer import Json

COLUMNS = {"layer": "name", **{name: name for name in ("weight", "activation", "bytes", "loss")}}
"""The columns of layers that sort them, with their keys in JSON."""
SQNR = "SQNR of the output: of 2 of the calls held out that mpqc compile judges by"
"""The sentence below SQNRs of stages."""


def add(commands: options.Commands) -> None:
    """Add the command and its options to the command line."""
    parser = commands.add("inspect", run, "look at the dumps of a compilation, or into an artifact")
    parser.add_argument("path", metavar="DUMPS|ARTIFACT")
    parser.add_argument("other", metavar="OTHER", nargs="?", help="with --html: a second one, side by side")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--pass", dest="pass_name", metavar="NAME", help="print the program after that pass")
    what.add_argument("--diff", nargs="+", metavar="PASS", help="what a pass changed, or the difference of two")
    what.add_argument("--bisect", action="store_true", help="the pass and the layer where the program went wrong")
    what.add_argument(
        "--why", metavar="LAYER", help="what decided on a layer's formats, in numbers; of a pipeline PART or PART/LAYER"
    )
    what.add_argument("--scores", action="store_true", help="by operation, unit and block (recipe qua2sedimo)")
    what.add_argument("--html", metavar="FILE", help="everything as one page to explore in a browser")
    what.add_argument("--model-explorer", metavar="DIR", help="a graph of each stage, and overlays, for Model Explorer")
    parser.add_argument("--layers", action="store_true", help="layer by layer: bits, bytes, loss")
    options.add_order(parser, "--layers", COLUMNS)
    parser.add_argument(
        "--bench",
        metavar="FILE",
        action="append",
        default=[],
        help="of `mpqc bench --kernels --json`: milliseconds and roofline; a second --bench is of OTHER",
    )
    parser.add_argument(
        "--compare", metavar="MODEL", help="with --html: draw with the artifact and its float model, and both weights"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a page that exists")


def run(args: argparse.Namespace) -> Any:
    """Print or write what is asked for, and return it."""
    path = Path(args.path)
    if missing := [each for each in (args.path, args.other) if each and not Path(each).exists()]:
        raise UserError(f"there is no '{missing[0]}': name an artifact, or a folder that `mpqc compile --dumps` wrote")
    if not args.html and (args.other or args.compare):
        raise UserError("a second DUMPS|ARTIFACT and --compare are of the page: add --html FILE, or leave them out")
    if args.bench and not (args.html or args.model_explorer):
        raise UserError("--bench adds to --html and --model-explorer: ask for one of them, or leave it out")
    if not args.html and not args.model_explorer:
        with _unverified(path):
            asked = (args.pass_name, args.diff, args.layers, args.bisect, args.why, args.scores, args.sort, args.top)
            return inspect(path, *asked)
    from mpq_compiler.inspection import explorer

    paths = [path, *([Path(args.other)] if args.other else [])]
    benches: list[str | None] = [*args.bench, *[None] * (len(paths) - len(args.bench))]
    if len(benches) > len(paths):
        raise UserError(f"--bench is given {len(benches)} times for {len(paths)} DUMPS|ARTIFACT; give one for each")
    if args.model_explorer:
        return _model_explorer(path, Path(args.model_explorer), benches[0], args.overwrite)
    page = Path(args.html)
    output.require_new(page, args.overwrite)
    gathered = [_gathered(each, bench, args.compare) for each, bench in zip(paths, benches, strict=True)]
    for each, found in zip(paths, gathered, strict=True):
        if args.compare and _is_artifact(each):
            from mpq_compiler.evaluation import side_by_side

            found["samples"] = side_by_side.pictures(each, args.compare)
    with _unverified(path), _unverified(paths[-1]):  # numbers that are none show when they are written
        text = explorer.page(gathered)
    output.write_text(text, page)
    terminal.say(f"wrote {page}")
    return {"output": str(page)}


@contextmanager
def _unverified(path: Path) -> Iterator[None]:
    """Says of dumps, which no hash covers, that they were altered, where something in them is not what is written."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        if _is_artifact(path):
            raise  # its files were verified: this is a fault of ours
        said = f"{type(error).__name__}: {error}"
        raise UserError(f"'{path}' was altered since it was written ({said}); compile it again with --dumps") from error


def inspect(
    path: Path,
    pass_name: str | None = None,
    diff: list[str] | None = None,
    layers: bool = False,
    bisect: bool = False,
    why: str | None = None,
    scores: bool = False,
    sort: str | None = None,
    top: int | None = None,
) -> Any:
    """Prints what is asked for and returns it as plain data.

    Raises UserError for a path that is neither, an unknown pass or layer, and options that do not fit.
    """
    from mpq_compiler.artifact.pipeline import is_pipeline

    if (sort is not None or top is not None) and not layers:
        raise UserError("--sort and --top are of the table of --layers: add that, or leave them out")
    if top is not None:
        require_counts(top=top)
    order = Order(sort, top)
    if is_pipeline(path):
        if pass_name or diff or bisect or scores or layers:
            raise UserError(f"'{path}' is a pipeline: name one of its parts, such as {path}/unet, or ask --why PART")
        return _pipeline(path, why)
    if why is not None:
        return _why(path, why)
    if scores:
        return _scores(path)
    if _is_artifact(path):
        if pass_name or diff or bisect:
            asked = "--pass" if pass_name else "--diff" if diff else "--bisect"
            raise UserError(f"'{path}' is an artifact; {asked} needs the folder of a compilation's --dumps")
        return _artifact(path, layers, order)
    if layers and (pass_name or diff or bisect):
        raise UserError("--layers goes with none of --pass, --diff and --bisect: ask one after the other")
    if layers:
        return _layers(path, order)
    return _bisect(path) if bisect else _dumps(path, pass_name, diff)


def _pipeline(path: Path, why: str | None) -> dict[str, object]:
    """The parts of a pipeline; ``why``: a part, for what a byte is worth in it, or a layer as ``part/layer``."""
    from mpq_compiler.artifact import bundle
    from mpq_compiler.artifact import pipeline as pipelines

    found = pipelines.read(path)
    if why is not None:
        name, _, layer = why.partition("/")
        part = found.part(name)
        return _why(part, layer) if layer else _worth(found, name)
    manifests = {name: bundle.read_manifest(found.part(name)) for name in found.document["parts"]}
    rows = [
        (
            name,
            found.document["parts"][name]["role"],
            terminal.size(manifest["weights"]["payload_bytes"]),
            f"{manifest['weights']['average_bits']:.3f}",
        )
        for name, manifest in manifests.items()
    ]
    target = next(iter(manifests.values()))["target"]["name"]
    headers = ("part", "role", "weights", "bits")
    terminal.table(f"{found.document['name']} for {target}", headers, rows, numeric=(2, 3))
    if shared := found.document.get("shares"):
        shares.print_shares("one budget: the PSNR that is expected of pictures", shared)
    return {
        "name": found.document["name"],
        "target": target,
        "parts": {name: manifest["weights"] for name, manifest in manifests.items()},
        "shares": shared or {},
    }


def _worth(found: Pipeline, name: str) -> dict[str, object]:
    """What a byte is worth in a part. UserError: the parts have no budget in common."""
    if not (shared := found.document.get("shares")):
        raise UserError(f"the parts of {found.path} were given their bytes apart: nothing was weighed between them")
    total = sum(share["loss"] for share in shared.values())
    shares.print_shares(f"what a byte is worth in '{name}', and in the others", {name: shared[name], **shared})
    share = shared[name]
    terminal.say(
        f"'{name}' makes {100 * share['loss'] / total:.1f} % of the noise that is expected of pictures; its next "
        f"kilobyte would take {100 * share['worth'] / total:.3f} % of all, for noise of its output counts "
        f"{share['gain']:.3g} times in pictures"
    )
    return {"part": name, **share, "shares": shared}


def _gathered(path: Path, bench: str | None, model: str | None = None) -> Json:
    """What an explorer shows of dumps or an artifact (`explorer.gather`)."""
    from mpq_compiler.artifact.pipeline import is_pipeline
    from mpq_compiler.inspection import explorer

    if is_pipeline(path):
        raise UserError(f"'{path}' is a pipeline: name one of its parts, such as {path}/unet")
    with _unverified(path):
        return explorer.gather(path, _read_dumps(path), _timed(Path(bench)) if bench else None, model)


def _model_explorer(path: Path, folder: Path, bench: str | None, overwrite: bool) -> dict[str, str]:
    """Writes the files of Model Explorer. UserError: the folder holds something, and nothing may be replaced."""
    from mpq_compiler.inspection import model_explorer

    if folder.is_dir():
        output.require_new(folder / "000.json", overwrite)
        if any(folder.iterdir()) and not overwrite:
            raise UserError(f"'{folder}' is not empty; name another folder or add --overwrite")
    else:
        check_place(folder)
        if folder.exists():
            raise UserError(f"'{folder}' is a file; name a folder")
    found = model_explorer.files(_gathered(path, bench))
    folder.mkdir(parents=True, exist_ok=True)
    for name, document in found.items():
        output.write_json(document, folder / name)
    terminal.say(f"wrote {len(found)} files to {folder}: model-explorer {folder / next(iter(found))}")
    return {"output": str(folder)}


def _timed(file: Path) -> Json:
    """The result of `mpqc bench --json`. UserError: the file holds none."""
    from mpq_compiler import schemas
    from mpq_compiler.support.files import decode_json

    try:
        found: Json = decode_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--bench {file} cannot be read; `mpqc bench --kernels --json {file}` writes it") from error
    if wrong := schemas.check(found, "bench"):
        raise UserError(f"--bench {file} is no result of mpqc bench ({wrong}); write it with --kernels --json")
    return found


def _is_artifact(path: Path) -> bool:
    from mpq_compiler.artifact import bundle

    return any((path / name).is_file() for name in (bundle.MANIFEST, bundle.PIPELINE)) or path.suffix == ".zip"


def _read_dumps(path: Path) -> list[Any]:
    if _is_artifact(path):
        return []
    from mpq_compiler.inspection.dumps import read_dumps

    return read_dumps(path)


def _why(path: Path, layer: str) -> dict[str, Any]:
    from mpq_compiler.inspection import explain

    dumps = _read_dumps(path)  # first, for it says best what is wrong with a path
    found = explain.why(explain.load(path), layer, dumps)
    explain.show(found)
    return found


def _scores(path: Path) -> dict[str, Any]:
    from mpq_compiler.inspection import explain, score_report

    found = score_report.explain(explain.load(path))
    score_report.show(found)
    return found


def _bisect(path: Path) -> dict[str, Any]:
    from mpq_compiler.inspection.bisect import bisect

    found = bisect(_read_dumps(path))
    terminal.table(
        str(path),
        ("pass", "contract", "nodes compared", "broken by", "SQNR of the output"),
        [
            (
                row["pass"],
                row["contract"],
                row["nodes"],
                ", ".join(f["layers"][0] for f in row["findings"]) or "",
                "" if row["sqnr_db"] is None else f"{row['sqnr_db']:.1f} dB",
            )
            for row in found["passes"]
        ],
        numeric=(2, 4),
    )
    terminal.say(SQNR)
    for finding in [f for row in found["passes"] for f in row["findings"]] or [found]:
        terminal.say(finding["sentence"])
    return found


def _artifact(path: Path, layers: bool, order: Order) -> dict[str, Any]:
    from mpq_compiler.artifact import bundle

    manifest = bundle.read(path).manifest
    plan, weights = manifest.get("plan", {}), manifest["weights"]
    rows = plan.get("layers", [])
    if layers:
        _table(path, rows, weights["payload_bytes"], order)
    counts: dict[str, list[int]] = {}
    for row in rows:
        counts.setdefault(row["weight"], []).append(row["bytes"])
    formats = [(name, len(sizes), terminal.size(sum(sizes))) for name, sizes in sorted(counts.items())]
    terminal.table(
        f"{manifest['name']} for {manifest['target']['name']}: {weights['payload_bytes']} bytes, "
        f"{weights['average_bits']:.3f} true average bits",
        ("format", "layers", "bytes"),
        formats,
        numeric=(1, 2),
    )
    if memory := manifest.get("memory"):
        kinds = ("activation_bytes", "workspace_bytes")
        terminal.table(
            f"memory: {terminal.memory(memory)}",
            ("function", "activations", "workspaces of a thread"),
            [(name, *(terminal.size(memory[kind][name]) for kind in kinds)) for name in memory["activation_bytes"]],
            numeric=(1, 2),
        )
    calls = manifest["model"].get("calls", [])
    if calls:
        rows_of_calls = [(entry["text"], ", ".join(entry["functions"])) for entry in calls]
        terminal.table("calls that it takes, the first calibrated", ("call", "functions"), rows_of_calls)
    for line in terminal.fallbacks(plan.get("fallbacks", {})):
        terminal.say(line)
    return {
        "name": manifest["name"],
        "target": manifest["target"]["name"],
        "weights": weights,
        "memory": memory,
        "calls": [entry["text"] for entry in calls],
        "layers": rows,
    }


class Order(NamedTuple):
    """The order of a table of layers, by a column of `COLUMNS`, and how many of them are printed."""

    sort: str | None
    top: int | None


def _table(path: Path, rows: list[dict[str, Any]], total: int, order: Order) -> None:
    """The layers, with their share of all stored bytes."""
    shown = terminal.arranged(rows, order.sort and COLUMNS[order.sort], order.top)
    terminal.table(
        f"{path}: layers" + (f", {len(shown)} of {len(rows)}" if len(shown) < len(rows) else ""),
        ("layer", "weight", "activation", "bytes", "share", "loss"),
        [
            (
                row["name"].removesuffix(".weight"),
                row["weight"],
                _short(row["activation"]),
                row["bytes"],
                f"{100 * row['bytes'] / total:.1f} %",
                None if row["loss"] is None else f"{row['loss']:.1e}",
            )
            for row in shown
        ],
        numeric=(3, 4, 5),
    )
    named = {name for row in shown for name in (row["weight"], _short(row["activation"]))}
    losses = ["loss"] if any(row["loss"] is not None for row in shown) else []
    if said := legend([*named, *losses], terminal.output.width):
        terminal.say(said)


def _short(activation: str) -> str:
    """The kind of an activation as artifacts write it, u8/t4."""
    return re.sub(r" in (\d+) time groups", r"/t\1", activation).replace(" with a scale for each token", "/token")


def _layers(path: Path, order: Order) -> dict[str, Any]:
    """The layers as the compilation that left these dumps decided on them."""
    from mpq_compiler.inspection import explain

    document = explain.load(path)
    rows, total = [], 0.0
    for layer in document["layers"]:
        found = explain.why(document, layer, moved=((), None))
        plan = explain.plan(found)
        if plan:
            total = plan["bytes"] / plan["share"]
        rows.append(
            {
                "name": found["parameter"],
                "weight": plan.get("format", "float"),
                "activation": explain.activation(plan),
                "bytes": plan.get("bytes", 0),
                "loss": plan.get("loss"),
                "fallback": found["fallback"],
            }
        )
    if not rows:
        raise UserError(f"the compilation of '{path}' ended before anything was decided of its layers")
    _table(path, rows, round(total) or 1, order)
    return {"layers": rows}


def _dumps(path: Path, pass_name: str | None, diff: list[str] | None) -> Any:
    from mpq_compiler.inspection.dumps import read_dumps
    from mpq_compiler.ir.diff import diff as compare

    dumps = read_dumps(path)
    names = [d.name for d in dumps]

    def index(name: str) -> int:
        if name not in names:
            raise UserError(f"the dumps in '{path}' have no pass '{name}': {nearest(name, names)}")
        return names.index(name)

    if pass_name is not None:
        dump = dumps[index(pass_name)]
        terminal.say(dump.text)
        return {"pass": dump.name, "text": dump.text}
    if diff is not None:
        if len(diff) > 2:
            raise UserError("--diff takes one pass (compared with the one before it) or two")
        last = index(diff[-1])
        first = index(diff[0]) if len(diff) == 2 else last - 1
        before = dumps[first].text if first >= 0 else ""
        text = compare(before, dumps[last].text)
        terminal.say(text or "no difference")
        return {"from": dumps[first].name if first >= 0 else None, "to": dumps[last].name, "diff": text}
    described = [{"pass": d.name, "nodes": d.nodes, "sqnr_db": d.sqnr_db} for d in dumps]
    terminal.table(
        str(path),
        ("pass", "nodes", "SQNR of the output"),
        [(d["pass"], d["nodes"], "" if d["sqnr_db"] is None else f"{d['sqnr_db']:.1f} dB") for d in described],
        numeric=(1, 2),
    )
    terminal.say(SQNR)
    return described
