"""The signature of an artifact or a pipeline: a file beside all others, which names each and what it has to hold.

It is plain text, so that the C program reads it, too (`mpq_sign.h`); docs/artifact.md describes it. The package
`cryptography` is imported where a key is given, and nowhere else.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mpq_compiler.support.errors import UserError
from mpq_compiler.support.files import sha512

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

FILE = "signature.txt"
MAX_BYTES = 1 << 20
_MAX_KEY = 1 << 16  # bytes of a file with a key
_NAME = r"[A-Za-z0-9_][A-Za-z0-9_.-]*(?:/[A-Za-z0-9_][A-Za-z0-9_.-]*)?"  # of a pipeline: the part before the file
_FORM = re.compile(
    rb"mpq-signature 1\nkey ([0-9a-f]{64})\n((?:file [0-9a-f]{128} [0-9]+ %s\n)+)signature ([0-9a-f]{128})\n"
    % _NAME.encode()
)
_HEX = re.compile(r"[0-9A-Fa-f]{64}")

Key = str | os.PathLike[str]
"""A public key: in hexadecimal, or a file with it, as such text or as PEM."""


@dataclass(frozen=True)
class Signed:
    """The files that the owner of a key signed: SHA-512 and size of each, by name."""

    path: Path
    """The artifact or pipeline, for sentences."""
    files: Mapping[str, tuple[str, int]]

    def part(self, name: str) -> Signed:
        """What was signed of a part of a pipeline."""
        own = {file: entry for file, entry in self.files.items() if file.startswith(f"{name}/")}
        return Signed(self.path / name, {file.removeprefix(f"{name}/"): entry for file, entry in own.items()})

    def require_names(self, present: Iterable[str]) -> None:
        """UserError: the files are more or fewer than were signed."""
        found = {*present}
        if extra := sorted(found - self.files.keys()):
            raise UserError(f"{self.path} holds {extra[0]}, which was not signed; remove it, or get the artifact again")
        if missing := sorted(self.files.keys() - found):
            raise UserError(f"{self.path} has no {missing[0]}, which was signed; get the artifact again")

    def require(self, name: str, content: bytes | Path) -> None:
        """UserError: a file, or what was read of it, is not what was signed."""
        if isinstance(content, Path):
            found = sha512(content), content.stat().st_size
        else:
            found = hashlib.sha512(content).hexdigest(), len(content)
        if self.files.get(name) != found:
            raise UserError(f"{self.path / name} is not the file that was signed; get the artifact again")


Trust = Key | Signed
"""Whom a reader trusts: the owner of a key, or what such an owner is known to have signed."""


def read(folder: Path, path: Path, key: Key) -> Signed:
    """The files that the owner of the key signed.

    Args:
        folder: where the signature lies.
        path: the artifact or pipeline, for sentences.
        key: the public key.

    Raises:
        UserError: no key, no signature, a damaged one, or that of another key.
    """
    try:
        with (folder / FILE).open("rb") as stream:
            return check(stream.read(MAX_BYTES + 1), path, key)
    except FileNotFoundError as error:
        raise UserError(
            f"{path} is not signed, and a key is given to check it with; its owner signs it with `mpqc sign`"
        ) from error


def check(text: bytes, path: Path, key: Key) -> Signed:
    """The files that the owner of the key signed by this text. UserError: as `read`."""
    trusted = public_key(key)
    form = _FORM.fullmatch(text) if len(text) <= MAX_BYTES else None
    if form is None:
        raise UserError(f"{path} is damaged: its {FILE} is no signature, or only a part of one; copy it again")
    owner, listed, signature = form[1].decode(), form[2].decode(), bytes.fromhex(form[3].decode())
    if bytes.fromhex(owner) != trusted:
        raise UserError(f"{path} is signed with another key ({owner}) than the given one ({trusted.hex()})")
    _require_right(path, trusted, text[: form.end(2)], signature)
    rows = (line.split(" ") for line in listed.splitlines())
    return Signed(path, {name: (digest, int(size)) for _, digest, size, name in rows})


def _require_right(path: Path, key: bytes, message: bytes, signature: bytes) -> None:
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        Ed25519PublicKey.from_public_bytes(key).verify(signature, message)
    except (InvalidSignature, ValueError) as error:
        raise UserError(
            f"{path} is altered: its {FILE} was not made by the owner of {key.hex()}; get it again from there"
        ) from error


def made(private: Ed25519PrivateKey, files: Mapping[str, Path]) -> bytes:
    """The text of a signature over files by name; equal content and keys give equal bytes.

    UserError: a name that no signature can have.
    """
    lines = ["mpq-signature 1", f"key {private.public_key().public_bytes_raw().hex()}"]
    for name, file in sorted(files.items()):
        if not re.fullmatch(_NAME, name):
            raise UserError(f"{file} cannot be signed: names have letters, digits, '_', '-' and '.'; rename the file")
        lines.append(f"file {sha512(file)} {file.stat().st_size} {name}")
    message = "".join(f"{line}\n" for line in lines).encode()
    return message + f"signature {private.sign(message).hex()}\n".encode()


def public_key(key: Key) -> bytes:
    """The 32 bytes of a public key. UserError: it is none, or `cryptography` is not installed."""
    require_cryptography()
    if isinstance(key, str) and _HEX.fullmatch(key):
        return bytes.fromhex(key)
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    content = key_file(key)
    if _HEX.fullmatch(said := content.decode(errors="replace").strip()):
        return bytes.fromhex(said)
    if b"PRIVATE KEY-----" in content:
        raise UserError(f"{key} holds a private key, which is for its owner alone; give the public one")
    try:
        found = load_pem_public_key(content)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise UserError(f"{key} holds no public key: it has to be PEM, or 64 hexadecimal digits") from error
    if not isinstance(found, Ed25519PublicKey):
        raise UserError(f"{key} holds a key of another kind: artifacts are signed with Ed25519, `mpqc sign --new-key`")
    return found.public_bytes_raw()


def key_file(path: Key, what: str = "key") -> bytes:
    """The content of a file with a key, or with its passphrase. UserError: it cannot be read, or is larger than any."""
    try:
        with Path(path).open("rb") as stream:
            content = stream.read(_MAX_KEY + 1)
    except (OSError, ValueError) as error:  # ValueError: a name with a NUL
        why = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read the {what} {path}: {why}") from error
    if len(content) > _MAX_KEY:
        raise UserError(f"{path} holds no {what}: it has more than {_MAX_KEY} bytes")
    return content


def require_cryptography() -> None:
    """UserError: the package that computes signatures is not installed."""
    try:
        import cryptography  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError(
            "signatures need the package cryptography, which is not installed: pip install 'mpq-compiler[sign]'"
        ) from error
