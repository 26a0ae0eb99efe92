"""GPTQ along several paths: of each row the best sequences of codes so far go on, and the best one at the end stays.

GPTQ takes the level nearest to each column and never goes back, which is Babai's nearest plane (Chen 2025, "The
geometry of LLM quantization", arXiv 2507.18553). The codes of the least error are the lattice point closest to the row,
and a search that keeps a number of candidates at each level of its tree comes close to it: K-best sphere decoding (Guo
and Nilsson 2006, "Algorithm and implementation of the K-best sphere decoding for MIMO detection", section III). A path
goes on to the two levels nearest to where its column stands.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

TOGETHER = 1 << 14
"""The numbers of a column, over all paths of some rows, that are worked on at once: they stay in a core's caches."""
NEAR = 8
"""The number of columns whose errors each path carries along, before they are carried into all columns behind."""

NearestTwo = Callable[[slice, Tensor], tuple[Tensor, Tensor]]
"""The nearest and the second nearest entries, f32 [P, O], to values in steps [P, O] of some rows; infinite where there
is none."""


@dataclass(frozen=True)
class Walk:
    """Columns of a weight in the order in which they are taken."""

    stands: Tensor
    """The weight, and what the columns before these have left, f32 [B, O]."""
    given: Tensor
    """The weight, f32 [B, O]."""
    scales: Tensor
    """The scale of each number, f32 [B, O]."""
    offset: Tensor | None
    """The offset of each row, f32 [O]."""
    carried: Tensor
    """The matrix U [B, B] that carries a column's error into those behind it, f32."""
    cost: Tensor
    """What the square of the error that a column is left with costs, f32 [B]."""

    def of_rows(self, some: slice) -> Walk:
        """The walk over some of the rows."""
        stands, given, scales = (x[:, some] for x in (self.stands, self.given, self.scales))
        return replace(
            self, stands=stands, given=given, scales=scales, offset=None if self.offset is None else self.offset[some]
        )

    def steps(self, column: int, values: Tensor) -> Tensor:
        """Values [P, O] of a column in steps."""
        return (values if self.offset is None else values - self.offset) / self.scales[column]

    def levels(self, entries: Tensor, scales: Tensor) -> Tensor:
        """The weights that entries stand for: [P, O] of a column, or [B, O] of all."""
        found = entries * scales
        return found if self.offset is None else found + self.offset


def best_entries(walk: Walk, nearest_two: NearestTwo, paths: int) -> Tensor:
    """The entries that columns have on the best of so many paths of each row, f32 [B, O]."""
    found = torch.empty_like(walk.stands)
    rows = max(1, TOGETHER // paths)
    for start in range(0, found.shape[1], rows):
        some = slice(start, start + rows)
        found[:, some] = _of_rows(walk.of_rows(some), partial(nearest_two, some), paths)
    return found


def _of_rows(walk: Walk, nearest_two: Callable[[Tensor], tuple[Tensor, Tensor]], paths: int) -> Tensor:
    count, rows = walk.stands.shape
    carried = walk.carried
    stands = walk.stands[:, None].repeat(1, paths, 1)  # of each path, as the columns before the last few leave it
    entries, parents = torch.empty(count, paths, rows), torch.empty(count, paths, rows, dtype=torch.int64)
    spent = torch.full((paths, rows), torch.inf)
    spent[0] = 0  # one path at first
    for start in range(0, count, NEAR):
        end = min(start + NEAR, count)
        errors = torch.empty(end - start, paths, rows)
        since = torch.arange(paths)[:, None].expand(paths, rows)
        for i in range(start, end):
            values, near = stands[i].gather(0, since), errors[: i - start]
            if len(near):
                values.view(-1).addmv_(near.view(len(near), -1).T, carried[start:i, i])
            at = walk.steps(i, values)
            both = torch.stack(nearest_two(at))
            further = spent + walk.cost[i] * ((at - both) * walk.scales[i]).square()
            spent, chosen = further.view(2 * paths, rows).topk(paths, 0, largest=False)
            entries[i], parents[i] = both.view(2 * paths, rows).gather(0, chosen), chosen % paths
            since = since.gather(0, parents[i])
            if len(near):
                near.copy_(near.gather(1, parents[i].expand_as(near)))
            torch.sub(walk.given[i], walk.levels(entries[i], walk.scales[i]), out=errors[i - start])
        if end < count:
            behind, added = stands[end:], carried[start:end, end:].T @ errors.view(end - start, -1)
            behind.copy_(behind.gather(1, since.expand_as(behind)) + added.view_as(behind))
    path = spent.argmin(0, keepdim=True)
    found = torch.empty_like(walk.stands)
    for i in range(count - 1, -1, -1):
        found[i] = entries[i].gather(0, path)[0]
        path = parents[i].gather(0, path)
    return found
