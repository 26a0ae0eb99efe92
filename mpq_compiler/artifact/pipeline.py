"""A pipeline on disk: a folder with an artifact for each part, the tokenizers, and `pipeline.json`, which joins them.

Every part is an artifact like any other (`bundle`). docs/pipelines.md describes the folder, schemas/pipeline.json the
document.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NotRequired, TypedDict, cast

from mpq_compiler import schemas
from mpq_compiler.artifact import bundle, documents, signature
from mpq_compiler.artifact.manifest import File, Manifest
from mpq_compiler.artifact.signature import Key, Signed
from mpq_compiler.sampling.call_tree import Tree
from mpq_compiler.sampling.glue import GlueData
from mpq_compiler.sampling.prompt_tokens import TokensData
from mpq_compiler.support.errors import UserError, nearest
from mpq_compiler.support.files import beside, put, sha256, sync

FORMAT, FORMAT_VERSION = bundle.PIPELINE_FORMAT, 1
FILE = bundle.PIPELINE
OWN = "pipeline_sha256"
"""The entry with the hash of all others."""
TEXT, DENOISER, DECODER, ENCODER = "text", "denoiser", "decoder", "encoder"
"""The roles of parts; an encoder is that of images, for pictures that are drawn from one."""


class Part(TypedDict):
    """A part: an artifact in a folder of its name."""

    role: str
    artifact_sha256: NotRequired[str]


class TokensEntry(TokensData):
    """How tokens are made of a prompt, and the file of their tokenizer."""

    file: str


class Share(TypedDict):
    """What a part got of one budget, and why."""

    bytes: int
    gain: float
    """The noise of pictures, mean squared error at values from 0 to 1, by the relative noise of the part's output."""
    loss: float
    """The noise of pictures that the plan expects of the part."""
    worth: float
    """What the next kilobyte would take of that noise; where the budget is well spent, the same in every part."""
    least_bytes: int
    """What it takes at least."""
    equal_bytes: int
    """What it would have got at equal bits."""
    equal_loss: float
    """The noise of pictures that would have been expected then; at the least bytes where equal bits are too few."""


class EncoderEntry(TypedDict):
    """A text encoder: its part, the glue that makes its arguments, and the sources that its results are.

    ``returned`` is the tree of what the model itself returns (`sampling.call_tree`), ``fields`` its names in order, and
    ``dimensions`` the number of dimensions of its tensors, by path.
    """

    part: str
    inputs: GlueData
    outputs: list[str]
    returned: Tree
    fields: list[str]
    dimensions: dict[str, int]


class DecoderEntry(TypedDict):
    """The decoder: its part, the glue from latents to what it takes, and from what it gives to images."""

    part: str
    latents: GlueData
    images: GlueData


class Description(TypedDict):
    """What a pipeline does with its parts (schemas/pipeline.json)."""

    name: str
    parts: dict[str, Part]
    tokens: list[TokensEntry]
    encoders: list[EncoderEntry]
    conditions: GlueData
    constants: GlueData
    decoder: DecoderEntry
    guidance: float | None
    null: str | None
    steps: int
    shares: NotRequired[dict[str, Share]]


class Document(Description):
    """The document of a pipeline on disk."""

    format: str
    format_version: int
    files: dict[str, File]
    pipeline_sha256: str


def check_output(path: str | os.PathLike[str], overwrite: bool) -> None:
    """Raises a UserError where a pipeline could not be written to `path`; call it before long work starts."""
    if Path(path).suffix == ".zip":
        raise UserError(f"{path}: a pipeline is a folder, which its parts are read from one by one; leave .zip out")
    bundle.check_output(path, overwrite)


def write(
    path: str | os.PathLike[str],
    fill: Callable[[Path], tuple[Description, Mapping[str, bytes]]],
    overwrite: bool = False,
) -> Document:
    """Writes a pipeline whole or not at all, and returns its document; equal content gives equal bytes.

    Args:
        path: a folder.
        fill: writes the artifacts of the parts into the folder that it is called with; returns the document but for the
            format, ``files`` and the hashes, and the content of the files beside the parts, by name.
        overwrite: whether a pipeline at `path` may be replaced.

    Raises:
        UserError: what `check_output` refuses, and whatever the file system refuses.
    """
    path = Path(path)
    check_output(path, overwrite)
    with beside(path) as scratch:
        folder = scratch / path.name
        folder.mkdir()
        described, files = fill(folder)
        for name, content in files.items():
            bundle.fill(folder / name, content)
        hashes = {name: bundle.read_manifest(folder / name)["artifact_sha256"] for name in described["parts"]}
        document = described | {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "files": {n: {"bytes": len(content), "sha256": sha256(folder / n)} for n, content in files.items()},
            "parts": {n: {**part, "artifact_sha256": hashes[n]} for n, part in described["parts"].items()},
        }
        document["pipeline_sha256"] = bundle.digest(document, OWN)
        if problem := schemas.check(json.loads(bundle.canonical(document)), "pipeline"):
            raise ValueError(f"the pipeline's document does not obey its schema: {problem}")
        with (folder / FILE).open("wb") as stream:
            stream.write(bundle.canonical(document))
            sync(stream)
        put(folder, path, scratch)
    return cast(Document, document)


