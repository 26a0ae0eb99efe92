"""An attack on compilations: the disk is full, as far as a limit of the size of files shows it."""

from __future__ import annotations

import os
import random
import resource
import shutil
from pathlib import Path
from unittest import mock

from tests.fuzz.attack import REFUSED, RIGHT, TAKEN, said
from tests.harness import tiny

LARGEST = 1 << 20
"""Bytes of a file that nothing here is larger than."""
TARGETS = ("reference", "native")
"""One in which all is written by this process, and one whose kernels others compile, which takes seconds."""


def compiled(folder: Path) -> None:
    """A model, its artifacts, and what the cache holds of it."""
    tiny.save("dit", folder).rename(folder / "model")
    for target in TARGETS:
        assert _compile(folder, target, folder / target, folder / "cache") == TAKEN
    assert max(file.stat().st_size for file in folder.rglob("*")) < LARGEST


def full(base: Path, scratch: Path, chance: random.Random) -> str:
    """Files end at some size, with an error; afterwards the same is compiled with what the cache has."""
    cache, artifact = scratch / "cache", scratch / "out" / "a.mpq"
    target = TARGETS[chance.random() < 0.2]
    artifact.parent.mkdir()
    if chance.random() < 0.9:
        shutil.copytree(base / "cache", cache)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (round(LARGEST ** chance.random()), limits[1]))
    try:
        how = _compile(base, target, artifact, cache)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    if how == REFUSED:
        assert not [*artifact.parent.iterdir()], f"something is left: {[*artifact.parent.iterdir()]}"
        assert _compile(base, target, artifact, cache) == TAKEN
    assert _content(artifact) == _content(base / target), "the artifact is another"
    return RIGHT if how == TAKEN else how


def _compile(base: Path, target: str, artifact: Path, cache: Path) -> str:
    how = ("--target", target, "--pipeline", tiny.PIPELINE, "--jobs", 1)
    with mock.patch.dict(os.environ, {"MPQ_CACHE": str(cache)}):
        return said("compile", base / "model", "-o", artifact, *how)


def _content(artifact: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in artifact.iterdir()}
