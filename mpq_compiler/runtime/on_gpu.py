"""Tensors that are on the GPU already: what a call takes of them, as addresses that it copies from on a stream.

Torch's tensors of any float type and any strides are taken, and others by DLPack as they must be. Nothing goes through
the CPU, and nothing waits for the GPU.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mpq_compiler.artifact.manifest import Value as InputValue
from mpq_compiler.runtime.values import is_torch, loaded_torch
from mpq_compiler.sampling.call_tree import Value
from mpq_compiler.support.errors import UserError

_CUDA = 2  # kDLCUDA


@dataclass(frozen=True)
class Origin:
    """Which tensor of the caller's it is: equal for what has the same memory, and was not written to in between.

    Writing to tensors of torch's inference mode does not show.
    """

    identity: tuple[object, ...]
    held: object = field(compare=False)
    """The tensor: while it is there, no other one has its memory."""

    @classmethod
    def of(cls, given: Value) -> Origin:
        """The origin of a tensor of torch's or of the runtime."""
        identity: tuple[object, ...] = (given.data_ptr(), tuple(given.shape))
        if is_torch(given):
            identity += (given.stride(), given.dtype, None if given.is_inference() else given._version)
        return cls(identity, given)


class OnGpu(ABC):
    """What a call reads on a GPU."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @abstractmethod
    def rows(self, begin: int, end: int, count: int, batch: int) -> list[tuple[int, int]]:
        """Addresses and bytes of samples, so many: behind the last one it again; one that stands for all of a batch."""


@dataclass(frozen=True)
class There(OnGpu):
    """A tensor on a GPU, contiguous."""

    pointer: int
    shape: tuple[int, ...]
    dtype: np.dtype
    owner: object
    """What keeps the memory: no longer than until the copies from it are asked for, which is the stream's order."""
    given: object
    """The caller's tensor, as it was before it was converted."""

    def rows(self, begin: int, end: int, count: int, batch: int) -> list[tuple[int, int]]:
        size = self.dtype.itemsize * int(np.prod(self.shape[1:], dtype=np.int64))
        if (self.shape[0] if self.shape else 1) != batch:
            return [(self.pointer, size)] * count
        last = [(self.pointer + (end - 1) * size, size)] * (count - (end - begin))
        return [(self.pointer + begin * size, (end - begin) * size), *last]


class Stacked(OnGpu):
    """Tensors [B, ...] of one shape as one, [B, S, ...], which is put together where a call reads it."""

    def __init__(self, parts: Sequence[There]) -> None:
        batch, *rest = parts[0].shape
        self.parts, self.shape, self.dtype = parts, (batch, len(parts), *rest), parts[0].dtype

    def rows(self, begin: int, end: int, count: int, batch: int) -> list[tuple[int, int]]:
        samples = [min(sample, end - 1) for sample in range(begin, begin + count)]
        return [row for at in samples for part in self.parts for row in part.rows(at, at + 1, 1, batch)]


def device_of(value: object) -> int | None:
    """The number of the GPU that a value is on; None where it is on none."""
    if is_torch(value):
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
    if is_torch(value):
        torch = loaded_torch()
        own = getattr(torch, str(wanted))
        given = value
        if value.dtype != own:
            if wanted.kind == "f" and not (value.dtype.is_floating_point or value.ndim <= 2):
                raise UserError(f"input '{name}' is {value.dtype}; this artifact takes {wanted}")
            if wanted.kind != "f" and value.dtype.is_floating_point and value.ndim > 1:
                raise UserError(f"input '{name}' is {value.dtype}; this artifact takes {wanted}")
            value = value.to(own)
        value = value.detach().contiguous()
        return There(value.data_ptr(), tuple(value.shape), wanted, value, given)
    tensor = from_dlpack(value)
    if str(tensor.dtype) != str(wanted):
        raise UserError(f"input '{name}' is {tensor.dtype}; this artifact takes {wanted}")
    shape, expected_stride = tuple(tensor.shape), 1
    for extent, stride in zip(reversed(shape), reversed(tuple(tensor.strides)), strict=True):
        if extent != 1 and stride != expected_stride:
            raise UserError(f"input '{name}' has strides {tuple(tensor.strides)}; give a contiguous tensor")
        expected_stride *= extent
    return There(tensor.data_ptr(), shape, wanted, tensor, tensor)


def conditions_key(inputs: Mapping[str, object], latent: str) -> Hashable:
    """Tells which tensors and values the inputs of a call are that stay the same from step to step."""
    return tuple(
        (name, Origin.of(value.given) if isinstance(value, There) else np.asarray(value).tobytes())
        for name, value in sorted(inputs.items())
        if name not in (latent, "timestep")
    )


def standing_in(tensor: OnGpu) -> np.ndarray:
    """An array of the tensor's shape and type, of zeros that take no memory: to check a call by."""
    return np.broadcast_to(np.zeros((), tensor.dtype), tensor.shape)


def stream_of(device: int) -> tuple[int, bool]:
    """The stream of the calling thread, torch's or else the default one, and whether a graph captures it."""
    torch = loaded_torch()
    if torch is None or not torch.cuda.is_available():
        return 0, False
    return int(torch.cuda.current_stream(device).cuda_stream), bool(torch.cuda.is_current_stream_capturing())
