"""Writes a plan as a C program: mpq.h is its interface, mpq_run.c a command around it, and mpq_model.c generated data.

`write` is for `--emit c`: mpq.c runs tables, a static memory plan and the kernels' objects, without TVM's runtime.
`write_machine` is for `--standalone`: mpq_vm.c runs the functions of kernels.so on TVM's small runtime (`tvm_wheels`).

A part that does not depend on the latents is computed again only where its inputs differ from the previous call's.
"""

from __future__ import annotations

import itertools
import math
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mpq_compiler.artifact.bundle import PROGRAM, SERVER
from mpq_compiler.backends.tvm import templates
from mpq_compiler.backends.tvm.kernels.problems.argument import Argument, sized
from mpq_compiler.backends.tvm.plan.calls import Accepted, Call, Function, Kernel, Lowered, Value
from mpq_compiler.backends.tvm.toolchain.linker import linker
from mpq_compiler.support.tensorfile import ALIGNMENT
from mpq_compiler.targets.table import Target

CRYPTOGRAPHY = ("monocypher.c", "monocypher-ed25519.c")
"""Sources by others, which every program is linked with: it checks signatures."""
SIGNING = (*CRYPTOGRAPHY, "monocypher.h", "monocypher-ed25519.h", "mpq_sign.h")
OWNER = "mpq_owner.h"
HEADERS = ("mpq.h", "mpq_plan.h", "mpq_common.h", "mpq_files.h", "mpq_json.h", *SIGNING, OWNER)
COMMON = (*HEADERS, "mpq_run.c", "CMakeLists.txt")
SOURCES = (*COMMON, "mpq.c", "mpq_pool.h", "mpq_rpc.c")
MACHINE = (*COMMON, "mpq_vm.c")
MODEL, KERNELS = "mpq_model.c", "libkernels.a"
LINKED = ("-std=c11", "-O2", "-Wl,--strip-all", "-Wl,--build-id=none", "-Wl,-z,noexecstack")
OPTIONS = (*LINKED, "-static")
TYPE_CODES = {"i": 0, "u": 1, "f": 2, "b": 6}
"""DLPack's type codes, by NumPy's kinds."""


@dataclass(frozen=True)
class File:
    """The size and the checksum of a file (`mpq_common.h`, sum_of)."""

    bytes: int
    sum: int

    def __str__(self) -> str:
        return f"{{{self.bytes}ull, {self.sum}ull}}"


@dataclass(frozen=True)
class Weights:
    """The weights file, and the byte range (first, end) of each tensor in it."""

    file: File
    places: Mapping[str, tuple[int, int]]


def describe(path: Path) -> File:
    """Computes the size and checksum of a file."""
    words = 1 << 20
    total, first = path.stat().st_size, 0
    with path.open("rb") as file, np.errstate(over="ignore"):
        result = np.uint64(total)
        while data := file.read(8 * words):
            values = np.frombuffer(data + bytes(-len(data) % 8), "<u8")
            odd = np.arange(first, first + len(values), dtype=np.uint64) * np.uint64(2) + np.uint64(1)
            result += (values * odd).sum(dtype=np.uint64)
            first += len(values)
    return File(total, int(result))


def write(
    folder: Path,
    lowered: Lowered,
    target: Target,
    objects: Sequence[Path],
    weights: Weights,
    workspace_bytes: int,
    accepted: Accepted | None = None,
    owner: str = "",
) -> list[str]:
    """Writes the C program with its own executor, and compiles it.

    Args:
        folder: receives the files.
        lowered: the plan.
        target: decides the compiler.
        objects: the object file of each kernel.
        weights: the weights file.
        workspace_bytes: the workspaces of a thread, at most.
        accepted: what inputs may hold.
        owner: the public key, in hexadecimal, whose owner has to have signed what the program opens; "": nobody.

    Returns:
        The names of the files: the sources, the archive of the kernels, and two static executables, `PROGRAM` with the
        whole model and `SERVER`, which receives programs on a device (`mpq_rpc.c`).

    Raises:
        UserError: there is no compiler for the target.
    """
    _sources(folder, SOURCES, _Model(lowered, target, weights, accepted or Accepted(), workspace_bytes).text(), owner)
    compiler = linker(target)
    archiver = compiler.removesuffix("gcc") + "ar" if compiler.endswith("-gcc") else "ar"
    run(folder, archiver, "rcsD", KERNELS, *(str(path.resolve()) for path in objects))
    sources = ("mpq.c", "mpq_run.c", MODEL, *CRYPTOGRAPHY)
    run(folder, compiler, *OPTIONS, *sources, KERNELS, "-lpthread", "-lm", "-o", PROGRAM)
    run(folder, compiler, *OPTIONS, "mpq_rpc.c", "-o", SERVER)
    return sorted([*SOURCES, MODEL, KERNELS, PROGRAM, SERVER])


