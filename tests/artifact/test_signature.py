"""Signatures: one more file, by which readers with a key refuse whatever its owner did not sign."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mpq_compiler.artifact import bundle, signature, signing
from mpq_compiler.artifact.manifest import Manifest
from mpq_compiler.support.errors import UserError
from tests.harness import signatures
from tests.harness.signatures import Pair, signed

KINDS = ("a.mpq", "a.zip")
NAMES = (bundle.MANIFEST, bundle.WEIGHTS, bundle.IR, bundle.KERNELS)


@pytest.fixture
def keys() -> tuple[Pair, Pair]:
    return signatures.keys()


def written(path: Path, name: str = "tiny") -> Manifest:
    value = {"shape": [1, 1, 8, 8], "dtype": "float32"}
    function = {
        "name": "denoise_b1",
        "batch": 1,
        "inputs": [{"name": "sample", **value}],
        "output": {"name": "sample", **value},
    }
    manifest = {
        "name": name,
        "target": {"name": "x86-64-avx2", "arch": "x86_64", "backend": "tvm", "features": ["avx2"]},
        "model": {"class": "UNet2DModel", "config": {"in_channels": 1}, "parameters": 10_000},
        "functions": [function],
        "tensors": [{"name": "w", "parameter": "w"}],
        "versions": {"mpq-compiler": "0.1.0"},
    }
    files = {bundle.IR: b"graph unet()\n", bundle.KERNELS: b"\x7fELF" * 300}
    return bundle.write(path, manifest, files, {"w": np.arange(5000, dtype=np.uint8)})


def contents(path: Path) -> dict[str, bytes]:
    """The content of each file, whose order in a zip is kept."""
    if path.is_dir():
        return {file.name: file.read_bytes() for file in path.iterdir()}
    with zipfile.ZipFile(path) as archive:
        return {info.filename: archive.read(info) for info in archive.infolist()}


def put(path: Path, files: dict[str, bytes]) -> None:
    """Replaces an artifact by one of these files."""
    if path.is_dir():
        shutil.rmtree(path)
        path.mkdir()
        for name, content in files.items():
            (path / name).write_bytes(content)
    else:
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)


def resealed(files: dict[str, bytes]) -> dict[str, bytes]:
    """The same files with a manifest whose hashes are theirs, as anybody can make it."""
    manifest = json.loads(files[bundle.MANIFEST])
    hashed = {name: content for name, content in files.items() if name not in (bundle.MANIFEST, signature.FILE)}
    manifest["files"] = {
        name: {"bytes": len(content), "sha256": bundle.hashlib.sha256(content).hexdigest()}
        for name, content in hashed.items()
    }
    manifest["artifact_sha256"] = bundle.digest(manifest)
    return files | {bundle.MANIFEST: bundle.canonical(manifest)}


# --- what a signature is ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_signature_is_one_more_file(tmp_path: Path, keys: tuple[Pair, Pair], kind: str) -> None:
    complete, before = written(tmp_path / kind), contents(tmp_path / kind)
    signed(tmp_path / kind, keys[0])
    after = contents(tmp_path / kind)
    assert after.keys() - before.keys() == {signature.FILE} and os.listdir(tmp_path) == [kind]
    assert [*after.items()][: len(before)] == [*before.items()] or (tmp_path / kind).is_dir()
    assert {name: after[name] for name in before} == before
    for key in (None, keys[0].hex, keys[0].hex.upper(), keys[0].public, str(keys[0].public)):
        found = bundle.read(tmp_path / kind, key)
        assert found.is_signed and found.manifest == complete
    lines = after[signature.FILE].decode().splitlines()
    assert lines[:2] == ["mpq-signature 1", f"key {keys[0].hex}"] and lines[-1].startswith("signature ")
    assert [line.split()[-1] for line in lines[2:-1]] == sorted(NAMES)


@pytest.mark.parametrize("kind", KINDS)
def test_signing_again_replaces_it(tmp_path: Path, keys: tuple[Pair, Pair], kind: str) -> None:
    written(tmp_path / kind)
    first = contents(signed(tmp_path / kind, keys[0]))
    raw = (tmp_path / kind).read_bytes() if kind == "a.zip" else b""
    assert contents(signed(tmp_path / kind, keys[0])) == first
    assert contents(signed(tmp_path / kind, keys[1])) != first
    bundle.read(tmp_path / kind, keys[1].public)
    assert contents(signed(tmp_path / kind, keys[0])) == first
    assert not raw or (tmp_path / kind).read_bytes() == raw


@pytest.mark.parametrize("root", ["", "a.mpq/"])
def test_the_entries_of_a_zip_keep_their_bytes_and_order(tmp_path: Path, keys: tuple[Pair, Pair], root: str) -> None:
    """Another program's zip too, with a signature between other entries; nothing is compressed anew."""
    written(tmp_path / "a.mpq")
    files = [*contents(signed(tmp_path / "a.mpq", keys[1])).items()]
    path, kinds = tmp_path / "made.zip", (zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED, zipfile.ZIP_BZIP2)
    with zipfile.ZipFile(path, "w") as archive:
        archive.comment = b"by hand"
        for number, (name, content) in enumerate(sorted(files, key=lambda item: item[0] != signature.FILE)):
            archive.writestr(root + name, content, kinds[number % 3], compresslevel=1)
    before = entries(path)
    signed(path, keys[0])
    after = entries(path)
    del before[root + signature.FILE]
    assert [*before.items()] == [*after.items()][:-1] and [*after][-1] == root + signature.FILE
    assert zipfile.ZipFile(path).testzip() is None and zipfile.ZipFile(path).comment == b"by hand"
    bundle.read(path, keys[0].hex)


