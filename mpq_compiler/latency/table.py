"""Latency tables: how long each kernel takes on one machine, and what follows from that. Imports no torch.

    {"version": 1, "target", "cpu", "threads", "batch", "call_us", "kernels": {kernel: microseconds},
     "models", "versions"}

A kernel is known by what the compiler asks for (its template and its problem, as `schedule.json` spells them). Its time
is the mean over the calls that were seen of the lower quartile over rounds, for what others do only adds to it.
``call_us`` is what a run takes beyond its kernels, by the call: the virtual machine, the copies of inputs; what timing
adds to a kernel is subtracted in it, so that it may be negative. Times are those of a run with nothing known from
earlier ones (docs/latency.md).
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mpq_compiler import schemas
from mpq_compiler.support.errors import UserError

VERSION = 1
CALL = ""
"""Under which `call_us` is kept beside kernels in the cache."""

_QUANTIZER = (
    (re.compile(r"op=quantize, value=\d+"), "op=quantize, value=8"),
    (re.compile(r"\b(time_groups|raw_groups)=\d+"), r"\1=1"),
    (re.compile(r"\braw=\d+"), "raw=8"),
)
_GROUPS = (re.compile(r"\bgroups=\d+"), "groups=1")
_BITS = (re.compile(r"\bbits=\d+"), "bits=8")
_FORMAT = re.compile(r"\b(bits|classes|has_offset|segments)=(\[[^\]]*\]|\w+)(, )?")
"""What of a layer's kernel its weight format decides."""


def timed_as(kernel: str) -> str:
    """The kernel as tables know it: widths of activations and numbers of time groups change no time.

    They are constants, and lengths of tables that a call reads once.
    """
    template = kernel.partition(" ")[0]
    rules = [*_QUANTIZER]
    if template in ("gemm", "quantize"):
        rules.append(_GROUPS)
    if template == "quantize":
        rules.append(_BITS)
    for pattern, replacement in rules:
        kernel = pattern.sub(replacement, kernel)
    return kernel


@dataclass(frozen=True)
class Table:
    """Times on one machine, with so many threads and samples a call."""

    target: str
    cpu: str
    threads: int
    batch: int
    call_us: float
    kernels: Mapping[str, float]
    """Microseconds by kernel, as `timed_as` spells it."""
    models: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Table:
        """UserError: not what `to_json` writes; names the key."""
        if wrong := schemas.check(document, "latency"):
            raise UserError(f"it is no latency table as `mpqc latency` writes it: {wrong}")
        for name, value in {"call_us": document["call_us"], **document["kernels"]}.items():
            if not math.isfinite(value):
                raise UserError(f"it is no latency table as `mpqc latency` writes it: '{name}' must be a finite number")
        rest = {key: value for key, value in document.items() if key != "version"}
        return cls(**{**rest, "models": tuple(rest.get("models", ()))})

    def to_json(self) -> dict[str, Any]:
        return {"version": VERSION, **asdict(self), "models": list(self.models), "kernels": dict(self.kernels)}

    @property
    def sha256(self) -> str:
        """Of the figures and of what they hold for."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

    def microseconds(self, kernel: str) -> float | None:
        """What a call of the kernel adds to a run; None where the table lacks it."""
        found = self.kernels.get(timed_as(kernel))
        return None if found is None else found + self.call_us


def load(path: str | Path) -> Table:
    """The table in a file. UserError: unreadable, or no latency table."""
    try:
        return Table.from_json(json.loads(Path(path).read_text(encoding="utf-8")))
    except OSError as error:
        raise UserError(f"the latency table '{path}' cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"the latency table '{path}' is not JSON: {error}") from error
    except UserError as error:
        raise UserError(f"'{path}': {error}") from error


def require_alike(table: Table, **other: str | int) -> None:
    """UserError where what has these attributes could not be `merged` with the table."""
    for key, theirs in other.items():
        ours = getattr(table, key)
        if ours != theirs:
            raise UserError(
                f"latency tables of different machines cannot be one: the {key} of the first is '{ours}', and "
                f"that of another '{theirs}'; measure them alike"
            )


def merged(tables: Sequence[Table]) -> Table:
    """One table of several of one machine; what more than one holds is their mean. UserError: of different ones."""
    first, *others = tables
    for other in others:
        require_alike(first, **{key: getattr(other, key) for key in ("target", "cpu", "threads", "batch")})
    times: dict[str, list[float]] = {}
    for table in tables:
        for kernel, time in table.kernels.items():
            times.setdefault(kernel, []).append(time)
    return Table(
        **{key: getattr(first, key) for key in ("target", "cpu", "threads", "batch", "versions")},
        call_us=statistics.fmean(table.call_us for table in tables),
        kernels={kernel: statistics.fmean(found) for kernel, found in sorted(times.items())},
        models=tuple(dict.fromkeys(name for table in tables for name in table.models)),
    )


def require_of(table: Table, target: str, cpu: str | None, threads: int | None = None) -> None:
    """UserError where the table holds for another target, another CPU or other threads; None: it does not matter."""
    for key, wanted in (("target", target), ("cpu", cpu), ("threads", threads)):
        own = getattr(table, key)
        if wanted is not None and own != wanted:
            raise UserError(
                f"the latency table (--latency-table) holds for the {key} '{own}', and '{wanted}' is asked for: "
                "measure one for that with `mpqc latency`"
            )


@dataclass(frozen=True)
class Prediction:
    """Of a run: milliseconds of the kernels that the table holds, and those that it lacks."""

    ms: float
    missing: tuple[str, ...]


def predict(table: Table, kernels: Iterable[str]) -> Prediction:
    """The time of a run that calls these kernels."""
    total, missing = 0.0, []
    for kernel in kernels:
        time = table.microseconds(kernel)
        if time is None:
            missing.append(kernel)
        else:
            total += time
    return Prediction(total / 1e3, tuple(missing))


# --- the same layer in other formats ------------------------------------------------------------------------


def in_any_format(kernel: str) -> str | None:
    """What the kernels of a layer in different weight formats have in common; None for what is no such kernel."""
    return _FORMAT.sub("", timed_as(kernel)) if kernel.startswith("gemm ") else None


def format_of(kernel: str) -> str | None:
    """The stored form of a layer's weight in words: "4 bits, offsets"; None for what is no layer on codes."""
    if not kernel.startswith("gemm "):
        return None
    found = {match[1]: match[2] for match in _FORMAT.finditer(kernel)}
    words = [f"{found.get('bits', '8')} bits"]
    if found.get("has_offset") == "True":
        words.append("offsets")
    if int(found.get("classes", "1")) > 1:
        words.append(f"{found['classes']} tables")
    if (groups := found.get("segments", "").count(",") + 1) > 1:
        words.append(f"{groups} K-groups")
    return ", ".join(words)


def others_of(table: Table) -> dict[str, dict[str, float]]:
    """By what `in_any_format` says: microseconds by stored form (`format_of`)."""
    found: dict[str, dict[str, float]] = {}
    for kernel, time in table.kernels.items():
        common, form = in_any_format(kernel), format_of(kernel)
        if common is not None and form is not None:
            found.setdefault(common, {})[form] = time
    return found
