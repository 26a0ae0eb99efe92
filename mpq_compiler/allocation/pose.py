"""The allocation problem that a sensitivity table poses under budgets."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

from mpq_compiler.allocation.sensitivity_table import CEILING_DB, CONTENT, QUALITY
from mpq_compiler.ir.facts import Fact
from mpq_compiler.ir.findings import CostTable, LayerCosts, Losses, SensitivityTable
from mpq_compiler.support.errors import BudgetError, UserError
from mpq_compiler.targets.numerics import FLOAT, FLOAT_BITS, layer_bops


class ScoredUnit(TypedDict):
    """Layers that are chosen for together."""

    kind: str
    layers: list[str]
    variants: dict[str, float]
    """The score by the formats of the layers, in order and joined by blanks."""


class Scores(TypedDict):
    """What `predict-scores` found."""

    units: list[ScoredUnit]


SCORES = Fact[Scores]("scores")


def problem(
    table: SensitivityTable,
    limit_bytes: int | None = None,
    activations: float | None = None,
    bops: float | None = None,
    latency: float | None = None,
    terms: Terms | None = None,
) -> dict[str, Any]:
    """Poses the allocation problem of a sensitivity table, as a JSON document (schemas/allocation-problem.json).

    A choice is a weight format with an activation width ("int4 u8"). An edge that several layers read is measured and
    stored once: its loss and its size are divided among them, and a link keeps them at one width. A format whose layers
    compute in float ("fp8 float") leaves the edge unquantized, without loss and outside the average width. Losses are
    those of `monotone`.

    Args:
        table: the sensitivity table.
        limit_bytes: budget of payload bytes.
        activations: budget of the average activation width, in bits.
        bops: budget of bit operations of a call.
        latency: budget of a call's latency, in ms; the time that no format changes is subtracted, and the problem's
            cost is in microseconds.
        terms: variations of objective and budgets.

    Raises:
        BudgetError: a budget of bytes or of time cannot be met; the sentence has the least that can.
    """
    terms = terms or Terms()
    table = terms.losses(monotone(table))
    attentions = table.get("attention", {})
    elements = [*table["elements"].values(), *(table["attention_costs"][name]["elements"] for name in attentions)]
    readers: dict[str, list[str]] = {}
    for layer in table["layers"]:
        for edge in layer["edges"]:
            readers.setdefault(edge, []).append(layer["name"])
    average = FLOAT_BITS if activations is None else activations
    layers = [
        {
            "name": layer["name"],
            "group": layer.get("group", ""),
            "choices": _choices(table, layer, readers, average, terms.protected, terms.unquantized),
        }
        for layer in table["layers"]
    ]
    layers += [
        {"name": name, "group": QUALITY, "choices": _attention_choices(table, name, terms.unquantized)}
        for name in attentions
    ]
    budgets: list[dict[str, Any]] = []
    if activations is not None:
        parts = {QUALITY: float(sum(table["attention_costs"][name]["elements"] for name in attentions))}
        for layer in table["layers"] if terms.activation_ratio is not None else ():
            size = sum(table["elements"][edge] / len(readers[edge]) for edge in layer["edges"])
            parts[layer["group"]] = parts.get(layer["group"], 0) + size
        budgets += _budgets("activation_bits", activations * sum(elements), parts, terms.activation_ratio)
    if limit_bytes is not None:
        require_bytes(table, limit_bytes, {name: list(losses) for name, losses in table["weights"].items()})
        parts = {}
        for layer in table["layers"] if terms.ratio is not None else ():
            parts[layer["group"]] = parts.get(layer["group"], 0) + layer["weights"]
        budgets += _budgets("bytes", limit_bytes - table["fixed_bytes"], parts, terms.ratio)
    if bops is not None:
        budgets.append({"cost": "bops", "max": bops})
    if latency is not None:
        require_latency(table, latency, {name: list(losses) for name, losses in table["weights"].items()})
        budgets.append({"cost": "latency", "max": 1e3 * latency - table["fixed_microseconds"]})
    links = [{"layers": names, "attribute": "activation"} for _, names in sorted(readers.items()) if len(names) > 1]
    return {"version": 1, "layers": layers, "budgets": budgets, "links": links}


def unit_problem(
    table: CostTable, units: Sequence[ScoredUnit], limit_bytes: int | None = None
) -> dict[str, Any]:
    """Poses the allocation problem whose layers are ``units`` of layers and whose losses are their negated scores.

    Args:
        table: the costs (`costs.describe`).
        units: each has its ``layers``, and ``variants``: a score by the formats of the layers, in order and joined by
            blanks. The problem's layer is named by the unit's layers in the same way.
        limit_bytes: budget of payload bytes.

    Raises:
        BudgetError: the budget cannot be met; the sentence has the least that can.
    """
    sizes = {layer["name"]: layer["formats"] for layer in table["layers"]}

    def choice(layers: Sequence[str], name: str, score: float) -> dict[str, Any]:
        size = sum(sizes[layer][format]["bytes"] for layer, format in zip(layers, name.split(" "), strict=True))
        return {"name": name, "loss": -score, "costs": {"bytes": size}}

    if limit_bytes is not None:
        formats = {
            layer: sorted({name.split(" ")[i] for name in unit["variants"]})
            for unit in units
            for i, layer in enumerate(unit["layers"])
        }
        require_bytes(table, limit_bytes, formats)
    return {
        "version": 1,
        "layers": [
            {
                "name": " ".join(unit["layers"]),
                "choices": [choice(unit["layers"], name, score) for name, score in unit["variants"].items()],
            }
            for unit in units
        ],
        "budgets": [] if limit_bytes is None else [{"cost": "bytes", "max": limit_bytes - table["fixed_bytes"]}],
    }


@dataclass(frozen=True)
class Terms:
    """Variations on the problem of least summed noise power under common budgets (MixDQ, arXiv 2405.17873)."""

    decibels: bool = False
    """Whether the objective is the summed SQNR in dB, as in the paper: losses are then noise powers in dB.

    Such a sum is not the noise of anything. Where no budget is on both, the problem falls into one of the weights and
    one of the activations.
    """
    ratio: float | None = None
    """Bits per weight of content over those of quality, whose budgets of bytes are apart; None has one budget."""
    activation_ratio: float | None = None
    """Bits per activation of content over those of quality; None has one budget."""
    protected: Mapping[str, int | None] = field(default_factory=dict)
    """The edges with a given width: bits, or None for float."""

    @property
    def unquantized(self) -> float:
        """The loss of a tensor that stays in float."""
        return -CEILING_DB if self.decibels else 0.0

    def losses(self, table: SensitivityTable) -> SensitivityTable:
        """Converts a table's losses to those that the objective sums."""
        if not self.decibels:
            return table

        def in_decibels(losses: Losses) -> Losses:
            return {c: max(10 * math.log10(max(x, 1e-300)), -CEILING_DB) for c, x in losses.items()}

        found = _with_losses(table, in_decibels)
        if "content" in table:  # their sum of SSIM is the paper's as it is
            content = [layer for layer in table["layers"] if layer.get("group") == CONTENT]
            others = {e for layer in table["layers"] if layer not in content for e in layer["edges"]}
            edges = {e for layer in content for e in layer["edges"]} - others
            found["weights"] |= {layer["name"]: table["weights"][layer["name"]] for layer in content}
            found["activations"] |= {e: table["activations"][e] for e in edges}
        return found