def entries(path: Path) -> dict[str, tuple[bytes, int, int]]:
    """The bytes of each entry as they lie in a zip, its check sum and its size."""
    with zipfile.ZipFile(path) as archive:
        found, data = archive.infolist(), path.read_bytes()
        ends = [*(info.header_offset for info in found[1:]), archive.start_dir]
        return {i.filename: (data[i.header_offset : e], i.CRC, i.file_size) for i, e in zip(found, ends, strict=True)}


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_disk_leaves_the_artifact_as_it_was(tmp_path: Path, keys: tuple[Pair, Pair], kind: str) -> None:
    written(tmp_path / kind)
    before = contents(tmp_path / kind)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    room = (tmp_path / kind).stat().st_size if kind == "a.zip" else 300  # too little for the signature alone
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        with pytest.raises(UserError, match="cannot write"):
            signed(tmp_path / kind, keys[0])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert contents(tmp_path / kind) == before and os.listdir(tmp_path) == [kind]


def test_a_copy_keeps_its_signature(tmp_path: Path, keys: tuple[Pair, Pair]) -> None:
    written(tmp_path / "a.mpq")
    found = bundle.read(signed(tmp_path / "a.mpq", keys[0]))
    for name in ("b.mpq", "b.zip"):
        bundle.copy(found, tmp_path / name)
        bundle.read(tmp_path / name, keys[0].hex)


# --- what is refused ----------------------------------------------------------------------------------------

Files = dict[str, bytes]


def altered(name: str, at: int = -2) -> Callable[[Files, Files], Files]:
    def change(files: Files, other: Files) -> Files:
        content = bytearray(files[name])
        content[at] ^= 1
        return files | {name: bytes(content)}

    return change


def without(name: str) -> Callable[[Files, Files], Files]:
    return lambda files, other: {key: content for key, content in files.items() if key != name}


