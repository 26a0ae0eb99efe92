"""Rules of quantized weights: codes, tables, scales, offsets, row classes, branches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mpq_compiler.formats import contract, low_rank
from mpq_compiler.formats.residual import ResidualFormat
from mpq_compiler.ir import views
from mpq_compiler.ir.lora import LORA
from mpq_compiler.ir.verifier.view import QUANTIZED, SIMULATED, Findings, Rules, View
from mpq_compiler.ir.views import Levels

RULES = Rules()
LUT_SIZES = (4, 8, 16, 32)
"""The entries of a table that codes are packed by."""


@RULES.add("codes", QUANTIZED)
def _codes(view: View) -> Findings:
    """u8 codes of levels of their table, or int8 values within +-127 where there is none; of FP8 any u8."""
    for levels in view.levels:
        if levels.codes is None:
            continue
        codes = view.tensor(levels.codes)
        if not levels.integer:
            sound = codes.dtype == torch.uint8
        elif levels.tables.lut is None:
            sound = codes.dtype == torch.int8 and int(codes.min()) >= -contract.LUT_MAX
        else:
            most = _levels_of_rows(view, levels, len(codes))
            sound = codes.dtype == torch.uint8 and bool((codes.amax(1) < most).all())
        if not sound:
            yield levels.call.name, f"'{levels.codes}' ({codes.dtype}) holds codes outside of their table"


def _levels_of_rows(view: View, levels: Levels, rows: int) -> Tensor:
    """How many levels the table of each row has; where classes are not sound (`row-classes`) the most of any table."""
    counts = 2 ** torch.tensor(contract.class_bits(view.tensor(str(levels.tables.lut))))
    if levels.tables.row_class is not None:
        classes = contract.row_classes(view.tensor(levels.tables.row_class), rows)
        if len(classes) == rows and int(classes.max()) < len(counts):
            return counts[classes]
    return counts.max()


@RULES.add("table-range", QUANTIZED)
def _table_range(view: View) -> Findings:
    """int8 entries within +-127; a table may have fewer levels than entries, a power of two in front of the filling."""
    for levels in view.levels:
        if levels.tables.lut is None:
            continue
        lut = view.tensor(levels.tables.lut)
        filled = lut == contract.NO_LEVEL
        sizes = [len(table) - int(n) for table, n in zip(lut, filled.sum(1), strict=True)]
        behind = all(bool(f[n:].all()) for f, n in zip(filled, sizes, strict=True))
        if lut.dtype != torch.int8 or not behind or max(sizes) < lut.shape[1] or any(n < 2 or n & n - 1 for n in sizes):
            yield levels.call.name, f"'{levels.tables.lut}' ({lut.dtype}) has entries outside of -127..127"


@RULES.add("table-size", QUANTIZED)
def _table_size(view: View) -> Findings:
    """A table [classes, 2^bits] with the bits of the planned format, or of its base while there is a branch."""
    based = {b.base.call.name for b in view.branches if b.base is not None}
    for levels in view.levels:
        planned = view.format(levels.path)
        if planned is None:
            continue
        base = planned.base if isinstance(planned, low_rank.LowRankFormat) else planned
        bits = base.index_bits
        # an open weight has the base's table; that of a low-rank format the merged one, once its branch is in the graph
        beside = levels.codes is None and (base is planned or ":range." in (levels.tables.lut or ""))
        apart = isinstance(base, ResidualFormat) and (beside or levels.call.name in based)
        if isinstance(base, ResidualFormat) and apart:
            bits = base.base_bits  # of one bit, too: its branch makes four levels of two before codes are packed
        size = None if levels.tables.lut is None else tuple(view.tensor(levels.tables.lut).shape)
        if size is None:
            if bits != 8:
                yield levels.call.name, f"{planned.name} needs a table of {2**bits} entries and there is none"
        elif len(size) != 2 or size[1] != 2**bits or not (apart or size[1] in LUT_SIZES):
            what = f"has the shape {list(size)}; {planned.name} has {2**bits} levels"
            yield levels.call.name, f"'{levels.tables.lut}' {what}"


@RULES.add("weight-scales", QUANTIZED)
def _weight_scales(view: View) -> Findings:
    """Positive f16 scales [O, J], one for each row and K-segment; of FP8 [O]."""
    for levels in view.levels:
        if levels.tables.scale is None:
            yield levels.call.name, "its scale is not in the store"
            continue
        scale = view.tensor(levels.tables.scale)
        rows = len(view.tensor(str(levels.codes or levels.weight)))
        shape = (rows, levels.segments) if levels.integer else (rows,)
        if scale.dtype != torch.float16 or tuple(scale.shape) != shape or not bool((scale > 0).all()):
            kind = f"{list(scale.shape)} ({scale.dtype})"
            yield levels.call.name, f"'{levels.tables.scale}' {kind} does not hold {list(shape)} positive halves"


@RULES.add("offsets", QUANTIZED)
def _offsets(view: View) -> Findings:
    """Offsets [O] where the planned format has them, and only there."""
    for levels in view.levels:
        planned = view.format(levels.path)
        if planned is None:
            continue
        if (levels.tables.offset is not None) != planned.has_offset:
            yield levels.call.name, f"{planned.name} has {'no ' if levels.tables.offset else ''}offsets"
        elif levels.tables.offset is not None:
            rows = len(view.tensor(str(levels.codes or levels.weight)))
            if tuple(view.tensor(levels.tables.offset).shape) != (rows,):
                yield levels.call.name, f"'{levels.tables.offset}' is not one offset a row"


def _nested(lut: Tensor) -> bool:
    """Whether each table has a bit more than the one before, and the last rises and holds the levels of all."""
    bits, inside = contract.class_bits(lut), lut[lut != contract.NO_LEVEL]
    steps = bits == tuple(range(bits[0], bits[0] + len(bits))) and bool((lut[-1, 1:] >= lut[-1, :-1]).all())
    return steps and bool(torch.isin(inside, lut[-1]).all())


@RULES.add("row-classes", QUANTIZED)
def _row_classes(view: View) -> Findings:
    """A class u8 below the number of tables for every 16 rows, where there are several tables.

    Where tables differ in size every row has a class, each table one bit more than the one before, and the last holds
    the others: a kernel looks all rows up in that one.
    """
    for levels in view.levels:
        classes = 1 if levels.tables.lut is None else len(view.tensor(levels.tables.lut))
        if levels.tables.row_class is None:
            if classes != 1:
                yield levels.call.name, f"{classes} tables and no row classes"
            continue
        table, lut = view.tensor(levels.tables.row_class), view.tensor(str(levels.tables.lut))
        rows, kind = len(view.tensor(str(levels.codes or levels.weight))), "rows"
        if len({*contract.class_bits(lut)}) == 1:
            rows, kind = -(-rows // contract.TILE_ROWS), "tiles"
        elif not _nested(lut):
            yield levels.call.name, f"the tables of '{levels.tables.lut}' are not each within the next, of one bit more"
        if table.dtype != torch.uint8 or tuple(table.shape) != (rows,) or int(table.max()) >= classes:
            what = f"is not one of {classes} classes for each of {rows} {kind}"
            yield levels.call.name, f"'{levels.tables.row_class}' {what}"


@RULES.add("branches", SIMULATED)
def _branches(view: View) -> Findings:
    """Signs 0 or 1, an int8 alpha, the base's scale, and a merged table within +-127."""
    for b in view.branches:
        call, base = b.call, b.base
        if base is None or base.tables.lut is None or base.codes is None or b.signs is None or b.alpha is None:
            yield call.name, "it is not added to a base of its own"
            continue
        sign, step = view.tensor(b.signs), view.tensor(b.alpha)
        if sign.dtype != torch.uint8 or int(sign.max()) > 1 or sign.shape != view.tensor(base.codes).shape:
            yield call.name, f"'{b.signs}' is not a sign 0 or 1 for each code of its base"
        if b.scale != base.tables.scale:
            yield call.name, "branch and base have different scales"
        if step.dtype != torch.int8 or step.numel() != 1:
            yield call.name, f"'{b.alpha}' is no int8 step of the table's grid"
        elif int(view.tensor(base.tables.lut).to(torch.int16).abs().max()) + abs(int(step)) > contract.LUT_MAX:
            yield call.name, "base and branch together leave the range of int8"


