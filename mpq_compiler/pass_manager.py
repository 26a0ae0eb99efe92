"""Passes, pipelines and the manager that runs them.

A pass is one frozen dataclass in one file of `passes/`; its fields are its typed options. A pipeline is a list of
passes, written by hand as ``"trace,layout,calibrate{samples=64}"`` or in a recipe. Before anything runs the manager
checks that every pass finds what it `requires`; after each pass it verifies the program and writes its dump.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import math
import time
import typing
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from mpq_compiler import entry_points
from mpq_compiler.errors import UserError, nearest
from mpq_compiler.numerics import NUMERICS

if TYPE_CHECKING:
    from torch import Tensor

    from mpq_compiler.denoiser import Denoiser
    from mpq_compiler.latency import Latency
    from mpq_compiler.program import Program

ENTRY_POINTS = "mpq_compiler.passes"

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class Contract(StrEnum):
    """What a pass promises about its output, run against the program before it (docs/ir.md)."""

    IDENTICAL = "identical"
    """The same bits."""
    REWRITE = "rewrite"
    """Equal to 1e-5 of the largest magnitude of the output, in f32."""
    SIMULATION = "simulation"
    """A quantization error is introduced; it is measured and printed."""
    EXACT = "exact"
    """The program before, executed in exact mode, gives the same bits."""


@dataclass
class Session:
    """What a run of passes shares that is no part of the program."""

    denoiser: Denoiser | None = None
    calibration: dict[str, Tensor] | None = None
    """Recorded inputs by name; None: recorded by sampling."""
    sensitivity: dict[str, Any] | None = None
    """A measured table; None: measured here."""
    latency: Latency | None = None
    """Times of layers in each format on the target, where they are asked for."""
    numerics: tuple[str, ...] = NUMERICS
    """Those of attentions that the target has kernels for."""
    steps: int | None = None
    """Of sampling, where they are said."""
    seed: int = 0
    jobs: int = 1
    cache: Path | None = None
    progress: Callable[[str, int], AbstractContextManager[Callable[..., None]]] | None = None
    """``with progress("sensitivity", total) as advance: advance(1)``: a bar for work of more than two seconds.

    ``advance(1, "12.3 dB")`` says how it goes besides.
    """
    statistics: frozenset[str] = frozenset()
    """The statistics that the passes of the pipeline ask `calibrate` for."""
    trajectories: dict[tuple[int, int], dict[str, Tensor]] = dataclasses.field(default_factory=dict)
    """Inputs that rewrites were tried on, by the number of trajectories and of steps: the next rewrite's too."""

    def track(self, title: str, total: int) -> AbstractContextManager[Callable[..., None]]:
        return self.progress(title, total) if self.progress else nullcontext(lambda n, said="": None)

    def map(self, work: Callable[[_Item], _Result], items: Iterable[_Item]) -> list[_Result]:
        """``work`` of every item, by as many threads as there are jobs, in order; an error or Ctrl-C drops the rest."""
        with ThreadPoolExecutor(self.jobs) as pool:
            futures = [pool.submit(work, item) for item in items]
            try:
                return [future.result() for future in futures]
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise


