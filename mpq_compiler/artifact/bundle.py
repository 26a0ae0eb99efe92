"""The artifact on disk: written whole or not at all, and read only if every byte is right.

It is a folder, or a zip of the same files: `manifest.json`, `weights.safetensors`, `ir.txt` and what the target's
backend adds (`kernels.so`, `graph.json`). docs/artifact.md describes it, schemas/manifest.json the manifest.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
import weakref
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np

from mpq_compiler import schemas
from mpq_compiler.artifact.manifest import File, Manifest
from mpq_compiler.support import tensorfile
from mpq_compiler.support.errors import UserError
from mpq_compiler.support.files import beside, check_place, sha256, sync, umask

FORMAT = "mpq-artifact"
FORMAT_VERSION = 3
MANIFEST = "manifest.json"
PIPELINE, PIPELINE_FORMAT = "pipeline.json", "mpq-pipeline"
"""The document of a folder of artifacts, and its format (`artifact.pipeline`)."""
WEIGHTS = "weights.safetensors"
KERNELS = "kernels.so"
CUDART = "cudart.so"
"""A shim for drivers of CUDA 12: it offers TVM's runtime the functions of CUDA 13's runtime library."""
LORA = "lora.safetensors"
"""What the factors of a LoRA are multiplied with, where passes have rewritten the channels of layers."""
IR = "ir.txt"
DECISIONS = "decisions.json"
SCHEDULE = "schedule.json"
PROGRAM, SERVER = "mpq_run", "mpq_rpc"
"""The executable files of an artifact: `--emit c` writes both, `--standalone` the first."""

_MAX_MANIFEST = 64 << 20  # bytes
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest time a zip can state

FileSource = bytes | Path | Callable[[Path], object]
"""Source of a file's content: bytes, a file to copy, or a function that writes to the path it is called with."""


def check_output(path: str | os.PathLike[str], overwrite: bool) -> None:
    """Raises a UserError where an artifact could not be written to `path`; call it before long work starts."""
    path = Path(path)
    check_place(path)
    if os.path.lexists(path):
        if not overwrite:
            raise UserError(f"{path} exists; choose another name or give --overwrite")
        if not _looks_like_artifact(path):
            raise UserError(
                f"{path} exists and is no artifact, so it is not overwritten; choose another name"
            )


def _looks_like_artifact(path: Path) -> bool:
    """Whether `path` may be replaced: it is an artifact, a pipeline of them, or an empty folder."""
    try:
        if path.is_dir():
            if not any(path.iterdir()):
                return True
            text = (path / (PIPELINE if (path / PIPELINE).is_file() else MANIFEST)).read_bytes()
        else:
            with zipfile.ZipFile(path) as archive:
                text = archive.read(MANIFEST)
        manifest = json.loads(text)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return False
    return isinstance(manifest, dict) and manifest.get("format") in (FORMAT, PIPELINE_FORMAT)


def write(
    path: str | os.PathLike[str],
    manifest: Mapping[str, Any],
    files: Mapping[str, FileSource],
    tensors: Mapping[str, np.ndarray],
    overwrite: bool = False,
) -> Manifest:
    """Writes an artifact and returns its complete manifest; equal content gives equal bytes.

    Everything is written beside `path` and renamed. So an error, a full disk or Ctrl-C leaves nothing behind, and an
    artifact that was to be overwritten stays as it was.

    Args:
        path: a folder, or a zip where it ends in .zip.
        manifest: obeys the schema but for what is filled in here: format, format_version, weights, files,
            artifact_sha256, and in `tensors` the dtype and shape of each entry.
        files: content of each file besides the manifest and the weights, by name.
        tensors: the stored tensors, by the names in `manifest["tensors"]`.
        overwrite: whether an artifact at `path` may be replaced.

    Raises:
        UserError: what `check_output` refuses, and whatever the file system refuses.
    """
    path = Path(path)
    check_output(path, overwrite)
    for name in files:
        if not _NAME.fullmatch(name) or name in (MANIFEST, WEIGHTS):
            raise ValueError(f"'{name}' cannot be the name of a file of an artifact")
    with beside(path) as scratch:
        folder = scratch / path.name
        folder.mkdir()
        for name, source in files.items():
            fill(folder / name, source)
        with (folder / WEIGHTS).open("wb") as stream:
            tensorfile.save(stream, tensors)
            sync(stream)
        complete = _complete(manifest, tensors, {file.name: _describe(file) for file in folder.iterdir()})
        with (folder / MANIFEST).open("wb") as stream:
            stream.write(canonical(complete))
            sync(stream)
        result = _zip(folder) if path.suffix == ".zip" else folder
        put(result, path, scratch / "previous")
    return complete


