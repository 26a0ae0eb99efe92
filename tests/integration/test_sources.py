"""Models from the hub, compiled."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import mpq_compiler
from tests.harness import tiny
from tests.harness.hub import COMMIT, cache, files_of

REPOSITORY = "somebody/some-model"


def test_an_artifact_says_which_commit_it_was_made_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    cache(tmp_path / "hub", REPOSITORY, files_of(tiny.save("unet2d", tmp_path)))
    made = tmp_path / "out.mpq"
    options = {"target": "reference", "recipe": "w8a8", "samples": 2, "steps": 2}
    report = mpq_compiler.compile(f"{REPOSITORY}@{COMMIT}", made, **options)
    manifest = json.loads((made / "manifest.json").read_text())
    source = {"repository": REPOSITORY, "commit": COMMIT, "file": "unet/diffusion_pytorch_model.safetensors"}
    assert manifest["name"] == "some-model" and manifest["model"]["source"] == source
    assert any(f"'{REPOSITORY}' at commit {COMMIT}" in note for note in report.notes)
