"""Histograms of an artifact's weights: where their values lie, and the levels that a row of them can take."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from mpq_compiler.formats import contract
from mpq_compiler.formats.contract import NO_LEVEL, WeightTables
from mpq_compiler.ir.stored_tensors import by_parameter

if TYPE_CHECKING:
    from mpq_compiler.artifact.bundle import Artifact

BINS = 49


def histograms(artifact: Artifact, segments: Mapping[str, Sequence[int]]) -> dict[str, dict[str, list[float]]]:
    """The histogram of each weight on integer codes, by parameter; low-rank branches are left out.

    Args:
        artifact: holds the weights.
        segments: the channel counts of each weight's K-groups; weights that are not here are left out.

    Returns:
        ``counts`` of the values in `BINS` equal bins, ``ends`` of the bins, and the ``levels`` of the row whose scale
        is the median.
    """
    found = {}
    entries = [entry for entry in artifact.manifest["tensors"] if entry["name"].partition(":")[0] in segments]
    for path, own in by_parameter(entries, artifact.tensors()).items():
        if "codes" not in own or "scale" not in own:
            continue
        tables = WeightTables(own["scale"], own.get("offset"), own.get("lut"), own.get("row_class"), segments[path])
        found[path] = histogram(own["codes"], tables)
    return found


def histogram(codes: torch.Tensor, tables: WeightTables[torch.Tensor]) -> dict[str, list[float]]:
    """The histogram of a weight of codes [O, K]."""
    weight = contract.dequantize(codes, tables)
    end = float(weight.abs().max()) or 1.0
    counts = torch.histc(weight, BINS, -end, end).to(torch.int64)
    scales = tables.scale[:, 0].to(torch.float32)
    row = int(scales.argsort()[len(scales) // 2])
    if tables.lut is None:
        steps = codes[row].unique().to(torch.float32)  # of 255 levels those that the row has
    else:
        steps = tables.lut[contract.row_classes(tables.row_class, len(codes))[row]]
        steps = steps[steps != NO_LEVEL].to(torch.float32)
    levels = steps * scales[row] + (0.0 if tables.offset is None else tables.offset[row].to(torch.float32))
    return {
        "counts": counts.tolist(),
        "ends": [-end, end],
        "levels": sorted(float(f"{level:.4g}") for level in levels.tolist() if math.isfinite(level)),
    }
