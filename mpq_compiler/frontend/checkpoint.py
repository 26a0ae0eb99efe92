"""Diffusers checkpoints: finds and reads a denoiser's configuration, weights and scheduler.

Only safetensors are read. Pickled checkpoints (.bin, .pt, .ckpt) can run code when they are opened, and are refused.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpq_compiler.frontend import custom_code, hub
from mpq_compiler.support.errors import UserError, named, nearest
from mpq_compiler.support.files import decode_json

if TYPE_CHECKING:  # finding models needs no torch; only their weights do
    import torch

    from mpq_compiler.frontend.stored_weights import Headers

MODELS = Path(__file__).parents[1] / "models"
_STEM = "diffusion_pytorch_model"
_SHARD = re.compile(r"-\d+-of-\d+\.safetensors$")
DENOISERS = ("unet", "transformer")
"""The parts of a pipeline that may be its denoiser: its folders, and its attributes."""
_SMALL = ["config.json", "model_index.json", f"{_STEM}*.json", "scheduler/*.json", "harness.json"]
_SMALL += [f"{part}/*.json" for part in DENOISERS]
"""The files of a repository that say which weights it takes, and how it is sampled."""


@dataclass(frozen=True)
class Location:
    """Where a model's parts lie on disk."""

    name: str
    denoiser: Path
    """The folder with config.json and the weights."""
    scheduler: Path | None
    """The file scheduler_config.json."""
    harness: Path | None
    """The file harness.json of this package: codec, number of text tokens, null class, class names."""
    source: Mapping[str, str] | None = None
    """The ``repository`` of the hub, the ``commit`` that was taken, and the ``file`` of the weights; else None."""


def bundled() -> dict[str, Path]:
    """The models that ship with the package, by name."""
    return {path.parent.name: path.parent for path in sorted(MODELS.glob("*/harness.json"))}


def bundled_pipelines() -> dict[str, Path]:
    """The pipelines from prompt to picture that ship with the package, by name."""
    return {path.parent.name: path.parent for path in sorted(MODELS.glob("*/model_index.json"))}


def place_of(model: str | Path) -> Path:
    """The folder of a bundled name, else the path itself."""
    return (bundled() | bundled_pipelines()).get(str(model), Path(model)) if isinstance(model, str) else model


def locate(model: str | Path) -> Location:
    """Finds a model on disk: a bundled name, a denoiser's or a pipeline's folder, or a hub id, alone or with a commit.

    Raises:
        UserError: there is no such model, or the folder has no denoiser.
    """
    path = place_of(model)
    if not path.exists():
        return _from_hub(str(model))
    if path.is_file():
        raise UserError(f"'{path}' is a file; name the folder that holds config.json and the safetensors")
    return _within(path, path.name, path if (path / "harness.json").exists() else path.parent)


def _within(path: Path, name: str, beside: Path) -> Location:
    """The denoiser in the folder `path`, or in its part for one.

    Args:
        path: the folder.
        name: the model's.
        beside: where the scheduler lies if the denoiser is `path` itself.

    Raises:
        UserError: there is none.
    """
    denoiser = _denoiser(path)
    if denoiser is None:
        raise UserError(
            f"'{path}' has no config.json, nor unet/config.json or transformer/config.json; name the folder "
            "of a diffusers denoiser or pipeline"
        )
    root = beside if denoiser == path else path
    scheduler, harness = root / "scheduler" / "scheduler_config.json", root / "harness.json"
    return Location(
        name, denoiser, scheduler if scheduler.is_file() else None, harness if harness.is_file() else None
    )


def _denoiser(path: Path) -> Path | None:
    """The folder of the denoiser: `path` itself or a pipeline's part; None: neither has a config.json."""
    folders = (path, *(path / part for part in DENOISERS))
    return next((folder for folder in folders if (folder / "config.json").is_file()), None)


def _from_hub(model: str) -> Location:
    """The denoiser in the local copy of the hub's repository `owner/name`, downloaded where it is not cached."""
    known = bundled() | bundled_pipelines()
    missing = UserError(f"there is no folder and no bundled model '{model}'; {nearest(model, known)}")
    if (name := hub.parse(model)) is None:
        raise missing
    try:
        found = hub.snapshot(name, _SMALL, _lacking)
    except ImportError:
        raise missing from None
    place = _within(found.folder, name.repository.partition("/")[2], found.folder)
    weights = weight_files(place.denoiser)[0].relative_to(found.folder).as_posix()
    return replace(place, source={"repository": found.repository, "commit": found.commit, "file": weights})


