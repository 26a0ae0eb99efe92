"""From prompt to picture on a Raspberry Pi 5 and a phone: a model of the seconds, from the instructions that run.

    python -m benchmarks.arm_pipelines
    python -m benchmarks.arm_pipelines --parts taesd --machines pi5

Nothing ran on silicon. The parts of each pipeline, of random weights, are lowered by the recipe w8a8 for the machine's
target at 512 x 512 pixels. Every distinct kernel is linked into a program, which qemu runs; llvm-mca models the cycles
of what it executed on the core (`benchmarks.arm_static`). Kernels of many rows run with few, and with twice as many:
from there the cycles grow in a straight line. A call takes the longer of two times: its cycles, spread evenly over the
threads, and the bytes of its operands and results at the memory's bandwidth, as if no cache kept any. Copies are bytes
alone. What is left out makes it faster than a board: misses in the caches, branches, heat, threads that wait; and one
thing makes it slower: activations that a cache does keep.

Needs qemu-aarch64, aarch64-linux-gnu-gcc, and llvm-mca and llvm-objdump of LLVM 17 or later.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from benchmarks import arm_static, cells, documents
from benchmarks.machine import provenance
from mpq_compiler.backends.tvm import lowering, templates
from mpq_compiler.backends.tvm.emit.walk import SelectKernels
from mpq_compiler.backends.tvm.kernels.problems.strides import sample_extents
from mpq_compiler.backends.tvm.plan.calls import Call, Kernel, Record
from mpq_compiler.driver.lower import lower
from mpq_compiler.driver.options import Options
from mpq_compiler.frontend import call_file, denoiser
from mpq_compiler.ir.program import Program
from mpq_compiler.support import terminal
from mpq_compiler.targets.table import TARGETS

RESULTS = cells.RESULTS / "arm_pipelines.json"
DOCS = cells.ROOT / "docs" / "pipelines.md"
LATENT, TOKENS = 64, 77
"""Pixels of the latents along a side, an eighth of the picture's; tokens of a prompt."""
ROWS = 64
"""Of a kernel that runs, at most twice that."""
GROWING = ("positions", "queries", "height")
"""Fields of problems that a kernel's cycles grow with in a straight line."""
MOVES = "movement"
"""The template of kernels that copy and compute nothing."""


@dataclass(frozen=True)
class Machine:
    """A machine: what it is called, its target, the core that llvm-mca models, its threads, and what memory gives."""

    name: str
    target: str
    core: str
    ghz: float
    threads: int
    gigabytes: float
    """A second, of what is read and written."""


MACHINES = {
    "pi5": Machine("Raspberry Pi 5, 4 threads", "aarch64-dotprod", "neoverse-n1", 2.4, 4, 10),
    "x4": Machine("Cortex-X4, 1 thread", "aarch64-i8mm", "cortex-x4", 3.3, 1, 30),
}
"""The core of a Raspberry Pi 5 is a Cortex-A76, of which llvm-mca knows the server's twin, Neoverse N1."""


class Text(nn.Module):
    """The text encoder of Stable Diffusion 1.5."""

    def __init__(self) -> None:
        super().__init__()
        config = CLIPTextConfig(
            hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12
        )  # fmt: skip
        self.model = CLIPTextModel(config)

    def forward(self, input_ids: Tensor) -> Tensor:
        found: Tensor = self.model(input_ids)[0]
        return found


class Step(nn.Module):
    """A UNet that is called with what a prompt says in 768 channels."""

    def __init__(self, **config: object) -> None:
        super().__init__()
        self.model = UNet2DConditionModel(sample_size=LATENT, cross_attention_dim=768, **config)

    def forward(self, sample: Tensor, timestep: Tensor, states: Tensor) -> Tensor:
        found: Tensor = self.model(sample, timestep, states, return_dict=False)[0]
        return found


