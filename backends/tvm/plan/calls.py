"""A denoiser as a list of kernel calls: plain data between the emitter (torch) and its workers (TVM)."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mpq_compiler.targets.numerics import F32, features_of

BATCH = "B"
Shape = tuple[int | str, ...]


@dataclass(frozen=True)
class Record:
    """A call of a class or function of `kernels/`, such as ``norms.GroupNorm``, with its arguments by name.

    The problem of a kernel as data: made without importing TVM, compared, hashed and sent to a worker.
    """

    type: str
    fields: tuple[tuple[str, Any], ...]

    def __str__(self) -> str:
        inner = ", ".join(f"{name}={_text(value)}" for name, value in self.fields)
        return f"{self.type.rsplit('.', 1)[-1]}({inner})"

    def get(self, name: str) -> Any:
        return dict(self.fields)[name]

    def replace(self, **changes: Any) -> Record:
        return record(self.type, **{**dict(self.fields), **changes})


def record(type: str, **fields: Any) -> Record:
    """The record with hashable fields in a fixed order."""
    return Record(type, tuple(sorted((name, _frozen(value)) for name, value in fields.items())))


def _frozen(value: Any) -> Any:
    return tuple(_frozen(v) for v in value) if isinstance(value, list | tuple) else value


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(_text(v) for v in value) + "]"
    return str(value)


@dataclass(frozen=True)
class Kernel:
    """A kernel: its template (a key of `TEMPLATES` of the device) and its problem. Equal kernels are compiled once.

    halves: its arguments that are in half precision where the problem has them in float32 (on GPUs alone)
    """

    template: str
    problem: Record
    halves: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The name of its function, which depends on the kernel alone: equal kernels have one name everywhere."""
        return f"{self.template}_{hashlib.sha256(str(self).encode()).hexdigest()[:16]}"

    @property
    def numerics(self) -> str:
        return str(dict(self.problem.fields).get("numerics", F32))

    def features(self, arch: str) -> tuple[str, ...]:
        """The instructions that it asks of a CPU, perhaps beyond the target's, as /proc/cpuinfo spells them."""
        return features_of(self.numerics, arch)

    def __str__(self) -> str:
        halves = f" halves [{', '.join(self.halves)}]" if self.halves else ""
        return f"{self.template} {self.problem}{halves}"


@dataclass(frozen=True)
class Value:
    """A tensor: name (of the node that makes it, or of the store), shape with "B" for the batch, element type."""

    name: str
    shape: Shape
    dtype: str

    @property
    def batched(self) -> bool:
        return self.shape[:1] == (BATCH,)

    @property
    def inner(self) -> tuple[int, ...]:
        """The shape of a sample."""
        return tuple(int(d) for d in self.shape[self.batched :])

    @property
    def size(self) -> int:
        """Elements of a sample."""
        return math.prod(self.inner)


@dataclass(frozen=True)
class Call:
    """A kernel applied: names of values by the names of the kernel's arguments. `node` is for messages.

    into:   the value of which this call writes a part, its one result; other calls write the other parts
    beside: nodes of the calls that it stands for besides
    """

    kernel: Kernel
    operands: tuple[tuple[str, str], ...]
    results: tuple[tuple[str, str], ...]
    node: str
    into: str = ""
    beside: tuple[str, ...] = ()


@dataclass(frozen=True)
class Part:
    """Calls that do not depend on the latents (`hoist`): ``name(inputs..., prepared...) -> outputs``, for one sample.

    inputs: of the denoiser, or outputs of the parts before it
    """

    name: str
    inputs: tuple[Value, ...]
    calls: tuple[Call, ...]
    outputs: tuple[Value, ...]


