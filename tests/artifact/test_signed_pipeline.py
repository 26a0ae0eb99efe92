"""Signed pipelines: one signature over all parts, none of which can be exchanged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mpq_compiler.artifact import bundle, pipeline, signature
from mpq_compiler.runtime import compiled_denoiser
from mpq_compiler.runtime.pipeline import load_pipeline
from mpq_compiler.support.errors import UserError
from tests.harness import compiled_pipeline, signatures
from tests.harness.signatures import Pair, signed


@pytest.fixture
def keys() -> tuple[Pair, Pair]:
    return signatures.keys()


@pytest.fixture
def copied(tmp_path: Path, keys: tuple[Pair, Pair]) -> Path:
    """A signed pipeline."""
    return signed(Path(shutil.copytree(compiled_pipeline.path(), tmp_path / "a.mpq")), keys[0])


def opened(folder: Path, key: str) -> None:
    """Opens a pipeline with each of its parts, as drawing does."""
    pipe = load_pipeline(folder, 1, key=key)
    for name in pipe.document["parts"]:
        pipe.part(name)


def another(folder: Path, path: Path, pair: Pair) -> Path:
    """Another pipeline of the same owner, whose denoiser and document differ in a name."""
    shutil.copytree(folder, path)
    (path / signature.FILE).unlink()
    manifest = json.loads((path / "unet" / bundle.MANIFEST).read_bytes()) | {"name": "another"}
    manifest["artifact_sha256"] = bundle.digest(manifest)
    (path / "unet" / bundle.MANIFEST).write_bytes(bundle.canonical(manifest))
    document = json.loads((path / pipeline.FILE).read_bytes()) | {"steps": 7}
    document["parts"]["unet"]["artifact_sha256"] = manifest["artifact_sha256"]
    document[pipeline.OWN] = bundle.digest(document, pipeline.OWN)
    (path / pipeline.FILE).write_bytes(bundle.canonical(document))
    return signed(path, pair)


def test_a_pipeline_is_signed_whole(copied: Path, keys: tuple[Pair, Pair]) -> None:
    before = compiled_pipeline.path()
    for file in before.rglob("*"):
        assert file.is_dir() or (copied / file.relative_to(before)).read_bytes() == file.read_bytes()
    assert pipeline.present(copied) == pipeline.present(before) and (copied / signature.FILE).is_file()
    opened(copied, keys[0].hex)
    assert compiled_denoiser.load(copied / "unet", 1, key=keys[0].public).artifact.is_signed
    text = (copied / signature.FILE).read_bytes()
    assert (signed(copied, keys[0]) / signature.FILE).read_bytes() == text
    with pytest.raises(UserError, match="is a part of a pipeline, which is signed whole"):
        signed(copied / "unet", keys[0])
    with pytest.raises(UserError, match="signed with another key"):
        load_pipeline(copied, key=keys[1].hex)
    with pytest.raises(UserError, match="is not signed, and a key is given"):
        load_pipeline(before, key=keys[0].hex)


def test_no_part_of_another_signed_pipeline_is_taken(copied: Path, tmp_path: Path, keys: tuple[Pair, Pair]) -> None:
    """Neither alone, nor with its document, nor with its signature, where either is not the other's."""
    other = another(copied, tmp_path / "other.mpq", keys[0])
    opened(other, keys[0].hex)
    shutil.copytree(copied, tmp_path / "kept")
    for taken in (("unet",), ("unet", pipeline.FILE), (pipeline.FILE,), (signature.FILE,), ("unet", signature.FILE)):
        shutil.rmtree(copied)
        shutil.copytree(tmp_path / "kept", copied)
        for name in taken:
            if (other / name).is_dir():
                shutil.rmtree(copied / name)
                shutil.copytree(other / name, copied / name)
            else:
                shutil.copy(other / name, copied / name)
        with pytest.raises(UserError, match=r"is not the file that was signed"):
            opened(copied, keys[0].hex)
    signed(Path(shutil.copytree(other / "unet", tmp_path / "alone.mpq")), keys[0])
    shutil.copy(tmp_path / "alone.mpq" / signature.FILE, tmp_path / "kept" / "unet")
    with pytest.raises(UserError, match=r"unet/signature\.txt, which was not signed"):
        opened(tmp_path / "kept", keys[0].hex)


PLANTED: dict[str, tuple[Callable[[Path], object], str]] = {
    "a file more": (lambda folder: (folder / "more.txt").write_text("x"), r"holds more\.txt, which was not signed"),
    "a file more in a part": (
        lambda folder: (folder / "vae" / "more.txt").write_text("x"), r"holds vae/more\.txt, which was not signed"
    ),
    "another tokenizer": (lambda folder: (folder / "tokenizer.json").write_text("{}"), "tokenizer.json"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), r"has no tokenizer\.json, which was signed"),
    "no part": (lambda folder: shutil.rmtree(folder / "vae"), "which was signed"),
    "no signature": (lambda folder: (folder / signature.FILE).unlink(), "is not signed"),
    "kernels of another part": (
        lambda folder: shutil.copy(folder / "vae" / bundle.KERNELS, folder / "unet"), r"kernels\.so"
    ),
}  # fmt: skip


@pytest.mark.parametrize("plant", PLANTED)
def test_a_pipeline_that_was_altered(copied: Path, keys: tuple[Pair, Pair], plant: str) -> None:
    change, said = PLANTED[plant]
    change(copied)
    with pytest.raises(UserError, match=said):
        opened(copied, keys[0].hex)


def test_parts_are_held_against_what_was_read(copied: Path, tmp_path: Path, keys: tuple[Pair, Pair]) -> None:
    """Whoever exchanges parts and signature behind an opened pipeline changes nothing of what it takes."""
    pipe = load_pipeline(copied, 1, key=keys[0].hex)
    other = another(copied, tmp_path / "other.mpq", keys[0])
    shutil.rmtree(copied)
    other.rename(copied)
    with pytest.raises(UserError, match=r"unet/manifest\.json is not the file that was signed"):
        pipe.part("unet")
    pipe.part("vae")


def test_a_pipeline_with_something_else_in_it_is_not_signed(copied: Path, keys: tuple[Pair, Pair]) -> None:
    (copied / "notes.txt").write_text("x")
    with pytest.raises(UserError, match=r"holds notes\.txt, which does not belong to it"):
        signed(copied, keys[0])