def group_budgets(total: float, sizes: Mapping[str, float], ratio: float) -> dict[str, float]:
    """Divides a budget between the groups, so that content has ``ratio`` times the bits per element of quality.

    With sizes W and bits per element B, B_q = B (W_c + W_q) / (k W_c + W_q) and B_c = k B_q (MixDQ's released search).
    Whatever the ratio k, W_c B_c + W_q B_q = (W_c + W_q) B.

    Args:
        total: the budget of all groups.
        sizes: elements of each group.
        ratio: k.
    """
    weights = {group: size * (ratio if group == CONTENT else 1.0) for group, size in sizes.items()}
    return {group: total * weight / sum(weights.values()) for group, weight in weights.items()}


def _budgets(cost: str, total: float, sizes: Mapping[str, float], ratio: float | None) -> list[dict[str, Any]]:
    if ratio is None:
        return [{"cost": cost, "max": total}]
    shares = group_budgets(total, sizes, ratio)
    return [{"cost": cost, "max": most, "group": group} for group, most in sorted(shares.items()) if sizes[group]]


def monotone(table: SensitivityTable) -> SensitivityTable:
    """Makes a table's losses monotone in the bits: each becomes the least loss at as many bits or fewer.

    Losses measured on a few inputs are out of order here and there. Formats are compared with those of their kind:
    "int4" with "int2", "int3+b" with "int2+b".
    """

    def cleaned(losses: Losses) -> Losses:
        def kind_and_bits(choice: str) -> tuple[str, int]:
            number = re.search(r"\d+", choice)
            return (choice[: number.start()] + choice[number.end() :], int(number[0])) if number else (choice, 0)

        found: dict[str, float] = {}
        least: dict[str, float] = {}
        for choice in sorted(losses, key=kind_and_bits):
            kind = kind_and_bits(choice)[0]
            least[kind] = found[choice] = min(losses[choice], least.get(kind, math.inf))
        return {choice: found[choice] for choice in losses}

    return _with_losses(table, cleaned)