def write_machine(
    folder: Path,
    lowered: Lowered,
    target: Target,
    library: Path,
    weights: Weights,
    held_bytes: int,
    accepted: Accepted | None = None,
    owner: str = "",
) -> list[str]:
    """Writes the C program that runs kernels.so on TVM's runtime, and compiles it.

    Args:
        folder: receives the files.
        lowered: the plan.
        target: decides the compiler.
        library: kernels.so.
        weights: the weights file.
        held_bytes: the memory that the runtime takes.
        accepted: what inputs may hold.
        owner: as for `write`.

    Returns:
        The names of the files: the sources and `PROGRAM`.

    Raises:
        UserError: there is no compiler for the target.
    """
    machine = _Machine(lowered, target, weights, accepted or Accepted())
    _sources(folder, MACHINE, machine.text(describe(library), held_bytes), owner)
    run(folder, linker(target), *LINKED, "mpq_vm.c", "mpq_run.c", MODEL, *CRYPTOGRAPHY, "-ldl", "-o", PROGRAM)
    return sorted([*MACHINE, MODEL, PROGRAM])


def _sources(folder: Path, names: Iterable[str], generated: str, owner: str) -> None:
    for name in names:
        text = Path(__file__).with_name(name).read_text()
        (folder / name).write_text(text.replace('""', f'"{owner}"') if name == OWNER else text)
    (folder / MODEL).write_text(generated)


def run(folder: Path, *command: str) -> None:
    """Runs a compiler in the folder. RuntimeError: it fails; its first error."""
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "error" in line] or [done.stderr.strip()]
        raise RuntimeError(f"{command[0]} ended with {done.returncode}: {errors[0]}")


def offsets(sizes: Mapping[str, int], alive: Mapping[str, tuple[int, int]]) -> tuple[dict[str, int], int]:
    """Allocates tensors in one block of memory, so that tensors alive at once do not overlap.

    Larger tensors are placed first, each at the lowest free place (greedy by size, Pisarchyk and Lee 2020, arXiv
    2001.03288).

    Args:
        sizes: bytes of each tensor.
        alive: the first and last call that need each tensor.

    Returns:
        The offset of each tensor, and the size of the block.
    """
    placed: dict[str, int] = {}
    for name in sorted(sizes, key=lambda n: (-sizes[n], n)):
        first, last = alive[name]
        others = (n for n in placed if alive[n][0] <= last and first <= alive[n][1])
        taken = sorted((placed[n], placed[n] + _aligned(sizes[n])) for n in others)
        at = 0
        for begin, end in taken:
            if at + _aligned(sizes[name]) <= begin:
                break
            at = max(at, end)
        placed[name] = at
    return placed, max((placed[n] + _aligned(sizes[n]) for n in placed), default=0)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class _Steps:
    """Lists of calls in the table, and the memory of their intermediate results."""

    first: list[int]
    """The place of each list's first call in the table, and the place behind the last list."""
    bytes: int
    """The size of the block of intermediate results."""
    places: dict[str, int]
    """The offset of each intermediate result in the block."""


