"""Machine code of the products on tensor cores, counted without a GPU: the inner loop beside CUTLASS's.

    python -m benchmarks.cuda_static                                  # into benchmarks/results/cuda_static.json
    python -m benchmarks.cuda_static --cutlass DIR --docs docs/targets.md

NVIDIA's compiler makes each kernel for all architectures; its disassembler lists it. The inner loop is the smallest one
that multiplies; figures are instructions that a warp issues for each `IMMA` (4096 products of 8 bits) or `HMMA` (2048
of bfloat16), an `IGMMA` of Hopper being as many as a warp has a share of; registers of a thread and shared memory of a
block. A tensor core of sm_80, sm_87 and sm_89 takes 8 cycles for an `IMMA`, in which a warp's scheduler issues as many
instructions: with fewer, tensor cores can be what a loop waits for. One of sm_90 takes 4, in an `IGMMA`. Nothing
is executed, and caches, banks and waiting are not in the figures. The tile of an attention is queries x keys, and its
loop holds the softmax too. CUTLASS's is its 2.x GEMM of signed 8-bit integers in our tile, from the folder of its
headers (`nvidia-cutlass` on PyPI, or a clone's `include`).
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import documents
from benchmarks.machine import provenance
from mpq_compiler.backends.tvm.kernels.cuda import (
    fast_attention,
    float_products,
    gemm,
    weight_only,
    wgmma,
    wgmma_attention,
)
from mpq_compiler.backends.tvm.kernels.cuda.gemm import tiles
from mpq_compiler.backends.tvm.kernels.cuda.threads import ROOM
from mpq_compiler.backends.tvm.kernels.cuda.weights import STEP
from mpq_compiler.backends.tvm.kernels.problems.dequantize import DequantizeTable, WeightOnly
from mpq_compiler.backends.tvm.kernels.problems.fast_attention import FastAttention
from mpq_compiler.backends.tvm.kernels.problems.float_gemm import Conv2d, Linear
from mpq_compiler.backends.tvm.kernels.problems.quant_matmul import QuantMatmul
from mpq_compiler.backends.tvm.toolchain import machine_code
from mpq_compiler.support import terminal
from mpq_compiler.targets.numerics import BF16
from mpq_compiler.targets.table import TARGETS

RESULTS = Path(__file__).parent / "results" / "cuda_static.json"
BUDGET = 8
"""Instructions that a scheduler issues while a tensor core is busy with one."""
INTEGER = {"LOP3", "PLOP3", "SHF", "PRMT", "IADD3", "LEA", "ISETP", "SEL", "IMNMX", "VIADD", "VIMNMX", "SGXT", "BMSK"}
"""Instructions of the integer pipe, which takes two cycles for a warp's."""
LINEAR = QuantMatmul.linear((4096,), 1280, 1280)
CONV = QuantMatmul(32, 32, 320, 320, (3, 3), padding=(1, 1, 1, 1))
FORMATS: dict[str, dict[str, Any]] = {
    "w8": {},
    "w4": {"bits": 4},
    "w4 integers": {"bits": 4, "integers": True},
    "w3": {"bits": 3},
    "w2": {"bits": 2},
    "base+b": {"bits": 2, "has_offset": True},
}
FLOATS = Linear(4096, 1280, 1280, packed=True, numerics=BF16)
FLOAT_CONV = Conv2d(32, 32, 320, 320, packed=True, numerics=BF16)
Problem = QuantMatmul | Linear | WeightOnly | FastAttention
PROBLEMS: dict[str, Problem] = {
    **{f"linear {name}": replace(LINEAR, **options) for name, options in FORMATS.items()},
    "linear w4 g128": replace(LINEAR, bits=4, segments=(128,) * 10),
    **{f"conv3x3 {name}": replace(CONV, **options) for name, options in FORMATS.items()},
    "linear bf16": FLOATS,
    **{f"linear w{n} a16": WeightOnly(FLOATS, DequantizeTable(1280, 1280, (1280,), n)) for n in (4, 2)},
    "conv3x3 w4 a16": WeightOnly(FLOAT_CONV, DequantizeTable(320, 9 * 320, (320,), 4)),
    **{f"attention bf16 d{dim}": FastAttention(4096, 4096, 8, dim) for dim in (40, 64, 80, 128)},
}
CUTLASS = """
#include "cutlass/gemm/device/gemm_universal.h"
#include "cutlass/epilogue/thread/linear_combination.h"
using Gemm = cutlass::gemm::device::GemmUniversal<
    int8_t, cutlass::layout::RowMajor, int8_t, cutlass::layout::ColumnMajor, float, cutlass::layout::RowMajor, int32_t,
    cutlass::arch::OpClassTensorOp, cutlass::arch::Sm80, cutlass::gemm::GemmShape<128, 128, 64>,
    cutlass::gemm::GemmShape<64, 64, 64>, cutlass::gemm::GemmShape<16, 8, 32>,
    cutlass::epilogue::thread::LinearCombination<float, 4, int32_t, float>,
    cutlass::gemm::threadblock::GemmIdentityThreadblockSwizzle<>, 3, 16, 16>;
int run(void *a, void *b, void *c, int m, int n, int k) {
    Gemm gemm;
    auto mode = cutlass::gemm::GemmUniversalMode::kGemm;
    return (int)gemm({mode, {m, n, k}, 1, {1.f, 0.f}, a, b, c, c, 0, 0, 0, 0, k, k, n, n});
}
"""


