"""`mpqc inspect --why LAYER`: the chain of decisions that made a layer what it is, with the numbers behind them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpq_compiler import artifact, terminal
from mpq_compiler.errors import UserError, nearest

if TYPE_CHECKING:
    from mpq_compiler.probes import Dump

STEP = 0.05
"""By how much of itself a budget is moved to see what would change."""
Document = Mapping[str, Any]


def load(path: Path) -> Document:
    """The decisions (`decisions.document`) in a dumps folder or an artifact.

    UserError: there are none, as in what an older version wrote.
    """
    if (path / artifact.MANIFEST).is_file() or path.suffix == ".zip":
        file = artifact.read(path).file(artifact.DECISIONS)
    else:
        file = path / artifact.DECISIONS
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"'{path}' holds no readable {artifact.DECISIONS}; compile it again") from error
    return found


def find(document: Document, name: str) -> str:
    """The layer of that name: its parameter, with or without ``.weight``, or its call. UserError: the nearest one."""
    known: dict[str, str] = {}
    for path, passes in document["layers"].items():
        known[path] = known[path.removesuffix(".weight")] = path
        known |= {said["call"]: path for said in passes.values() if "call" in said}
    for path in document["fallbacks"]:
        known.setdefault(path, path)
    if name not in known:
        shown = {path.removesuffix(".weight") for path in known.values()}
        raise UserError(f"there is no layer '{name}': {nearest(name, shown)}")
    return known[name]


def why(document: Document, name: str, dumps: Sequence[Dump] = ()) -> dict[str, Any]:
    """Everything that is known of a layer, as plain data.

    ``layer``; ``passes``, what each noted of it; ``choices``, the candidates with what they cost and lose; ``budgets``,
    with what 5 % more or less would change; ``price``, the loss that a byte is worth; ``noise`` after every pass, from
    dumps alone; ``fallback``, the reason where it stays float.
    """
    path = find(document, name)
    passes = document["layers"].get(path, {})
    allocation = _said(document["program"], "bytes")
    chosen = _said(passes, "format")
    budgets, reason = _budgets(allocation, path)
    price = next((b["price"] for b in budgets if b["cost"] == "bytes"), None)
    return {
        "layer": path.removesuffix(".weight"),
        "parameter": path,
        "passes": passes,
        "choices": _choices(_said(passes, "weights").get("weights", {}), chosen, price),
        "budgets": budgets,
        "budgets_reason": reason,
        "price": price,
        "noise": _noise(path, passes, dumps),
        "fallback": chosen.get("fallback") or document["fallbacks"].get(path),
    }


def _said(passes: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """What the pass noted that noted ``key``."""
    return next((said for said in passes.values() if key in said), {})


def _choices(weights: Mapping[str, Any], chosen: Mapping[str, Any], price: float | None) -> list[dict[str, Any]]:
    """The candidates from the smallest on; ``saves`` is loss for a byte more (or less) than what was chosen."""
    own = weights.get(chosen.get("format", ""))
    rows = []
    for name, cost in sorted(weights.items(), key=lambda item: (item[1]["bytes"], item[0])):
        row = {"format": name, **cost, "chosen": name == chosen.get("format"), "saves": None, "priced": None}
        if own is not None and cost["bytes"] != own["bytes"]:
            row["saves"] = (own["loss"] - cost["loss"]) / (cost["bytes"] - own["bytes"])
        if price is not None:
            row["priced"] = cost["loss"] + price * cost["bytes"]
        rows.append(row)
    return rows


def _budgets(allocation: Mapping[str, Any], layer: str) -> tuple[list[dict[str, Any]], str | None]:
    """Each budget with its use and what the layer and the whole program would be with 5 % less or more of it."""
    problem = allocation.get("problem")
    if problem is None:
        return [], "no program was solved: the plan was given"
    try:
        import highspy  # noqa: F401
    except ModuleNotFoundError:
        return [], "what other budgets would change needs the solver: pip install highspy"
    found = []
    for index, budget in enumerate(problem["budgets"]):
        cost = budget["cost"]
        row: dict[str, Any] = {"cost": cost, "max": budget["max"], "used": allocation["costs"][cost]}
        for name, factor in (("less", 1 - STEP), ("more", 1 + STEP)):
            row[name] = _resolved(problem, index, factor, layer)
        less, more = row["less"], row["more"]
        row["binding"] = more is not None and more["loss"] < allocation["objective"] * (1 - 1e-6)
        ends = [(less or {}).get("loss", allocation["objective"]), (more or {}).get("loss", allocation["objective"])]
        span = STEP * budget["max"] * ((less is not None) + (more is not None))
        row["price"] = max(0.0, ends[0] - ends[1]) / span if span else 0.0
        found.append(row)
    return found, None


def _resolved(problem: Mapping[str, Any], index: int, factor: float, layer: str) -> dict[str, Any] | None:
    """Loss and the layer's choice with a budget times ``factor``; None where it cannot be met."""
    from mpq_compiler.allocation import InfeasibleError, Problem, solve

    budgets = [{**b, "max": b["max"] * factor} if i == index else b for i, b in enumerate(problem["budgets"])]
    try:
        solution = solve(Problem.from_json({**problem, "budgets": budgets}))
    except InfeasibleError:
        return None
    return {"loss": solution.objective, "choice": solution.choices.get(layer)}


