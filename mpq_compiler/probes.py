"""Dumps: after each pass the program as text, and sampled values of every node.

``NNN-pass.txt`` is `printer.text`. ``NNN-pass.safetensors`` holds, of a run on a fixed batch of inputs,

- ``value:<node>``: at most 64 of its values, at positions drawn from the node's name and shape;
- ``shape:<node>``: its shape, channels last;
- ``sqnr:<node>``: f32 dB of those values against the first dump that has a float node of that name and shape;
- ``output`` and ``output:sqnr``: the same of the output, at up to 4096 positions, against the first dump.

Equal programs give equal bytes.
"""

from __future__ import annotations

import math
import os
import re
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor, fx

from mpq_compiler import printer, tensorfile
from mpq_compiler.errors import UserError
from mpq_compiler.pass_manager import Pass
from mpq_compiler.program import Interpreter, Program, Stage

VALUES, OUTPUT_VALUES = 64, 4096
_FILE = re.compile(r"(\d{3})-([a-z0-9-]+)\.(txt|safetensors)")


@dataclass(frozen=True)
class Dump:
    """What one pass left behind."""

    index: int
    name: str
    """The pass."""
    text: str
    values: dict[str, np.ndarray]
    """Node -> sampled values."""
    sqnr: dict[str, float]
    """Node -> dB against the first dump that has it in floats; infinite where nothing changed."""
    shapes: dict[str, tuple[int, ...]]
    output: np.ndarray
    output_sqnr: float
    """dB against the first dump, infinite where nothing changed."""

    @property
    def nodes(self) -> int:
        """Calls in the graph and its regions."""
        return len(self.values)

    @property
    def sqnr_db(self) -> float | None:
        """`output_sqnr`, None where it is infinite."""
        return self.output_sqnr if math.isfinite(self.output_sqnr) else None


class _Watching(Interpreter):
    """Sees the values within regions too."""

    def __init__(self, program: Program, watch: Callable[[fx.Node, Any], None]) -> None:
        super().__init__(program)
        self.watch = watch

    def evaluate(self, node: fx.Node, env: Mapping[fx.Node, Any]) -> Any:
        if node.op != "call_module":
            return super().evaluate(node, env)
        args = fx.map_arg(node.args, env.__getitem__)
        return self.execute(self.program.regions[str(node.target)], list(args), self.watch)


def sample(name: str, value: Tensor, count: int = VALUES) -> np.ndarray:
    """``count`` values of a tensor, or all where it has fewer, at positions that its name and shape decide."""
    flat = value.detach().reshape(-1)
    if flat.dtype in (torch.bfloat16, torch.float16):
        flat = flat.to(torch.float32)
    if len(flat) > count:
        seed = zlib.crc32(f"{name} {list(value.shape)}".encode())
        chosen = np.random.Generator(np.random.PCG64(seed)).choice(len(flat), count, replace=False)
        flat = flat[torch.from_numpy(np.sort(chosen))]
    return flat.numpy()


def sqnr_db(reference: np.ndarray, value: np.ndarray) -> float:
    """10 log10 of the signal's power over that of the difference; infinite where there is none."""
    signal = float(np.square(reference.astype(np.float64)).sum())
    noise = float(np.square(value.astype(np.float64) - reference.astype(np.float64)).sum())
    if noise == 0:
        return float("inf")
    return 10 * float(np.log10(signal / noise)) if signal > 0 else -float("inf")


@torch.no_grad()
def probe(program: Program, inputs: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Sampled values and shapes of every node and of the output, as they go into the file."""
    found: dict[str, np.ndarray] = {}
    first = program.stage == Stage.FLOAT

    def watch(node: fx.Node, value: Any) -> None:
        if node.op not in ("call_function", "call_module") or not isinstance(value, Tensor):
            return
        if first and value.dim() == 4:
            value = value.permute(0, 2, 3, 1)  # as `layout` will leave it
        found[f"value:{node.name}"] = sample(node.name, value)
        found[f"shape:{node.name}"] = np.array(value.shape, np.int64)

    output = _Watching(program, watch).run(inputs, watch=watch)
    found["output"] = sample("output", output, OUTPUT_VALUES)
    return found


def write_dump(
    folder: str | Path,
    index: int,
    step: Pass,
    program: Program,
    before: Program,
    inputs: Mapping[str, Tensor],
) -> None:
    """Writes both files of a pass. Dumps of the same and of later passes that an earlier run left there go first.

    Raises UserError where the folder cannot be written.
    """
    folder = Path(folder)
    found = probe(program, inputs)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.iterdir():
            match = _FILE.fullmatch(path.name)
            if match and int(match[1]) >= index:
                path.unlink()
        earlier = [d for d in read_dumps(folder) if d.index < index] if index else []
        _add_sqnr(found, earlier)
        stem = f"{index:03d}-{step.name()}"
        _write(folder / f"{stem}.txt", lambda file: file.write(printer.text(program, step.name()).encode()))
        _write(folder / f"{stem}.safetensors", lambda file: tensorfile.save(file, found))
    except OSError as error:
        raise UserError(
            f"the dumps cannot be written to {folder} ({error.strerror}); name another folder with --dumps"
        ) from error


def _add_sqnr(found: dict[str, np.ndarray], earlier: list[Dump]) -> None:
    for key in [k for k in found if k.startswith("value:")]:
        node = key.removeprefix("value:")
        shape = tuple(found[f"shape:{node}"].tolist())
        for dump in earlier:
            reference = dump.values.get(node)
            if reference is not None and dump.shapes[node] == shape and reference.dtype == np.float32:
                if found[key].dtype == np.float32:
                    found[f"sqnr:{node}"] = np.array([sqnr_db(reference, found[key])], np.float32)
                break
    reference = earlier[0].output if earlier else found["output"]
    found["output:sqnr"] = np.array([sqnr_db(reference, found["output"])], np.float32)


def _write(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    beside = path.with_name(path.name + ".partial")
    with beside.open("wb") as file:
        write(file)
    os.replace(beside, path)


def read_dumps(folder: str | Path) -> list[Dump]:
    """The dumps of a folder in the order of the passes.

    Raises UserError where the folder holds none, or holds one file of a pass without the other.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"there is no folder '{folder}'; mpqc compile --dumps writes one")
    stems = {}
    for path in folder.iterdir():
        if match := _FILE.fullmatch(path.name):
            stems[f"{match[1]}-{match[2]}"] = (int(match[1]), match[2])
    if not stems:
        raise UserError(f"'{folder}' holds no dumps (000-trace.txt ...); mpqc compile --dumps writes them")
    return [_read(folder, stem, *stems[stem]) for stem in sorted(stems)]


def _read(folder: Path, stem: str, index: int, name: str) -> Dump:
    try:
        text = (folder / f"{stem}.txt").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the dump {folder / stem}.txt cannot be read; write the dumps again") from error
    tensors = tensorfile.load(folder / f"{stem}.safetensors")

    def part(prefix: str) -> dict[str, np.ndarray]:
        return {k.removeprefix(prefix): np.asarray(v) for k, v in tensors.items() if k.startswith(prefix)}

    if "output" not in tensors or "output:sqnr" not in tensors:
        raise UserError(f"{folder / stem}.safetensors is no probe of a pass; write the dumps again")
    return Dump(
        index,
        name,
        text,
        part("value:"),
        {k: float(v[0]) for k, v in part("sqnr:").items()},
        {k: tuple(int(n) for n in v) for k, v in part("shape:").items()},
        np.asarray(tensors["output"]),
        float(tensors["output:sqnr"][0]),
    )
