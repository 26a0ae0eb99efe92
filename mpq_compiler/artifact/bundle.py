"""The artifact on disk: written whole or not at all, and read only if every byte is right.

It is a folder, or a zip of the same files: `manifest.json`, `weights.safetensors`, `ir.txt` and what the target's
backend adds (`kernels.so`, `graph.json`). docs/artifact.md describes it, schemas/manifest.json the manifest.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import os
import re
import shutil
import struct
import tempfile
import weakref
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from mpq_compiler import schemas
from mpq_compiler.artifact import documents, signature
from mpq_compiler.artifact.manifest import File, Manifest
from mpq_compiler.artifact.signature import Signed, Trust
from mpq_compiler.support import tensorfile
from mpq_compiler.support.errors import UserError
from mpq_compiler.support.files import beside, check_place, put, sha256, sweep, sync, umask

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
REWRITES = "rewrites.safetensors"
"""What passes multiplied channels of the model's parameters with."""
IR = "ir.txt"
DECISIONS = "decisions.json"
SCHEDULE = "schedule.json"
PROGRAM, SERVER = "mpq_run", "mpq_rpc"
"""The executable files of an artifact: `--emit c` writes both, `--standalone` the first."""

_MOST_FILES = 1000
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest time a zip can state

_UNREADABLE = (
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error),
    *(EOFError, NotImplementedError, RuntimeError, ValueError, OverflowError),
)
"""What Python's reader of zips raises for those that are damaged."""

FileSource = bytes | Path | Callable[[Path], object]
"""Source of a file's content: bytes, a file to copy, or a function that writes to the path it is called with."""


def check_output(path: str | os.PathLike[str], overwrite: bool) -> None:
    """Raises a UserError where an artifact could not be written to `path`; call it before long work starts."""
    path = Path(path)
    check_place(path)
    sweep(path.parent, path.name)
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
            with (path / (PIPELINE if (path / PIPELINE).is_file() else MANIFEST)).open("rb") as stream:
                text = documents.read(stream)
        else:
            with zipfile.ZipFile(path) as archive, archive.open(MANIFEST) as entry:
                text = documents.read(cast(BinaryIO, entry))
        return documents.parse(text).get("format") in (FORMAT, PIPELINE_FORMAT)
    except (OSError, KeyError, documents.Unsound, *_UNREADABLE):
        return False


def write(
    path: str | os.PathLike[str],
    manifest: Mapping[str, Any],
    files: Mapping[str, FileSource],
    tensors: Mapping[str, np.ndarray],
    overwrite: bool = False,
    tried: Callable[[Path], object] | None = None,
) -> Manifest:
    """Writes an artifact and returns its complete manifest; equal content gives equal bytes.

    Everything is written beside `path`, and put there in one step. So an error, a full disk, Ctrl-C or SIGTERM leaves
    nothing behind, and an artifact that was to be overwritten stays as it was; what a process that is killed leaves is
    removed when the next one is to write there.

    Args:
        path: a folder, or a zip where it ends in .zip.
        manifest: obeys the schema but for what is filled in here: format, format_version, weights, files,
            artifact_sha256, and in `tensors` the dtype and shape of each entry.
        files: content of each file besides the manifest and the weights, by name.
        tensors: the stored tensors, by the names in `manifest["tensors"]`.
        overwrite: whether an artifact at `path` may be replaced.
        tried: is called with the folder of the whole artifact before it is at `path`, and may refuse it by raising.

    Raises:
        UserError: what `check_output` refuses, and whatever the file system refuses.
    """
    path = Path(path)
    check_output(path, overwrite)
    for name in files:
        if not _NAME.fullmatch(name) or name in (MANIFEST, WEIGHTS, signature.FILE):
            raise ValueError(f"'{name}' cannot be the name of a file of an artifact")
    with beside(path) as scratch:
        folder = scratch / path.name
        folder.mkdir()
        for name, source in files.items():
            fill(folder / name, source)
        with (folder / WEIGHTS).open("wb") as stream:
            tensorfile.save(stream, tensors)
            sync(stream)
        complete = _complete(manifest, tensors, {file.name: described(file) for file in folder.iterdir()})
        with (folder / MANIFEST).open("wb") as stream:
            stream.write(canonical(complete))
            sync(stream)
        if tried is not None:
            tried(folder)
        result = _zip(folder) if path.suffix == ".zip" else folder
        put(result, path, scratch)
    return complete


def copy(artifact: Artifact, path: str | os.PathLike[str], overwrite: bool = False) -> None:
    """Copies an artifact to `path`, whole or not at all. UserError: as `write`."""
    path = Path(path)
    check_output(path, overwrite)
    try:
        with beside(path) as scratch:
            folder = scratch / path.name
            shutil.copytree(artifact.folder, folder)
            put(_zip(folder) if path.suffix == ".zip" else folder, path, scratch)
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


def described(path: Path) -> File:
    """The manifest's entry of a file."""
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