@dataclass
class _Tables:
    """Collects the tables of mpq_model.c."""

    lowered: Lowered
    target: Target
    weights: Weights
    accepted: Accepted
    shapes: list[int] = field(default_factory=list, init=False)
    first_of: dict[tuple[int, ...], int] = field(default_factory=dict, init=False)

    def build(self, functions: Sequence[str]) -> list[str]:
        """The lines of `mpq_build`, which every program has."""
        asked = (feature for kernel in self.lowered.kernels() for feature in kernel.features(self.target.arch))
        needed = dict.fromkeys([*self.target.features, *asked])
        features = ", ".join([*(f'"{name}"' for name in needed), "NULL"])
        tokens = self.accepted.tokens
        values = [", ".join(np.float32(value).item().hex() + "f" for value in each.values) for each in tokens]
        rows = [f'{{"{t.input}", {t.token}, {len(t.values)}, token_{i}}}' for i, t in enumerate(tokens)]
        return [
            f"static const char *const features[] = {{{features}}};",
            _table("mpq_function", "functions", functions),
            *(_table("float", f"token_{i}", [row]) for i, row in enumerate(values)),
            _table("mpq_token", "tokens", rows or ["{0}"]),
            f'const mpq_build mpq_the_build = {{"{self.target.name}", features, {self.weights.file}, functions, '
            f"{len(functions)}, tokens, {len(rows)}}};",
        ]

    def _shape(self, shape: tuple[int, ...]) -> int:
        """The index of a shape's first extent in the table of shapes, where it is added if it is new."""
        if shape not in self.first_of:
            self.first_of[shape] = len(self.shapes)
            self.shapes += shape
        return self.first_of[shape]

    def _tensor(self, name: str, value: Value, batch: int) -> str:
        shape, dtype = sized(value.shape, batch), np.dtype(value.dtype)
        code = "BOOL" if dtype.kind == "b" else f"{dtype.kind.upper()}{8 * dtype.itemsize}"
        size, below = _bytes(shape, value.dtype), dict(self.accepted.below).get(name, 0)
        return f'{{"{name}", "{code}", {len(shape)}, shapes + {self._shape(shape)}, {size}, {below}}}'

    def _tensors(self, values: Iterable[Value], batch: int) -> str:
        return ", ".join(self._tensor(value.name, value, batch) for value in values)


class _Machine(_Tables):
    """The tables that mpq_vm.c reads."""

    def text(self, library: File, held_bytes: int) -> str:
        lowered, parts = self.lowered, self.lowered.parts()
        numbers = {name: number for number, name in enumerate(parts)}
        tables, rows, functions, entries = [], [], [], []
        for name, part in parts.items():
            tables.append(f"static const mpq_tensor in_{name}[] = {{{self._tensors(part.inputs, 1)}}};")
            tables.append(f"static const mpq_tensor out_{name}[] = {{{self._tensors(part.outputs, 1)}}};")
            rows.append(f'{{"{name}", {len(part.inputs)}, {len(part.outputs)}, in_{name}, out_{name}}}')
        for function in lowered.functions:
            for batch in function.batches:
                name, arguments = function.name(batch), function.arguments
                own = ", ".join(str(numbers[part.name]) for part in function.parts)
                tables.append(f"static const mpq_tensor tensors_{name}[] = {{{self._tensors(arguments, batch)}}};")
                tables.append(f"static const int parts_{name}[] = {{{own or -1}}};")
                output = self._tensor("sample", function.output, batch)
                functions.append(f'{{"{name}", {len(function.inputs)}, tensors_{name}, {output}, 0}}')
                entries.append(f"{{{len(arguments)}, {len(function.parts)}, tensors_{name}, parts_{name}}}")
        stored = [self._tensor(value.name, value, 0) for value in lowered.stored]
        offsets = [str(self.weights.places[value.name][0]) for value in lowered.stored]
        machine = f"{library}, {held_bytes}ull, {len(stored)}, {len(rows)}, stored, offsets, parts, entries"
        return "\n".join(
            [
                "/* Generated: the functions of kernels.so. */",
                '#include "mpq_plan.h"',
                "",
                _table("int64_t", "shapes", map(str, self.shapes)),
                _table("mpq_tensor", "stored", stored),
                _table("uint64_t", "offsets", offsets),
                *tables,
                _table("mpq_part", "parts", rows or ["{0}"]),
                _table("mpq_entry", "entries", entries),
                *self.build(functions),
                f"const mpq_machine mpq_the_machine = {{{machine}}};",
                "",
            ]
        )