@RULES.add("low-rank", QUANTIZED)
def _low_rank(view: View) -> Findings:
    """A settled low-rank weight is read with both factors, halves [O, r] and [r, ...]; no other weight has any."""
    factors: dict[str, dict[str, str]] = {}
    for node, name in view.reads:
        part = views.factor(name)
        if part is None:
            continue
        path = name.split(":")[0]
        factors.setdefault(path, {})[part] = name
        if not isinstance(view.format(path), low_rank.LowRankFormat):
            yield node, f"'{name}' is a factor of a weight that is planned without a branch"
    for levels in view.levels:
        if levels.codes is None or not isinstance(view.format(levels.path), low_rank.LowRankFormat):
            continue
        names = factors.get(levels.path, {})
        if len(names) < len(views.FACTORS):
            yield levels.call.name, f"the low-rank branch of '{levels.path}' is not in the graph"
            continue
        up, down = (view.tensor(names[part]) for part in views.FACTORS)
        rows = len(view.tensor(levels.codes))
        if up.dtype != torch.float16 or down.dtype != torch.float16 or tuple(up.shape) != (rows, len(down)):
            yield levels.call.name, f"the factors {list(up.shape)} and {list(down.shape)} are not halves of one rank"


@RULES.add("lora", QUANTIZED)
def _lora(view: View) -> Findings:
    """A LoRA branch has both factors, halves [O, r] and [r, ...] of one rank; only those that are listed exist."""
    listed = view.program.facts.get(LORA)
    branches = {} if listed is None else listed.branches
    read: dict[str, set[str]] = {}
    for node, name in view.reads:
        if views.lora_factor(name) is None:
            continue
        path = name.split(":")[0]
        read.setdefault(path, set()).add(name)
        if path not in branches or name not in (branches[path].up, branches[path].down):
            yield node, f"'{name}' is a factor of a LoRA branch that is not listed"
    for path, branch in branches.items():
        if read.get(path, set()) != {branch.up, branch.down}:
            yield path, "its LoRA branch is not in the graph"
            continue
        up, down, rows = view.tensor(branch.up), view.tensor(branch.down), len(view.tensor(path))
        halves = up.dtype == down.dtype == torch.float16
        if not halves or tuple(up.shape) != (rows, branch.rank) or len(down) != branch.rank:
            yield path, f"the factors {list(up.shape)} and {list(down.shape)} are not halves of rank {branch.rank}"


@RULES.add("shared-weights", QUANTIZED)
def _shared_weights(view: View) -> Findings:
    """All calls that read a parameter read the same codes and scales."""
    parts: dict[str, set[Any]] = {}
    for levels in view.levels:
        made_of = (levels.weight, levels.codes, levels.tables.operands)
        parts.setdefault(levels.path, set()).add(made_of)
        if len(parts[levels.path]) > 1:
            yield levels.call.name, f"another call reads other codes of '{levels.path}'"