def _with_losses(table: SensitivityTable, change: Callable[[Losses], Losses]) -> SensitivityTable:
    """The table with all losses changed."""
    return {
        **table,
        "weights": {name: change(losses) for name, losses in table["weights"].items()},
        "activations": {name: change(losses) for name, losses in table["activations"].items()},
        "attention": {name: change(losses) for name, losses in table.get("attention", {}).items()},
    }


def most_sensitive(table: SensitivityTable, share: float, spared: Collection[str] = ()) -> list[str]:
    """The edges of largest loss at their narrowest width, sorted by name.

    Args:
        table: the sensitivity table.
        share: the share of all edges to take, at least one edge unless it is 0.
        spared: edges that are not taken by their loss.

    Returns:
        Those edges, and all other edges of layers that read one of them (at several calls of a weight).
    """
    losses = {edge: x[min(x, key=int)] for edge, x in table["activations"].items() if edge in table["elements"]}
    count = max(1, round(share * len(losses))) if share > 0 else 0
    found = set(sorted(losses.keys() - {*spared}, key=lambda edge: (-losses[edge], edge))[:count])
    while more := {e for layer in table["layers"] if found & {*layer["edges"]} for e in layer["edges"]} - found:
        found |= more
    return sorted(found)


def require_bytes(table: CostTable, limit_bytes: int, formats: Mapping[str, Sequence[str]]) -> None:
    """Raises a BudgetError where even the smallest of each layer's ``formats`` exceed the budget.

    The sentence has the least bytes that they need. Only the table's costs are read, so nothing has to be measured.
    """
    sizes = {layer["name"]: layer["formats"] for layer in table["layers"]}
    least = table["fixed_bytes"] + sum(min(sizes[n][f]["bytes"] for f in names) for n, names in formats.items())
    if limit_bytes < least:
        raise BudgetError(unmet(limit_bytes, least, table["parameters"]))


def unmet(limit_bytes: int, least: int, parameters: int) -> str:
    """The sentence on a budget of bytes that is below the least."""
    per_bit = parameters / 8
    return (
        f"a budget of {limit_bytes} bytes ({limit_bytes / per_bit:.2f} true average bits) cannot be met: "
        f"the least that the formats allow is {least} bytes ({least / per_bit:.3f} bits)"
    )