FORGERIES: dict[str, tuple[Callable[[Files, Files], Files], str]] = {
    "no signature": (without(signature.FILE), "is not signed, and a key is given to check it with"),
    "the signature of another artifact": (
        lambda files, other: files | {signature.FILE: other[signature.FILE]}, "is not the file that was signed"
    ),
    "another artifact under the signature": (
        lambda files, other: other | {signature.FILE: files[signature.FILE]}, "is not the file that was signed"
    ),
    "an empty signature": (lambda files, other: files | {signature.FILE: b""}, "is no signature, or only a part"),
    "a huge signature": (
        lambda files, other: files | {signature.FILE: files[signature.FILE] * 2000}, "is no signature|larger than"
    ),
    **{
        f"{name} altered": (altered(name), r"is not the file that was signed|was altered after it was written")
        for name in NAMES
    },
    **{
        f"{name} altered and all hashes made anew": (
            lambda files, other, name=name: resealed(altered(name)(files, other)), "is not the file that was signed"
        )
        for name in NAMES[1:]
    },
    "another name in the manifest": (
        lambda files, other: resealed(
            files | {bundle.MANIFEST: files[bundle.MANIFEST].replace(b'"name": "tiny"', b'"name": "evil"')}
        ),
        "is not the file that was signed",
    ),
    "a file more": (lambda files, other: resealed(files | {"more.txt": b"x"}), "is not the file that was|not signed"),
    "a file less": (
        lambda files, other: resealed(without(bundle.IR)(files, other)), "is not the file that was|was signed"
    ),
    "a file more, in no manifest": (lambda files, other: files | {"more.txt": b"x"}, "not signed|not in the manifest"),
    "a file less, in no manifest": (without(bundle.IR), "which was signed"),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_forgery_is_refused(tmp_path: Path, keys: tuple[Pair, Pair], forgery: str, kind: str) -> None:
    forge, said = FORGERIES[forgery]
    written(tmp_path / kind)
    (tmp_path / "other").mkdir()
    written(tmp_path / "other" / kind, "other")
    files = contents(signed(tmp_path / kind, keys[0]))
    put(tmp_path / kind, files)
    bundle.read(tmp_path / kind, keys[0].public)
    put(tmp_path / kind, forge(files, contents(signed(tmp_path / "other" / kind, keys[0]))))
    with pytest.raises(UserError, match=said):
        bundle.read(tmp_path / kind, keys[0].public)


@pytest.mark.parametrize("kind", KINDS)
def test_another_key_is_named(tmp_path: Path, keys: tuple[Pair, Pair], kind: str) -> None:
    written(tmp_path / kind)
    signed(tmp_path / kind, keys[0])
    with pytest.raises(UserError, match=f"signed with another key .{keys[0].hex}. than the given one .{keys[1].hex}"):
        bundle.read(tmp_path / kind, keys[1].public)
    put(tmp_path / kind, {
        name: content.replace(keys[0].hex.encode(), keys[1].hex.encode())
        for name, content in contents(tmp_path / kind).items()
    })  # fmt: skip
    with pytest.raises(UserError, match=f"was not made by the owner of {keys[1].hex}"):
        bundle.read(tmp_path / kind, keys[1].public)


def test_no_mutant_of_a_signature_is_taken(tmp_path: Path, keys: tuple[Pair, Pair]) -> None:
    written(tmp_path / "a.mpq")
    file = signed(tmp_path / "a.mpq", keys[0]) / signature.FILE
    text, tried = file.read_bytes(), 0
    for each in signatures.mutants(text, 400):
        file.write_bytes(each)
        if each == text:
            bundle.read(tmp_path / "a.mpq", keys[0].hex)
            continue
        tried += 1
        with pytest.raises(UserError, match=r"is no signature|is altered|signed with another key"):
            bundle.read(tmp_path / "a.mpq", keys[0].hex)
    assert tried > 300


# --- keys ---------------------------------------------------------------------------------------------------


def openssl(*arguments: object) -> None:
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)


def test_a_new_key_is_for_its_owner_alone(tmp_path: Path) -> None:
    public, fingerprint = signing.new_key(tmp_path / "k.pem")
    assert (tmp_path / "k.pem").stat().st_mode & 0o777 == 0o600 and public == tmp_path / "k.pub.pem"
    assert (tmp_path / "k.pem").read_bytes().startswith(b"-----BEGIN PRIVATE KEY-----")
    assert signature.public_key(public).hex() == fingerprint
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(UserError, match=r"k\.pem exists, and keys are never overwritten"):
        signing.new_key(tmp_path / "k.pem")
    (tmp_path / "k.pem").unlink()
    with pytest.raises(UserError, match=r"k\.pub\.pem exists, and keys are never overwritten"):
        signing.new_key(tmp_path / "k.pem")
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {"k.pub.pem": before["k.pub.pem"]}


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")
def test_keys_and_signatures_are_those_of_openssl(tmp_path: Path) -> None:
    """Its keys sign, it reads ours, and it finds the signature right."""
    openssl("genpkey", "-algorithm", "ed25519", "-out", tmp_path / "k.pem")
    openssl("pkey", "-in", tmp_path / "k.pem", "-pubout", "-out", tmp_path / "k.pub.pem")
    written(tmp_path / "a.mpq")
    signing.sign(tmp_path / "a.mpq", signing.private_key(tmp_path / "k.pem"))
    bundle.read(tmp_path / "a.mpq", tmp_path / "k.pub.pem")
    message, _, last = (tmp_path / "a.mpq" / signature.FILE).read_bytes().rpartition(b"signature ")
    (tmp_path / "message").write_bytes(message)
    (tmp_path / "raw").write_bytes(bytes.fromhex(last.decode()))
    given = ("-rawin", "-in", tmp_path / "message", "-sigfile", tmp_path / "raw")
    openssl("pkeyutl", "-verify", "-pubin", "-inkey", tmp_path / "k.pub.pem", *given)
    signing.new_key(tmp_path / "ours.pem", b"secret")
    openssl("pkey", "-in", tmp_path / "ours.pem", "-passin", "pass:secret", "-noout")


