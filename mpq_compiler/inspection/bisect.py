"""Finds the pass and the layer where a program went wrong, from its dumps alone (`mpqc inspect --bisect`).

Each pass is held to the contract that it declares, node by node and with forced inputs, so that no node answers for the
errors of another. docs/inspecting.md has the rules and the sources of their bounds.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mpq_compiler.analysis.teacher_forcing import ROUNDING
from mpq_compiler.inspection.dumps import OUTPUT, Dump
from mpq_compiler.pipeline import registry
from mpq_compiler.pipeline.passes import Contract, Role
from mpq_compiler.support.decibels import decibels
from mpq_compiler.support.errors import UserError

HALF_BIT, ONE_BIT, TWO_BITS = 2.0, 4.0, 16.0
"""Ratios of noise power that cost half a bit, one bit and two bits of width; a bit is 6 dB.

With noise of half a bit above the plan, the effective width rounds to a smaller one.
"""
STORED = 2.0**-20
"""The relative noise that stored types may cause in a node on leftovers: twice the unit roundoff of f16, squared."""
TIES = 2 * ROUNDING * 255
"""Share of codes that differ by one where the floats behind them differ by rounding: 2 * error / step of 8 bits."""
NEARER = 0.5
"""The ratio of squared distances below which a row counts as another row's."""


KINDS = ("groups", "table", "rows", "weight", "finite", "call", "leftover", "value")
"""The kinds of faults, causes before their effects; for a layer only the first kind is reported."""
LASTING = frozenset({"groups", "rows", "weight", "call", "leftover"})
"""The kinds that show again after later passes."""



@dataclass(frozen=True)
class Finding:
    """One thing that breaks the contract of a pass."""

    after: str
    """The pass that breaks it."""
    kind: str
    """One of `KINDS`."""
    node: str
    layers: tuple[str, ...]
    """The layers that the fault affects, as parameters without ``.weight``; the node where there are none."""
    measured: float | None
    """The measured figure; None where it is infinite."""
    allowed: float
    sentence: str

    @property
    def layer(self) -> str:
        """The first layer that the fault affects."""
        return self.layers[0]


@dataclass(frozen=True)
class Judged:
    """The judgement of a pass."""

    name: str
    contract: str
    nodes: int
    """The number of nodes that were compared with the program before."""
    findings: tuple[Finding, ...]
    sqnr_db: float | None


def judge(dumps: Sequence[Dump]) -> list[Judged]:
    """Judges every pass; findings are in the order of their kinds and of the graph.

    A fault is reported at the pass where it began, and not again after later ones.

    Raises:
        UserError: some dumps are missing.
    """
    gap = next((d.name for i, d in enumerate(dumps) if d.index != i), None)
    if gap is not None:
        raise UserError(f"the dump before that of '{gap}' is missing; --bisect needs those of the whole compilation")
    told: set[str] = set()
    judged = []
    for index, dump in enumerate(dumps):
        kept: dict[str, Finding] = {}
        for finding in sorted(_findings(dump, dumps[:index]), key=lambda f: KINDS.index(f.kind)):
            if finding.kind in LASTING and finding.layer in told:
                continue
            if not any(set(finding.layers) & set(f.layers) for f in kept.values()):
                kept[finding.node] = finding
        told.update(layer for f in kept.values() for layer in f.layers)
        findings = tuple(kept.values())
        judged.append(Judged(dump.name, str(dump.about["contract"]), len(dump.local), findings, dump.sqnr_db))
    return judged


def bisect(dumps: Sequence[Dump]) -> dict[str, Any]:
    """The verdict on all dumps as JSON: ``clean``, and the first fault's ``pass``, ``layer`` and ``sentence``."""
    judged = judge(dumps)
    first = next((f for j in judged for f in j.findings), None)
    return {
        "clean": first is None,
        "pass": None if first is None else first.after,
        "layer": None if first is None else first.layer,
        "sentence": f"nothing is wrong: {len(judged)} passes keep their promises" if first is None else first.sentence,
        "passes": [
            {
                "pass": j.name,
                "contract": j.contract,
                "nodes": j.nodes,
                "sqnr_db": j.sqnr_db,
                "findings": [{**asdict(f), "layers": list(f.layers)} for f in j.findings],
            }
            for j in judged
        ],
    }