BUILDS: dict[type[Problem], tuple[Callable[..., Any], Callable[..., Any]]] = {
    QuantMatmul: (gemm.build, wgmma.build),
    Linear: (float_products.build, float_products.build_on_hopper),
    WeightOnly: (weight_only.build, weight_only.build_on_hopper),
    FastAttention: (fast_attention.build, wgmma_attention.build),
}
"""Of all architectures, and of Hopper, which has products of its own in an artifact for it alone."""


def compiled(problem: Problem) -> list[bytes]:
    """The kernel's machine code for all architectures, and that for Hopper."""
    found = []
    for name, build in zip(("cuda", "cuda-sm90"), BUILDS[type(problem)], strict=True):
        target = TARGETS[name]
        if function := build(problem, "kernel"):
            _, device = machine_code.compiled({"kernel": function}, target)
            found.append(machine_code.fatbin(device.source, target.levels))
    return found


def tile(problem: Problem, hopper: bool) -> tuple[str, int]:
    """Of a block of threads, in words; and the bytes of shared memory that it asks for where it is launched."""
    if isinstance(problem, FastAttention):
        own = wgmma_attention.tile(problem) if hopper else fast_attention.tile(problem)
        assert own is not None
        words = 4 * own.words
        return f"{own.queries} x {own.keys}", words if words > ROOM else 0
    bits, chosen = 8, tiles.TILES
    if isinstance(problem, WeightOnly):
        problem, bits = problem.product, problem.table.bits // 2  # a channel is two bytes
    if not isinstance(problem, QuantMatmul):
        problem, chosen = float_products.in_bytes(problem), float_products.TILES
    found = wgmma.tile(problem) if hopper else tiles.tile(problem, chosen)
    size = found.stages * STEP * (found.rows + found.columns * min(bits, problem.bits) // 8)
    return f"{found.rows} x {found.columns}", size if size > ROOM else 0


def listed(code: Path) -> Iterator[tuple[int, list[tuple[int, str]]]]:
    """(compute capability, instructions with their addresses) of the machine code in a file."""
    command = [machine_code.tool("cuobjdump"), "-sass", str(code)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for part in re.split(r"(?=arch = sm_)", text)[1:]:
        level = re.match(r"arch = sm_(\d+)", part)
        assert level
        found = re.finditer(r"/\*([0-9a-f]{4,})\*/\s+([^;]*);", part)
        yield int(level[1]), [(int(m[1], 16), m[2]) for m in found]


def resources(code: Path) -> dict[int, dict[str, int]]:
    """By compute capability: REG, STACK, SHARED and LOCAL, of several kernels the most."""
    command = [machine_code.tool("cuobjdump"), "-res-usage", str(code)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {}
    for part in re.split(r"(?=arch = sm_)", text)[1:]:
        level = re.match(r"arch = sm_(\d+)", part)
        numbers = re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", part)
        if level and numbers:
            used = {name: [int(number) for other, number in numbers if other == name] for name, _ in numbers}
            found[int(level[1])] = {name: max(own) for name, own in used.items()}
    return found


def loop(instructions: list[tuple[int, str]]) -> tuple[int, int, int] | None:
    """(instructions, IMMAs and HMMAs, integer ones among them) of the smallest loop that has any products."""
    best: tuple[int, int, int] | None = None
    for end, text in instructions:
        target = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text)
        if not target or int(target[1], 16) >= end:
            continue
        body = [t for at, t in instructions if int(target[1], 16) <= at <= end]
        products = sum(_products(t) for t in body)
        if products and (best is None or len(body) < best[0]):
            integer = sum(re.sub(r"^@!?U?P\w+ ", "", text).split(".")[0].split()[0] in INTEGER for text in body)
            best = len(body), products, integer
    return best


def _products(text: str) -> int:
    """Of an instruction in units of IMMA or HMMA: 16 x 8 outputs of a warp, whose share of `wgmma` is 16 rows."""
    wide = re.search(r"\b[IH]GMMA\.64x(\d+)x", text)
    return int(wide[1]) // 8 if wide else int("MMA" in text)


def measure(name: str, code: bytes, tile: str, asked: int = 0) -> Iterator[dict[str, Any]]:
    """A row for each architecture. asked: bytes of shared memory, at the launch."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.fatbin")
        path.write_bytes(code)
        used = resources(path)
        for level, instructions in listed(path):
            found = loop(instructions)
            if found:
                row: dict[str, Any] = {"kernel": name, "tile": tile, "level": level}
                row |= dict(zip(("instructions", "mma", "integer"), found, strict=True))
                yield row | {key.lower(): value + (key == "SHARED") * asked for key, value in used[level].items()}


def cutlass(headers: Path) -> bytes:
    """Its GEMM for all architectures."""
    (found,) = {path.parents[1] for path in headers.rglob("cutlass/cutlass.h")}
    with tempfile.TemporaryDirectory() as folder:
        text, code = Path(folder, "gemm.cu"), Path(folder, "gemm.fatbin")
        text.write_text(CUTLASS)
        levels = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in TARGETS["cuda"].levels]
        options = ["-O3", "-std=c++17", "-w", *levels, f"-I{found}"]
        subprocess.run([machine_code.compiler(), "-fatbin", *options, "-o", code, text], check=True)
        return code.read_bytes()


def main() -> None:
    """Counts, prints, and writes the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="kernels whose name contains this")
    parser.add_argument("--cutlass", type=Path, help="folder of CUTLASS's headers")
    parser.add_argument("--json", default=str(RESULTS), help="'' for none")
    parser.add_argument("--docs", type=Path, help="write the table between the marks of this file")
    options = parser.parse_args()
    chosen = {name: problem for name, problem in PROBLEMS.items() if options.only in name}
    rows: list[dict[str, Any]] = []
    with terminal.progress("compiling kernels", len(chosen)) as advance:
        for name, problem in chosen.items():
            for code, kind in zip(compiled(problem), ("", " wgmma"), strict=False):
                rows += measure(name + kind, code, *tile(problem, bool(kind)))
            advance(1)
    if options.cutlass:
        rows += measure("CUTLASS w8", cutlass(options.cutlass), "128 x 128")
    headers, lines = table(rows)
    terminal.table("instructions of the inner loop for each IMMA or HMMA", headers, lines)
    over = [f"{r['kernel']} on sm_{r['level']}" for r in rows if r["instructions"] > BUDGET * r["mma"]]
    print(f"more than {BUDGET} instructions for each: {', '.join(over) or 'none'}")
    print(f"spills: {', '.join(r['kernel'] for r in rows if r['local'] or r['stack']) or 'none'}")
    if options.json:
        found = {**provenance(), "nvcc": machine_code.version(machine_code.compiler()).splitlines()[-1], "rows": rows}
        Path(options.json).write_text(json.dumps(found, indent=1) + "\n")
    if options.docs:
        documents.insert(options.docs, "cuda", documents.table(headers, lines))


def table(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """(headers, a line for each kernel)."""
    levels = sorted({row["level"] for row in rows})
    lines = []
    for name in dict.fromkeys(row["kernel"] for row in rows):
        own = {row["level"]: row for row in rows if row["kernel"] == name}
        first = next(iter(own.values()))
        ratios = [f"{own[n]['instructions'] / own[n]['mma']:.1f}" if n in own else "" for n in levels]
        cycles = [f"{2 * own[n]['integer'] / own[n]['mma']:.1f}" if n in own else "" for n in (80, 90)]
        registers = "{} .. {}".format(min(r["reg"] for r in own.values()), max(r["reg"] for r in own.values()))
        shared = f"{first['shared'] / 1024:.0f} KiB" if first["shared"] else ""
        lines.append([name, first["tile"], *ratios, *cycles, registers, shared])
    named = [f"sm_{n}" for n in levels]
    return ["kernel", "tile", *named, "integer sm_80", "integer sm_90", "registers", "shared"], lines


if __name__ == "__main__":
    main()
