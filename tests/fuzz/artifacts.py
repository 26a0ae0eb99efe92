"""Attacks on artifacts: folders and zips that were damaged, manifests and weights whose hashes are made anew."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from mpq_compiler.artifact import bundle
from mpq_compiler.runtime import compiled_denoiser
from mpq_compiler.support.errors import UserError
from tests.fuzz.attack import RIGHT, TAKEN, sentence
from tests.harness import mutants, relax_artifact
from tests.harness.damage import changed, damaged

INPUTS = {
    "sample": np.linspace(-2, 2, 2 * 3 * relax_artifact.WIDTH, dtype=np.float32).reshape(2, 3, relax_artifact.WIDTH),
    "timestep": np.array([3, 900]),
    "class_labels": np.array([0, 9]),
}


def ran(path: Path, base: Path, strict: bool) -> str:
    """How an artifact that may be a mutant ends. AssertionError: it gives something else, where that is wrong."""
    try:
        found = compiled_denoiser.load(path, threads=1).run(INPUTS)
    except UserError as error:
        return sentence(error)
    if np.array_equal(found, np.load(base / "right.npy")):
        return RIGHT
    assert not strict, "another result, and no word"
    return TAKEN


def artifact(folder: Path) -> None:
    relax_artifact.build(folder / "a.mpq")
    np.save(folder / "right.npy", compiled_denoiser.load(folder / "a.mpq").run(INPUTS))


def damaged_folder(base: Path, scratch: Path, chance: random.Random) -> str:
    path = Path(shutil.copytree(base / "a.mpq", scratch / "a.mpq"))
    files = sorted(path.iterdir())
    one, other = chance.choice(files), chance.choice(files)
    kind = chance.randrange(6)
    if kind == 0:
        one.unlink()
    elif kind == 1:
        one.write_bytes(other.read_bytes())
    elif kind == 2:
        (path / chance.choice(["x", ".x", "signature.txt", "kernels.so.1"])).write_bytes(chance.randbytes(20))
    elif kind == 3:
        one.unlink()
        one.symlink_to(base / "a.mpq" / one.name)
    else:
        one.write_bytes(damaged(one.read_bytes(), chance))
    return ran(path, base, strict=True)


def damaged_zip(base: Path, scratch: Path, chance: random.Random) -> str:
    """Bytes of a zip changed, of each way to compress that there is."""
    ways = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
    path = scratch / "a.zip"
    with zipfile.ZipFile(path, "w", chance.choice(ways)) as made:
        for file in sorted((base / "a.mpq").iterdir()):
            made.write(file, file.name)
    path.write_bytes(damaged(path.read_bytes(), chance))
    return ran(path, base, strict=True)


def odd_zip(base: Path, scratch: Path, chance: random.Random) -> str:
    """A sound zip of other files than an artifact's: twice, elsewhere, a bomb."""
    path = scratch / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as made:
        prefix = chance.choice(["", "", "a/", "../", "/", "a/b/"])
        for file in sorted((base / "a.mpq").iterdir()):
            if chance.random() < 0.05:
                continue
            content = file.read_bytes()
            if file.name == bundle.MANIFEST and chance.random() < 0.5:
                part = chance.choice([b"[],", b"{},", b"0,", b'"x",', b"[[[[]]]],"])
                content = b'{"format":"mpq-artifact","x":[' + part * chance.choice([10, 10**5, 3 * 10**6]) + b"0]}"
            with contextlib.suppress(UserWarning):
                made.writestr(prefix + file.name, content)
        if chance.random() < 0.3:
            made.writestr(chance.choice(["x", "signature.txt", "weights.safetensors/", "é", "a" * 300]), b"\0" * 10**7)
    return ran(path, base, strict=True)


def resealed(path: Path, manifest: dict[str, Any]) -> None:
    """Writes a manifest as one who knows how hashes are computed."""
    with contextlib.suppress(ValueError, TypeError, AttributeError):
        manifest["artifact_sha256"] = bundle.digest(manifest)
    (path / bundle.MANIFEST).write_bytes(bundle.canonical(manifest))


def _manifest(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / bundle.MANIFEST).read_bytes())
    return found


def resealed_manifest(base: Path, scratch: Path, chance: random.Random) -> str:
    path = Path(shutil.copytree(base / "a.mpq", scratch / "a.mpq"))
    mutant = changed(_manifest(path), chance)
    if not isinstance(mutant, dict):
        return RIGHT
    try:
        resealed(path, mutant)
    except (ValueError, RecursionError):
        return RIGHT  # no text, so that there is nothing to read
    return ran(path, base, strict=True)


def resealed_weights(base: Path, scratch: Path, chance: random.Random) -> str:
    path = Path(shutil.copytree(base / "a.mpq", scratch / "a.mpq"))
    (path / bundle.MANIFEST).chmod(0o644)
    file = path / bundle.WEIGHTS
    ((_, content),) = mutants.mutants(chance.randrange(2**32), 1, file.read_bytes())
    file.write_bytes(content)
    manifest = _manifest(path)
    manifest["files"][bundle.WEIGHTS] = bundle.described(file)
    resealed(path, manifest)
    return ran(path, base, strict=False)
