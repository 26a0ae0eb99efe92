"""Explains a layer: the decisions that gave it its format, with their numbers (`mpqc inspect --why LAYER`)."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpq_compiler import schemas
from mpq_compiler.artifact import bundle
from mpq_compiler.support import terminal
from mpq_compiler.support.decibels import decibels
from mpq_compiler.support.errors import UserError, nearest
from mpq_compiler.support.files import decode_json

if TYPE_CHECKING:
    from mpq_compiler.allocation.problem import Solution
    from mpq_compiler.inspection.dumps import Dump
    from mpq_compiler.ir.provenance import Decisions as Document

STEP = 0.05
"""The fraction of itself by which a budget is moved, to see what would change."""


def load(path: Path) -> Document:
    """Reads the decisions (`provenance.document`) of a dumps folder or an artifact.

    Raises:
        UserError: there are none, or none that can be read.
    """
    opened = None  # an unpacked zip lasts as long as what was read of it
    if (path / bundle.MANIFEST).is_file() or path.suffix == ".zip":
        opened = bundle.read(path)
    file = opened.file(bundle.DECISIONS) if opened else path / bundle.DECISIONS
    try:
        found: Document = decode_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"'{path}' holds no readable {bundle.DECISIONS}; compile it again") from error
    if wrong := schemas.check(found, "decisions"):
        raise UserError(f"{file} is no record of decisions: {wrong}; compile it again")
    return found


def find(document: Document, name: str) -> str:
    """The parameter of the layer called `name`: its path, with or without ``.weight``, or its call.

    Raises:
        UserError: there is no such layer; the sentence has the nearest one.
    """
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


@dataclass(frozen=True)
class Moved:
    """A budget with the best allocations at 5 % less and 5 % more of it, None where that is infeasible."""

    cost: str
    max: float
    used: float
    objective: float
    """The loss with the budget as it is."""
    less: Solution | None
    more: Solution | None
    layers: Collection[str] | None = None
    """The layers that share the budget; None where all do."""
    group: str | None = None

    @property
    def binding(self) -> bool:
        """Whether more of it would lower the loss by at least a thousandth."""
        return self.more is not None and self.more.objective < self.objective - 1e-3 * abs(self.objective)

    @property
    def price(self) -> float:
        """The loss that one unit of the cost is worth."""
        high, low = (self.objective if s is None else s.objective for s in (self.less, self.more))
        steps = (self.less is not None) + (self.more is not None)
        return max(0.0, high - low) / (STEP * self.max * steps) if steps else 0.0

    def of(self, layer: str) -> dict[str, Any]:
        """The budget as JSON, with the choice of a layer at less and at more of it."""

        def otherwise(solution: Solution | None) -> dict[str, Any] | None:
            if solution is None:
                return None
            return {"loss": solution.objective, "choice": solution.choices.get(layer)}

        return {
            "cost": self.cost if self.group is None else f"{self.cost} of {self.group} layers",
            "max": self.max,
            "used": self.used,
            "binding": self.binding,
            "price": self.price,
            "less": otherwise(self.less),
            "more": otherwise(self.more),
        }


def moved_budgets(document: Document) -> tuple[list[Moved], str | None]:
    """Moves every budget of the allocation; returns ([], a reason) where no program was solved, or none can be here."""
    allocation = _said(document["program"], "problem")
    if not allocation:
        return [], "no program was solved: the plan was given"
    if importlib.util.find_spec("highspy") is None:
        return [], "what other budgets would change needs the solver: pip install highspy"
    from mpq_compiler.allocation.problem import InfeasibleError, Problem
    from mpq_compiler.allocation.solver import solve

    problem, choices = allocation["problem"], allocation["choices"]
    layers = [(x, next(c for c in x["choices"] if c["name"] == choices[x["name"]])) for x in problem["layers"]]

    def members(budget: dict[str, Any]) -> dict[str, dict[str, Any]]:
        return {x["name"]: choice for x, choice in layers if budget.get("group") in (None, x.get("group"))}

    used = [sum(choice["costs"][b["cost"]] for choice in members(b).values()) for b in problem["budgets"]]
    most = [max(b["max"], own) for b, own in zip(problem["budgets"], used, strict=True)]  # what is written is rounded

    def solved(index: int, factor: float) -> Solution | None:
        budgets = [
            {**b, "max": m * (factor if i == index else 1)}
            for i, (b, m) in enumerate(zip(problem["budgets"], most, strict=True))
        ]
        try:
            return solve(Problem.from_json({**problem, "budgets": budgets}))
        except InfeasibleError:
            return None

    return [
        Moved(
            budget["cost"],
            budget["max"],
            used[index],
            sum(choice["loss"] for _, choice in layers),
            solved(index, 1 - STEP),
            solved(index, 1 + STEP),
            members(budget).keys(),
            budget.get("group"),
        )
        for index, budget in enumerate(problem["budgets"])
    ], None


def why(
    document: Document,
    name: str,
    dumps: Sequence[Dump] = (),
    moved: tuple[Sequence[Moved], str | None] | None = None,
) -> dict[str, Any]:
    """Explains a layer, as JSON.

    Args:
        document: the decisions.
        name: the layer (`find`).
        dumps: the dumps, for the noise after each pass.
        moved: the budgets moved, where they were solved before.

    Returns:
        ``layer``; ``passes``, the notes of each pass on it; ``choices``, the candidates with their costs and losses;
        ``budgets``, with the effect of 5 % more or less; ``price``, the loss that a byte is worth; ``noise`` after each
        pass; ``fallback``, the reason where it stays float.

    Raises:
        UserError: there is no such layer.
    """
    path = find(document, name)
    passes = document["layers"].get(path, {})
    chosen = _said(passes, "format")
    budgets, reason = moved if moved is not None else moved_budgets(document)
    price = next((b.price for b in budgets if b.cost == "bytes" and (b.layers is None or path in b.layers)), None)
    times = _said(passes, "microseconds").get("microseconds", {})
    return {
        "layer": path.removesuffix(".weight"),
        "parameter": path,
        "passes": passes,
        "choices": _choices(_said(passes, "weights").get("weights", {}), chosen, price, times),
        "budgets": [budget.of(path) for budget in budgets],
        "budgets_reason": reason,
        "price": price,
        "noise": _noise(path, passes, dumps),
        "fallback": chosen.get("fallback") or document["fallbacks"].get(path),
    }


def plan(layer: Mapping[str, Any]) -> Mapping[str, Any]:
    """The allocation's decision on a layer that `why` explains; empty where there is none yet."""
    return _said(layer["passes"], "format")