def copy(artifact: Artifact, path: str | os.PathLike[str], overwrite: bool = False) -> None:
    """Copies an artifact to `path`, whole or not at all. UserError: as `write`."""
    path = Path(path)
    check_output(path, overwrite)
    try:
        with beside(path) as scratch:
            folder = scratch / path.name
            shutil.copytree(artifact.folder, folder)
            put(_zip(folder) if path.suffix == ".zip" else folder, path, scratch / "previous")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def _complete(
    manifest: Mapping[str, Any], tensors: Mapping[str, np.ndarray], files: Mapping[str, File]
) -> Manifest:
    entries = {entry["name"]: entry for entry in manifest["tensors"]}
    if entries.keys() != tensors.keys():
        odd = sorted(entries.keys() ^ tensors.keys())[0]
        raise ValueError(f"tensor '{odd}' is only in the manifest or only among the tensors")
    payload = tensorfile.payload_bytes(tensors)
    complete = {
        **manifest,
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "tensors": [
            {**entries[name], "dtype": str(tensors[name].dtype), "shape": list(tensors[name].shape)}
            for name in sorted(entries)
        ],
        "weights": {"payload_bytes": payload, "average_bits": 8 * payload / manifest["model"]["parameters"]},
        "files": dict(files),
    }
    complete["artifact_sha256"] = digest(complete)
    if problem := schemas.check(json.loads(canonical(complete)), "manifest"):
        raise ValueError(f"the manifest does not obey its schema: {problem}")
    return cast(Manifest, complete)