def _noise(path: str, passes: Mapping[str, Any], dumps: Sequence[Dump]) -> list[dict[str, Any]]:
    """After every pass: the call's own noise and the planned one, that of its weight, and all that has gathered."""
    call = _said(passes, "call").get("call", "")
    rows = []
    for dump in dumps:
        own, weight = dump.local.get(call), dump.weights.get(path)
        gathered = dump.sqnr.get(call)
        if own is None and weight is None and gathered is None:
            continue
        rows.append(
            {
                "pass": dump.name,
                "own_db": None if own is None else _decibels(own.noise),
                "planned_db": _decibels(dump.expected.get(call, 0.0)),
                "weight_db": None if weight is None else _decibels(float(weight[1])),
                "weight_planned_db": None if weight is None else _decibels(float(weight[2])),
                "sqnr_db": gathered if gathered is not None and math.isfinite(gathered) else None,
            }
        )
    return rows


def _decibels(power: float) -> float | None:
    return 10 * math.log10(power) if 0 < power < math.inf else None


# --- for reading --------------------------------------------------------------------------------------------


def show(found: Mapping[str, Any]) -> None:
    """Prints `why` as sentences and tables."""
    terminal.say(f"{found['layer']}: {headline(found)}")
    for sentence in sentences(found):
        terminal.say(f"  {sentence}")
    if found["choices"]:
        price = found["price"]
        terminal.table(
            "what each format would cost" + (f"; a kilobyte is worth a loss of {1e3 * price:.2g}" if price else ""),
            ("format", "bytes", "loss", "saves per kB", "loss + price", ""),
            [
                (
                    row["format"],
                    row["bytes"],
                    f"{row['loss']:.2e}",
                    "" if row["saves"] is None else f"{1e3 * row['saves']:.1e}",
                    "" if row["priced"] is None else f"{row['priced']:.2e}",
                    "chosen" if row["chosen"] else "",
                )
                for row in found["choices"]
            ],
            numeric=(1, 2, 3, 4),
        )
    if found["budgets"]:
        terminal.table(
            "the budgets, and this layer with 5 % less or more of one",
            ("budget", "used", "of", "binds", "5 % less", "5 % more"),
            [
                (
                    b["cost"],
                    f"{b['used']:.0f}",
                    f"{b['max']:.0f}",
                    "yes" if b["binding"] else "no",
                    *(_otherwise(b[key]) for key in ("less", "more")),
                )
                for b in found["budgets"]
            ],
            numeric=(1, 2),
        )
    if found["noise"]:
        terminal.table(
            "noise after each pass: its own on the float program's inputs, its weight's, and all that has gathered",
            ("pass", "own", "planned", "weight", "plain rounding", "SQNR so far"),
            [
                (
                    row["pass"],
                    *(_db(row[key]) for key in ("own_db", "planned_db", "weight_db", "weight_planned_db", "sqnr_db")),
                )
                for row in found["noise"]
            ],
            numeric=range(1, 6),
        )


def _db(value: float | None) -> str:
    return "" if value is None else f"{value:.1f} dB"


def _otherwise(solved: Mapping[str, Any] | None) -> str:
    return "cannot be met" if solved is None else f"{solved['choice'] or 'float'}, loss {solved['loss']:.2e}"


def headline(found: Mapping[str, Any]) -> str:
    """What became of the layer, in a line."""
    plan = _said(found["passes"], "format")
    if not plan:
        return f"stays float: {found['fallback']}"
    activation = _activation(plan)
    share = f"{plan['bytes']} bytes, {100 * plan['share']:.2f} % of all"
    return f"weight {plan['format']}, activation {activation}, {share}"


def _activation(plan: Mapping[str, Any]) -> str:
    if "activation_bits" not in plan:
        return "float"
    if plan["dynamic"]:
        return f"u{plan['activation_bits']} with a scale for each token"
    groups = len(plan["scale"])
    return f"u{plan['activation_bits']}" + (f" in {groups} time groups" if groups > 1 else "")


