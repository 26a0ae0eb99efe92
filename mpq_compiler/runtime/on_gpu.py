"""Tensors that are on the GPU already: what a call takes of them, as addresses that it copies from on a stream.

Torch's tensors of any float type and any strides are taken, and others by DLPack as they must be. Nothing goes through
the CPU, and nothing waits for the GPU.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mpq_compiler.artifact.manifest import Value as InputValue
from mpq_compiler.support.errors import UserError

_CUDA = 2  # kDLCUDA


@dataclass(frozen=True)
class There:
    """A tensor on a GPU, contiguous."""

    pointer: int
    shape: tuple[int, ...]
    dtype: np.dtype
    owner: object
    """What keeps the memory: no longer than until the copies from it are asked for, which is the stream's order."""

    def rows(self, begin: int, end: int, count: int, batch: int) -> list[tuple[int, int]]:
        """Addresses and bytes of samples, so many: behind the last one it again; one that stands for all of a batch."""
        size = self.dtype.itemsize * int(np.prod(self.shape[1:], dtype=np.int64))
        if (self.shape[0] if self.shape else 1) != batch:
            return [(self.pointer, size)] * count
        last = [(self.pointer + (end - 1) * size, size)] * (count - (end - begin))
        return [(self.pointer + begin * size, (end - begin) * size), *last]


def device_of(value: object) -> int | None:
    """The number of the GPU that a value is on; None where it is on none."""
    if _is_torch(value):
        return int(value.device.index or 0) if value.device.type == "cuda" else None  # type: ignore[attr-defined]
    if isinstance(value, np.ndarray | np.generic) or not hasattr(value, "__dlpack_device__"):
        return None
    kind, number = value.__dlpack_device__()
    return int(number) if kind == _CUDA else None


def stays(inputs: Mapping[str, object], device: int) -> bool:
    """Whether a call is one on tensors of the GPU `device`.

    Raises:
        UserError: they are on several devices, or on another one. What has one value a sample may be anywhere.
    """
    places = {name: device_of(value) for name, value in inputs.items()}
    if all(place is None for place in places.values()):
        return False
    for name, place in places.items():
        value = inputs[name]
        if place is None and getattr(value, "ndim", 0) > 1:
            there = next(other for other, at in places.items() if at is not None)
            raise UserError(
                f"input '{name}' is on the CPU, and '{there}' on cuda:{places[there]}: put them on one device"
            )
        if place not in (None, device):
            raise UserError(
                f"input '{name}' is on cuda:{place}, and this artifact on cuda:{device}: .to('cuda:{device}'), or load "
                f"it there, mpq_compiler.load(..., device='cuda:{place}')"
            )
    return True


def taken(name: str, value: Any, expected: InputValue, from_dlpack: Callable[[object], Any]) -> There:
    """A tensor on the GPU as a call copies it.

    Raises:
        UserError: it is of a type that the input has not.
    """
    wanted = np.dtype(expected["dtype"])
    if _is_torch(value):
        torch = sys.modules["torch"]
        own = getattr(torch, str(wanted))
        if value.dtype != own:
            if wanted.kind == "f" and not (value.dtype.is_floating_point or value.ndim <= 2):
                raise UserError(f"input '{name}' is {value.dtype}; this artifact takes {wanted}")
            if wanted.kind != "f" and value.dtype.is_floating_point and value.ndim > 1:
                raise UserError(f"input '{name}' is {value.dtype}; this artifact takes {wanted}")
            value = value.to(own)
        value = value.detach().contiguous()
        return There(value.data_ptr(), tuple(value.shape), wanted, value)
    tensor = from_dlpack(value)
    if str(tensor.dtype) != str(wanted):
        raise UserError(f"input '{name}' is {tensor.dtype}; this artifact takes {wanted}")
    shape, expected_stride = tuple(tensor.shape), 1
    for extent, stride in zip(reversed(shape), reversed(tuple(tensor.strides)), strict=True):
        if extent != 1 and stride != expected_stride:
            raise UserError(f"input '{name}' has strides {tuple(tensor.strides)}; give a contiguous tensor")
        expected_stride *= extent
    return There(tensor.data_ptr(), shape, wanted, tensor)


def standing_in(tensor: There) -> np.ndarray:
    """An array of the tensor's shape and type, of zeros that take no memory: to check a call by."""
    return np.broadcast_to(np.zeros((), tensor.dtype), tensor.shape)


def stream_of(device: int) -> tuple[int, bool]:
    """The stream of the calling thread, torch's or else the default one, and whether a graph captures it."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return 0, False
    return int(torch.cuda.current_stream(device).cuda_stream), bool(torch.cuda.is_current_stream_capturing())


def _is_torch(value: object) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)