@dataclass
class _Model(_Tables):
    """The tables that mpq.c reads."""

    workspace_bytes: int
    operands: list[str] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    stages: list[str] = field(default_factory=list)
    reads: list[str] = field(default_factory=list)
    kept_bytes: int = 0
    signatures: dict[Kernel, tuple[list[Argument], list[Argument]]] = field(default_factory=dict)
    last: dict[str, Call] = field(default_factory=dict)
    """The call of the preparation that reads a tensor last, where no function does."""

    def text(self) -> str:
        lowered = self.lowered
        self.last = {name: call for call in lowered.preparation for _, name in call.operands}
        self.last = {name: call for name, call in self.last.items() if name not in lowered.prepared}
        for kernel in lowered.kernels():
            self.signatures[kernel] = templates.arguments(kernel, self.target)
        held, held_bytes, copies = self._held()
        begin = {name: ("MPQ_HELD", at) for name, at in held.items()}
        stored = {value.name: ("MPQ_FILE", self.weights.places[value.name][0]) for value in lowered.stored} | begin
        prepare = self._steps([lowered.preparation], stored, 0, ())
        peak = prepare.bytes
        functions, steps, tables = [], [], []
        for function in lowered.functions:
            for batch in function.batches:
                name = function.name(batch)
                kept = self._kept(function, batch)
                ends = [*function.inputs, function.output]
                lists = [*(part.calls for part in function.parts), function.own]
                own = self._steps(lists, kept | {n: stored[n] for n in lowered.prepared}, batch, ends)
                first_stage = self._stages(function, batch, own, kept)
                peak = max(peak, own.bytes)
                inputs = ", ".join(str(own.places[v.name]) for v in function.inputs)
                tables.append(f"static const uint64_t inputs_{name}[] = {{{inputs}}};")
                described = self._tensors(function.inputs, batch)
                tables.append(f"static const mpq_tensor tensors_{name}[] = {{{described}}};")
                output = self._tensor("sample", function.output, batch)
                count = own.first[-1] - own.first[0]
                functions.append(f'{{"{name}", {len(function.inputs)}, tensors_{name}, {output}, {count}}}')
                calls = f"{own.first[-2]}, {own.first[-1] - own.first[-2]}, {first_stage}, {len(function.parts)}"
                steps.append(f"{{{calls}, inputs_{name}, {own.places[function.output.name]}}}")
        kernels = sorted(kernel.name for kernel in self.signatures)
        workspace = _aligned(self.workspace_bytes + 64 * ALIGNMENT)
        spans = (self.weights.places[name] for name in lowered.prepared if stored.get(name, ("",))[0] == "MPQ_FILE")
        file_bytes = sum(end - first for first, end in spans)
        plan = [
            held_bytes, max(peak, ALIGNMENT), max(self.kept_bytes, ALIGNMENT), workspace, file_bytes, "shapes",
            "operands", len(self.operands), "calls", "stages", len(self.stages), "reads", "copies", len(copies),
            f"{{{prepare.first[0]}, {prepare.first[1] - prepare.first[0]}, 0, 0, NULL, 0}}", "steps",
        ]  # fmt: skip
        return "\n".join(
            [
                "/* Generated: the plan of a denoiser. */",
                '#include "mpq_plan.h"',
                "",
                *(f"int __tvm_ffi_{n}(void *, const void *, int32_t, void *);" for n in kernels),
                _table("int64_t", "shapes", map(str, self.shapes)),
                _table("mpq_operand", "operands", self.operands),
                _table("mpq_call", "calls", self.calls),
                _table("mpq_stage", "stages", self.stages or ["{0}"]),
                _table("mpq_read", "reads", self.reads or ["{0}"]),
                _table("mpq_copy", "copies", copies or ["{0, 0, 0}"]),
                *tables,
                *self.build(functions),
                _table("mpq_steps", "steps", steps),
                f"const mpq_plan mpq_the_plan = {{{', '.join(map(str, plan))}}};",
                "",
                "#ifndef MPQ_PART /* of a program of several models */",
                'const mpq_numbered mpq_the_models[] = {{"denoiser", &mpq_the_build, &mpq_the_plan}};',
                "const int mpq_the_count = 1;",
                "#endif",
                "",
            ]
        )

    def _held(self) -> tuple[dict[str, int], int, list[str]]:
        """Allocates prepared tensors, and copies of small stored ones: offsets, bytes in all, and the copies."""
        lowered, held, copies, at = self.lowered, {}, [], 0
        for value in lowered.stored:
            first, end = self.weights.places[value.name]
            if first % ALIGNMENT:
                held[value.name] = at
                copies.append(f"{{{first}, {at}, {end - first}}}")
                at += _aligned(end - first)
        sizes = self._results(lowered.preparation, 0)
        for name in lowered.prepared:
            if name in sizes and name not in held:
                held[name] = at
                at += _aligned(sizes[name])
        return held, max(at, ALIGNMENT), copies

    def _keep(self, size: int) -> int:
        """Allocates bytes that stay between calls; returns their offset."""
        at = self.kept_bytes
        self.kept_bytes += _aligned(size)
        return at

    def _kept(self, function: Function, batch: int) -> dict[str, tuple[str, int]]:
        """Allocates the results of a function's parts, which stay between calls."""
        made = (value for part in function.parts for value in part.outputs)
        return {v.name: ("MPQ_KEPT", self._keep(_bytes(sized(v.shape, batch), v.dtype))) for v in made}

    def _stages(
        self, function: Function, batch: int, steps: _Steps, kept: Mapping[str, tuple[str, int]]
    ) -> int:
        """Adds a function's parts to the table of stages; returns the number of the first."""
        first_stage = len(self.stages)
        for part, first, end in zip(function.parts, steps.first, steps.first[1:], strict=False):
            begin = len(self.reads)
            for value in part.inputs:
                space, at = kept.get(value.name) or ("MPQ_CALL", steps.places[value.name])
                size = _bytes(sized(value.shape, batch), value.dtype)
                self.reads.append(f"{{{space}, {at}, {self._keep(size)}, {size}}}")
            self.stages.append(f"{{{first}, {end - first}, {begin}, {len(part.inputs)}}}")
        return first_stage

    def _results(self, calls: Iterable[Call], batch: int) -> dict[str, int]:
        """The bytes of each result of some calls."""
        found: dict[str, int] = {}
        for call in calls:
            names = dict(call.results)
            for argument in self.signatures[call.kernel][1]:
                found[call.into or names[argument.name]] = _bytes(sized(argument.shape, batch), argument.dtype)
        return found

    def _steps(
        self,
        lists: Sequence[Sequence[Call]],
        kept: Mapping[str, tuple[str, int]],
        batch: int,
        ends: Sequence[Value],
    ) -> _Steps:
        """Adds lists of calls, which run one after another, to the tables.

        Args:
            lists: the calls.
            kept: the space and offset of tensors that stay between calls.
            batch: the batch size.
            ends: the inputs and, last, the output, which is needed to the end.
        """
        calls = [call for each in lists for call in each]
        sizes = {name: size for name, size in self._results(calls, batch).items() if name not in kept}
        alive = {}
        for value in ends[:-1]:
            sizes[value.name], alive[value.name] = _bytes(sized(value.shape, batch), value.dtype), (-1, -1)
        for number, call in enumerate(calls):
            names = [name for _, name in (*call.operands, *call.results)] + ([call.into] if call.into else [])
            for name in names:
                if name in sizes:
                    alive[name] = (alive.get(name, (number, 0))[0], number)
        for value in ends[-1:]:
            alive[value.name] = (alive[value.name][0], len(calls))
        places, size = offsets({name: sizes[name] for name in alive}, alive)
        where = {**{name: ("MPQ_CALL", at) for name, at in places.items()}, **kept}
        first = [*itertools.accumulate(map(len, lists), initial=len(self.calls))]
        for call in calls:
            self._call(call, where, batch)
        return _Steps(first, size, places)

    def _call(self, call: Call, where: Mapping[str, tuple[str, int]], batch: int) -> None:
        inputs, outputs = self.signatures[call.kernel]
        names, begin = {**dict(call.operands), **dict(call.results)}, len(self.operands)
        for argument in (*inputs, *outputs):
            name = call.into if call.into and argument in outputs else names[argument.name]
            space, at = where[name]
            dtype, shape = np.dtype(argument.dtype), sized(argument.shape, batch)
            code = f"{TYPE_CODES[dtype.kind]}, {8 * dtype.itemsize}"
            last = _bytes(shape, argument.dtype) if space == "MPQ_FILE" and self.last.get(name) is call else 0
            self.operands.append(f"{{{space}, {code}, {len(shape)}, {self._shape(shape)}, {at}, {last}}}")
        name = f"__tvm_ffi_{call.kernel.name}"
        self.calls.append(f'{{{name}, "{call.kernel.name}", {begin}, {len(self.operands) - begin}}}')


def _bytes(shape: Sequence[int], dtype: str) -> int:
    return math.prod(shape) * np.dtype(dtype).itemsize


def _table(kind: str, name: str, rows: Iterable[str]) -> str:
    return f"static const {kind} {name}[] = {{\n    " + ",\n    ".join(rows) + "\n};"
