"""The entry point `mpq_compiler.export`: an artifact's weights in the container of another project."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from mpq_compiler.artifact import bundle
from mpq_compiler.artifact.signature import Trust
from mpq_compiler.frontend import checkpoint
from mpq_compiler.interchange import FORMATS, comfy, names, original, sdnq
from mpq_compiler.interchange.container import Layer, Written
from mpq_compiler.support.errors import UserError
from mpq_compiler.support.files import beside, check_place, put


@dataclass(frozen=True)
class Export:
    """What was written."""

    path: Path
    format: str
    layers: list[Written]
    notes: list[str]
    """Sentences on what is lacking of the artifact."""

    @property
    def bytes(self) -> int:
        """The size of the file, or of the files of the folder."""
        return sum(file.stat().st_size for file in (self.path.iterdir() if self.path.is_dir() else [self.path]))

    def to_json(self) -> dict[str, object]:
        """The export as schemas/export.json describes it."""
        rows = [
            {
                "name": w.layer.name,
                "weight": w.layer.format or "float",
                "type": w.type,
                "sqnr_db": None if math.isinf(w.sqnr_db) else round(w.sqnr_db, 2),
                "bytes": w.bytes,
                "artifact_bytes": w.layer.bytes,
            }
            for w in self.layers
        ]
        return {"path": str(self.path), "format": self.format, "bytes": self.bytes, "layers": rows, "notes": self.notes}


def export(
    artifact: str | Path,
    output: str | Path,
    model: str | Path,
    format: str = "gguf",
    *,
    overwrite: bool = False,
    key: Trust | None = None,
) -> Export:
    """Writes the weights of an artifact to what another project loads as those of its float model.

    Args:
        artifact: a folder or zip.
        output: the new file; of ``sdnq`` the new folder.
        model: the model that was compiled: a folder, a bundled name, a hub id.
        format: one of `FORMATS`.
        overwrite: whether a file, or the folder of another such export, may be replaced.
        key: the owner's public key, which the artifact has to be signed with.

    Raises:
        UserError: there is no such format; the artifact was made of another model; the output cannot be written.
    """
    if format not in FORMATS:
        raise UserError(f"there is no format '{format}'; formats are {', '.join(FORMATS)}")
    path = Path(output)
    check_place(path)
    replaceable = sdnq.is_folder(path) if format == "sdnq" else path.is_file()
    if path.exists() and not (overwrite and replaceable):
        raise UserError(f"'{path}' exists; choose another name" + (" or overwrite it" if replaceable else ""))
    found = bundle.read(artifact, key)
    place = checkpoint.locate(model)
    weights = {name: value.float() for name, value in checkpoint.read_weights(place.denoiser).items()}
    config = checkpoint.read_json(place.denoiser / "config.json")
    layers = _layers(found, config, weights)
    notes = ["activations of the artifact's plan are not exported: the other project has its own"]
    class_ = str(config.get("_class_name"))
    called = None if format == "sdnq" else names.original(class_, config, weights)
    if called is None and format == "comfy":
        raise UserError(
            f"ComfyUI loads original checkpoints' names, and those of a {class_} are not known here: export to gguf or "
            "sdnq"
        )
    if called is None and format == "gguf":
        notes.append(f"tensors have the names of diffusers' {class_}: those of its original are not known here")
    layers = {called[name] if called else name: layer for name, layer in layers.items()}
    with beside(path) as scratch:
        made = scratch / "made"
        if format == "sdnq":
            rows = sdnq.write(made, layers, config)
        elif format == "comfy":
            rows = comfy.write(made, layers)
        else:
            from mpq_compiler.interchange import gguf  # of an extra

            rows = gguf.write(made, layers, _architecture(called is not None, config))
        put(made, path, scratch)
    return Export(path, format, rows, notes)


def _architecture(known: bool, config: Mapping[str, object]) -> str:
    """The word of ComfyUI-GGUF for a UNet's family; that of nobody for others."""
    if not known:
        return "diffusers"
    return "sdxl" if config.get("addition_embed_type") == "text_time" else "sd1"


def _layers(
    artifact: bundle.Artifact, config: Mapping[str, object], weights: Mapping[str, torch.Tensor]
) -> dict[str, Layer]:
    """The parameters of the model, with the artifact's values where it has some."""
    class_, own = artifact.manifest["model"]["class"], str(config.get("_class_name"))
    if class_ != own:
        raise original.of_another(artifact, f"a {class_}, not a {own}")
    read = original.read(artifact, weights)
    error = sum(float((known.value - weights[name]).square().sum()) for name, known in read.items())
    if not read or error > sum(float(weights[name].square().sum()) for name in read):
        raise original.of_another(artifact, "its weights are not the model's")
    layers = {}
    for name, weight in weights.items():
        known = read.get(name, original.Original(weight))
        value = known.value.contiguous().numpy()
        layers[name] = Layer(name, value, known.format, known.bits, known.grid, known.bytes)
    return layers
