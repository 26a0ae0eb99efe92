"""ARM kernels without an ARM machine: modelled cycles of what really runs, for every format, target and core.

    python -m benchmarks.arm_static                       # all, into benchmarks/results/arm_static.json
    python -m benchmarks.arm_static --format w4 --target aarch64-dotprod --json ''
    python -m benchmarks.arm_static --peer FOLDER         # with the wheels of others in it (see `peers`)
    python -m benchmarks.arm_static --attention           # attentions alone, in the results that are there
    python -m benchmarks.arm_static --streaming --qemu PATH    # SME beside i8mm alone: LLVM 23 or later, qemu 11

Each kernel is linked into a static program, which qemu runs once; its trace says how often every block of instructions
is executed. llvm-mca models the cycles of a block on a core, as if it were repeated. *loop* is the speed of the block
that holds most dot products, in shares of the core's peak: a loop of nothing but dot products on registers (smull,
smlal and sadalp where there are none). *outside* is the share of all cycles that is not that loop's: epilogue,
unpacking, loads of start values, tails. These are models of the pipeline: caches, memory and branch prediction are not
in them, and nothing ran on silicon. Of attentions all cycles are summed up, and those of 8 bits, keys and values made
ready among them, are held against those of float32. Needs qemu-aarch64, aarch64-linux-gnu-gcc, and llvm-mca and
llvm-objdump of LLVM.

A peer is a wheel for AArch64, which is not run: of all innermost loops of its libraries with many dot products, each
core's best is what it is said to have. Loops that take bytes apart are those of 4 bits. To have one:

    pip download onnxruntime --no-deps --only-binary=:all: --platform manylinux_2_28_aarch64 -d FOLDER
"""

from __future__ import annotations

import argparse
import collections
import itertools
import json
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import documents
from benchmarks.kernels import FORMATS
from benchmarks.machine import provenance
from mpq_compiler.backends.tvm import standalone, templates
from mpq_compiler.backends.tvm.compile.worker import _compile
from mpq_compiler.backends.tvm.plan.calls import Call, Function, Kernel, Lowered, Record, Value, record
from mpq_compiler.backends.tvm.toolchain.linker import linker
from mpq_compiler.support import terminal
from mpq_compiler.targets.numerics import F32
from mpq_compiler.targets.table import TARGETS, Target

emulated_by = "qemu-aarch64"
RESULTS = Path(__file__).parent / "results" / "arm_static.json"
IN_ORDER, REORDERING = (
    ("cortex-a55", "cortex-a510"),
    ("cortex-a76", "neoverse-n1", "neoverse-n2", "neoverse-v1", "neoverse-v2"),
)
CORES = {
    "aarch64-neon": (*IN_ORDER, *REORDERING),
    "aarch64-dotprod": (*IN_ORDER, *REORDERING),
    "aarch64-i8mm": ("cortex-a510", *REORDERING[2:]),
}
DOTS = {"aarch64-neon": "sadalp", "aarch64-dotprod": "sdot", "aarch64-i8mm": "usmmla", "aarch64-sme2": "usmopa"}
"""The instruction that is counted: one for each 16 products, usmmla for 32, usmopa for 1024."""
PEER_DOTS = {
    "aarch64-neon": (re.compile(r"[su](mull|mlal)2?\s+v\d+\.8h"), 0.5),
    "aarch64-dotprod": (re.compile(r"(s|u|us)dot\s+[vz]\d+\.4?s"), 1),
    "aarch64-i8mm": (re.compile(r"(s|u|us)mmla\s+[vz]\d+\.4?s"), 1),
}
"""Those of others, and how many of the above each is."""
MANY, UNPACKS = 16, re.compile(r"(and|ushr|sshr|shl)\s+v\d+\.(16b|8h)")
"""Dot products of a loop of a peer, at least, and what takes two codes out of a byte."""
SVE = {"cortex-a510": 1, "neoverse-n2": 1, "neoverse-v1": 2, "neoverse-v2": 1}
"""How many times 128 bits a vector of SVE has, on the cores that have it."""
FEATURES = "+i8mm,+dotprod,+sve"
SME, REGISTERS = "aarch64-sme2", "aarch64-i8mm"
"""The target with a matrix engine, and that of the same CPU's registers."""
STREAMING_CORE, STREAMING_FEATURES = "c1-ultra", ",+sme2,+bf16"
"""The one core of whose matrix engine LLVM has a model, from release 23 on."""
CPUS = {SME: "max,sme512=on,sme_fa64=off"}
"""CPUs of qemu, where ``max`` will not do."""
PEAKS = {
    "aarch64-neon": (
        "smull v{0}.8h, v30.8b, v31.8b",
        "smlal2 v{0}.8h, v30.16b, v31.16b",
        "sadalp v{1}.4s, v{0}.8h",
    ),
    "aarch64-dotprod": ("sdot v{1}.4s, v30.16b, v31.16b",),
    "aarch64-i8mm": ("usmmla v{1}.4s, v30.16b, v31.16b",),
    SME: ("usmopa za{2}.s, p0/m, p0/m, z0.b, z1.b",),
}
"""What a dot product takes, on registers alone."""
SUMS = 12
"""Of them that are independent, so that none waits for another."""
ROWS, SIZE = (64, 256), 640
TOKENS = ((256, 256), (1024, 1024), (1024, 77))
"""Queries and keys of attentions, of a head of 64 channels."""
LOOP = {**dict.fromkeys(REORDERING, 0.95), "cortex-a55": 0.75}
OUTSIDE = 0.10
"""At 256 rows, on cores that reorder."""
AS_W8 = 1.10