def _zip(folder: Path) -> Path:
    """Packs `folder` into an uncompressed zip, in which nothing depends on the time or the machine."""
    target = folder.with_name(folder.name + ".archive")
    with target.open("wb") as stream:
        with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
            for file in sorted(folder.iterdir()):
                with file.open("rb") as source, archive.open(zip_entry(file.name), "w", force_zip64=True) as sink:
                    shutil.copyfileobj(source, sink, 1 << 20)
        sync(stream)
    return target


def zip_entry(name: str) -> zipfile.ZipInfo:
    """The entry of a file in a zip, which depends on its name alone."""
    info = zipfile.ZipInfo(name, _EPOCH)
    info.create_system = 3  # Unix, on any machine
    info.external_attr = 0o100644 << 16
    return info


@dataclass(frozen=True)
class Artifact:
    """A verified artifact; `folder` holds its files. A zip's is temporary and is removed with this object."""

    path: Path
    folder: Path
    manifest: dict[str, Any]
    _unverified: set[str] = field(default_factory=lambda: {WEIGHTS, KERNELS}, repr=False, compare=False)
    """Files whose hashes are compared when they are asked for."""
    _keep: list[object] = field(default_factory=list, repr=False, compare=False)

    def file(self, name: str) -> Path:
        """The path of one of its files. UserError: it has no file of this name, or another than was written."""
        path = self._path(name)
        if name in self._unverified:
            self._verify(name)
        return path

    def content(self, name: str) -> bytes:
        """What one of its files holds, which is what has the hash. UserError: as `file`."""
        path = self._path(name)
        with _reading(path):
            content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != self.manifest["files"][name]["sha256"]:
            raise tensorfile.altered(path)
        return content

    def _path(self, name: str) -> Path:
        if name not in self.manifest["files"]:
            raise UserError(f"{self.path} has no {name}: an artifact of this kind needs it; compile it again")
        return self.folder / name

    def _verify(self, name: str) -> None:
        """Compares the hash of a file."""
        with _reading(self.path):
            found = sha256(self.folder / name)
        if found != self.manifest["files"][name]["sha256"]:
            raise _altered(self.path, f"{name} was altered after it was written")
        self._unverified.discard(name)

    @property
    def is_signed(self) -> bool:
        """Whether there is a signature, right or wrong: only `read` with a key tells."""
        return ((whole_of(self.path) or self.folder) / signature.FILE).is_file()

    def tensors(self, name: str = WEIGHTS) -> dict[str, np.ndarray]:
        """The tensors of one of its files, in memory.

        UserError: the file was altered since it was verified; the stored tensors are others than the manifest says.
        """
        found = tensorfile.load_verified(self._path(name), self.manifest["files"][name]["sha256"])
        stated = {entry["name"]: (entry["dtype"], tuple(entry["shape"])) for entry in self.manifest["tensors"]}
        if name == WEIGHTS and stated != {n: (str(tensor.dtype), tensor.shape) for n, tensor in found.items()}:
            raise _altered(self.path, f"{WEIGHTS} holds other tensors than its {MANIFEST} says")
        return found


def whole_of(path: Path) -> Path | None:
    """The folder of the pipeline that an artifact is a part of; None: of none."""
    folder = Path(os.path.abspath(path)).parent
    return folder if path.is_dir() and (folder / PIPELINE).is_file() else None


def _signed(path: Path, key: Trust | None) -> Signed | None:
    """What the owner of a key signed of an artifact in a folder; a part's signature is that of its pipeline."""
    if key is None or isinstance(key, Signed):
        return key
    if (whole := whole_of(path)) is not None:
        return signature.read(whole, whole, key).part(Path(os.path.abspath(path)).name)
    return signature.read(path, path, key)


def read_manifest(folder: str | os.PathLike[str], key: Trust | None = None) -> Manifest:
    """The manifest of an artifact's folder, verified itself; no other file is looked at. UserError: as `read`."""
    folder = Path(folder)
    return cast(Manifest, _read_manifest(folder, folder, _signed(folder, key)))


def read(path: str | os.PathLike[str], key: Trust | None = None) -> Artifact:
    """Opens and verifies an artifact: the version, the manifest, the set of files, and the hash of each.

    Args:
        path: a folder or a zip.
        key: the public key of its owner, who has to have signed every byte: in hexadecimal, or a file with it. Without
            one a signature is not looked at.

    Raises:
        UserError: no such path, not an artifact, made by another version, truncated, altered, a file missing or too
            many; with a key, no signature, or not one of its owner over these bytes.
    """
    artifact = opened(path, key)
    for name in sorted(artifact.manifest["files"]):
        artifact.file(name)
    return artifact


def opened(path: str | os.PathLike[str], key: Trust | None = None) -> Artifact:
    """Opens an artifact as `read` does, but for the hashes of weights and kernels.

    They are compared where the files are read (`Artifact.tensors`, `content`) or asked for (`file`), so that what runs
    an artifact hashes its weights once. UserError: as `read`.
    """
    path = Path(path)
    with _reading(path):
        if path.is_dir():
            signed = _signed(path, key)
            return _verified(Artifact(path, path, _read_manifest(path, path, signed)), signed)
        if not path.exists():
            raise UserError(f"there is no artifact {path}")
        if not zipfile.is_zipfile(path):
            raise UserError(
                f"{path} is not an artifact: neither a folder with {MANIFEST} nor a whole zip of one"
            )
        scratch = Path(tempfile.mkdtemp(prefix="mpq-"))
        keeper = _Scratch(scratch)
        signed = _unzip(path, scratch, key)
        return _verified(Artifact(path, scratch, _read_manifest(scratch, path, signed), _keep=[keeper]), signed)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turns what the file system refuses into a UserError that names the path."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


