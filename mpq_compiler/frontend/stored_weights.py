"""Weights as they lie in safetensors files: what headers say of them, and the tensors, mapped and not copied."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from mpq_compiler.frontend import fp8
from mpq_compiler.ir import scratch
from mpq_compiler.support import tensorfile
from mpq_compiler.support.errors import UserError, named

ALIGNED = 64
"""The alignment of torch's own memory, in bytes."""
_TYPES = {
    "BOOL": torch.bool,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
    **{f"I{bits}": getattr(torch, f"int{bits}") for bits in (8, 16, 32, 64)},
    **{f"U{bits}": getattr(torch, f"uint{bits}") for bits in (8, 16, 32, 64)},
}


@dataclass(frozen=True)
class Entry:
    """Where a tensor is stored, and as what."""

    file: Path
    code: str
    """Its type, as safetensors spells it."""
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Headers:
    """What the headers of a checkpoint say, with all that can be wrong with it short of its values."""

    entries: dict[str, Entry]
    scales: fp8.Scales
    block: tuple[int, int]
    """Rows and columns of a block of weights in 8-bit floats that share a scale."""
    again: list[tuple[str, Path]] = field(default_factory=list)
    """Tensors that a second file has too."""

    def promised(self) -> dict[str, torch.Tensor]:
        """The tensors that `read` would give, without values; what is in 8-bit floats as float32."""
        return {
            name: torch.empty(entry.shape, dtype=_TYPES.get(entry.code, torch.float32), device="meta")
            for name, entry in self.entries.items()
            if name not in self.scales.names
        }


def headers(
    files: Iterable[Path], places: Mapping[str, str] | None = None, block: tuple[int, int] = fp8.BLOCK
) -> Headers:
    """Reads the headers of the files of a checkpoint, and no weights.

    Args:
        files: its safetensors.
        places: the file's name for each tensor, by an index of shards.
        block: rows and columns of a block of weights in 8-bit floats that share a scale.

    Raises:
        UserError: a file is damaged, lacks what the index says, or contradicts another; a type that is no weight's;
            weights and scales in 8-bit floats that do not go together.
    """
    entries: dict[str, Entry] = {}
    again: list[tuple[str, Path]] = []
    folder = Path()
    for path in files:
        folder = path.parent
        for name, entry in tensorfile.read_header(path)[0].items():
            found = Entry(path, entry["dtype"], tuple(entry["shape"]))
            if found.code not in (*_TYPES, *fp8.STORED, "F8_E8M0"):
                raise UserError(
                    f"the tensor '{name}' in '{path}' has the type {found.code}; weights are compiled from floats: "
                    "give the checkpoint that was not quantized"
                )
            first = entries.setdefault(name, found)
            if first is found:
                continue
            if (first.code, first.shape) != (found.code, found.shape):
                raise _two_files(name, first.file, path, "as another type or shape")
            again.append((name, path))
    _require_places(entries, again, places or {}, folder)
    types = {name: (entry.code, entry.shape) for name, entry in entries.items()}
    return Headers(entries, fp8.scales(types, block, f"'{folder}'"), block, again)


def _require_places(
    entries: Mapping[str, Entry], again: Iterable[tuple[str, Path]], places: Mapping[str, str], folder: Path
) -> None:
    """UserError: a file lacks a tensor that the index says is in it."""
    held = {(name, entry.file.name) for name, entry in entries.items()} | {(name, path.name) for name, path in again}
    lacking = [(name, file) for name, file in sorted(places.items()) if (name, file) not in held]
    lacking = [(name, file) for name, file in lacking if file == lacking[0][1]]
    if lacking:
        raise UserError(
            f"the index in '{folder}' says that '{lacking[0][1]}' holds {named([name for name, _ in lacking])}, and it "
            "does not; get index and shards again, of one commit"
        )


def _two_files(name: str, first: Path, second: Path, how: str) -> UserError:
    return UserError(
        f"the tensor '{name}' is in '{first.name}' and, {how}, in '{second.name}' of '{first.parent}'; get the shards "
        "again, of one commit"
    )


def read(found: Headers) -> dict[str, torch.Tensor]:
    """Maps the tensors that are weights, in the types that they are stored in.

    Halves and whole numbers are views of a private mapping of their file: pages are read when they are touched, take no
    memory that the system cannot have back, and changes do not reach the file. So is float32 where it is aligned.
    Copied are other float32, float64, as float32, and 8-bit floats, as what they stand for (`fp8.widened`), large ones
    into temporary files.

    Raises:
        UserError: a tensor is in two files, with different values; no room for temporary files.
    """
    stored: dict[str, torch.Tensor] = {}
    for path in dict.fromkeys(entry.file for entry in found.entries.values()):
        stored |= _mapped(path, [name for name, entry in found.entries.items() if entry.file == path])
    for name, path in found.again:
        if not torch.equal(_bytes(stored[name]), _bytes(_mapped(path, [name])[name])):
            raise _two_files(name, found.entries[name].file, path, "with other values")
    weights: dict[str, torch.Tensor] = {}
    for name, entry in found.entries.items():
        if name in found.scales.names:
            continue
        tensor = stored.pop(name)
        if entry.code in fp8.STORED:
            scale = found.scales.of.get(name)
            tensor = scratch.kept(fp8.widened(tensor, None if scale is None else stored[scale], found.block))
        elif tensor.dtype == torch.float64:
            tensor = tensor.float()
        weights[name] = tensor
    return weights


def _mapped(path: Path, names: Iterable[str]) -> dict[str, torch.Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise UserError(f"'{path}' is not a valid safetensors file: {error}") from error
    return {name: _aligned(tensor) for name, tensor in tensors.items()}


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor on an address that code can take it from: of a multiple of its elements, for float32 of `ALIGNED`.

    torch's kernels take other paths elsewhere, and give other bits. Halves are widened to memory of torch's own first.
    """
    if tensor.data_ptr() % (ALIGNED if tensor.dtype == torch.float32 else tensor.element_size()):
        return scratch.kept(tensor.clone())
    return tensor


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.reshape(-1).view(torch.uint8)
