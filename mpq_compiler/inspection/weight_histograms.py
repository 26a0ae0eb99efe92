"""Histograms of an artifact's weights: where their values and those of the float model lie, and the levels of a row."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from mpq_compiler.artifact.bundle import REWRITES
from mpq_compiler.formats import contract
from mpq_compiler.formats.contract import NO_LEVEL, WeightTables
from mpq_compiler.interchange import original
from mpq_compiler.ir.rewrites import bases
from mpq_compiler.ir.stored_tensors import by_parameter
from mpq_compiler.ir.weight_basis import Basis

if TYPE_CHECKING:
    from mpq_compiler.artifact.bundle import Artifact

BINS = 49


def histograms(
    artifact: Artifact, segments: Mapping[str, Sequence[int]], model: Mapping[str, torch.Tensor] | None = None
) -> dict[str, dict[str, list[float]]]:
    """The histogram of each weight on integer codes, by parameter; low-rank branches are left out.

    Args:
        artifact: holds the weights.
        segments: the channel counts of each weight's K-groups; weights that are not here are left out.
        model: the parameters that were compiled, by name; None where they are not known.

    Returns:
        ``counts`` of the values in `BINS` equal bins, ``ends`` of the bins, the ``levels`` of the row whose scale is
        the median, and with the model ``float``, the counts of its weight, rewritten as passes rewrote it.

    Raises:
        UserError: the artifact was made of another model.
    """
    rewrites = artifact.manifest.get("rewrites")
    known = {} if model is None or rewrites is None else model  # older artifacts do not say what passes rewrote
    steps = bases(rewrites, artifact.tensors(REWRITES)) if rewrites else {}
    found = {}
    entries = [entry for entry in artifact.manifest["tensors"] if entry["name"].partition(":")[0] in segments]
    for path, own in by_parameter(entries, artifact.tensors()).items():
        if "codes" not in own or "scale" not in own:
            continue
        tables = WeightTables(own["scale"], own.get("offset"), own.get("lut"), own.get("row_class"), segments[path])
        basis = steps.get(path, Basis(path))
        weight = None if basis.origin not in known else _rows(artifact, known[basis.origin], basis, own["codes"].shape)
        found[path] = histogram(own["codes"], tables, weight)
    return found


def _rows(artifact: Artifact, weight: torch.Tensor, basis: Basis, shape: torch.Size) -> torch.Tensor:
    """The model's rows that codes of a shape stand for. UserError: its weight has others."""
    try:
        rows = original.rewritten(weight, basis)
    except RuntimeError:  # the steps fit other channels
        rows = weight[:0]
    if rows.shape != shape:
        raise original.of_another(artifact, f"its '{basis.origin}' has another shape")
    return rows


def histogram(
    codes: torch.Tensor, tables: WeightTables[torch.Tensor], weight: torch.Tensor | None = None
) -> dict[str, list[float]]:
    """The histogram of a weight of codes [O, K], and that of the float weight they are of."""
    values = {"counts": contract.dequantize(codes, tables)} | ({} if weight is None else {"float": weight})
    end = max(float(each.abs().max()) for each in values.values()) or 1.0
    counts = {name: torch.histc(each, BINS, -end, end).to(torch.int64).tolist() for name, each in values.items()}
    scales = tables.scale[:, 0].to(torch.float32)
    row = int(scales.argsort()[len(scales) // 2])
    if tables.lut is None:
        steps = codes[row].unique().to(torch.float32)  # of 255 levels those that the row has
    else:
        steps = tables.lut[contract.row_classes(tables.row_class, len(codes))[row]]
        steps = steps[steps != NO_LEVEL].to(torch.float32)
    levels = steps * scales[row] + (0.0 if tables.offset is None else tables.offset[row].to(torch.float32))
    return {
        **counts,
        "ends": [-end, end],
        "levels": sorted(float(f"{level:.4g}") for level in levels.tolist() if math.isfinite(level)),
    }