class Decoder(nn.Module):
    """A decoder of latents in four channels."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, latents: Tensor) -> Tensor:
        found: Tensor = self.model.decode(latents, return_dict=False)[0]
        return found


def _autoencoder() -> nn.Module:
    levels = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    return Decoder(AutoencoderKL(**levels, block_out_channels=(128, 256, 512, 512), layers_per_block=2))


def _small_unet() -> nn.Module:
    """Without the lowest level, the middle and every second block, as that of SDXS-512."""
    return Step(
        block_out_channels=(320, 640, 1280), layers_per_block=1, mid_block_type=None,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip


def _small_decoder() -> nn.Module:
    return Decoder(AutoencoderTiny())


PARTS = {"text": Text, "sd15": Step, "vae": _autoencoder, "sdxs": _small_unet, "taesd": _small_decoder}
"""What makes each part."""
MODELS: dict[str, tuple[str, str, str, int]] = {
    "Stable Diffusion 1.5, 4 steps": ("text", "sd15", "vae", 4),
    "like SDXS-512, 1 step": ("text", "sdxs", "taesd", 1),
}
"""Text encoder, denoiser, decoder and steps; without guidance, as models of few steps are drawn with."""


def packed(name: str) -> Program:
    """A part as the recipe w8a8 packs it, which is the same for all CPUs."""
    torch.manual_seed(0)
    module, draw = PARTS[name]().eval(), torch.Generator().manual_seed(1)
    latents = [torch.randn(1, 4, LATENT, LATENT, generator=draw) for _ in range(2)]
    calls: list[dict[str, Tensor]] = [{"latents": each} for each in latents]
    if name == "text":
        calls = [{"input_ids": torch.randint(49407, (1, TOKENS), generator=draw)} for _ in range(2)]
    elif isinstance(module, Step):
        states = [torch.randn(1, TOKENS, 768, generator=draw) for _ in range(2)]
        calls = [
            {"sample": each, "timestep": torch.tensor([float(at)]), "states": state}
            for each, at, state in zip(latents, (900, 300), states, strict=True)
        ]
    latent = next(iter(calls[0]))
    with tempfile.TemporaryDirectory() as scratch, torch.no_grad():
        file = Path(scratch) / "calls.safetensors"
        call_file.write(file, module, calls, latent=latent)
        time = "timestep" if isinstance(module, Step) else None
        options = Options(recipe="w8a8", calibration=file, cache=Path(scratch) / "cache")
        return lower(denoiser.wrap_calls(module, file, name=name, latent=latent, time=time), options).packed().program


def calls_of(program: Program, target: str) -> tuple[Call, ...]:
    """The kernel calls of a packed program for one sample."""
    stages = [SelectKernels(program, (1,), ()), *lowering.of_target(TARGETS[target])]
    return lowering.run(stages).functions[0].calls


def fewer(problem: Record) -> tuple[Record, Record, float] | None:
    """A problem with few of its rows, with twice as many, and how often their difference is added to the first.

    None for a problem that is small, or of nothing that grows.
    """
    fields = dict(problem.fields)
    field = next((name for name in GROWING if name in fields), None)
    if field is None:
        return None
    few = max(1, ROWS // int(fields.get("width", 1)))
    if int(fields[field]) <= 2 * few:
        return None
    first, second = (problem.replace(**{field: n}) for n in (few, 2 * few))
    return first, second, (int(fields[field]) - few) / few


def cycles(kernel: Kernel, machine: Machine, kept: dict[tuple[str, str], float]) -> float:
    """Cycles of a call of the kernel in one thread."""

    def total(problem: Record) -> float:
        ran = arm_static.run(Kernel(kernel.template, problem), TARGETS[machine.target])
        each = arm_static.cycles([block for block, _ in ran], machine.core, kept)
        return sum(count * time for time, (_, count) in zip(each, ran, strict=True))

    if kernel.template == MOVES:
        return 0.0
    if (cut := fewer(kernel.problem)) is None:
        return total(kernel.problem)
    few, twice = total(cut[0]), total(cut[1])
    return few + cut[2] * (twice - few)


def traffic(kernel: Kernel, target: str) -> int:
    """Bytes of all operands and results of a call of one sample."""
    buffers = itertools.chain(*templates.arguments(kernel, TARGETS[target]))
    return sum(math.prod(sample_extents(each.shape)) * np.dtype(each.dtype).itemsize for each in buffers)


def cost(calls: Sequence[Call], machine: Machine, kept: dict[tuple[str, str], float]) -> dict[str, object]:
    """The modelled cost of calls, one after the other.

    Seconds in all, those of arithmetic and those of memory alone, the bytes that are moved, and the seconds of each
    template of kernels.
    """
    seconds = computing = moving = 0.0
    moved, templates_ = 0, Counter[str]()
    counted = Counter(call.kernel for call in calls)
    with terminal.progress("kernels", len(counted)) as advance:
        for kernel, count in counted.items():
            busy = cycles(kernel, machine, kept) / (machine.ghz * 1e9 * machine.threads)
            size = traffic(kernel, machine.target)
            waits = size / (machine.gigabytes * 1e9)
            computing, moving, moved = computing + count * busy, moving + count * waits, moved + count * size
            seconds += count * max(busy, waits)
            templates_[kernel.template] += count * max(busy, waits)
            advance(1)
    return {"seconds": seconds, "computing": computing, "moving": moving, "bytes": moved,
            "templates": dict(templates_.most_common())}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[*PARTS])
    parser.add_argument("--machines", nargs="+", choices=MACHINES, default=[*MACHINES])
    parser.add_argument("--table", action="store_true", help="write the table of what is there, and measure nothing")
    args = parser.parse_args()
    kept: dict[tuple[str, str], float] = {}
    order = {"machine": tuple(MACHINES), "part": tuple(PARTS)}
    for part in [] if args.table else args.parts:
        program = packed(part)
        for key in args.machines:
            machine = MACHINES[key]
            about = {"part": part, "machine": key, **vars(machine), "llvm": arm_static.llvm(), "parameters": 0}
            cell = {**about, **cost(calls_of(program, machine.target), machine, kept), **provenance()}
            cells.keep(RESULTS, cell, ("part", "machine"), order)
            print(json.dumps({name: cell[name] for name in ("part", "machine", "seconds")}), flush=True)
    documents.insert(DOCS, "arm-pipelines", table(cells.read(RESULTS)))


def table(found: Sequence[Mapping[str, object]]) -> str:
    """A line for each model on each machine."""
    seconds = {(str(cell["part"]), str(cell["machine"])): float(str(cell["seconds"])) for cell in found}
    headers = ("at 512 x 512", "machine", "text", "a step", "decoder", "whole")
    lines = []
    for (title, (*parts, steps)), (key, machine) in itertools.product(MODELS.items(), MACHINES.items()):
        if all((part, key) in seconds for part in parts):
            text, step, decoder = (seconds[part, key] for part in parts)
            whole = text + int(steps) * step + decoder
            times = [f"{value:.2f} s" for value in (text, step, decoder, whole)]
            lines.append([title, machine.name, *times])
    return documents.table(headers, lines)


if __name__ == "__main__":
    main()
