"""What `mpqc bench` compares: something that is called, and what a process of its own needs for it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpq_compiler.latency.timing import Arrays
from mpq_compiler.runtime.compiled_denoiser import CompiledDenoiser
from mpq_compiler.support.errors import UserError

OURS, CONTROL, REUSING = "mpq", "mpq control", "mpq reusing"
"""Names of the first artifact, of the same once more, and of the same with its cache."""


@dataclass(frozen=True)
class Subject:
    """Something that computes the same function: a call, its stored bytes, and how another process would load it."""

    name: str
    call: Callable[..., Any]
    bytes: int | None = None
    loader: tuple[str, ...] = ()
    """Its kind and its path or model, for `child`; empty where its memory is not asked for."""


def of_artifact(path: str | Path, compiled: CompiledDenoiser, inputs: Arrays, name: str) -> Subject:
    """The subject that calls a loaded artifact on the inputs; its bytes are those of the stored weights."""
    size = compiled.manifest["weights"]["payload_bytes"]
    return Subject(name, functools.partial(compiled.run, inputs), size, ("artifact", str(path)))


def names_of(paths: Sequence[str | Path]) -> list[str]:
    """Names of artifacts: the first is OURS, others have their file's, or their path's where files share one.

    UserError: a path is given twice.
    """
    stems, found = [Path(path).stem for path in paths[1:]], [OURS]
    for path, stem in zip(paths[1:], stems, strict=True):
        alone = stems.count(stem) == 1 and f"{OURS} {stem}" not in (CONTROL, REUSING)
        name = f"{OURS} {stem if alone else path}"
        if name in found:
            raise UserError(f"'{path}' is given twice; '{CONTROL}' is the first artifact once more")
        found.append(name)
    return found
