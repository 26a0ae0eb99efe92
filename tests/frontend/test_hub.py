from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mpq_compiler.frontend import checkpoint, hub
from mpq_compiler.frontend.denoiser import load
from mpq_compiler.support.errors import UserError
from tests.harness import tiny
from tests.harness.hub import COMMIT, OTHER, cache, files_of, server
from tests.harness.tree import ROOT

STEM = "diffusion_pytorch_model"
REPOSITORY = "somebody/some-model"


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a pipeline's repository."""
    folder = tiny.save("unet2d", tmp_path_factory.mktemp("pipeline"))
    index = {"_class_name": "DDIMPipeline", "unet": ["diffusers", "UNet2DModel"]}
    return files_of(folder) | {"model_index.json": json.dumps(index).encode()}


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a sharded transformer's repository, with half precision beside."""
    folder = tmp_path_factory.mktemp("sharded")
    model = tiny.model("pixart")
    model.save_pretrained(folder / "transformer", max_shard_size="60KB")
    model.half().save_pretrained(folder / "transformer", variant="fp16")
    return files_of(folder)


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def refused(model: str, *parts: str) -> None:
    with pytest.raises(UserError) as caught:
        checkpoint.locate(model)
    message = str(caught.value)
    assert "\n" not in message and all(part in message for part in parts), message


def shard_names(files: dict[str, bytes]) -> list[str]:
    return sorted(name for name in files if "-of-" in name)


def test_names() -> None:
    assert hub.parse("owner/name") == hub.Name("owner/name")
    assert hub.parse(f"owner/na.me-2@{COMMIT}") == hub.Name("owner/na.me-2", COMMIT)
    assert hub.parse("owner/name@refs/pr/1") == hub.Name("owner/name", "refs/pr/1")
    for text in ("name", "./owner/name", "~/name", "a/b/c", "/a/b", "a/b@", "a/b@../../c", "a/b@/etc", "../b", "a/b c"):
        assert hub.parse(text) is None, text


def test_a_cached_repository_is_read_without_a_network(offline: Path, pipeline: dict[str, bytes]) -> None:
    cache(offline, REPOSITORY, pipeline)
    place = checkpoint.locate(REPOSITORY)
    assert place.name == "some-model" and place.scheduler is not None
    assert place.source == {"repository": REPOSITORY, "commit": COMMIT, "file": f"unet/{STEM}.safetensors"}
    model = load(REPOSITORY)
    assert model.source == place.source
    assert any(COMMIT in note and f"'{REPOSITORY}'" in note for note in model.notes)


def test_the_environment_says_where_the_cache_is_and_that_there_is_no_network(
    tmp_path: Path, pipeline: dict[str, bytes]
) -> None:
    cache(tmp_path, REPOSITORY, pipeline)
    code = f"from mpq_compiler.frontend.checkpoint import locate; print(locate({REPOSITORY!r}).source['commit'])"
    found = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.split() == [COMMIT]


def test_a_commit_a_tag_and_a_branch_are_told_apart(
    offline: Path, pipeline: dict[str, bytes], sharded: dict[str, bytes]
) -> None:
    cache(offline, REPOSITORY, pipeline, COMMIT, ("main", "v1.0"))
    cache(offline, REPOSITORY, sharded, OTHER, ("refs/pr/1",))
    for revision, commit in ((COMMIT, COMMIT), (OTHER, OTHER), ("v1.0", COMMIT), ("refs/pr/1", OTHER)):
        source = checkpoint.locate(f"{REPOSITORY}@{revision}").source
        assert source is not None and source["commit"] == commit
    refused(f"{REPOSITORY}@v2", "'somebody/some-model@v2' is not cached", "HF_HUB_OFFLINE", f"@{COMMIT}'")


def test_what_was_cached_alone_is_enough(offline: Path, pipeline: dict[str, bytes], sharded: dict[str, bytes]) -> None:
    """A pipeline's other parts, its index, and files of another precision are not needed."""
    weights = ("unet/config.json", f"unet/{STEM}.safetensors")
    cache(offline, REPOSITORY, {name: pipeline[name] for name in weights})
    assert checkpoint.locate(REPOSITORY).scheduler is None
    cache(offline, "a/b", {name: data for name, data in sharded.items() if "fp16" not in name})
    assert len(checkpoint.weight_files(checkpoint.locate("a/b").denoiser)) == len(shard_names(sharded)) > 4
    cache(offline, "a/c", {n: d for n, d in sharded.items() if "fp16" in n or n == "transformer/config.json"})
    assert (checkpoint.locate("a/c").source or {})["file"] == f"transformer/{STEM}.fp16.safetensors"


def test_a_denoisers_own_repository_has_its_scheduler_beside(offline: Path, pipeline: dict[str, bytes]) -> None:
    cache(offline, REPOSITORY, {name.removeprefix("unet/"): data for name, data in pipeline.items()})
    place = checkpoint.locate(REPOSITORY)
    assert place.scheduler == place.denoiser / "scheduler" / "scheduler_config.json"