def test_a_key_with_a_passphrase(tmp_path: Path, keys: tuple[Pair, Pair]) -> None:
    _, fingerprint = signing.new_key(tmp_path / "k.pem", b"secret")
    (tmp_path / "p").write_bytes(b"secret\nmore\n")
    assert signing.passphrase_of(tmp_path / "p") == b"secret"
    private = signing.private_key(tmp_path / "k.pem", b"secret")
    assert private.public_key().public_bytes_raw().hex() == fingerprint
    for path, passphrase, said in (
        (tmp_path / "k.pem", None, "is encrypted: give its passphrase with passphrase_file"),
        (tmp_path / "k.pem", b"wrong", "or its passphrase is another"),
        (keys[0].private, b"secret", "is not encrypted: leave passphrase_file out"),
    ):
        with pytest.raises(UserError, match=said):
            signing.private_key(path, passphrase)
    (tmp_path / "p").write_bytes(b"\nsecret")
    with pytest.raises(UserError, match="holds no passphrase: its first line is empty"):
        signing.passphrase_of(tmp_path / "p")


def test_files_that_are_no_keys(tmp_path: Path, keys: tuple[Pair, Pair]) -> None:
    wrong = signatures.no_keys(tmp_path) | {"none": "cannot read the key", ".": "cannot read the key"}
    from cryptography.hazmat.primitives import serialization as forms
    from cryptography.hazmat.primitives.asymmetric import ec

    other = ec.generate_private_key(ec.SECP256R1())
    info = forms.PublicFormat.SubjectPublicKeyInfo
    (tmp_path / "ec.pub").write_bytes(other.public_key().public_bytes(forms.Encoding.PEM, info))
    plain = (forms.Encoding.PEM, forms.PrivateFormat.PKCS8, forms.NoEncryption())
    (tmp_path / "ec").write_bytes(other.private_bytes(*plain))
    for name, said in (wrong | {"ec.pub": "holds a key of another kind"}).items():
        with pytest.raises(UserError, match=said):
            signature.public_key(tmp_path / name)
    with pytest.raises(UserError, match="holds a private key, which is for its owner alone"):
        signature.public_key(keys[0].private)
    with pytest.raises(UserError, match=r"cannot read the key 0123: No such file"):
        signature.public_key("0123")
    for name, said in (wrong | {"ec": "holds a key of another kind"}).items():
        with pytest.raises(UserError, match=said):
            signing.private_key(tmp_path / name)
    with pytest.raises(UserError, match="holds no private key in PEM; `mpqc sign --new-key FILE` makes one"):
        signing.private_key(keys[0].public)


def test_cryptography_is_for_keys_alone(tmp_path: Path, keys: tuple[Pair, Pair]) -> None:
    """Without a key it is not imported, and with one its absence is a sentence."""
    written(tmp_path / "a.mpq")
    signed(tmp_path / "a.mpq", keys[0])
    code = """
        import sys
        from mpq_compiler.artifact import bundle
        assert bundle.read(sys.argv[1]).is_signed and "cryptography" not in sys.modules
        sys.modules["cryptography"] = None
        try:
            bundle.read(sys.argv[1], sys.argv[2])
        except Exception as error:
            print(type(error).__name__, error)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "a.mpq"), keys[0].hex]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert re.match(r"UserError .*needs? the package cryptography.*pip install 'mpq-compiler\[sign\]'", done.stdout)
