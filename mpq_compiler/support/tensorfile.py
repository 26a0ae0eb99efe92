"""Safetensors files whose large tensors can be mapped instead of copied, and a reader that checks every claim.

Compiled kernels read their tensors with aligned vector loads, while the format packs tensors without gaps. So large
tensors come first, in an order that needs least padding, and the padding itself is stored as U8 tensors named
`__pad<i>`. This reader leaves them out; any other reader of the format sees small tensors. Small tensors come last and
unaligned, since copying them costs less than padding.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mpq_compiler.support.errors import UserError

ALIGNMENT = 64
_MAPPED = 4096  # bytes (one page) from which on a tensor is aligned and mapped
_MAX_HEADER = 100_000_000  # bytes; the safetensors library's own limit
_PAD = "__pad"

_Header = dict[str, Any]
"""The entry of each tensor by name."""

_DTYPES = {
    name: np.dtype(name)
    for name in (
        *("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"),
        *("float16", "float32", "float64", "complex64"),
    )
}
_CODES = {
    **{dtype: f"{dtype.kind.upper()}{8 * dtype.itemsize}" for dtype in _DTYPES.values()},
    np.dtype("bool"): "BOOL",
}
_NUMPY = {code: dtype for dtype, code in _CODES.items()}
_BITS = {
    **{code: 8 * dtype.itemsize for code, dtype in _NUMPY.items()},
    **{"BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6},
}


def payload_bytes(tensors: Mapping[str, np.ndarray]) -> int:
    """Bytes of the tensors alone: neither padding nor header."""
    return sum(tensor.nbytes for tensor in tensors.values())


def save(
    stream: BinaryIO, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes `tensors` to `stream`. The bytes depend on names and tensors, not on the mapping's order."""
    text, chunks = _plan(tensors, metadata)
    stream.write(len(text).to_bytes(8, "little") + text)
    for chunk in chunks:
        stream.write(chunk.reshape(-1).view(np.uint8).data)


def places(tensors: Mapping[str, np.ndarray]) -> dict[str, tuple[int, int]]:
    """The byte range (first, end) of each tensor in the file that `save` writes."""
    text, _ = _plan(tensors, None)
    start = 8 + len(text)
    spans = {name: entry["data_offsets"] for name, entry in json.loads(text).items()}
    return {name: (start + spans[name][0], start + spans[name][1]) for name in tensors}


def _plan(
    tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None
) -> tuple[bytes, list[np.ndarray]]:
    """Lays the file out: the header's text, padded to `ALIGNMENT`, and the tensors in the order of their bytes."""
    header: _Header = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    chunks: list[np.ndarray] = []
    offset = pads = 0

    def append(name: str, tensor: np.ndarray) -> None:
        nonlocal offset
        end = offset + tensor.nbytes
        code = _CODES[tensor.dtype.newbyteorder("=")]
        header[name] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        chunks.append(tensor)
        offset = end

    for name in _order(tensors):
        tensor = tensors[name]
        append(name, tensor.astype(tensor.dtype.newbyteorder("<"), order="C", copy=False))
        if tensor.nbytes >= _MAPPED and offset % ALIGNMENT:
            append(f"{_PAD}{pads}", np.zeros(-offset % ALIGNMENT, np.uint8))
            pads += 1

    text = json.dumps(header, separators=(",", ":")).encode()
    return text + b" " * (-(8 + len(text)) % ALIGNMENT), chunks


def _order(tensors: Mapping[str, np.ndarray]) -> list[str]:
    """Sorts the names: large tensors of whole 64-byte blocks, other large ones, small ones by falling element size."""
    for name, tensor in tensors.items():
        if name.startswith(_PAD) or name == "__metadata__":
            raise ValueError(f"the tensor name '{name}' is reserved")
        if tensor.dtype.newbyteorder("=") not in _CODES:
            raise ValueError(f"tensor '{name}' has type {tensor.dtype}, which safetensors files cannot hold")

    def rank(name: str) -> tuple[int, int, str]:
        size = tensors[name].nbytes
        if size < _MAPPED:
            return 2, -tensors[name].dtype.itemsize, name
        return int(size % ALIGNMENT != 0), 0, name

    return sorted(tensors, key=rank)


def read_header(path: str | os.PathLike[str]) -> tuple[_Header, int]:
    """Reads and checks the header of a safetensors file.

    Nothing of a claimed size is allocated before it is checked, so a hostile file costs nothing.

    Returns:
        The entry of each tensor by name (dtype, shape, data_offsets), and the byte where the data begin.

    Raises:
        UserError: not a safetensors file, truncated, or a header that contradicts itself or the file.
    """
    path = Path(path)
    try:
        with path.open("rb") as stream:
            return _header(path, stream, path.stat().st_size)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def _header(path: Path, stream: BinaryIO | mmap.mmap, size: int) -> tuple[_Header, int]:
    """The header of a file of ``size`` bytes, as `read_header` returns it. UserError: it is not sound."""

    def refuse(what: str) -> UserError:
        return UserError(f"{path} is not a sound safetensors file: {what}; get the file again")

    length = int.from_bytes(stream.read(8), "little")
    if size < 8:
        raise refuse(f"it has only {size} bytes")
    if length > min(size - 8, _MAX_HEADER):
        raise refuse(f"its header claims {length} bytes, the file has {size}")
    text = stream.read(length)
    try:
        header = json.loads(text, object_pairs_hook=_unique)
        if not isinstance(header, dict):
            raise ValueError("its header is not an object")
        header.pop("__metadata__", None)
        spans = sorted(_span(name, entry) for name, entry in header.items())
    except (ValueError, RecursionError) as error:
        reason = "its header is not JSON" if isinstance(error, json.JSONDecodeError) else str(error)
        raise refuse(reason) from error
    end = 0
    for begin, stop, name in spans:
        if begin != end:
            raise refuse(f"tensor '{name}' begins at byte {begin} where {end} is expected")
        end = stop
    if 8 + length + end != size:
        raise refuse(f"its tensors end at byte {8 + length + end}, the file has {size}")
    return header, 8 + length


def metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """The metadata of a safetensors file: text by key. UserError: as `read_header`."""
    read_header(path)
    with Path(path).open("rb") as stream:
        found = json.loads(stream.read(int.from_bytes(stream.read(8), "little"))).get("__metadata__")
    return {str(k): str(v) for k, v in found.items()} if isinstance(found, dict) else {}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("its header names a tensor twice")
    return result


def _span(name: str, entry: Any) -> tuple[int, int, str]:
    """The byte range (begin, end) and name of a header's entry. ValueError: its parts contradict each other."""
    try:
        bits, shape, (begin, end) = _BITS[entry["dtype"]], entry["shape"], entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"the entry of tensor '{name}' is incomplete or has an unknown type") from None
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in [*shape, begin, end]):
        raise ValueError(f"the entry of tensor '{name}' holds something that is not a size")
    if 8 * (end - begin) != bits * math.prod(shape):
        raise ValueError(f"tensor '{name}' of shape {shape} does not fill its {end - begin} bytes")
    return begin, end, name


def load(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Maps the tensors of a safetensors file copy-on-write: pages are read when they are touched.

    A bfloat16 tensor is converted to float32, since NumPy has no such type.

    Raises:
        UserError: as `read_header`; a tensor of another type that NumPy lacks (float8).
    """
    header, start = read_header(path)
    return _tensors(path, header, start, np.memmap(path, np.uint8, mode="c"))


def altered(path: Path) -> UserError:
    """The error of a file that has another hash than when it was written."""
    return UserError(f"{path} was altered after it was written; copy or compile it again")


def load_verified(path: str | os.PathLike[str], sha256: str) -> dict[str, np.ndarray]:
    """Reads the tensors of a safetensors file to memory, if the file has this SHA-256.

    The bytes that were hashed are those of the tensors: a file that is overwritten meanwhile or later, which a mapping
    would see, changes nothing. Arrays lie in one mapping of memory (`mapping`), whose pages can be given back.

    Raises:
        UserError: as `load`; the file has another hash.
    """
    path = Path(path)
    try:
        with path.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            memory = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            with memoryview(memory) as view:
                read = 0
                while count := stream.readinto(view[read:size]):
                    read += count
                if read != size or hashlib.sha256(view[:size]).hexdigest() != sha256:
                    raise altered(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    header, start = _header(path, memory, size)
    return _tensors(path, header, start, np.frombuffer(memory, np.uint8))


def _tensors(
    path: str | os.PathLike[str], header: _Header, start: int, data: np.ndarray
) -> dict[str, np.ndarray]:
    """The tensors of a file whose bytes are `data`."""
    tensors = {}
    for name, entry in header.items():
        if name.startswith(_PAD):
            continue
        begin, end = (start + offset for offset in entry["data_offsets"])
        stored = np.asarray(data[begin:end])
        if entry["dtype"] == "BF16":  # the upper half of a float32
            stored = (stored.view("<u2").astype(np.uint32) << 16).view(np.float32)
        elif entry["dtype"] in _NUMPY:
            stored = stored.view(_NUMPY[entry["dtype"]])
        else:
            raise UserError(f"tensor '{name}' of {path} has type {entry['dtype']}, which cannot be read here")
        tensors[name] = stored.reshape(entry["shape"])
    return tensors


def mapping(array: np.ndarray) -> mmap.mmap | None:
    """The mapping that an array of `load` or of `load_verified` lies in; None for another array."""
    base: object = array
    while isinstance(base, np.ndarray | memoryview):
        base = base.base if isinstance(base, np.ndarray) else base.obj
    return base if isinstance(base, mmap.mmap) else None


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """An uninitialised C-ordered array that begins on a 64-byte boundary, as compiled kernels need it."""
    nbytes = math.prod(shape) * dtype.itemsize
    raw = np.empty(nbytes + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + nbytes].view(dtype).reshape(shape)


def aligned(array: np.ndarray) -> np.ndarray:
    """`array` itself where it is C-ordered, writable and aligned, else a copy that is."""
    if array.flags.c_contiguous and array.flags.writeable and array.ctypes.data % ALIGNMENT == 0:
        return array
    copy = aligned_empty(array.shape, array.dtype)
    copy[...] = array
    return copy