def _lacking(folder: Path, tried: Collection[str]) -> list[str]:
    """The files that a snapshot lacks of what a denoiser is read from, as far as those that it has tell.

    Args:
        folder: of the snapshot.
        tried: files that the hub was asked for.
    """
    denoiser = _denoiser(folder)
    if denoiser is None:
        return [f"{prefix}config.json" for prefix in ("", *(f"{part}/" for part in DENOISERS))]
    # before much is downloaded; what diffusers does not have is found by whoever builds the module
    custom_code.require_none(read_json(denoiser / "config.json"), denoiser, {}, lambda name: True)
    part = "" if denoiser == folder else f"{denoiser.name}/"
    if (index := _index(denoiser)) is not None:
        return [part + name for name in index.files if not (denoiser / name).is_file()]
    there = [path for path in denoiser.glob("*.safetensors") if path.is_file()]  # no links to what was not downloaded
    if any(_SHARD.search(path.name) for path in there):
        return [f"{part}{_STEM}.safetensors.index.json"]
    if there:
        return []
    # there are repositories with half precision alone, whose files have other names
    full = f"{part}{_STEM}.safetensors"
    return [f"{part}*.safetensors"] if full in tried else [full]


def read_json(path: Path) -> dict[str, Any]:
    """Reads the JSON object in `path`. UserError: there is none."""
    try:
        value = decode_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read '{path}': {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"'{path}' is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"'{path}' must hold a JSON object, and holds a {type(value).__name__}")
    return value


@dataclass(frozen=True)
class _Index:
    """The index of a sharded checkpoint."""

    path: Path
    places: Mapping[str, str]
    """The file of each tensor."""

    @property
    def files(self) -> list[str]:
        return sorted(set(self.places.values()))


def _index(folder: Path) -> _Index | None:
    """The index of the shards in a denoiser's folder; None: its weights are one file. UserError: it is none."""
    if (folder / f"{_STEM}.safetensors").is_file():
        return None
    found = sorted(folder.glob(f"{_STEM}*.safetensors.index*.json"), key=lambda path: (len(path.name), path.name))
    if not found:
        return None
    places = read_json(found[0]).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(shard, str) for shard in places.values()):
        raise UserError(f"'{found[0]}' has no weight_map from tensors to files")
    index = _Index(found[0], places)
    for name in index.files:
        if Path(name).name != name or name in ("", ".", ".."):
            raise UserError(f"'{found[0]}' names the file '{name}', which is not in that folder")
    return index


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a denoiser's folder, one or its shards; full precision goes before a variant (fp16)."""
    if (index := _index(folder)) is not None:
        if absent := [name for name in index.files if not (folder / name).is_file()]:
            file = "the file" if len(absent) == 1 else f"{len(absent)} files,"
            raise UserError(
                f"'{index.path}' names {file} {named(absent)}, which {'is' if len(absent) == 1 else 'are'} not in that "
                "folder; get what is missing"
            )
        return [folder / name for name in index.files]
    single = [folder / f"{_STEM}.safetensors", *sorted(folder.glob(f"{_STEM}.*.safetensors"))]
    single += sorted(folder.glob("*.safetensors"))
    if found := [path for path in single if path.is_file()]:
        if _SHARD.search(found[0].name):
            raise UserError(
                f"'{folder}' has the shard '{found[0].name}' and no index of shards; get {_STEM}.safetensors.index.json"
            )
        return found[:1]
    if pickles := sorted(
        path.name for pattern in ("*.bin", "*.pt", "*.ckpt") for path in folder.glob(pattern)
    ):
        raise UserError(
            f"'{folder}' has its weights in {pickles[0]}, which could run code when opened; "
            "convert it to safetensors"
        )
    raise UserError(f"'{folder}' has a config.json but no weights; it needs {_STEM}.safetensors")


def headers(folder: Path) -> Headers:
    """Reads and checks what the files of a denoiser's folder say of its weights, and no weights.

    UserError: as `stored_weights.headers`.
    """
    from mpq_compiler.frontend import fp8, stored_weights

    index = _index(folder)
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    quantized = config.get("quantization_config")
    block = quantized.get("weight_block_size") if isinstance(quantized, dict) else None
    pair = isinstance(block, list) and len(block) == 2 and all(isinstance(n, int) and n > 0 for n in block)
    edges = (int(block[0]), int(block[1])) if pair and block else fp8.BLOCK
    return stored_weights.headers(weight_files(folder), index.places if index else None, edges)


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Maps all weights of a denoiser's folder in the types that they are stored in (`stored_weights.read`).

    Raises:
        UserError: a file is damaged, or files contradict each other.
    """
    from mpq_compiler.frontend import stored_weights

    return stored_weights.read(headers(folder))
