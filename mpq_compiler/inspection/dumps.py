"""Dumps: the program as text after each pass, with samples of the values that its nodes compute.

``NNN-pass.txt`` is `printer.text`. ``decisions.json`` is `provenance.document` so far. ``NNN-pass.safetensors`` has
measurements of runs on a fixed batch of inputs:

- ``value:<node>``: at most 64 values of a node, at positions drawn from the node's name and shape;
- ``shape:<node>``: its shape, channels last;
- ``sqnr:<node>``: the SQNR of these values, f32 dB, against the first dump with a float node of this name and shape;
- ``output`` and ``output:sqnr``: values and SQNR of the output, at up to 4096 positions, against the first dump;
- ``local:<node>``: f64 [6], the node's own departure, with its inputs forced to their values before the pass
  (`Departure`: largest, noise, share of the elements, departing channels, and the first two of them). An exact pass is
  compared with exact mode, a simulation with the last float program;
- ``expected:<node>``: f64 [1], the noise that the plan implies at the output of a call on quantized operands;
- ``weight:<parameter>``: f64 [5], noise of the quantized weight: over that of plain rounding, then relative to the
  layer's output measured and expected, then relative to the weight measured and expected;
- ``rows:<parameter>``: f64 [S, 4], its noisiest rows (`expected_noise.WeightNoise.suspects`);
- ``groups:<parameter>``: f64 [J], noise of each K-group over that of plain rounding, where there are several;
- ``edge:<edge>``: f64 [4, G], scale and zero point by time group, their noise on calibration values, and the noise of
  plain rounding.

The file's metadata are the pass, its contract and the stage, the time-group boundaries, the calls of each layer, the
readers of each edge, the calls on quantized operands, and the nodes from which a rewrite departs without returning.
`bisect` reads all of this. Equal programs give equal bytes.
"""

from __future__ import annotations

import math
import re
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpq_compiler.analysis.teacher_forcing import Departure
from mpq_compiler.ir import views
from mpq_compiler.ir.aten import aten
from mpq_compiler.ir.graph import weight_of
from mpq_compiler.ir.program import Program, Stage
from mpq_compiler.support import tensorfile
from mpq_compiler.support.errors import UserError
from mpq_compiler.support.files import decode_json

VALUES, OUTPUT_VALUES = 64, 4096
"""The most sampled values of a node, and of the output."""
OUTPUT = "output"
LOST_DB = -200.0
"""The SQNR of an output of which nothing is left, such as NaN."""
DEPARTING = 16
"""The most nodes that are named as those from which a rewrite departs."""
FILE = re.compile(r"(\d{3})-([a-z0-9-]+)\.(txt|safetensors)")
FLOAT_STAGES = (Stage.FLOAT, Stage.REWRITTEN, Stage.PLANNED)


@dataclass(frozen=True)
class Dump:
    """The dump of one pass."""

    index: int
    name: str
    """The pass."""
    text: str
    values: dict[str, np.ndarray]
    """The sampled values of each node, in the order of execution."""
    sqnr: dict[str, float]
    """The SQNR of each node in dB against the first dump that has it in floats; infinite where nothing changed."""
    shapes: dict[str, tuple[int, ...]]
    output: np.ndarray
    output_sqnr: float
    """The SQNR of the output in dB against the first dump; infinite where nothing changed."""
    local: dict[str, Departure] = field(default_factory=dict)
    """The departure of each node by itself, in the order of execution."""
    expected: dict[str, float] = field(default_factory=dict)
    """The relative noise that the plan implies, for each call on quantized operands."""
    weights: dict[str, np.ndarray] = field(default_factory=dict)
    rows: dict[str, np.ndarray] = field(default_factory=dict)
    groups: dict[str, np.ndarray] = field(default_factory=dict)
    edges: dict[str, np.ndarray] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    """The metadata: pass, contract, stage, boundaries, order, layers, readers, consumers, departing."""

    @property
    def nodes(self) -> int:
        """The number of calls in the graph and its regions."""
        return len(self.values)

    @property
    def sqnr_db(self) -> float | None:
        """`output_sqnr`, at least `LOST_DB`; None where the output is the same."""
        return None if self.output_sqnr == math.inf else max(self.output_sqnr, LOST_DB)