# --- rules --------------------------------------------------------------------------------------------------


def _findings(dump: Dump, earlier: Sequence[Dump]) -> Iterator[Finding]:
    before = earlier[-1] if earlier else None
    yield from _groups(dump, before)
    yield from _tables(dump, before)
    yield from _finite(dump, before)
    if _trains(dump.name):
        return
    if dump.about["contract"] == Contract.SIMULATION:
        yield from _weights(dump)
        yield from _calls(dump)
    elif dump.about["contract"] == Contract.LOWERED:
        yield from _lowered(dump)
    else:
        yield from _values(dump)


def _trains(name: str) -> bool:
    """Whether the pass moves weights and leftovers away from the float model on purpose; held-out calls judge these."""
    known, _ = registry.usable()
    return name in known and known[name].role is Role.TRAINS


def _groups(dump: Dump, before: Dump | None) -> Iterator[Finding]:
    """Rule: time groups stay as `time-groups` decided."""
    now, decided = dump.about["boundaries"], dump.about.get("decided")
    then = decided if decided is not None else before.about["boundaries"] if before is not None else []
    if then and not _same(now, then):
        missing = [b for b in then if not any(_same([b], [c]) for c in now)]
        what = f"boundary {_numbers(missing)} is gone" if missing else f"boundaries are {_numbers(now)}"
        yield Finding(
            dump.name,
            "groups",
            "g",
            ("g", *_layers_of_edges(dump)),
            len(now) + 1,
            len(then) + 1,
            f"{dump.name} leaves {len(now) + 1} time groups of {len(then) + 1} that were decided on: {what}",
        )


def _same(a: Sequence[float], b: Sequence[float]) -> bool:
    return len(a) == len(b) and all(math.isclose(x, y, rel_tol=1e-5) for x, y in zip(a, b, strict=True))


def _tables(dump: Dump, before: Dump | None) -> Iterator[Finding]:
    """Rule: scales and zero points are unchanged where bits must stay, and nowhere half a bit noisier than planned."""
    promised = dump.about["contract"]
    for edge, table in dump.edges.items():
        old = before.edges.get(edge) if before is not None else None
        if old is not None and np.array_equal(old[:2], table[:2]):
            continue
        layers = _readers(dump, edge)
        if old is not None and (old.shape != table.shape or promised != Contract.SIMULATION):
            what = _changed(old, table)
            sentence = f"{dump.name} promises {_PROMISES[promised]}, and it changes the quantizer of '{edge}': {what}"
            yield Finding(dump.name, "table", edge, layers, None, 0.0, sentence + _read_by(layers))
            continue
        allowed = HALF_BIT * (table[3] if old is None else old[2])
        worst = int(np.argmax(table[2] / np.maximum(allowed, 1e-30)))
        if table[2, worst] > allowed[worst]:
            ratio = HALF_BIT * float(table[2, worst] / allowed[worst])
            than = "plain rounding" if old is None else "the planned one"
            sentence = (
                f"{dump.name}: the quantizer of '{edge}' in time group {worst} (scale {table[0, worst]:.3g}, zero "
                f"point {table[1, worst]:.0f}) is {_times(ratio)} as noisy as {than}, {_bits(ratio)} lost where half a "
                "bit is allowed"
            )
            yield Finding(dump.name, "table", edge, layers, ratio, HALF_BIT, sentence + _read_by(layers))


