"""A cache of results that do not depend on the latents: the parts of an artifact (docs/artifact.md).

A part computes one sample. Its results are looked up by the bytes of its inputs, so a cached result is what would be
computed, bit for bit, and samples of a batch with the same inputs share one. The least recently used result is evicted
first. Memory is bounded and allocated once.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mpq_compiler.support.tensorfile import ALIGNMENT, aligned_empty

REUSE_BYTES = 64 << 20
"""Bytes that all parts together may keep by default; pages are only used as results come."""
MOST_ROWS = 256
"""The most results that a part keeps: the steps of a long schedule."""
LEAST_ROWS = 2
"""The fewest results that a part keeps: one of a prompt and one of the empty prompt."""
SMALL = 1024
"""The most bytes of an input that enters a key itself; larger inputs enter by a number (`Contents`)."""

Key = tuple[bytes | int, ...]
"""The inputs of a sample, each by its bytes or by the number of its contents."""

Staged = tuple[np.ndarray, Any]
"""A buffer, and the runtime's tensor on the same memory."""


def stage(shape: tuple[int, ...], dtype: np.dtype[Any], tensor: Callable[[np.ndarray], Any]) -> Staged:
    """Allocates a buffer and makes its tensor with ``tensor``."""
    array = aligned_empty(shape, dtype)
    return array, tensor(array)


class Part:
    """A function for one sample, and a cache of its latest results."""

    def __init__(
        self,
        entry: Mapping[str, Any],
        tensor: Callable[[np.ndarray], Any],
        call: Callable[..., Sequence[Any]],
        room: int,
    ) -> None:
        """Allocates the cache.

        Args:
            entry: the part as the manifest describes it: name, inputs and outputs.
            tensor: makes the runtime's tensor of an aligned array.
            call: the function, on such tensors.
            room: bytes for results and keys; `LEAST_ROWS` results are kept even if they need more.
        """
        self.name: str = entry["name"]
        self.inputs: list[str] = [value["name"] for value in entry["inputs"]]
        self.outputs: list[str] = [value["name"] for value in entry["outputs"]]
        self._tensor, self._call = tensor, call
        self._arguments = [stage(tuple(v["shape"]), np.dtype(v["dtype"]), tensor) for v in entry["inputs"]]
        self._types = [(tuple(v["shape"]), np.dtype(v["dtype"])) for v in entry["outputs"]]
        self.row_bytes = sum(_rounded(math.prod(shape) * dtype.itemsize) for shape, dtype in self._types)
        """Bytes of one result, all outputs aligned."""
        key = sum(array.nbytes for array, _ in self._arguments)
        self.rows = min(MOST_ROWS, max(LEAST_ROWS, room // (self.row_bytes + key)))
        """The number of results that are kept."""
        self._contents = [
            Contents(array.nbytes, self.rows) if array.nbytes > SMALL else None for array, _ in self._arguments
        ]
        self._memory = aligned_empty((self.rows * self.row_bytes,), np.dtype(np.uint8))
        self._places: dict[int, list[Staged]] = {}
        self._batches: dict[int, list[Staged]] = {}
        self.computed = 0
        """The number of calls of the function so far."""
        self.forget()

    @property
    def reserved_bytes(self) -> int:
        """Bytes reserved for results and keys, without the buffers in which batches are assembled."""
        return self._memory.nbytes + sum(c.nbytes for c in self._contents if c is not None)

    def forget(self) -> None:
        """Evicts all results."""
        self._kept: OrderedDict[Key, int] = OrderedDict()
        """The place of each result by its key, the latest used last."""
        self._free = list(range(self.rows))[::-1]
        """The places without a result; the last is taken next."""
        self._latest: dict[int, list[Key]] = {}
        """The keys of the batch that is assembled, by its size."""

    def results(self, arrays: Mapping[str, np.ndarray], batch: int) -> list[Staged]:
        """The outputs for a batch, computed where they are not cached; valid until the next call.

        Args:
            arrays: the inputs [batch, ...] by name; those that the part does not read are ignored.
            batch: the number of samples.
        """
        taken = [arrays[name] for name in self.inputs]
        keys = [self._key(taken, i) for i in range(batch)]
        if batch == 1:
            return self._row(keys[0], taken, 0)
        if batch not in self._batches:
            self._batches[batch] = [stage((batch, *shape[1:]), dtype, self._tensor) for shape, dtype in self._types]
        batched = self._batches[batch]
        if self._latest.get(batch) != keys:
            self._latest.pop(batch, None)  # until all of it is there: a call may be interrupted
            for i, key in enumerate(keys):
                for (target, _), (source, _) in zip(batched, self._row(key, taken, i), strict=True):
                    target[i] = source[0]
            self._latest[batch] = keys
        return batched

    def _key(self, taken: Sequence[np.ndarray], sample: int) -> Key:
        return tuple(
            contents.number(array[sample]) if contents else array[sample].tobytes()
            for array, contents in zip(taken, self._contents, strict=True)
        )

    def _row(self, key: Key, taken: Sequence[np.ndarray], sample: int) -> list[Staged]:
        if (known := self._kept.get(key)) is not None:
            self._kept.move_to_end(key)
            return self._places[known]
        if not self._free:
            self._free.append(self._kept.popitem(last=False)[1])
        place = self._place(self._free[-1])
        for (buffer, _), array in zip(self._arguments, taken, strict=True):
            np.copyto(buffer, array[sample : sample + 1])
        made = self._call(*(tensor for _, tensor in self._arguments))
        self.computed += 1
        for (target, _), source in zip(place, made, strict=True):
            np.copyto(target, np.from_dlpack(source))
        self._kept[key] = self._free.pop()
        return place

    def _place(self, number: int) -> list[Staged]:
        if number not in self._places:
            start, found = number * self.row_bytes, []
            for shape, dtype in self._types:
                size = math.prod(shape) * dtype.itemsize
                array = self._memory[start : start + size].view(dtype).reshape(shape)
                found.append((array, self._tensor(array)))
                start += _rounded(size)
            self._places[number] = found
        return self._places[number]


class Contents:
    """Numbers for arrays of ``size`` bytes: arrays have the same number if and only if their bytes are equal.

    The ``count`` arrays used last are remembered. Arrays are compared and copied in place, so a look-up allocates
    nothing.
    """

    def __init__(self, size: int, count: int) -> None:
        self._memory = aligned_empty((count, size), np.dtype(np.uint8))
        self._slots = list(range(count))
        """The slots of `_memory`, the latest used first."""
        self._numbers = [-1] * count
        self._next = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the remembered arrays."""
        return self._memory.nbytes

    def number(self, array: np.ndarray) -> int:
        """The number of a contiguous array: a new one where its bytes are not remembered."""
        address, size = array.ctypes.data, self._memory.shape[1]
        for i, slot in enumerate(self._slots):
            known = self._numbers[slot] >= 0
            if known and _libc().memcmp(address, self._memory.ctypes.data + slot * size, size) == 0:
                self._slots.insert(0, self._slots.pop(i))
                return self._numbers[slot]
        slot = self._slots[-1]
        self._numbers[slot] = -1  # until its bytes are those of the number: a call may be interrupted
        ctypes.memmove(self._memory.ctypes.data + slot * size, address, size)
        self._numbers[slot], self._next = self._next, self._next + 1
        self._slots.insert(0, self._slots.pop())
        return self._numbers[slot]


@functools.cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None)
    libc.memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
    return libc


def _rounded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
