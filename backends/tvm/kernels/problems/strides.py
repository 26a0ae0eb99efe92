"""Extents and strides of loop nests over tensors."""

from __future__ import annotations

from collections.abc import Sequence

from mpq_compiler.backends.tvm.kernels.problems.argument import BATCH, Shape


def sample_extents(shape: Shape) -> list[int]:
    """Extents with the batch as 1, so that strides are those within a sample."""
    if BATCH in shape[1:]:
        raise ValueError(f"the batch must be the first dimension of {shape}")
    return [1 if extent == BATCH else int(extent) for extent in shape]


def merge_dimensions(extents: Sequence[int], strides: Sequence[Sequence[int]]) -> tuple[list[int], list[list[int]]]:
    """Merges neighbouring dimensions that every operand steps through evenly.

    extents: of the loop nest, outermost first. strides: for each operand, one stride for each dimension (0
    where it is broadcast). The result describes the same accesses in as few dimensions as possible.
    """
    kept = [d for d, extent in enumerate(extents) if extent != 1]
    if not kept:
        return [1], [[0] for _ in strides]
    sizes = [extents[kept[0]]]
    steps = [[stride[kept[0]]] for stride in strides]
    for d in kept[1:]:
        if all(step[-1] == stride[d] * extents[d] for step, stride in zip(steps, strides, strict=True)):
            sizes[-1] *= extents[d]
            for step, stride in zip(steps, strides, strict=True):
                step[-1] = stride[d]
        else:
            sizes.append(extents[d])
            for step, stride in zip(steps, strides, strict=True):
                step.append(stride[d])
    return sizes, steps
