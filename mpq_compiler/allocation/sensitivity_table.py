"""The sensitivity table that `mpqc sensitivity` writes: its file, its checks, and the times that are added to it.

A table is plain data. It holds the measured losses, and everything that costs are computed from, so that an allocation
needs neither the model nor torch.

    {"version": 1, "model", "parameters", "fixed_bytes", "inputs",
     "weights": {layer: {format: loss}}, "activations": {edge: {bits: loss}}, "attention": {call: {bits: loss}},
     "layers": [{"name", "group"?, "weights"?, "edges", "macs",
                 "formats": {format: {"bits", "bytes", "float_macs"?, "float"?}}}],
     "elements": {edge: count},
     "attention_costs": {call: {"macs", "elements", "bytes"}}, "dynamic", "floating", "content"?, "fixed_microseconds"?}

``dynamic`` says that edges of linear layers were measured with one scale a row, ``floating`` that activations are small
floats, which layers of every format read ("fp8 f8"), ``content`` that losses of content layers are 1 - SSIM. With a
latency table, formats have their ``microseconds``, and ``fixed_microseconds`` is the time that no format changes. An
attention is a layer of its own, whose choices are "float" and the widths of its operands and probabilities.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from mpq_compiler.ir.facts import Fact
from mpq_compiler.ir.findings import CostTable, FormatCosts, LayerCosts, LossTable, SensitivityTable
from mpq_compiler.support.errors import UserError
from mpq_compiler.support.files import decode_json

VERSION = 1
"""The version of the table's format."""

CEILING_DB = 120.0
"""The SQNR in dB of a tensor that is not quantized, where losses are summed in dB (`pose.Terms.decibels`)."""
CONTENT, QUALITY = "content", "quality"
"""The names of the groups of layers (`mixdq_groups`)."""

ORTHOGONALITY = Fact[LossTable]("orthogonality")
"""A table of the bits that layers lack by their importance, in the form of the losses."""

Table = TypeVar("Table", bound=CostTable)


def is_table(path: str | Path) -> bool:
    """Whether the file is a sensitivity table rather than an allocation problem."""
    try:
        document = decode_json(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False  # whoever reads it as a problem says what is wrong
    return isinstance(document, dict) and "weights" in document and "layers" in document


def load(path: str | Path) -> SensitivityTable:
    """Reads a table from a file.

    Raises:
        UserError: it is unreadable, no table, or its parts contradict each other; the sentence names the key.
    """
    from mpq_compiler import schemas

    try:
        table: SensitivityTable = decode_json(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"the sensitivity table '{path}' cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"the sensitivity table '{path}' is not JSON: {error}") from error
    if wrong := schemas.check(table, "sensitivity"):
        raise UserError(f"'{path}' is no sensitivity table as `mpqc sensitivity` writes it: {wrong}")
    if wrong := next(_faults(table), None):
        raise UserError(f"the sensitivity table '{path}' does not fit together: {wrong}; measure it again")
    return table


def _faults(table: SensitivityTable) -> Iterator[str]:
    """Faults that the schema cannot express: losses that are not finite, layers, formats or edges that are missing."""
    attention = table.get("attention", {})
    measured = {"weights": table["weights"], "activations": table["activations"], "attention": attention}
    for kind, by_name in measured.items():
        for name, losses in by_name.items():
            if not losses:
                yield f"'{kind}.{name}' holds no loss"
            for choice, loss in losses.items():
                if not -math.inf < loss < math.inf:
                    yield f"'{kind}.{name}.{choice}' must be a finite number, not {loss}"
                if kind != "weights" and not re.fullmatch("[1-9][0-9]?", choice):
                    yield f"'{kind}.{name}' must be by number of bits, not by '{choice}'"
    names = [layer["name"] for layer in table["layers"]]
    for name in names:
        if name not in table["weights"]:
            yield f"'weights' lacks the layer '{name}' of 'layers'"
        if names.count(name) > 1:
            yield f"'layers' has '{name}' twice"
    for name in table["weights"].keys() - set(names):
        yield f"'weights.{name}' is no layer of 'layers'"
    for i, layer in enumerate(table["layers"]):
        if unknown := table["weights"][layer["name"]].keys() - layer["formats"].keys():
            yield f"'layers[{i}].formats' of '{layer['name']}' lacks '{min(unknown)}', which 'weights' holds a loss of"
        for edge in layer["edges"]:
            for kind, known in (("activations", table["activations"]), ("elements", table["elements"])):
                if edge not in known:
                    yield f"'{kind}' lacks '{edge}', which 'layers[{i}]' reads"
            if table["activations"][edge].keys() != table["activations"][layer["edges"][0]].keys():
                yield f"'activations' of the edges of 'layers[{i}]' must be of the same bits"
    for name in table.get("attention", {}).keys() - table.get("attention_costs", {}).keys():
        yield f"'attention_costs' lacks '{name}' of 'attention'"


def require_of(
    table: SensitivityTable, model: str, parameters: int, edges: Mapping[str, Sequence[str]] | None = None
) -> None:
    """Raises a UserError unless the table can be the model's, whatever the model is called.

    Args:
        table: the sensitivity table.
        model: the model's name, for the sentence.
        parameters: the model's number of parameters.
        edges: the edges that each layer reads, where they are known already.
    """
    name = table.get("model", "another model")
    of, ask = f"the sensitivity table (--sensitivity) is that of '{name}'", "measure this one with `mpqc sensitivity`"
    here = f"of '{model}' in this pipeline: {ask}, in the same pipeline"
    if table["parameters"] != parameters:
        raise UserError(f"{of} with {table['parameters']} parameters, and '{model}' has {parameters}: {ask}")
    if edges is None:
        return
    for wanted, known in ((edges.keys(), table["weights"]), (set().union(*edges.values()), table["activations"])):
        if missing := sorted(wanted - known.keys()):
            raise UserError(f"{of}, and lacks '{missing[0]}' {here}")
    if extra := sorted(table["weights"].keys() - edges.keys()):
        raise UserError(f"{of}, and its '{extra[0]}' is no layer {here}")


def with_latencies(table: Table, fixed: float, layers: Mapping[str, Mapping[str, float]]) -> Table:
    """Adds times to a table.

    Args:
        table: the sensitivity table.
        fixed: microseconds that no format changes.
        layers: microseconds of each layer by format.
    """

    def timed(layer: LayerCosts) -> LayerCosts:
        times = layers[layer["name"]]
        costs: dict[str, FormatCosts] = {
            name: {**cost, "microseconds": times[name]} if name in times else cost
            for name, cost in layer["formats"].items()
        }
        return {**layer, "formats": costs}

    found = table.copy()
    found["fixed_microseconds"] = fixed
    found["layers"] = [timed(layer) for layer in table["layers"]]
    return found
