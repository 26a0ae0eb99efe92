"""Faults planted in the checks themselves: what is attacked without one of its checks is noticed."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mpq_compiler import schemas
from mpq_compiler.artifact import bundle, documents, signature, signing
from mpq_compiler.runtime import rpc
from mpq_compiler.runtime.tvm import VirtualMachine
from mpq_compiler.support import cache, files, tensorfile
from mpq_compiler.support.errors import UserError
from tests.fuzz import requests
from tests.fuzz.artifacts import ran
from tests.fuzz.attack import REFUSED
from tests.fuzz.attacks import ATTACKS, base_of
from tests.harness import relax_artifact
from tests.support import test_files

Patch = pytest.MonkeyPatch


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bases")


def attacked(name: str, bases: Path, scratch: Path, count: int = 150) -> None:
    """Tries mutants in this process, where the fault is."""
    base = base_of(name, bases)
    for seed in range(count):
        place = scratch / str(seed)
        place.mkdir()
        ATTACKS[name].mutant(base, place, random.Random(f"{name} {seed}"))


# ------------------------------------------------------------------------------------------------- the faults


def no_hash_of_weights(patch: Patch) -> None:
    """Neither when an artifact is opened nor when they are read."""
    load = tensorfile.load
    patch.setattr(tensorfile, "load_verified", lambda path, digest: load(path))
    patch.setattr(bundle, "_verified", lambda artifact, signed: artifact)


def no_hash_of_the_manifest(patch: Patch) -> None:
    patch.setattr(bundle, "require_whole", lambda document, text, schema, own: None)


def no_interface(patch: Patch) -> None:
    patch.setattr(VirtualMachine, "_require_interface", lambda self, artifact: None)


def no_comparison_of_tensors(patch: Patch) -> None:
    def tensors(self: bundle.Artifact, name: str = bundle.WEIGHTS) -> object:
        return tensorfile.load_verified(self.file(name), self.manifest["files"][name]["sha256"])

    patch.setattr(bundle.Artifact, "tensors", tensors)


def no_seal(patch: Patch) -> None:
    patch.setattr(cache, "_seal", lambda content: b"mpq-cache 1 " + b"0" * 64 + b"\n")


def no_hash_of_lines(patch: Patch) -> None:
    patch.setattr(cache, "_line", lambda result: f"{'0' * 16} {result}\n".encode())


def no_lock(patch: Patch) -> None:
    patch.setattr(files.fcntl, "flock", lambda handle, how: None)


def no_way_back(patch: Patch) -> None:
    """What was taken from its place is not put back when the new one is refused."""
    patch.setattr(files, "PREVIOUS", "../elsewhere")
    rename = files.os.rename
    patch.setattr(files.os, "rename", lambda one, other: rename(one, other) if "elsewhere" not in str(one) else None)


def no_signature(patch: Patch) -> None:
    patch.setattr(signature, "_require_right", lambda path, key, message, signed: None)


def a_limit_too_far(patch: Patch) -> None:
    patch.setattr(documents, "MOST_LEVELS", documents.MOST_LEVELS + 1)


def a_limit_too_near(patch: Patch) -> None:
    patch.setattr(documents, "MOST_VALUES", documents.MOST_VALUES - 1)


def no_schema_of_settings(patch: Patch) -> None:
    patch.setattr(schemas, "check", lambda document, name: None)


def no_bound_of_words(patch: Patch) -> None:
    text = requests.source()
    patch.setattr(requests, "source", lambda: text.replace("if (bytes >= LONGEST)", "if (bytes >= 4 * LONGEST)"))


# -------------------------------------------------------------------------------------- what notices each of them


def swept(bases: Path, scratch: Path) -> None:
    test_files.test_what_lives_and_what_is_not_ours_stays(scratch)


def put_back(bases: Path, scratch: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        test_files.test_a_rename_that_is_refused_puts_the_old_one_back(scratch, patch)


def forged(bases: Path, scratch: Path) -> None:
    """A hash in the list of what was signed is changed, and the signature stays."""
    ATTACKS["artifact, a folder"].base(scratch)
    signing.new_key(scratch / "k.pem")
    key = signing.private_key(scratch / "k.pem")
    signing.sign(scratch / "a.mpq", key)
    text = (scratch / "a.mpq" / signature.FILE).read_bytes()
    public = key.public_key().public_bytes_raw().hex()
    bundle.read(scratch / "a.mpq", public)
    listed = bytearray(text)
    listed[text.index(b"file ") + len("file ")] ^= 1  # a hexadecimal digit, and still one
    with pytest.raises(UserError):
        signature.check(bytes(listed), scratch / "a.mpq", public)


def bounded(bases: Path, scratch: Path) -> None:
    """Documents just within the bounds are read, those just beyond are not."""

    def nested(levels: int) -> bytes:
        return b'{"a":' * levels + b"{}" + b"}" * levels

    def many(values: int) -> bytes:
        return b'{"a":[' + b"0," * (values - 2) + b"0]}"

    for make, most in ((nested, 31), (many, 1 << 20)):
        documents.parse(make(most))
        with pytest.raises(documents.Unsound):
            documents.parse(make(most + 1))


def too_long(bases: Path, scratch: Path) -> None:
    """A token that has no room in what it is compared in."""
    requests.device(scratch)
    assert requests.served(scratch, scratch, b"MPQ1" + rpc._text("x" * 9000)) == REFUSED


FAULTS: dict[str, tuple[Callable[[Patch], None], Callable[[Path, Path], None]]] = {
    "the hash of weights is not compared": (
        no_hash_of_weights, lambda bases, scratch: altered(scratch)
    ),
    "the hash of the manifest is not compared": (
        no_hash_of_the_manifest, lambda bases, scratch: relabelled(scratch)
    ),
    "shapes are not held against the kernels": (
        no_interface, lambda bases, scratch: attacked("manifest, hashes right", bases, scratch, 400)
    ),
    "tensors are not held against the manifest": (
        no_comparison_of_tensors, lambda bases, scratch: attacked("weights, hashes right", bases, scratch)
    ),
    "files of the cache are believed": (no_seal, lambda bases, scratch: attacked("cache", bases, scratch)),
    "lines of the cache are believed": (no_hash_of_lines, lambda bases, scratch: attacked("cache", bases, scratch)),
    "a lock is not taken": (no_lock, swept),
    "what was taken away is not put back": (no_way_back, put_back),
    "a signature is not checked": (no_signature, forged),
    "settings of a LoRA are believed": (
        no_schema_of_settings, lambda bases, scratch: attacked("LoRA", bases, scratch, 80)
    ),
    "a device believes how long a word is": (no_bound_of_words, too_long),
    "a limit of levels is off by one": (a_limit_too_far, bounded),
    "a limit of values is off by one": (a_limit_too_near, bounded),
}  # fmt: skip


def altered(scratch: Path) -> None:
    """A code of a weight is another one."""
    ATTACKS["artifact, a folder"].base(scratch)
    file = scratch / "a.mpq" / bundle.WEIGHTS
    codes = bytes(range(relax_artifact.WIDTH))
    file.write_bytes(file.read_bytes().replace(codes, codes[::-1]))
    assert ran(scratch / "a.mpq", scratch, strict=True) == REFUSED


def relabelled(scratch: Path) -> None:
    """A manifest says more labels than the table has, and keeps its hash."""
    ATTACKS["artifact, a folder"].base(scratch)
    file = scratch / "a.mpq" / bundle.MANIFEST
    file.write_bytes(file.read_bytes().replace(b'"class_labels": 10', b'"class_labels": 99'))
    ran(scratch / "a.mpq", scratch, strict=True)
    with pytest.raises(UserError):
        bundle.read(scratch / "a.mpq")


@contextlib.contextmanager
def planted(plant: Callable[[Patch], None]) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        plant(patch)
        yield


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_noticed(name: str, bases: Path, tmp_path: Path) -> None:
    plant, notice = FAULTS[name]
    (tmp_path / "sound").mkdir()
    notice(bases, tmp_path / "sound")
    (tmp_path / "planted").mkdir()
    with planted(plant), pytest.raises((Exception, pytest.fail.Exception)):
        notice(bases, tmp_path / "planted")