def _weights(dump: Dump) -> Iterator[Finding]:
    """Rule: noise above plain rounding is below half a bit for a weight, one bit for a K-group, two for a row.

    No row is nearer to another row of the float weight than to its own.
    """
    for path, weight in dump.weights.items():
        layer = (path.removesuffix(".weight"),)
        node = dump.about["layers"].get(path, [layer[0]])[0]
        suspects = dump.rows.get(path, np.zeros((0, 4)))
        swapped = [row for row in suspects if row[3] < NEARER]
        noisy = [row for row in suspects if row[1] > TWO_BITS]
        if swapped:
            nearer = float(swapped[0][3])
            rows = ", ".join(f"{int(r[0])} is nearest to {int(r[2])}" for r in swapped)
            what = f"rows of '{layer[0]}' are not where they belong: row {rows} of the float weight"
            sentence = f"{dump.name}: {what} (squared distance {nearer:.2g} of that to its own, allowed {NEARER})"
            yield Finding(dump.name, "rows", node, layer, nearer, NEARER, sentence)
        elif noisy:
            ratio = float(noisy[0][1])
            rows = ", ".join(str(int(r[0])) for r in noisy)
            what = f"row {rows} of '{layer[0]}' is {_times(ratio)} as noisy as plain rounding"
            sentence = f"{dump.name}: {what}, {_bits(ratio)} lost where two bits are allowed to a row"
            yield Finding(dump.name, "rows", node, layer, ratio, TWO_BITS, sentence)
        groups = dump.groups.get(path, np.zeros(1))
        if groups.max() > ONE_BIT:
            worst, ratio = int(groups.argmax()), float(groups.max())
            what = f"K-group {worst} of the {len(groups)} of '{layer[0]}' is {_times(ratio)} as noisy as plain rounding"
            sentence = f"{dump.name}: {what}, {_bits(ratio)} lost where one is allowed to a group"
            yield Finding(dump.name, "rows", node, layer, ratio, ONE_BIT, sentence)
        if weight[0] > HALF_BIT:
            what = f"the weight of '{layer[0]}' is {_times(weight[0])} as noisy as plain rounding at its width"
            power = f"{_decibels(weight[1])} at the layer's output, {_decibels(weight[2])} expected"
            sentence = f"{dump.name}: {what} ({power})"
            yield Finding(dump.name, "weight", node, layer, float(weight[0]), HALF_BIT, sentence)


def _calls(dump: Dump) -> Iterator[Finding]:
    """Rule: calls on quantized operands stay within a bit of the plan; others change by leftovers' rounding alone."""
    consumers = set(dump.about["consumers"])
    for node, d in dump.local.items():
        layer = (_layer(dump, node),)
        if node in dump.expected:
            ratio = d.noise / max(dump.expected[node], STORED)
            if ratio > ONE_BIT:
                sentence = (
                    f"{dump.name}: {_named(dump, node)} on the float program's inputs has a noise of "
                    f"{_decibels(d.noise)}, where its plan stands for {_decibels(dump.expected[node])}: {_bits(ratio)} "
                    "lost where one is allowed"
                )
                yield Finding(dump.name, "call", node, layer, _finite_or_none(ratio), ONE_BIT, sentence)
        elif node not in consumers and d.noise > STORED:
            sentence = (
                f"{dump.name}: {_named(dump, node)} reads nothing quantized, and departs by {_decibels(d.noise)} from "
                f"the float program where leftovers in half precision allow {_decibels(STORED)}"
            )
            yield Finding(dump.name, "leftover", node, layer, _finite_or_none(d.noise), STORED, sentence)


def _values(dump: Dump) -> Iterator[Finding]:
    """Rule: bits are equal; after a rewrite, equal to f32 rounding where departures do not return before the output."""
    promised = dump.about["contract"]
    rewrite = promised == Contract.REWRITE
    nodes = dump.about["departing"] if dump.about["agreeing"] else [n for n, d in dump.local.items() if d.share]
    if OUTPUT in dump.local and not nodes:
        d = dump.local[OUTPUT]
        nodes = [OUTPUT] if (d.largest > ROUNDING if rewrite else d.share) else []
    for node in nodes:
        d = dump.local[node]
        allowed = ROUNDING if rewrite else 0.0
        sentence = f"{dump.name} promises {_PROMISES[promised]}, and {_described(dump, node, d)}"
        yield Finding(dump.name, "value", node, (_layer(dump, node),), _finite_or_none(d.largest), allowed, sentence)


def _lowered(dump: Dump) -> Iterator[Finding]:
    """Kernels whose results are not those of the packed program: equal integers, floats within rounding."""
    for node, d in dump.local.items():
        allowed = float(dump.about["allowed"][node])
        codes = node in dump.values and dump.values[node].dtype.kind != "f"
        elements = math.prod(dump.shapes.get(node, ()))
        ties = max(TIES, 2 / max(elements, 1))
        if d.largest > allowed or (codes and allowed and d.share > ties):
            many = f" ({allowed:.0f} in {100 * ties:.2g} % allowed)" if codes and allowed else ""
            sentence = f"{dump.name} promises {_PROMISES[Contract.LOWERED]}, and {_described(dump, node, d)}{many}"
            measured, layer = _finite_or_none(d.largest), _layer(dump, node)
            yield Finding(dump.name, "value", node, (layer,), measured, allowed, sentence)


