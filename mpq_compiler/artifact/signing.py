"""Signing: keys, and the signature that is added to an artifact or a pipeline, whose other bytes stay as they are."""

from __future__ import annotations

import os
import shutil
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from mpq_compiler.artifact import bundle, pipeline, signature
from mpq_compiler.artifact.signature import Signed
from mpq_compiler.support.errors import UserError
from mpq_compiler.support.files import beside, check_place, put, sync

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey


def sign(path: str | os.PathLike[str], private: Ed25519PrivateKey) -> tuple[str, Signed]:
    """Signs an artifact, or a pipeline with all its parts; a signature that it has is replaced.

    Returns:
        The public key in hexadecimal, and what is signed.

    Raises:
        UserError: it is not sound, or a part, which is signed with its pipeline, or cannot be written to.
    """
    path = Path(path)
    place = path.resolve()
    check_place(place)
    if pipeline.is_pipeline(path):
        files = _of_pipeline(path)
    else:
        if bundle.whole_of(path) is not None:
            raise UserError(f"{path} is a part of a pipeline, which is signed whole: sign {path.parent}")
        artifact = bundle.read(path)
        files = {name: artifact.folder / name for name in (bundle.MANIFEST, *artifact.manifest["files"])}
    text = signature.made(private, files)
    with beside(place) as scratch:
        if place.is_dir():
            bundle.fill(scratch / signature.FILE, text)
            put(scratch / signature.FILE, place / signature.FILE, scratch)
        else:
            _into_zip(place, scratch / place.name, text)
            put(scratch / place.name, place, scratch)
    key = private.public_key().public_bytes_raw().hex()
    return key, signature.check(text, path, key)


def _of_pipeline(path: Path) -> dict[str, Path]:
    """The files of a pipeline by name, those of its parts behind the part's. UserError: it is not sound."""
    made = pipeline.read(path)
    files = {name: path / name for name in (pipeline.FILE, *made.document["files"])}
    for name in made.document["parts"]:
        part = bundle.read(made.part(name))
        made.require_part(name, part.manifest["artifact_sha256"])
        files |= {f"{name}/{file}": path / name / file for file in (bundle.MANIFEST, *part.manifest["files"])}
    if extra := sorted(pipeline.present(path) - files.keys()):
        raise UserError(f"{path} holds {extra[0]}, which does not belong to it; remove it before it is signed")
    return files


def _into_zip(source: Path, target: Path, text: bytes) -> None:
    """Writes a zip with the signature behind all other entries, which keep their bytes and order."""
    with source.open("rb") as old, zipfile.ZipFile(old) as archive, target.open("w+b") as stream:
        entries = sorted(archive.infolist(), key=lambda info: info.header_offset)
        ends = [*(info.header_offset for info in entries[1:]), archive.start_dir]
        kept = []
        for info, end in zip(entries, ends, strict=True):
            if os.path.basename(info.filename) == signature.FILE:
                continue
            old.seek(begin := info.header_offset)
            info.header_offset = stream.tell()
            _copy(old, stream, end - begin)
            kept.append(info)
        root = next(os.path.dirname(info.filename) for info in kept if not info.is_dir())
        with zipfile.ZipFile(stream, "w") as made:  # behind them, with a directory of all
            made.filelist += kept
            made.NameToInfo |= {info.filename: info for info in kept}
            made.comment = archive.comment
            made.writestr(bundle.zip_entry(os.path.join(root, signature.FILE)), text)
        sync(stream)
    shutil.copymode(source, target)


def _copy(source: BinaryIO, target: BinaryIO, count: int) -> None:
    """Copies so many bytes."""
    while count > 0 and (piece := source.read(min(count, 1 << 20))):
        target.write(piece)
        count -= len(piece)


def private_key(path: str | os.PathLike[str], passphrase: bytes | None = None) -> Ed25519PrivateKey:
    """The private key in a PEM file, of ours or of `openssl genpkey -algorithm ed25519`. UserError: there is none."""
    signature.require_cryptography()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    content = signature.key_file(path)
    try:
        found = load_pem_private_key(content, passphrase)
    except TypeError as error:  # that a passphrase is missing, or given for nothing
        what = "leave --passphrase-file out" if passphrase else "give its passphrase with --passphrase-file"
        raise UserError(f"{path} is {'not ' if passphrase else ''}encrypted: {what}") from error
    except (ValueError, UnsupportedAlgorithm) as error:
        wrong = ", or its passphrase is another" if passphrase else ""
        raise UserError(
            f"{path} holds no private key in PEM{wrong}; `mpqc sign --new-key FILE` makes one"
        ) from error
    if not isinstance(found, Ed25519PrivateKey):
        raise UserError(f"{path} holds a key of another kind: artifacts are signed with Ed25519, `mpqc sign --new-key`")
    return found


def passphrase_of(path: str | os.PathLike[str]) -> bytes:
    """The first line of a file. UserError: it cannot be read, or is empty."""
    if not (line := signature.key_file(path, "passphrase").partition(b"\n")[0].removesuffix(b"\r")):
        raise UserError(f"{path} holds no passphrase: its first line is empty")
    return line


def new_key(path: str | os.PathLike[str], passphrase: bytes | None = None) -> tuple[Path, str]:
    """Makes a key: `path` for its owner alone, and a public one beside it; returns that file, and it in hexadecimal.

    UserError: one of the files exists, or cannot be written.
    """
    signature.require_cryptography()
    from cryptography.hazmat.primitives import serialization as forms
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    path = Path(path)
    public = path.with_suffix(".pub.pem")
    check_place(path)
    for file in (path, public):
        if os.path.lexists(file):
            raise UserError(f"{file} exists, and keys are never overwritten; choose another name")
    key = Ed25519PrivateKey.generate()
    hidden = forms.BestAvailableEncryption(passphrase) if passphrase else forms.NoEncryption()
    own = key.private_bytes(forms.Encoding.PEM, forms.PrivateFormat.PKCS8, hidden)
    told = key.public_key().public_bytes(forms.Encoding.PEM, forms.PublicFormat.SubjectPublicKeyInfo)
    _create(path, own, 0o600)
    try:
        _create(public, told, 0o644)
    except BaseException:
        path.unlink()
        raise
    return public, key.public_key().public_bytes_raw().hex()


def _create(path: Path, content: bytes, mode: int) -> None:
    """Writes a file that does not exist, whole or not at all."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        with open(handle, "wb") as stream:
            stream.write(content)
            sync(stream)
    except BaseException:
        path.unlink()
        raise
