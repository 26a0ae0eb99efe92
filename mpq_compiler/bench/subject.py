"""What `mpqc bench` compares: something that is called, and what a process of its own needs for it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpq_compiler.latency.timing import Arrays
from mpq_compiler.runtime.compiled_denoiser import CompiledDenoiser


@dataclass(frozen=True)
class Subject:
    """Something that computes the same function: a call, its stored bytes, and how another process would load it."""

    name: str
    call: Callable[..., Any]
    bytes: int | None = None
    loader: tuple[str, ...] = ()
    """Its kind and its path or model, for `child`; empty where its memory is not asked for."""


def of_artifact(path: str | Path, compiled: CompiledDenoiser, inputs: Arrays, name: str) -> Subject:
    size = compiled.manifest["weights"]["payload_bytes"]
    return Subject(name, functools.partial(compiled.run, inputs), size, ("artifact", str(path)))