@dataclass(frozen=True)
class Function:
    """The denoiser at one image size: ``denoise(inputs..., outputs of the parts..., prepared...)`` for each batch size.

    own:    calls of a step in order, without those of the parts
    suffix: end of the names of its specializations, "" for the size that was calibrated
    parts:  functions that have been taken out of it
    made:   values that its calls and those of the parts yield
    mixed:  nodes of its calls that read no latents (`hoist`)
    copied: concatenations that are copied -> of what (`fuse.copies`)
    """

    inputs: tuple[Value, ...]
    own: tuple[Call, ...]
    output: Value
    batches: tuple[int, ...] = (1,)
    suffix: str = ""
    parts: tuple[Part, ...] = ()
    made: tuple[Value, ...] = ()
    mixed: tuple[str, ...] = ()
    copied: tuple[tuple[str, str], ...] = ()

    @property
    def calls(self) -> tuple[Call, ...]:
        """All calls: first those of the parts, then those of a step."""
        return (*(call for part in self.parts for call in part.calls), *self.own)

    @property
    def values(self) -> dict[str, Value]:
        """The values that the calls yield, by name."""
        return {value.name: value for value in self.made}

    @property
    def arguments(self) -> tuple[Value, ...]:
        """The arguments of the function, without the prepared tensors that follow them."""
        return (*self.inputs, *(value for part in self.parts for value in part.outputs))

    def name(self, batch: int) -> str:
        """The name of the specialization for a batch size."""
        return f"denoise_b{batch}{self.suffix}"

    def mapped(self, change: Callable[[Call], Call]) -> Function:
        """The function with every call changed, those of the parts too."""
        parts = tuple(replace(part, calls=tuple(map(change, part.calls))) for part in self.parts)
        return replace(self, own=tuple(map(change, self.own)), parts=parts)


@dataclass(frozen=True)
class Token:
    """A token of an input that was compiled in as a constant (pass bos-split)."""

    input: str
    token: int
    values: tuple[float, ...]


@dataclass(frozen=True)
class Accepted:
    """What inputs may hold beyond shapes and types: numbers less than a bound, by name, and constant tokens."""

    below: tuple[tuple[str, int], ...] = ()
    tokens: tuple[Token, ...] = ()


@dataclass(frozen=True)
class Lowered:
    """``prepare(stored...) -> prepared`` and the functions, all of which take everything that is prepared.

    prepared: names of the values that a function reads and `prepare` makes or hands on
    integers: names of stored tables of 16 entries that hold -8 to 7
    halves:   whether what kernels hand on may be in half precision
    """

    stored: tuple[Value, ...] = ()
    preparation: tuple[Call, ...] = ()
    prepared: tuple[str, ...] = ()
    functions: tuple[Function, ...] = ()
    integers: frozenset[str] = frozenset()
    halves: bool = False

    def kernels(self) -> dict[Kernel, str]:
        """The kernels, each with the node that asks for it first."""
        found: dict[Kernel, str] = {}
        for call in self.calls():
            found.setdefault(call.kernel, call.node)
        return found

    def parts(self) -> dict[str, Part]:
        """The parts of all functions by name; functions share those that are equal."""
        return {part.name: part for function in self.functions for part in function.parts}

    def calls(self) -> Iterator[Call]:
        """All calls: those of `prepare`, then those of the functions."""
        yield from self.preparation
        for function in self.functions:
            yield from function.calls

    def reads(self) -> list[int]:
        """How often calls of `prepare` read each stored tensor; one more where it is handed on."""
        found = Counter(name for call in self.preparation for _, name in call.operands) + Counter(self.prepared)
        return [found[value.name] for value in self.stored]

    def linked(self) -> Lowered:
        """The plan whose `prepare` makes what the functions read, in the order in which they do, and nothing else."""
        known = {value.name for value in self.stored} | {name for call in self.preparation for _, name in call.results}
        read = dict.fromkeys(name for f in self.functions for call in f.calls for _, name in call.operands)
        prepared = tuple(name for name in read if name in known)
        return replace(self, preparation=needed(self.preparation, prepared), prepared=prepared)


def needed(calls: Sequence[Call], results: Iterable[str]) -> tuple[Call, ...]:
    """The calls without those that nothing reads."""
    read, kept = {*results}, []
    for call in reversed(calls):
        if any(name in read for _, name in call.results):
            kept.append(call)
            read |= {name for _, name in call.operands}
    return tuple(reversed(kept))


@dataclass(frozen=True)
class Made:
    """The outcome of compiling a plan: the objects of the kernels, and the library of them and of the plan.

    workspace_bytes: memory that a kernel takes in a thread, at most
    held_bytes:      memory that TVM's runtime takes, for prepared weights and the largest function
    """

    objects: Sequence[Path]
    library: Path
    workspace_bytes: int
    held_bytes: int