def _finite(dump: Dump, before: Dump | None) -> Iterator[Finding]:
    """Rule: no NaN or infinity where there was none before; masks may begin with one."""
    for node, values in dump.values.items():
        if values.dtype.kind != "f" or np.isfinite(values).all():
            continue
        known = None if before is None else before.values.get(node)
        if not np.isnan(values).any() if known is None else not np.isfinite(known).all():
            continue
        count = f"{int((~np.isfinite(values)).sum())} of {len(values)}"
        sentence = f"{dump.name}: {_named(dump, node)} is not finite in {count} sampled values"
        yield Finding(dump.name, "finite", node, (_layer(dump, node),), None, 0.0, sentence)
        return  # what reads it holds NaN as well


# --- words --------------------------------------------------------------------------------------------------

_PROMISES = {
    Contract.IDENTICAL: "the same bits",
    Contract.EXACT: "the bits of exact mode",
    Contract.LOWERED: "what the packed program computes of the same values",
    Contract.REWRITE: f"values within {ROUNDING:g} of the largest",
}


def _described(dump: Dump, node: str, d: Any) -> str:
    shape = dump.shapes.get(node, ())
    of = f" of {shape[-1]}" if shape else ""
    named = ", ".join(map(str, d.channels)) + (", ..." if d.departing > len(d.channels) else "")
    where = f", in channel {named} ({d.departing}{of})" if d.channels else ""
    if not math.isfinite(d.largest):
        return f"{_named(dump, node)} is not finite{where}"
    integer = dump.values[node].dtype.kind != "f" if node in dump.values else False
    by = f"by {d.largest:.0f} codes" if integer else f"by {d.largest:.2g} of the largest value"
    return f"{_named(dump, node)} departs {by} in {100 * d.share:.2g} % of its values{where}"


def _changed(old: np.ndarray, new: np.ndarray) -> str:
    if old.shape != new.shape:
        return f"{old.shape[1]} time groups become {new.shape[1]}"
    group = int(np.argmax((old[:2] != new[:2]).any(0)))
    parts = [
        f"{name} {old[i, group]:.4g} -> {new[i, group]:.4g}"
        for i, name in enumerate(("scale", "zero point"))
        if old[i, group] != new[i, group]
    ]
    return f"{', '.join(parts)} in time group {group}"


def _layer(dump: Dump, node: str) -> str:
    """The layer that a node belongs to, or the node itself."""
    for path, nodes in dump.about["layers"].items():
        if node in nodes:
            return str(path).removesuffix(".weight")
    edge = node.removesuffix("_q")
    return _readers(dump, edge)[0] if edge != node and edge in dump.about["readers"] else node


def _named(dump: Dump, node: str) -> str:
    layer = _layer(dump, node)
    return f"'{layer}'" if layer.replace(".", "_") in (layer, node) else f"'{node}' of layer '{layer}'"


def _readers(dump: Dump, edge: str) -> tuple[str, ...]:
    """The layers that read an edge; else the attention in which it lies, or the edge itself."""
    paths = dump.about["readers"].get(edge, [])
    return tuple(p.removesuffix(".weight") for p in paths) or (edge.split(":")[0],)


def _layers_of_edges(dump: Dump) -> tuple[str, ...]:
    return tuple(dict.fromkeys(layer for edge in dump.edges for layer in _readers(dump, edge)))


def _read_by(layers: tuple[str, ...]) -> str:
    more = f" and {len(layers) - 3} more" if len(layers) > 3 else ""
    return f"; read by {', '.join(layers[:3])}{more}"


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{v:g}" for v in values) or "none"


def _times(ratio: float) -> str:
    return f"{ratio:.3g} times"


def _bits(ratio: float) -> str:
    return f"{math.log2(ratio) / 2:.1f} bits" if math.isfinite(ratio) else "all bits"


def _decibels(power: float) -> str:
    if not math.isfinite(power):
        return "no finite value"
    level = decibels(power)
    return "none" if level is None else f"{level:.1f} dB"


def _finite_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None