def test_missing_files_of_a_cached_repository_are_named(
    offline: Path, pipeline: dict[str, bytes], sharded: dict[str, bytes]
) -> None:
    names = shard_names(sharded)
    full = {name: data for name, data in sharded.items() if "fp16" not in name}
    cache(offline, REPOSITORY, {name: data for name, data in full.items() if name != names[1]})
    refused(REPOSITORY, "cached in part", f"without '{names[1]}' of commit {COMMIT}", "HF_HUB_OFFLINE")
    cache(offline, "a/b", {name: data for name, data in full.items() if name not in names})
    refused("a/b", f"'{names[0]}', '{names[1]}', '{names[2]}' and {len(names) - 3} more")
    cache(offline, "a/c", {"unet/config.json": pipeline["unet/config.json"]})
    refused("a/c", f"without 'unet/{STEM}.safetensors'")
    cache(offline, "a/e", {name: data for name, data in full.items() if not name.endswith(".index.json")})
    refused("a/e", f"without 'transformer/{STEM}.safetensors.index.json'")
    cache(offline, "a/d", {"model_index.json": pipeline["model_index.json"]})
    refused("a/d", "without 'config.json', 'unet/config.json', 'transformer/config.json'")


def test_a_download_that_was_cut_off_is_no_file(offline: Path, pipeline: dict[str, bytes]) -> None:
    link = cache(offline, REPOSITORY, pipeline) / "unet" / f"{STEM}.safetensors"
    blob = link.resolve()
    blob.rename(blob.with_name(blob.name + ".incomplete"))
    refused(REPOSITORY, "cached in part", f"'unet/{STEM}.safetensors'")


def test_what_is_not_cached_at_all(offline: Path) -> None:
    refused(REPOSITORY, "there is no folder 'somebody/some-model'", "HF_HUB_OFFLINE", "network")


LOCATE = """
import sys
from mpq_compiler.frontend.checkpoint import locate
from mpq_compiler.support.errors import UserError
for model in sys.argv[1:]:
    try:
        print(*(locate(model).source or {}).values())
    except UserError as error:
        print(error)
"""


def located(endpoint: str, folder: Path, *models: str) -> list[str]:
    """What a process that asks `endpoint` makes of each model: its source, or the error."""
    found = subprocess.run(
        [sys.executable, "-c", LOCATE, *models],
        env=os.environ | {"HF_HUB_CACHE": str(folder), "HF_ENDPOINT": endpoint, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    return found.stdout.splitlines()


def test_only_what_is_missing_and_needed_is_asked_for(tmp_path: Path, sharded: dict[str, bytes]) -> None:
    names = shard_names(sharded)
    other = {"text_encoder/model.safetensors": b"x", "transformer/code.py": b"", "README.md": b""}
    with server(REPOSITORY, sharded | other, {"main": COMMIT, "v1.0": COMMIT}) as (endpoint, given):
        cache(tmp_path, REPOSITORY, {name: sharded[name] for name in names[1:]}, refs=())
        asked = (f"{REPOSITORY}@v1.0", REPOSITORY, f"{REPOSITORY}@{COMMIT}", f"{REPOSITORY}@v2")
        lines = located(endpoint, tmp_path, *asked)
    assert lines[:3] == [f"{REPOSITORY} {COMMIT} {names[0]}"] * 3
    assert "has no commit, tag or branch 'v2'" in lines[3]
    json_files = {name for name in sharded if name.endswith(".json")}
    assert set(given) == {names[0], *json_files}


def test_weights_of_a_model_that_is_refused_are_not_asked_for(tmp_path: Path, pipeline: dict[str, bytes]) -> None:
    config = json.loads(pipeline["unet/config.json"]) | {"auto_map": {"AutoModel": "unet.OwnUNet"}}
    files = pipeline | {"unet/config.json": json.dumps(config).encode(), "unet/unet.py": b"raise SystemExit"}
    with server(REPOSITORY, files, {"main": COMMIT}) as (endpoint, given):
        (line,) = located(endpoint, tmp_path, REPOSITORY)
    assert "auto_map" in line and "code of a repository is never executed" in line
    assert given and all(name.endswith(".json") for name in given)


def test_half_precision_is_taken_where_a_repository_has_no_other(tmp_path: Path, sharded: dict[str, bytes]) -> None:
    half = {name: data for name, data in sharded.items() if "fp16" in name or name == "transformer/config.json"}
    with server(REPOSITORY, half, {"main": COMMIT}) as (endpoint, _):
        assert located(endpoint, tmp_path, REPOSITORY) == [
            f"{REPOSITORY} {COMMIT} transformer/{STEM}.fp16.safetensors"
        ]


def test_a_hub_that_does_not_answer_or_lacks_files(tmp_path: Path, sharded: dict[str, bytes]) -> None:
    names = shard_names(sharded)
    torn = {name: data for name, data in sharded.items() if name != names[1] and "fp16" not in name}
    with server(REPOSITORY, torn, {"main": COMMIT}) as (endpoint, _):
        (line,) = located(endpoint, tmp_path, REPOSITORY)
        assert f"without '{names[1]}' of commit {COMMIT}" in line and "the hub does not have it" in line
    shutil.rmtree(tmp_path / "models--somebody--some-model" / "trees", ignore_errors=True)
    partly, absent = located(endpoint, tmp_path, REPOSITORY, "some/other")
    assert f"without '{names[1]}' of commit {COMMIT}" in partly and "hub" in partly
    assert "no folder 'some/other'" in absent and "the hub could not be asked" in absent