@dataclass(frozen=True)
class Pass(ABC):
    """One step of the compiler. The docstring of a pass states its purpose, its source and a before/after excerpt."""

    contract: ClassVar[Contract]
    requires: ClassVar[frozenset[str]] = frozenset()
    """Properties that an earlier pass must provide."""
    provides: ClassVar[frozenset[str]] = frozenset()
    statistics: ClassVar[frozenset[str]] = frozenset()
    """Calibration statistics the pass reads; `calibrate` collects what the whole pipeline asks for, once."""

    @classmethod
    def name(cls) -> str:
        return cls.__module__.rsplit(".", 1)[-1].replace("_", "-")

    @abstractmethod
    def run(self, program: Program, session: Session) -> Program:
        """The program after the pass; the one given is left as it is."""

    def asks(self) -> frozenset[str]:
        """The statistics that the pass, with its options, asks for."""
        return self.statistics

    def options(self) -> dict[str, Any]:
        """Option name -> value, in the order of declaration."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    def require(self, option: str, least: float, most: float = math.inf) -> None:
        """UserError unless the option, or each of its values, is a number of that range; none passes."""
        value = getattr(self, option)
        items = value if isinstance(value, tuple) else () if value is None else (value,)
        wanted = f"{least:g} or more" if most == math.inf else f"{least:g} to {most:g}"
        if value == () or not all(least <= item <= most and item != math.inf for item in items):
            given = "empty" if value == () else _print_value(value)
            raise UserError(f"option '{option}' of pass '{self.name()}' must be {wanted}, not {given}")

    def changed(self) -> dict[str, Any]:
        """The options that differ from their defaults."""
        return {f.name: value for f in dataclasses.fields(self) if (value := getattr(self, f.name)) != f.default}

    def text(self) -> str:
        """``name{option=value,...}`` with the options that differ from their defaults."""
        changed = [f"{name}={_print_value(value)}" for name, value in self.changed().items()]
        return self.name() + ("{" + ",".join(changed) + "}" if changed else "")


def find(name: str) -> type[Pass]:
    """The pass class of that name: one of `mpq_compiler.passes`, or of a package with an entry point.

    Raises UserError for an unknown name, a name defined twice, and a package whose pass cannot be used, with why.
    """
    from mpq_compiler.passes import PASSES

    external = [e for e in entry_points.of(ENTRY_POINTS) if e.name == name]
    if len(external) + (name in PASSES) > 1:
        owners = ", ".join(_owner(e) for e in external)
        raise UserError(f"pass '{name}' is defined more than once ({owners}); uninstall one of the packages")
    if external:
        return _load(external[0])
    if name not in PASSES:
        raise UserError(f"unknown pass '{name}': {nearest(name, all_names())}")
    module = importlib.import_module("mpq_compiler.passes." + name.replace("-", "_"))
    (cls,) = [
        c
        for c in vars(module).values()
        if isinstance(c, type) and issubclass(c, Pass) and c.__module__ == module.__name__
    ]
    return cls


def _owner(entry: importlib.metadata.EntryPoint) -> str:
    """Where an entry point comes from: its object, and its distribution."""
    return f"{entry.value} of {entry.dist.name} {entry.dist.version}" if entry.dist else entry.value


def _load(entry: importlib.metadata.EntryPoint) -> type[Pass]:
    """The pass behind an entry point. UserError: whatever keeps it from being one."""
    where = f"pass '{entry.name}' ({_owner(entry)})"
    try:
        loaded = entry.load()
    except (Exception, SystemExit) as error:  # importing a package runs what its author wrote
        raise UserError(f"{where} fails to import: {type(error).__name__}: {error}") from error
    if not (isinstance(loaded, type) and issubclass(loaded, Pass)):
        raise UserError(f"{where} is no subclass of mpq_compiler.pass_manager.Pass")
    if loaded.name() != entry.name:
        raise UserError(f"{where} calls itself '{loaded.name()}': name its module after it, or override name()")
    if not isinstance(getattr(loaded, "contract", None), Contract):
        raise UserError(f"{where} declares no contract: set it to {', '.join(f'Contract.{c.name}' for c in Contract)}")
    if missing := sorted(getattr(loaded, "__abstractmethods__", ())):
        raise UserError(f"{where} does not define {', '.join(missing)}")
    return loaded


def all_names() -> list[str]:
    """The names of all passes, in pipeline order, third-party ones last, those among them that cannot be used too."""
    from mpq_compiler.passes import PASSES

    return [*PASSES, *sorted({e.name for e in entry_points.of(ENTRY_POINTS)} - set(PASSES))]


def usable() -> tuple[dict[str, type[Pass]], dict[str, str]]:
    """(the passes that can be used by name, the reason for each name that cannot)."""
    found: dict[str, type[Pass]] = {}
    broken: dict[str, str] = {}
    for name in all_names():
        try:
            found[name] = find(name)
        except UserError as error:
            broken[name] = str(error)
    return found, broken


def make(name: str, options: dict[str, Any]) -> Pass:
    """The pass with the options checked against their declared types; UserError names the option."""
    cls = find(name)
    hints = typing.get_type_hints(cls)
    known = {f.name: hints[f.name] for f in dataclasses.fields(cls)}
    values = {}
    for key, value in options.items():
        key = key.replace("-", "_")
        if key not in known:
            hint = nearest(key, known) if known else "it has none"
            raise UserError(f"pass '{name}' has no option '{key}': {hint}")
        values[key] = _convert(value, known[key], f"option '{key}' of pass '{name}'")
    return cls(**values)


def _convert(value: Any, expected: Any, where: str) -> Any:
    alternatives = typing.get_args(expected) if isinstance(expected, UnionType) else (expected,)
    if typing.get_origin(expected) is typing.Literal:
        choices = typing.get_args(expected)
        if value not in choices:
            raise UserError(f"{where} is '{value}': {nearest(str(value), map(str, choices))}")
        return value
    if type(None) in alternatives and value in (None, "none"):
        return None
    for kind in alternatives:
        origin = typing.get_origin(kind) or kind
        if origin is tuple and isinstance(value, list | tuple | str):
            parts = value.split("/") if isinstance(value, str) else value
            inner = typing.get_args(kind)[0]
            return tuple(_convert(p, inner, where) for p in parts)
        if origin is bool and str(value).lower() in ("true", "false"):
            return str(value).lower() == "true"
        if origin is int and isinstance(value, float) and not value.is_integer():
            continue  # int() would cut it
        if origin in (int, float, str) and not isinstance(value, bool | list | dict):
            try:
                return origin(value)
            except (TypeError, ValueError):
                continue
    names = " or ".join("none" if k is type(None) else getattr(k, "__name__", str(k)) for k in alternatives)
    raise UserError(f"{where} must be {names}, not '{value}'")


def _print_value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return "/".join(_print_value(v) for v in value)  # "+" stands in names of formats
    return "none" if value is None else str(value)


def parse(text: str) -> list[Pass]:
    """The passes of ``"a,b{x=1,y=2},c"``; tuples are written ``x=1/2``."""
    passes: list[Pass] = []
    rest = text.strip()
    while rest:
        end = min((i for i in (rest.find(","), rest.find("{")) if i >= 0), default=len(rest))
        name, options = rest[:end].strip(), {}
        if end < len(rest) and rest[end] == "{":
            close = rest.find("}", end)
            if close < 0:
                raise UserError(f"pipeline '{text}': '{{' after '{name}' is never closed")
            for item in filter(None, (i.strip() for i in rest[end + 1 : close].split(","))):
                key, equals, value = item.partition("=")
                if not equals:
                    raise UserError(f"pipeline '{text}': '{item}' of '{name}' must be written option=value")
                options[key.strip()] = value.strip()
            end = close + 1
        following = rest[end:].strip()
        if following and not following.startswith(","):
            raise UserError(f"pipeline '{text}': a comma is missing before '{following}'")
        if not name:
            raise UserError(f"pipeline '{text}': a pass name is missing before '{rest[end:]}'")
        passes.append(make(name, options))
        rest = following[1:].strip() if following else ""
    if not passes:
        raise UserError("the pipeline is empty; name at least the pass 'trace'")
    return passes


def to_text(passes: Iterable[Pass]) -> str:
    """The pipeline as `parse` reads it."""
    return ",".join(p.text() for p in passes)


def check(passes: Sequence[Pass], present: Iterable[str] = ()) -> None:
    """UserError if a pass misses something that no earlier pass provides."""
    have = set(present)
    for p in passes:
        missing = sorted(p.requires - have)
        if missing:
            makers = [name for name, maker in usable()[0].items() if missing[0] in maker.provides]
            hint = f"put {' or '.join(makers)} before it" if makers else "no pass provides it"
            raise UserError(f"pass '{p.name()}' needs '{missing[0]}': {hint}")
        have |= p.provides


@dataclass
class Record:
    """What one pass did: for the report, never for dumps or artifacts."""

    name: str
    seconds: float
    peak_bytes: int
    notes: dict[str, Any] = field(default_factory=dict)


def run_pipeline(
    passes: Sequence[Pass],
    program: Program,
    session: Session,
    after: Callable[[int, Pass, Program, Program], None] | None = None,
    present: Iterable[str] = (),
) -> tuple[Program, list[Record]]:
    """Runs the passes in order, verifying after each; ``after(index, pass, before, program)`` sees each step."""
    import resource

    from mpq_compiler.decisions import observe
    from mpq_compiler.verifier import verify

    check(passes, present)
    session = dataclasses.replace(
        session, statistics=frozenset().union(*(p.asks() for p in passes)) | session.statistics
    )
    records = []
    for index, p in enumerate(passes):
        start = time.perf_counter()
        before, program = program, p.run(program, session)
        verify(program, after=p.name())
        observe(p, before, program)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        records.append(Record(p.name(), time.perf_counter() - start, peak))
        if after is not None:
            after(index, p, before, program)
    return program, records