def _said(passes: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """The notes of the first pass that noted ``key``; empty where none did."""
    return next((said for said in passes.values() if key in said), {})


def _choices(
    weights: Mapping[str, Any], chosen: Mapping[str, Any], price: float | None, times: Mapping[str, float]
) -> list[dict[str, Any]]:
    """The candidate formats, the smallest first.

    ``ms`` is the time of the layer, None without a latency table. ``saves`` is the loss that a byte saves between the
    candidate and the chosen format. ``priced`` is the loss plus the bytes at their price; an allocation with one budget
    chooses the least of these.
    """
    own = weights.get(chosen.get("format", ""))
    rows = []
    for name, cost in sorted(weights.items(), key=lambda item: (item[1]["bytes"], item[0])):
        row = {"format": name, **cost, "chosen": name == chosen.get("format"), "saves": None, "priced": None}
        row["ms"] = times[name] / 1e3 if name in times else None
        if own is not None and cost["bytes"] != own["bytes"]:
            row["saves"] = (own["loss"] - cost["loss"]) / (cost["bytes"] - own["bytes"])
        if price is not None:
            row["priced"] = cost["loss"] + price * cost["bytes"]
        rows.append(row)
    return rows


def _noise(path: str, passes: Mapping[str, Any], dumps: Sequence[Dump]) -> list[dict[str, Any]]:
    """The noise after each pass: the call's own and planned, its weight's own and planned, and the accumulated SQNR."""
    call = _said(passes, "call").get("call", "")
    rows = []
    for dump in dumps:
        if dump.about["stage"] == "lowered":  # no stage of a lowering decides anything of a layer
            continue
        own, weight = dump.local.get(call), dump.weights.get(path)
        gathered = dump.sqnr.get(call)
        if own is None and weight is None and gathered is None:
            continue
        rows.append(
            {
                "pass": dump.name,
                "own_db": None if own is None else decibels(own.noise),
                "planned_db": decibels(dump.expected.get(call, 0.0)),
                "weight_db": None if weight is None else decibels(float(weight[1])),
                "weight_planned_db": None if weight is None else decibels(float(weight[2])),
                "sqnr_db": gathered if gathered is not None and math.isfinite(gathered) else None,
            }
        )
    return rows


# --- for reading --------------------------------------------------------------------------------------------


def show(found: Mapping[str, Any]) -> None:
    """Prints the result of `why` as sentences and tables."""
    terminal.say(f"{found['layer']}: {headline(found)}")
    for sentence in sentences(found):
        terminal.say(f"  {sentence}")
    if found["choices"]:
        price = found["price"]
        terminal.table(
            "what each format would cost" + (f"; a kilobyte is worth a loss of {1e3 * price:.2g}" if price else ""),
            ("format", "bytes", "loss", "ms", "saves per kB", "loss + price", ""),
            [
                (
                    row["format"],
                    row["bytes"],
                    f"{row['loss']:.2e}",
                    "" if row["ms"] is None else f"{row['ms']:.4f}",
                    "" if row["saves"] is None else f"{1e3 * row['saves']:.1e}",
                    "" if row["priced"] is None else f"{row['priced']:.2e}",
                    "chosen" if row["chosen"] else "",
                )
                for row in found["choices"]
            ],
            numeric=(1, 2, 3, 4, 5),
        )
    if found["budgets"]:
        terminal.table(
            "the budgets, and this layer with 5 % less or more of one",
            ("budget", "used", "of", "binds", "5 % less", "5 % more"),
            [
                (
                    b["cost"].replace("_", " "),
                    f"{b['used']:,.0f}",
                    f"{b['max']:,.0f}",
                    "yes" if b["binding"] else "no",
                    *(_otherwise(b[key]) for key in ("less", "more")),
                )
                for b in found["budgets"]
            ],
            numeric=(1, 2),
        )
    noise = [
        (
            row["pass"],
            *(_db(row[key]) for key in ("own_db", "planned_db", "weight_db", "weight_planned_db", "sqnr_db")),
        )
        for row in found["noise"]
    ]
    if told := [row for row in noise if any(row[1:])]:
        terminal.table(
            "noise after each pass: its own on the float program's inputs, its weight's, and all that has gathered",
            ("pass", "own", "planned", "weight", "plain rounding", "SQNR so far"),
            told,
            numeric=range(1, 6),
        )


def _db(value: float | None) -> str:
    return "" if value is None else f"{value:.1f} dB"


def _otherwise(solved: Mapping[str, Any] | None) -> str:
    return "cannot be met" if solved is None else f"{solved['choice'] or 'float'}, loss {solved['loss']:.2e}"


def headline(found: Mapping[str, Any]) -> str:
    """The decision on the layer, in one line."""
    decided = plan(found)
    if not decided:
        return f"stays float: {found['fallback']}"
    share = f"{decided['bytes']} bytes, {100 * decided['share']:.2f} % of all"
    return f"weight {decided['format']}, activation {activation(decided)}, {share}"


def activation(decided: Mapping[str, Any]) -> str:
    """The width and kind of the activation that a planned layer reads, in words."""
    if "activation_bits" not in decided:
        return "float"
    if decided["dynamic"]:
        return f"u{decided['activation_bits']} with a scale for each token"
    groups, kind = len(decided["scale"]), str(decided.get("activation", f"u{decided['activation_bits']}"))
    return kind + (f" in {groups} time groups" if groups > 1 else "")


def sentences(found: Mapping[str, Any]) -> list[str]:
    """The chain of decisions, one sentence for each step that took part."""
    passes = found["passes"]
    told = [
        *_statistics(_said(passes, "edge")),
        *_time(_said(passes, "ranges")),
        *_scored(_said(passes, "scores")),
        *_important(_said(passes, "importance")),
        *_choice(found),
        *_tables(_said(passes, "activation_bits")),
    ]
    for name, said in passes.items():
        told += _codes(name, said)
        told += _packed(name, said)
    told += _kernels(passes.get("backend", {}))
    known = {"calibrate", "time-groups", "sensitivity", "predict-scores", "orthogonality", "bit-allocation", "backend"}
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


def _scored(said: Mapping[str, Any]) -> list[str]:
    if not said:
        return []
    told = ", ".join(f"{name} {score:.2f}" for name, score in sorted(said["scores"].items(), key=lambda item: -item[1]))
    parts = [f"the predictor scores it as '{said['operation']}' of block {said['block']}: {told}"]
    others = [path.removesuffix(".weight") for path in said.get("unit_layers", ())]
    if len(others) > 1:
        parts.append(f"its format is chosen together with those of its unit, {', '.join(others)}")
    return parts


def _important(said: Mapping[str, Any]) -> list[str]:
    if not said:
        return []
    return [
        f"its outputs have {said['gamma']:.2f} in common with those of all layers on average (network orthogonality): "
        f"its bits count {said['importance']:.2g} times those of the layer with the least"
    ]


def _choice(found: Mapping[str, Any]) -> list[str]:
    plan = _said(found["passes"], "format")
    if not plan:
        return []
    if not found["choices"] and _said(found["passes"], "scores"):
        return [f"{plan['format']} was taken by these scores and the price of its {plan['bytes']} bytes"]
    if not found["choices"]:
        return [f"{plan['format']} is the plan's one format for every layer"]
    chosen = next((row for row in found["choices"] if row["chosen"]), None)
    if chosen is None:
        return []
    step = next(name for name, said in found["passes"].items() if "format" in said)
    text = f"{step} took {chosen['format']}: a loss of {chosen['loss']:.2e} for {chosen['bytes']} bytes"
    price = found["price"]
    smaller = [row for row in found["choices"] if row["bytes"] < chosen["bytes"] and row["saves"] is not None]
    larger = [row for row in found["choices"] if row["bytes"] > chosen["bytes"] and row["saves"] is not None]
    if price and smaller:
        row = smaller[-1]
        freed = chosen["bytes"] - row["bytes"]
        text += f"; {row['format']} would free {freed} bytes, and lose {_times(row['saves'], price)} their price"
    if price and larger:
        row = max(larger, key=lambda r: r["saves"])
        taken = row["bytes"] - chosen["bytes"]
        text += f"; {row['format']} would take {taken} more, and gain {_times(row['saves'], price)} their price"
    return [text]


def _times(saves: float, price: float) -> str:
    ratio = saves / price
    return f"{ratio:.2g} times" if ratio < 100 else f"{ratio:,.0f} times"


def _tables(plan: Mapping[str, Any]) -> list[str]:
    if not plan or plan["dynamic"]:
        return []
    if "zero_point" not in plan:
        return ["activation scale by time group: " + ", ".join(f"{s:.3g}" for s in plan["scale"])]
    pairs = zip(plan["scale"], plan["zero_point"], strict=True)
    return ["activation scale and zero point by time group: " + ", ".join(f"{s:.3g} / {z}" for s, z in pairs)]


def _codes(name: str, said: Mapping[str, Any]) -> list[str]:
    if "codes" not in said:
        return []
    parts = [f"{name} settled the codes"]
    if "scale_to_range" in said:
        parts.append(f"scales are on average {said['scale_to_range']:.2f} of those that span the largest weights")
    if "branch" in said:
        steps = _value(said["alpha"]).strip("[]")
        parts.append(f"a binary branch adds or subtracts {steps} steps of the table")
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