def digests(hashes: Mapping[str, str]) -> bytes:
    """The SHA-256 of the parts' artifacts in the order of their names, which a file of tokens is for."""
    return b"".join(bytes.fromhex(hashes[name]) for name in sorted(hashes))


def is_pipeline(path: str | os.PathLike[str]) -> bool:
    """Whether a folder is a pipeline, sound or not."""
    return (Path(path) / FILE).is_file()


@dataclass(frozen=True)
class Pipeline:
    """A verified pipeline; its parts are verified when they are loaded."""

    path: Path
    document: Document
    signed: Signed | None = None
    """What the owner of the key signed that it was read with; None without a key."""

    @property
    def is_signed(self) -> bool:
        """Whether there is a signature, right or wrong."""
        return (self.path / signature.FILE).is_file()

    def signed_part(self, name: str) -> Signed | None:
        """What of a part was signed; None without a key."""
        return self.signed and self.signed.part(name)

    def manifest(self, name: str) -> Manifest:
        """The manifest of a part. UserError: there is none of that name, or it is not sound."""
        return bundle.read_manifest(self.part(name), self.signed_part(name))

    @property
    def hashes(self) -> dict[str, str]:
        """The SHA-256 of the artifact of each part that draws a prompt."""
        drawing = {name: part for name, part in self.document["parts"].items() if part["role"] != ENCODER}
        return {name: part.get("artifact_sha256", "") for name, part in drawing.items()}

    def part(self, name: str) -> Path:
        """The folder of a part. UserError: it has none of that name."""
        if name not in self.document["parts"]:
            raise UserError(f"{self.path} has no part '{name}': {nearest(name, self.document['parts'])}")
        return self.path / name

    def of_role(self, role: str) -> list[str]:
        """The names of the parts of a role, in order."""
        return [name for name, part in self.document["parts"].items() if part["role"] == role]

    def text(self, name: str) -> str:
        """The content of one of its files. UserError: it is not what was signed."""
        content = (self.path / name).read_bytes()
        if self.signed is not None:
            self.signed.require(name, content)
        return content.decode()

    def require_part(self, name: str, digest: str) -> None:
        """Raises a UserError where the artifact that was found, by its SHA-256, is not that of the part."""
        if digest != self.document["parts"][name].get("artifact_sha256"):
            raise UserError(f"{self.path / name} is another artifact than the pipeline was made with: compile it again")


def present(path: Path) -> set[str]:
    """The names of all files of a pipeline but its signature, those of its parts behind the part's."""
    folders = {entry.name: entry for entry in path.iterdir() if entry.is_dir()}
    files = {entry.name for entry in path.iterdir()} - folders.keys() - {signature.FILE}
    return files | {f"{name}/{entry.name}" for name, folder in folders.items() for entry in folder.iterdir()}


def read(path: str | os.PathLike[str], key: Key | None = None) -> Pipeline:
    """Opens and verifies a pipeline: the document and the hash of each file beside its parts.

    Args:
        path: the folder.
        key: the public key of its owner, who has to have signed every byte: in hexadecimal, or a file with it.

    Raises:
        UserError: no pipeline, made by another version, altered, or a file or part missing; with a key, no signature,
            or not one of its owner over these bytes.
    """
    path = Path(path)
    if not is_pipeline(path):
        raise UserError(f"{path} is no pipeline: it has no {FILE}")
    signed = None if key is None else signature.read(path, path, key)
    try:
        if signed is not None:
            signed.require_names(present(path))
        with (path / FILE).open("rb") as stream:
            text = documents.read(stream)
        if signed is not None:
            signed.require(FILE, text)
        document = documents.parse(text)
        if (version := document.get("format_version")) != FORMAT_VERSION:
            raise UserError(
                f"{path} is of format version {version}, and this one reads {FORMAT_VERSION}: compile it again"
            )
        bundle.require_whole(document, text, "pipeline", OWN)
    except OSError as error:
        raise UserError(f"{path} is damaged: its {FILE} cannot be read ({error}); copy or compile it again") from error
    except documents.Unsound as wrong:
        raise UserError(f"{path} is damaged: its {FILE} {wrong}; copy or compile it again") from wrong
    for name, entry in document["files"].items():
        file = path / name
        if Path(name).name != name or not file.is_file() or sha256(file) != entry["sha256"]:
            raise UserError(f"{path} is damaged: {name} is missing or was altered; copy or compile it again")
        if signed is not None:
            signed.require(name, file)
    for name in document["parts"]:
        if Path(name).name != name or not (path / name / bundle.MANIFEST).is_file():
            raise UserError(f"{path} is damaged: its part {name} is missing; copy or compile it again")
    return Pipeline(path, cast(Document, document), signed)