def sentences(found: Mapping[str, Any]) -> list[str]:
    """The chain of decisions, one sentence for each step that had a say."""
    passes = found["passes"]
    told = [
        *_statistics(_said(passes, "edge")),
        *_time(_said(passes, "ranges")),
        *_choice(found),
        *_tables(_said(passes, "activation_bits")),
    ]
    for name, said in passes.items():
        told += _codes(name, said)
        told += _packed(name, said)
    told += _kernels(passes.get("backend", {}))
    known = {"calibrate", "time-groups", "sensitivity", "bit-allocation", "backend"}
    for name, said in passes.items():
        rest = {k: v for k, v in said.items() if k not in _TOLD}
        if rest and name not in known:
            told.append(f"{name}: {', '.join(f'{k} {_value(v)}' for k, v in rest.items())}")
    if found["fallback"]:
        told.append(f"float: {found['fallback']}")
    return told


_TOLD = {
    *("codes", "table", "scale_to_range", "branch", "alpha"),
    *("operator", "epilogue", "code_bits", "offsets", "tables", "segments"),
}


def _statistics(said: Mapping[str, Any]) -> list[str]:
    if not said:
        return []
    shape = " x ".join(map(str, said["shape"]))
    sharing = [p.removesuffix(".weight") for p in said["shared_with"]]
    with_others = f", which {', '.join(sharing)} read too: they share its quantizer" if sharing else ""
    return [
        f"{said['operator']} with a weight of {shape}, {said['macs'] / 1e6:.3g} million multiplications a sample",
        f"reads '{said['edge']}'{with_others}",
        f"calibration saw it between {said['low']:.3g} and {said['high']:.3g}, rms {said['rms']:.3g}: the largest "
        f"value is {said['outliers']:.1f} rms, the widest timestep {said['time_variation']:.2f} times the narrowest",
    ]


def _time(said: Mapping[str, Any]) -> list[str]:
    ranges = [r for r in said.get("ranges", ()) if r]
    if len(ranges) < 2:
        return []
    return ["ranges of its time groups: " + ", ".join(f"{low:.3g} .. {high:.3g}" for low, high in ranges)]


def _choice(found: Mapping[str, Any]) -> list[str]:
    plan = _said(found["passes"], "format")
    if not plan:
        return []
    if not found["choices"]:
        return [f"{plan['format']} is the plan's one format for every layer"]
    chosen = next((row for row in found["choices"] if row["chosen"]), None)
    if chosen is None:
        return []
    text = f"bit-allocation took {chosen['format']}: a loss of {chosen['loss']:.2e} for {chosen['bytes']} bytes"
    price = found["price"]
    smaller = [row for row in found["choices"] if row["bytes"] < chosen["bytes"] and row["saves"] is not None]
    larger = [row for row in found["choices"] if row["bytes"] > chosen["bytes"] and row["saves"] is not None]
    if price and smaller:
        row = smaller[-1]
        text += f"; {row['format']} would give up {_times(row['saves'], price)} what its bytes are worth elsewhere"
    if price and larger:
        row = max(larger, key=lambda r: r["saves"])
        text += f"; {row['format']} would gain {_times(row['saves'], price)} of that"
    return [text]


def _times(saves: float, price: float) -> str:
    return f"{saves / price:.2g} times"


def _tables(plan: Mapping[str, Any]) -> list[str]:
    if not plan or plan["dynamic"]:
        return []
    pairs = zip(plan["scale"], plan["zero_point"], strict=True)
    return ["activation scale and zero point by time group: " + ", ".join(f"{s:.3g} / {z}" for s, z in pairs)]


def _codes(name: str, said: Mapping[str, Any]) -> list[str]:
    if "codes" not in said:
        return []
    parts = [f"{name} settled the codes"]
    if "scale_to_range" in said:
        parts.append(f"scales are {said['scale_to_range']:.2f} times those of the full range")
    if "branch" in said:
        parts.append(f"with a binary branch of {_value(said['alpha'])} on the table's grid")
    return [", ".join(parts)]


def _packed(name: str, said: Mapping[str, Any]) -> list[str]:
    if "code_bits" not in said:
        return []
    table = "the code is the value" if not said["tables"] else f"{said['tables']} table{'s' * (said['tables'] > 1)}"
    parts = [f"{said['operator']} on {said['code_bits']}-bit codes", table]
    if said["offsets"]:
        parts.append("an offset a row")
    if said["segments"] and len(said["segments"]) > 1:
        parts.append(f"scales for {len(said['segments'])} channel groups")
    if said["epilogue"]:
        parts.append("in one kernel with " + ", ".join(said["epilogue"]))
    return [f"{name}: " + ", ".join(parts)]


def _kernels(said: Mapping[str, Any]) -> list[str]:
    return [f"computed by {', '.join(sorted({k['template'] for k in said['kernels']}))} kernels"] if said else []


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_value, value)) + "]"
    return str(value)