def sample(name: str, value: Tensor, count: int = VALUES) -> np.ndarray:
    """Samples ``count`` values of a tensor, or all where it has fewer; its name and shape decide the positions."""
    flat = value.detach().reshape(-1)
    if flat.dtype in (torch.bfloat16, torch.float16):
        flat = flat.to(torch.float32)
    if len(flat) > count:
        seed = zlib.crc32(f"{name} {list(value.shape)}".encode())
        chosen = np.random.Generator(np.random.PCG64(seed)).choice(len(flat), count, replace=False)
        flat = flat[torch.from_numpy(np.sort(chosen))]
    return flat.numpy()


def layers(program: Program, planned: Program | None = None) -> dict[str, list[str]]:
    """The calls that multiply by each parameter, in any stage, and the calls of ``planned`` that they replace."""
    found: dict[str, list[str]] = {}
    for flat in [views.flatten(p) for p in (program, planned) if p is not None]:
        levels = {made.call.name: made for made in views.levels_of(flat)}
        for call in flat:
            path = views.weight_path(call, levels)
            if path is None and call.target is aten.conv2d.default:
                path = views.stored(call.args[1])
            if path is not None and call.name not in found.setdefault(path, []):
                found[path].append(call.name)
    return found


def readers(planned: Program) -> dict[str, list[str]]:
    """The parameters of the layers that read each edge."""
    found: dict[str, list[str]] = {}
    for node in planned.quantizable:
        path = str(weight_of(node)).split(":")[0]
        source = node.args[0]
        readers = found.setdefault(getattr(source, "name", ""), [])
        if path not in readers:
            readers.append(path)
    return found


def read_dumps(folder: str | Path) -> list[Dump]:
    """Reads the dumps of a folder, in the order of the passes.

    Raises:
        UserError: there is no dump, or one file of a pass is missing or damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"there is no folder '{folder}'; `mpqc compile --dumps` writes one")
    stems = {}
    for path in folder.iterdir():
        if match := FILE.fullmatch(path.name):
            stems[f"{match[1]}-{match[2]}"] = (int(match[1]), match[2])
    if not stems:
        raise UserError(f"'{folder}' holds no dumps (000-trace.txt ...); `mpqc compile --dumps` writes them")
    return [_read(folder, stem, *stems[stem]) for stem in sorted(stems)]


def _read(folder: Path, stem: str, index: int, name: str) -> Dump:
    try:
        text = (folder / f"{stem}.txt").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the dump {folder / stem}.txt cannot be read; write the dumps again") from error
    file = folder / f"{stem}.safetensors"
    tensors = tensorfile.load(file)

    def part(prefix: str) -> dict[str, np.ndarray]:
        return {k.removeprefix(prefix): np.asarray(v) for k, v in tensors.items() if k.startswith(prefix)}

    try:
        about = decode_json(tensorfile.metadata(file).get("mpq", ""))
        local, values = part("local:"), part("value:")
        return Dump(
            index,
            name,
            text,
            {node: values[node] for node in about["order"] if node in values},
            {k: float(v[0]) for k, v in part("sqnr:").items()},
            {k: tuple(int(n) for n in v) for k, v in part("shape:").items()},
            np.asarray(tensors[OUTPUT]),
            float(tensors["output:sqnr"][0]),
            {node: _departure_of(local[node]) for node in about["order"] if node in local},
            {k: float(v[0]) for k, v in part("expected:").items()},
            part("weight:"),
            part("rows:"),
            part("groups:"),
            part("edge:"),
            about,
        )
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(f"{file} is no probe of a pass; write the dumps again") from error


def _departure_of(row: np.ndarray) -> Departure:
    largest, power, share, departing, *channels = row.tolist()
    return Departure(largest, power, share, tuple(int(c) for c in channels if c >= 0), int(departing))
