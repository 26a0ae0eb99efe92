"""Tensors in files that go with the process: what is too large to hold in memory while other things are done."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Sequence

import torch
from torch import Tensor

from mpq_compiler.support.errors import UserError

LEAST = 1 << 19
"""The bytes from which on a tensor lies in a file."""


def zeros(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """Zeros; those of `LEAST` bytes and more are mapped from a file in `TMPDIR`, which the system may write out.

    The file has no name any more, so that nothing stays behind, however the process ends. UserError: the disk is full.
    """
    count = math.prod(shape)
    size = count * dtype.itemsize
    if size < LEAST:
        return torch.zeros(*shape, dtype=dtype)
    with tempfile.NamedTemporaryFile(prefix="mpqc-") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            raise UserError(
                f"{size / 2**20:.0f} MiB do not fit in '{tempfile.gettempdir()}' ({error.strerror}): free some space "
                "there, or name another folder with TMPDIR"
            ) from error
        return torch.from_file(file.name, shared=True, size=count, dtype=dtype).reshape(*shape)


def is_mapped(tensor: Tensor) -> bool:
    """Whether a tensor lies in a file that `zeros` made."""
    return tensor.untyped_storage().filename is not None


def kept(tensor: Tensor) -> Tensor:
    """The tensor itself where it is small or mapped already, else its copy in a file; its strides stay."""
    if tensor.nbytes < LEAST or is_mapped(tensor):
        return tensor
    strides = tensor.stride()
    order = sorted(range(tensor.dim()), key=lambda axis: -strides[axis])  # memory's order, outermost first
    dense = tensor.permute(order)
    if not dense.is_contiguous():
        order, dense = list(range(tensor.dim())), tensor
    copy = zeros(dense.shape, tensor.dtype).copy_(dense)
    return copy.permute([order.index(axis) for axis in range(tensor.dim())])