def require_latency(table: CostTable, latency: float, formats: Mapping[str, Sequence[str]]) -> None:
    """Raises a BudgetError where even the fastest of each layer's ``formats`` take longer than ``latency`` ms.

    A table without times raises a UserError.
    """
    if "fixed_microseconds" not in table:
        raise UserError(
            "the sensitivity table holds no times, which --latency needs: measure it with `mpqc sensitivity MODEL "
            "--latency-table FILE`"
        )
    times = {layer["name"]: layer["formats"] for layer in table["layers"]}
    fixed = table["fixed_microseconds"] / 1e3
    least = fixed + sum(min(times[n][f]["microseconds"] for f in names) for n, names in formats.items()) / 1e3
    if latency < least:
        raise BudgetError(
            f"a latency of {latency:g} ms cannot be met: the smallest that the formats allow is {up(least)} ms, "
            f"{fixed:.4g} ms of it whatever they are"
        )


def up(value: float) -> str:
    """Formats a value in four digits, rounded up, so that the least budget that an error names can be met."""
    text = f"{value:.4g}"
    return text if float(text) >= value else f"{value * (1 + 1e-3):.4g}"


def _choices(
    table: SensitivityTable,
    layer: LayerCosts,
    readers: dict[str, list[str]],
    average: float,
    protected: Mapping[str, int | None],
    unquantized: float,
) -> list[dict[str, Any]]:
    """The choices of a layer: every format with every width, or with the width of a protected edge.

    ``average`` is the width by which an edge in float enters the average.
    """
    edges = layer["edges"]
    given = [protected[e] for e in edges if e in protected]
    widths: Sequence[int | None] = given[:1] or sorted({int(b) for e in edges for b in table["activations"][e]})
    shared = {e: 1 / len(readers[e]) for e in edges}
    elements, kind = sum(table["elements"][e] * shared[e] for e in edges), "f" if table.get("floating") else "u"

    def choice(name: str, loss: float, bits: int | None) -> dict[str, Any]:
        costs, width = layer["formats"][name], FLOAT if bits is None else f"{kind}{bits}"
        noise = sum((unquantized if bits is None else table["activations"][e][str(bits)]) * shared[e] for e in edges)
        read = FLOAT_BITS if bits is None else bits
        spent = {
            "bytes": costs["bytes"],
            "activation_bits": (average if bits is None else bits) * elements,
            "bops": layer_bops(layer["macs"], costs["bits"], read, costs.get("float_macs", 0)),
        }
        if "microseconds" in costs:
            spent["latency"] = costs["microseconds"]
        return {"name": f"{name} {width}", "loss": loss + noise, "costs": spent, "attributes": {"activation": width}}

    return [
        choice(name, loss, bits)
        for name, loss in table["weights"][layer["name"]].items()
        for bits in ([None] if layer["formats"][name].get("float") else widths)
    ]


def _attention_choices(table: SensitivityTable, name: str, unquantized: float) -> list[dict[str, Any]]:
    """The choices of an attention: float, at no bytes and 32 bits an activation, and the measured widths."""
    costs = table["attention_costs"][name]

    def choice(label: str, loss: float, bits: int, size: float) -> dict[str, Any]:
        spent = {"bytes": size, "activation_bits": bits * costs["elements"], "bops": costs["macs"] * bits * bits}
        if "fixed_microseconds" in table:
            spent["latency"] = 0.0  # it is among the fixed ones: no target with times has kernels for the others
        return {"name": label, "loss": loss, "costs": spent}

    measured = [choice(f"u{bits}", loss, int(bits), costs["bytes"]) for bits, loss in table["attention"][name].items()]
    return [choice(FLOAT, unquantized, FLOAT_BITS, 0), *measured]


def byte_limit(parameters: int, bits: float | None, size: int | None) -> int | None:
    """The payload bytes that both budgets allow, true average ``bits`` and bytes; None without either."""
    limits = [] if size is None else [size]
    if bits is not None:
        limits.append(int(bits * parameters / 8))
    return min(limits, default=None)
