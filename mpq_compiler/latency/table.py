"""Latency tables: the time of each kernel on one machine, and the predictions that follow.

    {"version": 1, "target", "cpu", "threads", "batch", "call_us", "kernels": {kernel: microseconds},
     "models", "versions"}

A kernel is identified by its template and its problem, as `schedule.json` spells them. Its time is the lower quartile
over rounds (disturbances only add time), averaged over the calls that were seen. ``call_us`` is the time of a run
beyond its kernels, per call: the virtual machine, the copies of inputs. The overhead of timing a kernel is subtracted
there, so it may be negative. Times are those of a run without results of earlier runs (docs/latency.md). Nothing here
imports torch.
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
from mpq_compiler.support.files import decode_json

VERSION = 1
"""The version of the table's format."""
CALL = ""
"""The name of `call_us` among the kernels in the cache."""

_QUANTIZER = (
    (re.compile(r"op=quantize, value=\d+"), "op=quantize, value=8"),
    (re.compile(r"\b(time_groups|raw_groups)=\d+"), r"\1=1"),
    (re.compile(r"\braw=\d+"), "raw=8"),
)
_GROUPS = (re.compile(r"\bgroups=\d+"), "groups=1")
_BITS = (re.compile(r"\bbits=\d+"), "bits=8")
_FORMAT = re.compile(r"\b(bits|classes|has_offset|segments)=(\[[^\]]*\]|\w+)(, )?")
"""The parts of a layer's kernel that its weight format decides."""


def timed_as(kernel: str) -> str:
    """Canonicalizes a kernel to the form that tables have, in which kernels of equal time are one.

    Widths of activations and numbers of time groups are replaced: they change constants, and the lengths of tables that
    a call reads once, and thus no time.
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
    """Times of kernels on one machine, with ``threads`` threads and ``batch`` samples a call."""

    target: str
    cpu: str
    threads: int
    batch: int
    call_us: float
    kernels: Mapping[str, float]
    """Microseconds of each kernel, as `timed_as` spells it."""
    models: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Table:
        """The table that `to_json` wrote. UserError: the document is none; the sentence names the key."""
        if wrong := schemas.check(document, "latency"):
            raise UserError(f"it is no latency table as `mpqc latency` writes it: {wrong}")
        for name, value in {"call_us": document["call_us"], **document["kernels"]}.items():
            if not math.isfinite(value):
                raise UserError(f"it is no latency table as `mpqc latency` writes it: '{name}' must be a finite number")
        rest = {key: value for key, value in document.items() if key != "version"}
        return cls(**{**rest, "models": tuple(rest.get("models", ()))})

    def to_json(self) -> dict[str, Any]:
        """The table as a JSON document (schemas/latency.json)."""
        return {"version": VERSION, **asdict(self), "models": list(self.models), "kernels": dict(self.kernels)}

    @property
    def sha256(self) -> str:
        """The SHA-256 of the whole table, times and conditions."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()

    def microseconds(self, kernel: str) -> float | None:
        """The time that a call of the kernel adds to a run, in microseconds; None where the table lacks it."""
        found = self.kernels.get(timed_as(kernel))
        return None if found is None else found + self.call_us


def load(path: str | Path) -> Table:
    """Reads a table from a file. UserError: it is unreadable, or no latency table."""
    try:
        return Table.from_json(decode_json(Path(path).read_text(encoding="utf-8")))
    except OSError as error:
        raise UserError(f"the latency table '{path}' cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"the latency table '{path}' is not JSON: {error}") from error
    except UserError as error:
        raise UserError(f"'{path}': {error}") from error


def require_alike(table: Table, **other: str | int) -> None:
    """Raises a UserError where a table with these attributes could not be `merged` with this one."""
    for key, theirs in other.items():
        ours = getattr(table, key)
        if ours != theirs:
            raise UserError(
                f"latency tables of different machines cannot be one: the {key} of the first is '{ours}', and "
                f"that of another '{theirs}'; measure them alike"
            )


def merged(tables: Sequence[Table]) -> Table:
    """Merges tables of one machine; times of a kernel in several are averaged. UserError: machines differ."""
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
    """Raises a UserError where the table holds for another target, CPU or number of threads; None matches any."""
    for key, wanted in (("target", target), ("cpu", cpu), ("threads", threads)):
        own = getattr(table, key)
        if wanted is not None and own != wanted:
            raise UserError(
                f"the latency table (--latency-table) holds for the {key} '{own}', and '{wanted}' is asked for: "
                "measure one for that with `mpqc latency`"
            )


@dataclass(frozen=True)
class Prediction:
    """The predicted time of a run."""

    ms: float
    """Milliseconds of the kernels that the table has."""
    missing: tuple[str, ...]
    """The kernels that the table lacks."""


def predict(table: Table, kernels: Iterable[str]) -> Prediction:
    """Predicts the time of a run that calls these kernels."""
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
    """The common part of a layer's kernels in different weight formats; None for a kernel of another kind."""
    return _FORMAT.sub("", timed_as(kernel)) if kernel.startswith("gemm ") else None


def format_of(kernel: str) -> str | None:
    """The stored form of a layer's weight in words ("4 bits, offsets"); None for a kernel of another kind."""
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
    """Microseconds by stored form (`format_of`), for each layer kernel without its format (`in_any_format`)."""
    found: dict[str, dict[str, float]] = {}
    for kernel, time in table.kernels.items():
        common, form = in_any_format(kernel), format_of(kernel)
        if common is not None and form is not None:
            found.setdefault(common, {})[form] = time
    return found
