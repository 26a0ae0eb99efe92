"""Records the decisions of every pass on each layer (`ir.provenance`), after the pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mpq_compiler import formats
from mpq_compiler.allocation.sensitivity_table import ORTHOGONALITY
from mpq_compiler.ir import costs, ops, views
from mpq_compiler.ir.edges import input_edge
from mpq_compiler.ir.facts import Fact
from mpq_compiler.ir.findings import ALLOCATION, NO_LOSSES, SENSITIVITY
from mpq_compiler.ir.printer import operator_name
from mpq_compiler.ir.program import PARAMETERS, TIME_GROUPS, Program, Stage
from mpq_compiler.ir.provenance import PROGRAM, note
from mpq_compiler.pipeline.passes import Pass
from mpq_compiler.quantization.statistics import CALIBRATION, EdgeStatistics

# --- what every compilation decides -------------------------------------------------------------------------


def observe(index: int, done: Pass, before: Program, program: Program) -> None:
    """Notes the options of a pass, and the decisions that any pass of its kind adds to the program."""

    def new(fact: Fact[Any]) -> bool:
        return fact in program.facts and fact not in before.facts

    step = done.name()
    note(program, PROGRAM, step, options=done.options())
    if new(CALIBRATION):
        _calibrated(step, program)
    if new(TIME_GROUPS):
        _grouped(step, program)
    for fact in (SENSITIVITY, ORTHOGONALITY):
        if new(fact):
            table = program.facts[fact]
            _measured(step, program, table)
    if program.stage == Stage.PLANNED and before.stage != Stage.PLANNED:
        _planned(step, program)
    if program.stage == Stage.FAKE_QUANTIZED:
        _settled(step, before, program)
    if program.stage == Stage.PACKED:
        _packed(step, before, program)


def _calibrated(step: str, program: Program) -> None:
    calibration = program.facts[CALIBRATION]
    operations = costs.macs(program)
    readers: dict[str, list[str]] = {}
    for node in program.quantizable:
        readers.setdefault(input_edge(node).name, []).append(str(costs.weight_path(node)))
    note(program, PROGRAM, step, inputs=len(calibration.timesteps), timesteps=len(calibration.timesteps.unique()))
    for node in program.quantizable:
        path, edge = str(costs.weight_path(node)), input_edge(node).name
        weight = program.tensors[str(node.args[1].target)]  # type: ignore[union-attr]
        note(
            program,
            path,
            step,
            call=node.name,
            operator=operator_name(node.target),
            shape=list(weight.shape),
            macs=operations[node.name],
            edge=edge,
            shared_with=sorted({r for r in readers[edge] if r != path}),
            **_range(calibration.edges[edge], calibration.timesteps),
        )


def _range(edge: EdgeStatistics, timesteps: Tensor) -> dict[str, Any]:
    """The range, outliers and variation over time of an edge."""
    rms = float(edge.values.square().mean().sqrt())
    largest = float(torch.maximum(edge.low.abs(), edge.high.abs()).max())
    widths = [float(edge.high[timesteps == t].max() - edge.low[timesteps == t].min()) for t in timesteps.unique()]
    return {
        "elements": edge.elements,
        "low": float(edge.low.min()),
        "high": float(edge.high.max()),
        "rms": rms,
        "outliers": largest / max(rms, 1e-30),
        "time_variation": max(widths) / max(min(widths), 1e-30),
    }


def _grouped(step: str, program: Program) -> None:
    calibration = program.facts.get(CALIBRATION)
    boundaries = program.facts[TIME_GROUPS]
    note(program, PROGRAM, step, boundaries=boundaries)
    if calibration is None:
        return
    group = ops.time_group(calibration.inputs["timestep"], boundaries)
    inputs = [int((group == g).sum()) for g in range(len(boundaries) + 1)]
    note(program, PROGRAM, step, inputs=inputs)
    for node in program.quantizable:
        edge = calibration.edges[input_edge(node).name]
        ranges = [
            [float(edge.low[group == g].min()), float(edge.high[group == g].max())] if count else None
            for g, count in enumerate(inputs)
        ]
        note(program, str(costs.weight_path(node)), step, ranges=ranges)


def _measured(step: str, program: Program, table: Mapping[str, Any]) -> None:
    note(program, PROGRAM, step, inputs=table.get("inputs"))
    for node in program.quantizable:
        path, edge = str(costs.weight_path(node)), input_edge(node).name
        weight = str(node.args[1].target)  # type: ignore[union-attr]
        weights = {
            name: {"loss": loss, "bytes": costs.weight_bytes(program, weight, name)}
            for name, loss in table["weights"].get(path, {}).items()
        }
        note(program, path, step, weights=weights, activations=table["activations"].get(edge, {}))


def _planned(step: str, program: Program) -> None:
    stored = costs.stored_bytes(program)
    parameters = program.facts[PARAMETERS]
    allocation = program.facts.get(ALLOCATION, {})
    note(program, PROGRAM, step, bytes=stored, average_bits=costs.average_bits(stored, parameters), **allocation)
    losses = program.facts.get(SENSITIVITY, NO_LOSSES)["weights"]
    for node in program.quantizable:
        path, edge = str(costs.weight_path(node)), input_edge(node).name
        plan, activation = program.weights[path], program.activations.get(edge)
        size = costs.weight_bytes(program, str(node.args[1].target), plan.format)  # type: ignore[union-attr]
        note(
            program,
            path,
            step,
            format=plan.format,
            bytes=size,
            share=size / stored,
            loss=losses.get(path, {}).get(plan.format),
            fallback=program.fallbacks.get(node.name) or program.fallbacks.get(path),
        )
        if activation is not None:
            tables = {
                key: program.tensors[name]
                for key, name in (("scale", activation.scale), ("zero_point", activation.zero_point))
                if name is not None
            }
            kind = {} if activation.exponent is None else {"activation": activation.kind}
            note(program, path, step, activation_bits=activation.bits, dynamic=activation.dynamic, **kind, **tables)


def _settled(step: str, before: Program, program: Program) -> None:
    """Notes the weights that got their codes in this pass."""
    was = {levels.path: levels for levels in views.levels_of(views.flatten(before))}
    for levels in views.levels_of(views.flatten(program)):
        old = was.get(levels.path)
        if levels.codes is None or (old is not None and old.codes == levels.codes):
            continue
        found: dict[str, Any] = {"codes": "settled"}
        if levels.tables.lut is not None:
            found["table"] = [len(program.tensors[levels.tables.lut]), program.tensors[levels.tables.lut].shape[-1]]
        if levels.tables.scale is not None and old is not None and old.tables.scale is not None:
            then, now = (program.tensors[name].to(torch.float64) for name in (old.tables.scale, levels.tables.scale))
            if then.shape == now.shape:
                found["scale_to_range"] = float((now / then).mean())
        note(program, levels.path, step, **found)
    for call in views.flatten(program):
        if call.target is ops.binary_branch and call.name not in {c.name for c in views.flatten(before)}:
            alpha = views.stored(call.args[2])
            path = str(views.stored(call.args[0])).split(":")[0]
            note(program, path, step, branch="binary", alpha=program.tensors[str(alpha)])


def _packed(step: str, before: Program, program: Program) -> None:
    """Notes the form of layers in the packed program, and their epilogues."""
    old = {} if before.stage != Stage.PACKED else _forms(before)
    for path, form in _forms(program).items():
        if old.get(path) != form:
            note(program, path, step, **form)


def _forms(program: Program) -> dict[str, dict[str, Any]]:
    flat = views.flatten(program)
    levels = {made.call.name: made for made in views.levels_of(flat)}
    regions: dict[str, list[views.Call]] = {}
    for call in flat:
        if call.region is not None:
            regions.setdefault(call.region, []).append(call)
    found: dict[str, dict[str, Any]] = {}
    for call in flat:
        path = views.weight_path(call, levels)
        if path is None:
            continue
        inside = regions.get(call.region or "", [call])
        form: dict[str, Any] = {
            "operator": operator_name(call.target),
            "epilogue": [operator_name(c.target) for c in inside if c.name != call.name],
        }
        made = levels.get(call.name)
        if made is not None:
            plan = program.weights.get(path)
            form["code_bits"] = formats.get(plan.format).bits if plan else None
            form["offsets"] = made.tables.offset is not None
            form["tables"] = 0 if made.tables.lut is None else len(program.tensors[made.tables.lut])
            form["segments"] = list(call.args[10]) if call.target in views.PACKED_LAYERS else None
        found.setdefault(path, form)
    return found
