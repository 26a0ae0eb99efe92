"""Pipelines on disk: equal bytes, planted faults, and what is refused before work begins."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mpq_compiler import schemas
from mpq_compiler.artifact import bundle, pipeline
from mpq_compiler.runtime.pipeline import load_pipeline
from mpq_compiler.support.errors import UserError
from tests.harness import compiled_pipeline


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    return Path(shutil.copytree(compiled_pipeline.path(), tmp_path / "a.mpq"))


def test_what_is_written_is_read(copied: Path) -> None:
    found = pipeline.read(copied)
    assert schemas.check(found.document, "pipeline") is None
    assert found.of_role("denoiser") == ["unet"] and found.of_role("decoder") == ["vae"]
    assert {entry.name for entry in copied.iterdir()} == {
        pipeline.FILE, *found.document["parts"], *found.document["files"]
    }  # fmt: skip


def _edited(folder: Path, change: Callable[[dict], None], sign: bool) -> None:
    file = folder / pipeline.FILE
    document = json.loads(file.read_text())
    change(document)
    if sign:
        document[pipeline.OWN] = bundle.digest(document, pipeline.OWN)
    file.write_bytes(bundle.canonical(document))


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a document that was altered": (
        lambda folder: _edited(folder, lambda document: document.update(steps=7), sign=False), "was altered after"
    ),
    "a document that obeys no schema": (
        lambda folder: _edited(folder, lambda document: document.pop("tokens"), sign=True), "does not obey the schema"
    ),
    "a document of a later version": (
        lambda folder: _edited(folder, lambda document: document.update(format_version=9), sign=True), "version 9"
    ),
    "no JSON": (lambda folder: (folder / pipeline.FILE).write_text("{"), "is not JSON"),
    "another tokenizer": (
        lambda folder: (folder / "tokenizer.json").write_text("{}"), "tokenizer.json is missing or was altered"
    ),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    "no decoder": (lambda folder: shutil.rmtree(folder / "vae"), "its part vae is missing"),
    "no document": (lambda folder: (folder / pipeline.FILE).unlink(), "is no pipeline"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault: str, copied: Path) -> None:
    plant, said = FAULTS[fault]
    plant(copied)
    with pytest.raises(UserError, match=said):
        pipeline.read(copied)


def test_a_part_that_was_exchanged_or_altered_is_found(copied: Path) -> None:
    shutil.rmtree(copied / "vae")
    shutil.copytree(copied / "text_encoder", copied / "vae")
    with pytest.raises(UserError, match="another artifact than the pipeline was made with"):
        load_pipeline(copied).part("vae")
    with (copied / "unet" / bundle.WEIGHTS).open("r+b") as stream:
        stream.seek(-1, 2)
        stream.write(b"\x7f")
    with pytest.raises(UserError, match="was altered"):
        load_pipeline(copied).part("unet")


def test_what_is_in_the_way_is_refused(copied: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="exists; choose another name"):
        pipeline.check_output(copied, overwrite=False)
    pipeline.check_output(copied, overwrite=True)
    with pytest.raises(UserError, match=r"leave \.zip out"):
        pipeline.check_output(tmp_path / "a.zip", overwrite=False)


def test_nothing_is_left_of_a_pipeline_that_fails(tmp_path: Path) -> None:
    def fill(folder: Path) -> tuple[pipeline.Description, dict[str, bytes]]:
        (folder / "unet").mkdir()
        raise UserError("no")

    with pytest.raises(UserError, match="no"):
        pipeline.write(tmp_path / "a.mpq", fill)
    assert not [*tmp_path.iterdir()]