def canonical(manifest: Mapping[str, Any]) -> bytes:
    """Encodes a manifest in its one form: JSON with sorted keys, two spaces, a newline at the end."""
    return (json.dumps(manifest, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()


def digest(manifest: Mapping[str, Any], own: str = "artifact_sha256") -> str:
    """The SHA-256 of the canonical manifest without its ``own`` entry; the hashes in it cover the files."""
    rest = {key: value for key, value in manifest.items() if key != own}
    return hashlib.sha256(canonical(rest)).hexdigest()


def _describe(path: Path) -> File:
    return {"bytes": path.stat().st_size, "sha256": sha256(path)}


def fill(path: Path, source: FileSource) -> None:
    """Writes one file to the disk itself; programs may be run."""
    if isinstance(source, bytes):
        path.write_bytes(source)
    elif isinstance(source, Path):
        shutil.copyfile(source, path)
    else:
        source(path)
    with path.open("rb+") as stream:
        sync(stream)
    path.chmod((0o777 if path.name in (PROGRAM, SERVER) else 0o666) & ~umask())


def put(new: Path, path: Path, previous: Path) -> None:
    """Puts `new` at `path` by renaming; what was there moves to `previous`, and back again if that fails."""
    if not os.path.lexists(path):
        os.rename(new, path)
    elif new.is_file() and path.is_file():
        os.replace(new, path)
    else:
        os.rename(path, previous)
        try:
            os.rename(new, path)
        except BaseException:
            os.rename(previous, path)
            raise


def _zip(folder: Path) -> Path:
    """Packs `folder` into an uncompressed zip, in which nothing depends on the time or the machine."""
    target = folder.with_name(folder.name + ".archive")
    with target.open("wb") as stream:
        with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
            for file in sorted(folder.iterdir()):
                info = zipfile.ZipInfo(file.name, _EPOCH)
                info.create_system = 3  # Unix, on any machine
                info.external_attr = 0o100644 << 16
                with file.open("rb") as source, archive.open(info, "w", force_zip64=True) as sink:
                    shutil.copyfileobj(source, sink, 1 << 20)
        sync(stream)
    return target


@dataclass(frozen=True)
class Artifact:
    """A verified artifact; `folder` holds its files. A zip's is temporary and is removed with this object."""

    path: Path
    folder: Path
    manifest: dict[str, Any]
    _keep: list[object] = field(default_factory=list, repr=False, compare=False)

    def file(self, name: str) -> Path:
        """The path of one of its files. UserError: it has no file of this name."""
        if name not in self.manifest["files"]:
            raise UserError(f"{self.path} has no {name}: an artifact of this kind needs it; compile it again")
        return self.folder / name

    def tensors(self, name: str = WEIGHTS) -> dict[str, np.ndarray]:
        """The tensors of one of its files, in memory. UserError: the file was altered since it was verified."""
        return tensorfile.load_verified(self.file(name), self.manifest["files"][name]["sha256"])


def read_manifest(folder: str | os.PathLike[str]) -> Manifest:
    """The manifest of an artifact's folder, verified itself; no other file is looked at. UserError: as `read`."""
    return cast(Manifest, _read_manifest(Path(folder), Path(folder)))


def read(path: str | os.PathLike[str]) -> Artifact:
    """Opens and verifies an artifact: the version, the manifest, the set of files, and the hash of each.

    Raises:
        UserError: no such path, not an artifact, made by another version, truncated, altered, a file missing or too
            many.
    """
    path = Path(path)
    try:
        if path.is_dir():
            return _verified(Artifact(path, path, _read_manifest(path, path)))
        if not path.exists():
            raise UserError(f"there is no artifact {path}")
        if not zipfile.is_zipfile(path):
            raise UserError(
                f"{path} is not an artifact: neither a folder with {MANIFEST} nor a whole zip of one"
            )
        scratch = Path(tempfile.mkdtemp(prefix="mpq-"))
        keeper = _Scratch(scratch)
        _unzip(path, scratch)
        return _verified(Artifact(path, scratch, _read_manifest(scratch, path), [keeper]))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


class _Scratch:
    """Owns a temporary folder, which is removed when this object is collected or the process ends."""

    def __init__(self, folder: Path) -> None:
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)


def _altered(path: Path, what: str) -> UserError:
    return UserError(f"{path} is damaged: {what}; copy or compile it again")


def _read_manifest(folder: Path, path: Path) -> dict[str, Any]:
    file = folder / MANIFEST
    if (folder / PIPELINE).is_file():
        raise UserError(f"{path} is a pipeline of several artifacts: name one of its parts, such as {path}/unet")
    if not file.is_file():
        raise UserError(f"{path} is not an artifact: it has no {MANIFEST}")
    with file.open("rb") as stream:
        text = stream.read(_MAX_MANIFEST + 1)
    if len(text) > _MAX_MANIFEST:
        raise _altered(path, f"its {MANIFEST} is larger than any manifest is")
    try:
        manifest = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _altered(path, f"its {MANIFEST} is not JSON (truncated or altered)") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(f"{path} is not an artifact: its {MANIFEST} does not say format '{FORMAT}'")
    version = manifest.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise UserError(
            f"{path} has format version {version}, made by a newer mpq-compiler; this one reads up to "
            f"{FORMAT_VERSION}: update it (pip install --upgrade mpq-compiler)"
        )
    if isinstance(version, int) and version < FORMAT_VERSION:
        raise UserError(
            f"{path} has format version {version}, made by an earlier mpq-compiler, and this one calls its functions "
            "in another way: compile it again"
        )
    try:
        sound = text == canonical(manifest) and manifest.get("artifact_sha256") == digest(manifest)
    except ValueError:  # NaN, which no manifest holds
        sound = False
    if not sound:
        raise _altered(path, f"its {MANIFEST} was altered after it was written")
    if problem := schemas.check(manifest, "manifest"):
        raise _altered(path, f"its {MANIFEST} does not obey the schema ({problem})")
    return manifest


def _verified(artifact: Artifact) -> Artifact:
    expected = artifact.manifest["files"]
    present = {entry.name for entry in artifact.folder.iterdir()}
    if missing := sorted(expected.keys() - present):
        raise _altered(artifact.path, f"{missing[0]} is missing")
    if extra := sorted(present - expected.keys() - {MANIFEST}):
        raise _altered(artifact.path, f"it holds {extra[0]}, which does not belong to it")
    for name, entry in sorted(expected.items()):
        file = artifact.folder / name
        if not _NAME.fullmatch(name) or not file.is_file() or file.is_symlink():
            raise _altered(artifact.path, f"{name} is not a plain file")
        size = file.stat().st_size
        if size < entry["bytes"]:
            raise _altered(artifact.path, f"{name} is truncated ({size} of {entry['bytes']} bytes)")
        if size > entry["bytes"] or sha256(file) != entry["sha256"]:
            raise _altered(artifact.path, f"{name} was altered after it was written")
    return artifact


def _unzip(path: Path, folder: Path) -> None:
    """Unpacks the files of a zip, or of the one folder in it, and no more bytes than the manifest states."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = [info for info in archive.infolist() if not info.is_dir()]
            roots = {os.path.dirname(info.filename) for info in entries}
            names = [os.path.basename(info.filename) for info in entries]
            if MANIFEST not in names:
                raise UserError(f"{path} is not an artifact: it has no {MANIFEST}")
            if len(roots) != 1 or "/" in next(iter(roots)) or len({*names}) != len(names):
                raise _altered(path, "it holds more than the files of one artifact")
            limits = {MANIFEST: _MAX_MANIFEST}
            for info, name in sorted(zip(entries, names, strict=True), key=lambda pair: pair[1] != MANIFEST):
                if not _NAME.fullmatch(name):
                    raise _altered(path, f"it holds {name!r}, which does not belong to it")
                if info.file_size > limits.get(name, -1):
                    what = "larger than the manifest says" if name in limits else "not in the manifest"
                    raise _altered(path, f"{name} is {what}")
                with archive.open(info) as source, (folder / name).open("wb") as sink:
                    shutil.copyfileobj(source, sink, 1 << 20)
                if name == MANIFEST:
                    manifest = _read_manifest(folder, path)
                    limits.update({file: entry["bytes"] for file, entry in manifest["files"].items()})
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise _altered(path, f"the zip cannot be read ({error})") from error