class _Scratch:
    """Owns a temporary folder, which is removed when this object is collected or the process ends."""

    def __init__(self, folder: Path) -> None:
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)


def _altered(path: Path, what: str) -> UserError:
    return UserError(f"{path} is damaged: {what}; copy or compile it again")


def _read_manifest(folder: Path, path: Path, signed: Signed | None) -> dict[str, Any]:
    file = folder / MANIFEST
    if (folder / PIPELINE).is_file():
        raise UserError(f"{path} is a pipeline of several artifacts: name one of its parts, such as {path}/unet")
    if not file.is_file():
        raise UserError(f"{path} is not an artifact: it has no {MANIFEST}")
    try:
        with file.open("rb") as stream:
            text = documents.read(stream)
        if signed is not None:
            signed.require(MANIFEST, text)
        manifest = documents.parse(text)
    except documents.Unsound as wrong:
        raise _altered(path, f"its {MANIFEST} {wrong}") from wrong
    if manifest.get("format") != FORMAT:
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
        require_whole(manifest, text, "manifest", "artifact_sha256")
    except documents.Unsound as wrong:
        raise _altered(path, f"its {MANIFEST} {wrong}") from wrong
    return manifest


def require_whole(document: Mapping[str, object], text: bytes, schema: str, own: str) -> None:
    """Unsound: a document departs from its schema, or is not the one that was written.

    Args:
        document: of the text.
        text: as it lies on the disk.
        schema: of the package.
        own: the entry with the hash of all others.
    """
    documents.require(document, schema)
    try:
        whole = text == canonical(document)
    except ValueError:  # NaN, which none holds
        whole = False
    line = f'\n  "{own}": "{document[own]}",'.encode()  # one, behind which other entries follow: `digest` of the text
    if not whole or hashlib.sha256(text.replace(line, b"")).hexdigest() != document[own]:
        raise documents.Unsound("was altered after it was written")


def _verified(artifact: Artifact, signed: Signed | None) -> Artifact:
    expected = artifact.manifest["files"]
    present = {entry.name for entry in artifact.folder.iterdir()} - {signature.FILE}
    if signed is not None:
        signed.require_names(present)
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
        if size > entry["bytes"]:
            raise _altered(artifact.path, f"{name} was altered after it was written")
        if name not in artifact._unverified:
            artifact._verify(name)
        if signed is not None:
            signed.require(name, file)
    return artifact


def _require_room(path: Path, folder: Path, size: int) -> None:
    if size > (free := shutil.disk_usage(folder).free):
        raise UserError(
            f"{path} unpacks to {size} bytes, and {folder.parent} has room for {free}: free some space there, or name "
            "another folder in TMPDIR"
        )


def _unzip(path: Path, folder: Path, key: Trust | None) -> Signed | None:
    """Unpacks the files of a zip, or of the one folder in it, and no more bytes than the manifest states.

    Returns what the owner of the key signed; without a key None.
    """
    signed = None
    try:
        with zipfile.ZipFile(path) as archive:
            entries = [info for info in archive.infolist() if not info.is_dir()]
            roots = {os.path.dirname(info.filename) for info in entries}
            names = [os.path.basename(info.filename) for info in entries]
            if MANIFEST not in names:
                raise UserError(f"{path} is not an artifact: it has no {MANIFEST}")
            if len(entries) > _MOST_FILES or len(roots) != 1 or "/" in next(iter(roots)) or len({*names}) != len(names):
                raise _altered(path, "it holds more than the files of one artifact")
            limits = {signature.FILE: signature.MAX_BYTES, MANIFEST: documents.MOST_BYTES}
            turn = {name: number for number, name in enumerate(limits)}
            for info, name in sorted(zip(entries, names, strict=True), key=lambda pair: turn.get(pair[1], len(turn))):
                if not _NAME.fullmatch(name):
                    raise _altered(path, f"it holds {name!r}, which does not belong to it")
                if info.file_size > limits.get(name, -1):
                    what = "larger than the manifest says" if name in limits else "not in the manifest"
                    raise _altered(path, f"{name} is {what}")
                with archive.open(info) as source, (folder / name).open("wb") as sink:
                    shutil.copyfileobj(source, sink, 1 << 20)
                if name == MANIFEST:
                    if key is not None:
                        signed = key if isinstance(key, Signed) else signature.read(folder, path, key)
                    manifest = _read_manifest(folder, path, signed)
                    limits.update({file: entry["bytes"] for file, entry in manifest["files"].items()})
                    _require_room(path, folder, sum(limits.values()))
    except _UNREADABLE as error:
        raise _altered(path, f"the zip cannot be read ({error})") from error
    return signed