def problems(rows: int) -> dict[str, Record]:
    """A linear layer and a 3 x 3 convolution of so many rows, in all formats."""
    side = int(rows**0.5)
    found = {}
    for name, options in FORMATS.items():
        fields = {"height": rows, "width": 1, "channels": SIZE, "outputs": SIZE, "rank": 3, **options}
        found[f"linear {name}"] = record("problem.QuantMatmul", **fields)
        image = {"height": side, "width": side, "channels": SIZE // 2, "outputs": SIZE // 2, **options}
        same = {"kernel": (3, 3), "padding": (1, 1, 1, 1)}
        found[f"conv3x3 {name}"] = record("problem.QuantMatmul", **image, **same)
    return found


def program(kernel: Kernel, target: Target, folder: Path) -> Path:
    """A static program, with its symbols, that calls the kernel once, on zeros."""
    buffers = templates.arguments(kernel, target)
    taken, given = ([Value(a.name, tuple(a.shape), a.dtype) for a in part] for part in buffers)
    call = Call(kernel, *(tuple((v.name, v.name) for v in part) for part in (taken, given)), "kernel")
    lowered = Lowered((), (), (), (Function(tuple(taken), (call,), given[-1]),))
    workspace = _compile(kernel, target, str(folder / "kernel.o"))
    weights = folder / "weights.safetensors"
    weights.write_bytes(bytes(64))
    about = standalone.Weights(standalone.describe(weights), {})
    standalone.write(folder, lowered, target, [folder / "kernel.o"], about, workspace)
    sources = [str(folder / name) for name in ("mpq.c", "mpq_run.c", standalone.MODEL, *standalone.CRYPTOGRAPHY)]
    path = folder / "program"
    options = ("-std=c11", "-O2", "-static", "-no-pie", *sources, str(folder / "kernel.o"), "-lpthread", "-lm")
    subprocess.run([linker(target), *options, "-o", str(path)], check=True)
    return path


@dataclass(frozen=True)
class Ran:
    """Instructions that follow each other, by the address of the first, and how often they were executed."""

    start: int
    count: int
    executions: int

    @property
    def end(self) -> int:
        return self.start + 4 * self.count


def executions(path: Path, folder: Path, target: Target) -> list[Ran]:
    """What a program executes: what qemu translates at once, and how often it enters that."""
    log = folder / "trace"
    command = [*emulator(target), "-d", "in_asm,exec,nochain", "-D", str(log), str(path)]
    subprocess.run([*command, "--weights", str(folder / "weights.safetensors")], check=True, capture_output=True)
    sizes: dict[int, int] = {}
    entered: collections.Counter[int] = collections.Counter()
    start = 0
    with log.open() as lines:
        for line in lines:
            if line.startswith("Trace"):
                entered[int(line.split("/")[1], 16)] += 1
            elif line.startswith("IN:"):
                start = 0
            elif line.startswith("0x"):
                start = start or int(line.split(":")[0], 16)
                sizes[start] = (int(line.split(":")[0], 16) - start) // 4 + 1
    log.unlink()
    return [Ran(start, sizes[start], count) for start, count in sorted(entered.items())]


def instructions(path: Path) -> Iterator[tuple[str, int, str]]:
    """(function, address, instruction) of all that a program or library holds."""
    command = [tool("llvm-objdump"), "-d", "--no-show-raw-insn", f"--mattr={FEATURES}", str(path)]
    function = ""
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if match := re.match(r"\s+([0-9a-f]+):\s+(.*)", line):
                yield function, int(match[1], 16), match[2].split("//")[0].strip()
            elif match := re.match(r"[0-9a-f]+ <(.*)>:", line):
                function = match[1]
    if process.returncode:
        sys.exit(f"llvm-objdump cannot read {path}")


BRANCH = re.compile(r"(b|b\.\w+|bl|blr|br|ret|cbn?z|tbn?z)\b")


def blocks(code: dict[int, str], ran: Sequence[Ran]) -> Iterator[tuple[list[str], int]]:
    """(instructions, executions) of what ran; what qemu cut, which makes long blocks shorter, is one again."""
    left = {each.start: each for each in ran if each.start in code}
    for start in sorted(left):
        if (each := left.pop(start, None)) is None:
            continue
        end = each.end
        while not BRANCH.match(code[end - 4]) and end in left and left[end].executions == each.executions:
            end = left.pop(end).end
        yield [code[at] for at in range(each.start, end, 4)], each.executions


def cycles(found: Iterable[Sequence[str]], core: str, kept: dict[tuple[str, str], float]) -> list[float]:
    """Of one execution of each block among many, by llvm-mca."""
    texts = []
    for block in found:
        # a branch costs an instruction, and is taken for granted
        text = "\n".join("nop" if BRANCH.match(line) else line.split("<")[0].strip() for line in block)
        texts.append(re.sub(r"(adrp?\s+\w+), .*", r"\1, #0", text))
    new = [text for text in dict.fromkeys(texts) if (text, core) not in kept]
    if new:
        command = [tool("llvm-mca"), "-mtriple=aarch64", f"-mcpu={core}", f"-mattr={FEATURES}", "-iterations=400"]
        regions = "".join(f"# LLVM-MCA-BEGIN\n{text}\n# LLVM-MCA-END\n" for text in new)
        done = subprocess.run(command, input=regions, capture_output=True, text=True)
        totals = re.findall(r"Total Cycles:\s+(\d+)", done.stdout)
        if len(totals) != len(new):
            raise RuntimeError(f"llvm-mca has no cycles of a block on {core}: {done.stderr.strip()[:300]}")
        kept.update({(text, core): int(total) / 400 for text, total in zip(new, totals, strict=True)})
    return [kept[text, core] for text in texts]


def tool(name: str) -> str:
    """The newest of an LLVM tool that is installed."""
    found = [f"{name}-{version}" for version in range(30, 15, -1) if shutil.which(f"{name}-{version}")]
    if not found and not shutil.which(name):
        sys.exit(f"{name} is not installed: install LLVM (apt install llvm)")
    return (found or [name])[0]


def llvm() -> str | None:
    """The release of LLVM whose models these are."""
    said = subprocess.run([tool("llvm-mca"), "--version"], capture_output=True, text=True).stdout
    release = re.search(r"version (\S+)", said)
    return release and release[1]


@dataclass(frozen=True)
class Cell:
    """Of a kernel on a core: cycles of a dot product in the loop and at the peak; the share of cycles outside; all."""

    loop: float
    peak: float
    outside: float
    total: float

    @property
    def share(self) -> float:
        return self.peak / self.loop


def run(kernel: Kernel, target: Target) -> list[tuple[list[str], int]]:
    """(instructions, executions) of the blocks of a call of the kernel."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        path = program(kernel, target, folder)
        code = {address: text for function, address, text in instructions(path) if kernel.name in function}
        return list(blocks(code, executions(path, folder, target)))


def measure(
    problem: Record, target: Target, cores: Sequence[str], kept: dict[tuple[str, str], float]
) -> dict[str, Cell]:
    """Each core's cell."""
    ran = run(Kernel("gemm", problem), target)
    dots = [sum(line.startswith(DOTS[target.name]) for line in block) for block, _ in ran]
    main = max(range(len(ran)), key=lambda i: dots[i] * ran[i][1])
    found = {}
    for core in cores:
        each = cycles([block for block, _ in ran], core, kept)
        own = each[main] / dots[main]
        total = sum(count * time for time, (_, count) in zip(each, ran, strict=True))
        useful = own * sum(n * count for n, (_, count) in zip(dots, ran, strict=True))
        found[core] = Cell(own, peak(target, core, kept), max(0.0, 1 - useful / total), total)
    return found


def emulator(target: Target) -> list[str]:
    """What runs a program for the target."""
    return [emulated_by, "-cpu", CPUS.get(target.name, "max")]


def streaming(formats: Sequence[str], kept: dict[tuple[str, str], float]) -> Iterator[dict[str, Any]]:
    """Of products by a matrix engine: cycles by registers over theirs, and how the latter are spent."""
    work = [(name, m, problem) for m in ROWS for name, problem in problems(m).items() if name.split()[1] in formats]
    with terminal.progress("kernels", len(work)) as advance:
        for name, m, problem in work:
            tiles, registers = (
                measure(problem, TARGETS[target], [STREAMING_CORE], kept)[STREAMING_CORE] for target in (SME, REGISTERS)
            )
            yield {"kernel": name, "rows": m, "core": STREAMING_CORE, "ratio": round(registers.total / tiles.total, 3),
                   "share": round(tiles.share, 4), "outside": round(tiles.outside, 4)}  # fmt: skip
            advance(1)


def streaming_table(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """A line for each kernel, under the headers."""
    many = list(dict.fromkeys(row["rows"] for row in rows))
    lines = [["kernel", *(f"{n} rows" for n in many), "the loop's share", f"outside, {many[-1]} rows"]]
    for name in dict.fromkeys(row["kernel"] for row in rows):
        own = [row for row in rows if row["kernel"] == name]
        ratios = [f"{row['ratio']:.2f} x" for row in own]
        lines.append([name, *ratios, f"{min(r['share'] for r in own):.0%}", f"{own[-1]['outside']:.0%}"])
    return lines


def attentions(names: Sequence[str], kept: dict[tuple[str, str], float]) -> Iterator[dict[str, Any]]:
    """Of attentions in each numerics that targets have: all modelled cycles, relative to those in float32."""
    for (queries, keys), name in itertools.product(TOKENS, [n for n in names if TARGETS[n].numerics]):
        target = TARGETS[name]
        fields = {"queries": queries, "keys": keys, "heads": 1, "dim": 64}
        totals: dict[str, dict[str, float]] = {}
        for kind in (F32, *target.numerics):
            kernels = [Kernel("attention", record("attention.Attention", **fields))]
            if kind != F32:
                ready = record("fast_attention.Ready", keys=keys, heads=1, dim=64, numerics=kind)
                fast = record("fast_attention.FastAttention", numerics=kind, **fields)
                kernels = [Kernel("fast_attention", ready), Kernel("fast_attention", fast)]
            ran = [block for kernel in kernels for block in run(kernel, target)]
            totals[kind] = {
                core: sum(n * each for (_, n), each in zip(ran, cycles([b for b, _ in ran], core, kept), strict=True))
                for core in CORES[name]
            }
        for kind in target.numerics:
            for core, cycled in totals[kind].items():
                yield {"queries": queries, "keys": keys, "target": name, "core": core, "numerics": kind,
                       "ratio": round(cycled / totals[F32][core], 3)}  # fmt: skip


def attention_table(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """A line for each attention and target, a column for each core, under the headers."""
    cores = list(dict.fromkeys(core for each in CORES.values() for core in each))
    lines = [["attention", "target", *cores]]
    for queries, keys, name, kind in dict.fromkeys((r["queries"], r["keys"], r["target"], r["numerics"]) for r in rows):
        own = {r["core"]: f"{r['ratio']:.2f}" for r in rows
               if (r["queries"], r["keys"], r["target"], r["numerics"]) == (queries, keys, name, kind)}  # fmt: skip
        lines.append([f"{queries} x {keys}, {kind}", f"`{name}`", *(own.get(core, "") for core in cores)])
    return lines


def loops(wheel: Path) -> set[tuple[str, ...]]:
    """The innermost loops of a wheel's libraries: from where a branch goes back to, with no other before it."""
    found: set[tuple[str, ...]] = set()
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if ".so" not in Path(name).suffixes:
                continue
            since: list[tuple[int, str]] = []
            for _, address, text in instructions(Path(archive.extract(name, folder))):
                since.append((address, text))
                if branch := BRANCH.match(text):
                    goal = re.findall(r"0x([0-9a-f]+)", text.split("<")[0])
                    if goal and since[0][0] <= int(goal[-1], 16) < address:
                        found.add((*(line for at, line in since[:-1] if at >= int(goal[-1], 16)), branch[0]))
                    since = []
    return found


def products(loop: Sequence[str], target: str, core: str) -> float:
    """Dot products of a peer's loop on a core, of 128 bits."""
    dot, worth = PEER_DOTS[target]
    return worth * sum(SVE.get(core, 0) if "z" in m[0] else 1 for m in map(dot.match, loop) if m)


def peers(wheel: Path, targets: Sequence[str], kept: dict[tuple[str, str], float]) -> Iterator[dict[str, Any]]:
    """The best of a peer's loops on each core, for 8 bits and for 4, where it has any."""
    name = " ".join(wheel.name.split("-")[:2])
    found = [loop for loop in loops(wheel) if any(products(loop, target, "neoverse-v1") for target in targets)]
    for target, bits in itertools.product(targets, (8, 4)):
        for core in CORES[target]:
            own = [loop for loop in found if any(map(UNPACKS.match, loop)) == (bits == 4)]
            own = [loop for loop in own if products(loop, target, core) >= MANY]
            if not own:
                continue
            times = cycles(own, core, kept)
            best = min(time / products(loop, target, core) for time, loop in zip(times, own, strict=True))
            most = peak(TARGETS[target], core, kept)
            yield {"kernel": f"{name} w{bits}", "target": target, "core": core, "share": round(most / best, 4),
                   "cycles": round(best, 4), "peak": round(most, 4), "loops": len(own)}  # fmt: skip


def peak(target: Target, core: str, kept: dict[tuple[str, str], float]) -> float:
    """Cycles of a dot product where there is nothing else."""
    register_only = [line.format(i, i + SUMS, i % 4) for line in PEAKS[target.name] for i in range(SUMS)]
    (found,) = cycles([register_only], core, kept)
    return found / SUMS


def merge(path: Path, **parts: object) -> None:
    """Puts parts of the results into those that are there."""
    found = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**found, **parts}, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", nargs="+", choices=CORES, default=list(CORES))
    parser.add_argument("--format", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--peer", nargs="+", type=Path, default=[], help="wheels, or folders of wheels, of peers")
    parser.add_argument("--attention", action="store_true", help="attentions alone")
    parser.add_argument("--streaming", action="store_true", help="SME beside i8mm alone")
    parser.add_argument("--qemu", default="qemu-aarch64", help="an emulator of AArch64, of release 11 for SME")
    parser.add_argument("--json", default=str(RESULTS), help="'' writes none")
    parser.add_argument("--docs", type=Path, help="write the tables into this file, between the marks")
    options = parser.parse_args()
    wheels = [wheel for path in options.peer for wheel in (sorted(path.glob("*.whl")) if path.is_dir() else [path])]
    if bad := [str(path) for path in wheels or options.peer if not zipfile.is_zipfile(path)]:
        parser.error(f"--peer: no wheel, nor a folder of wheels: {', '.join(bad)}")
    global emulated_by, FEATURES
    emulated_by = options.qemu
    kept: dict[tuple[str, str], float] = {}
    if options.streaming:
        FEATURES += STREAMING_FEATURES
        found = list(streaming(options.format, kept))
        lines = streaming_table(found)
        terminal.table(f"{SME} on {STREAMING_CORE}: speed by that of {REGISTERS}, modelled", lines[0], lines[1:])
        if options.json:
            merge(Path(options.json), streaming={**provenance(), "llvm": llvm(), "rows": found})
        if options.docs:
            documents.insert(options.docs, "streaming", documents.table(lines[0], lines[1:]))
        return
    heads = list(attentions(options.target, kept))
    lines = attention_table(heads)
    terminal.table("attention: modelled cycles, relative to float32", lines[0], lines[1:])
    if options.attention:
        if options.json:
            merge(Path(options.json), attention=heads)
        return
    rows: list[dict[str, Any]] = []
    work = [
        (name, m, problem, TARGETS[target])
        for target in options.target
        for m in ROWS
        for name, problem in problems(m).items()
        if name.split()[1] in options.format
    ]
    with terminal.progress("kernels", len(work)) as advance:
        for name, m, problem, target in work:
            for core, cell in measure(problem, target, CORES[target.name], kept).items():
                rows.append(
                    {"kernel": name, "rows": m, "target": target.name, "core": core, "share": round(cell.share, 4),
                     "cycles": round(cell.loop, 4), "peak": round(cell.peak, 4), "outside": round(cell.outside, 4)}
                )  # fmt: skip
            advance(1)
    others: list[dict[str, Any]] = []
    for wheel in wheels:
        others += peers(wheel, options.target, kept)
    tables = {target: table(rows, others, target) for target in options.target}
    for target, lines in tables.items():
        title = f"{target}: the loop's share of the peak / cycles outside it at {' and '.join(map(str, ROWS))} rows"
        terminal.table(title, lines[0], lines[1:])
    for line in missed(rows):
        print(line)
    if options.json:
        before = json.loads(RESULTS.read_text(encoding="utf-8"))
        record_ = {**provenance(), "llvm": llvm(), "size": SIZE, "rows": rows, "peers": others, "attention": heads,
                   "streaming": before.get("streaming")}  # fmt: skip
        Path(options.json).write_text(json.dumps(record_, indent=1) + "\n")
    if options.docs:
        text = "\n\n".join(f"`{name}`:\n\n{documents.table(lines[0], lines[1:])}" for name, lines in tables.items())
        documents.insert(options.docs, "arm", text)


def table(rows: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]], target: str) -> list[list[str]]:
    """A line for each kernel and each peer, a column for each core, under the headers."""
    lines = [["kernel", *CORES[target]]]
    for name in dict.fromkeys(row["kernel"] for row in (*rows, *others) if row["target"] == target):
        line = [name]
        for core in CORES[target]:
            own = [r for r in (*rows, *others) if (r["kernel"], r["target"], r["core"]) == (name, target, core)]
            outside = ", ".join(f"{row['outside']:.0%}" for row in own if "outside" in row)
            share = f"{min(row['share'] for row in own):.0%}" if own else ""
            line.append(f"{share} / {outside}" if outside else share)
        lines.append(line)
    return lines


def missed(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """The goals that are not met, and the worst cell."""
    by_key = {(row["kernel"], row["rows"], row["target"], row["core"]): row for row in rows}
    for (name, m, target, core), row in by_key.items():
        what = f"{target} {core}, {name}, {m} rows"
        if row["share"] < LOOP.get(core, 0):
            yield f"NOT MET: {what}: the loop has {row['share']:.1%} of the peak, goal {LOOP[core]:.0%}"
        if m == max(ROWS) and core in REORDERING and row["outside"] > OUTSIDE:
            yield f"NOT MET: {what}: {row['outside']:.1%} of the cycles are outside the loop, goal {OUTSIDE:.0%}"
        eight = by_key.get((name.replace("w4", "w8"), m, target, core))
        if (
            name.endswith("w4")
            and eight
            and row["cycles"] / (1 - row["outside"]) > AS_W8 * eight["cycles"] / (1 - eight["outside"])
        ):
            yield f"NOT MET: {what}: more than {AS_W8 - 1:.0%} slower than w8"
    worst = min(rows, key=lambda row: row["share"])
    yield f"the worst loop: {worst['target']} {worst['core']}, {worst['kernel']}: {worst['share']:.1%} of the peak"
    worst = max((row for row in rows if row["rows"] == max(ROWS)), key=lambda row: row["outside"])
    where = f"{worst['target']} {worst['core']}, {worst['kernel']}"
    yield f"the most outside a loop at {max(ROWS)} rows: {where}: {worst['outside']:.1%} of the cycles"


if __name__ == "__main__":
    main()
