"""The algebra of data movement, which reduces a chain to at most a reshape, a permute and a reshape.

The elements of a tensor are addressed by *atoms*, factors of its dimensions. Permutes reorder them, reshapes regroup
and split them, repeats add atoms that address nothing. Only the order of the atoms counts in the end.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from mpq_compiler.ir.aten import aten

Size = tuple[int, int]
"""A size at the batch sizes 2 and 3: (n, n), or (2n, 3n) where it grows with the batch."""
Step = tuple[Any, list[int]]
"""An operator of data movement and its argument; -1 is the size that grows with the batch."""
ONE: Size = (1, 1)


def _is_size(size: Size) -> bool:
    return size[0] == size[1] or 3 * size[0] == 2 * size[1]


def _over(a: Size, b: Size) -> Size | None:
    """The quotient a / b where that is a size, else None."""
    if a[0] % b[0] or a[1] % b[1]:
        return None
    quotient = a[0] // b[0], a[1] // b[1]
    return quotient if _is_size(quotient) else None


def _written(size: Size) -> int:
    return size[0] if size[0] == size[1] else -1


@dataclass
class Chain:
    """A chain of data movement: the dimensions of its result, as atoms of its source."""

    source: tuple[Size, ...]
    sizes: dict[int, Size] = field(default_factory=dict)
    order: list[int] = field(default_factory=list)
    """The atoms of the source, outermost first."""
    dims: list[list[int]] = field(default_factory=list)
    """The atoms of each dimension of the result."""
    repeated: set[int] = field(default_factory=set)
    """The atoms that address nothing: they repeat the same elements."""

    def __post_init__(self) -> None:
        for size in self.source:
            self.dims.append([] if size == ONE else [self._new(size)])
        self.order = [atom for dim in self.dims for atom in dim]

    def _new(self, size: Size) -> int:
        self.sizes[len(self.sizes)] = size
        return len(self.sizes) - 1

    def shape(self) -> tuple[Size, ...]:
        """The shape of the result."""
        return tuple(self._product(dim) for dim in self.dims)

    def _product(self, atoms: Sequence[int]) -> Size:
        total = ONE
        for atom in atoms:
            total = total[0] * self.sizes[atom][0], total[1] * self.sizes[atom][1]
        return total

    def permute(self, order: Sequence[int]) -> None:
        """Permutes the dimensions."""
        self.dims = [self.dims[d] for d in order]

    def repeat(self, dim: int, size: Size, inner: bool) -> None:
        """Repeats dimension ``dim`` by the factor ``size``: each element (inner), or all elements in turn."""
        atom = self._new(size)
        self.repeated.add(atom)
        self.dims[dim] = [*self.dims[dim], atom] if inner else [atom, *self.dims[dim]]

    def reshape(self, shape: Sequence[Size]) -> bool:
        """Reshapes by regrouping the atoms; False where the new dimensions are no products of them."""
        queue = [atom for dim in self.dims for atom in dim]
        dims: list[list[int]] = []
        for wanted in shape:
            dims.append([])
            while wanted != ONE:
                if not queue:
                    return False
                atom = queue.pop(0)
                if (rest := _over(wanted, self.sizes[atom])) is not None:
                    dims[-1].append(atom)
                    wanted = rest
                elif (rest := _over(self.sizes[atom], wanted)) is not None:
                    inner = self._split(atom, wanted, rest)
                    dims[-1].append(atom)
                    queue.insert(0, inner)
                    wanted = ONE
                else:
                    return False
        self.dims = dims
        return not queue

    def _split(self, atom: int, outer: Size, inner: Size) -> int:
        new = self._new(inner)
        self.sizes[atom] = outer
        if atom in self.repeated:
            self.repeated.add(new)
        else:
            self.order.insert(self.order.index(atom) + 1, new)
        return new

    def without_repeats(self) -> bool:
        """Reduces dimensions that only repeat to 1; False where a dimension repeats and holds elements, too."""
        if any(0 < len(self.repeated & set(dim)) < len(dim) for dim in self.dims):
            return False
        self.dims = [[] if self.repeated & set(dim) else dim for dim in self.dims]
        return True

    def leads_with_batch(self) -> bool:
        """Whether the size that grows with the batch is the outermost."""
        grows = [self.sizes[a][0] != self.sizes[a][1] for dim in self.dims for a in dim]
        return grows[:1] == [True]

    def steps(self) -> list[Step]:
        """The calls that compute the result from the source; the permute comes last where that is possible."""
        place = {atom: i for i, atom in enumerate(self.order)}
        flat = [atom for dim in self.dims for atom in dim]
        if flat == self.order:
            return _reshapes(self.source, self.shape())
        if all(_consecutive([place[a] for a in dim]) for dim in self.dims):
            groups, regrouped = self.dims, self.shape()
        else:
            groups = [list(run) for run in _runs(flat, place)]
            regrouped = None
        keys = [place[group[0]] if group else -1 for group in groups]
        for i, key in enumerate(keys):  # a dimension of size 1 stays behind the one before it
            keys[i] = key if key >= 0 else (keys[i - 1] if i else 0)
        stable = sorted(range(len(groups)), key=lambda i: (keys[i], i))
        first = _reshapes(self.source, tuple(self._product(groups[i]) for i in stable))
        order = [stable.index(i) for i in range(len(groups))]
        last = [] if regrouped else [(aten.reshape.default, [_written(s) for s in self.shape()])]
        return [*first, (aten.permute.default, order), *last]


def _reshapes(before: tuple[Size, ...], after: tuple[Size, ...]) -> list[Step]:
    return [] if before == after else [(aten.reshape.default, [_written(s) for s in after])]


def _consecutive(places: Sequence[int]) -> bool:
    return all(b == a + 1 for a, b in itertools.pairwise(places))


def _runs(atoms: Sequence[int], place: dict[int, int]) -> list[list[int]]:
    runs: list[list[int]] = []
    for atom in atoms:
        if runs and place[atom] == place[runs[-1][-1]] + 1:
            runs[-1].append(atom)
        else:
            runs.append([atom])
    return runs


def follow(chain: Chain, node: fx.Node, shape: tuple[Size, ...]) -> bool:
    """Applies a call of `aten.MOVEMENT`, or a repetition, to the chain.

    shape: of the call's result.

    Returns:
        False where the call is no such rearrangement; the chain is invalid then.
    """
    target, rank = node.target, len(chain.dims)
    if target is aten.permute.default:
        chain.permute([int(d) % rank for d in node.args[1]])  # type: ignore[union-attr, arg-type]
    elif target in (aten.transpose.int, aten.swapaxes.default, aten.t.default):
        a, b = (0, rank - 1) if target is aten.t.default else (int(d) % rank for d in node.args[1:3])  # type: ignore[arg-type]
        order = list(range(rank))
        order[a], order[b] = order[b], order[a]
        chain.permute(order)
    elif target is aten.repeat_interleave.self_int:
        dim = int(node.args[2]) % rank  # type: ignore[arg-type]
        chain.repeat(dim, (int(node.args[1]),) * 2, inner=True)  # type: ignore[arg-type]
    elif target is aten.expand.default:
        chain.dims = [[] for _ in range(len(shape) - rank)] + chain.dims
        for dim, (before, after) in enumerate(zip(chain.shape(), shape, strict=True)):
            if before != after:
                chain.repeat(dim, after, inner=True)
    else:
        return chain.reshape(shape)
    return chain.shape() == shape
