"""The compiled pipeline: from a prompt to pictures without torch.

>>> pipe = mpq_compiler.load_pipeline("out.mpq")
>>> pipe("a lighthouse", seed=1).images[0].save("lighthouse.png")
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mpq_compiler.artifact import pipeline as pipelines
from mpq_compiler.artifact.pipeline import DECODER, DENOISER, ENCODER, Pipeline
from mpq_compiler.artifact.signature import Key
from mpq_compiler.runtime import compiled_denoiser
from mpq_compiler.runtime.compiled_denoiser import CompiledDenoiser
from mpq_compiler.runtime.drop_ins import CompiledDecoder, CompiledEncoder
from mpq_compiler.sampling import inverse, loop
from mpq_compiler.sampling.conditioning import NULL, Conditioning
from mpq_compiler.sampling.convention import Convention
from mpq_compiler.sampling.glue import Glue
from mpq_compiler.sampling.inverse import Inverse, InverseOfPixels
from mpq_compiler.sampling.prompt_tokens import Tokens
from mpq_compiler.sampling.schedulers import Scheduler, exchanged
from mpq_compiler.support.errors import Notice, UserError

if TYPE_CHECKING:
    from PIL.Image import Image

Array = np.ndarray
TOGETHER = 4
"""The most samples in a call of the denoiser."""
STRENGTH = 0.8
"""How much of a picture is drawn anew where nothing is said, as in diffusers."""


@dataclass(frozen=True)
class Pictures:
    """What a pipeline drew."""

    images: list[Image]
    """Pictures of Pillow, as diffusers' pipelines give them."""
    pixels: Array = field(repr=False)
    """Pixels before they are rounded to bytes: f32 [N, H, W, channels] from 0 to 1."""


@dataclass(frozen=True)
class _Encoder:
    """A text encoder of the pipeline."""

    part: str
    inputs: Glue
    outputs: tuple[str, ...]


class CompiledPipeline:
    """A compiled pipeline: call it with a prompt.

    Its parts are loaded when they are first needed, and stay loaded; with ``sequential`` one follows the other, so that
    memory holds the largest alone. Calls from several threads must not overlap.
    """

    def __init__(
        self,
        made: Pipeline,
        threads: int | None = None,
        sequential: bool = False,
        load: Callable[[Path], CompiledDenoiser] | None = None,
    ) -> None:
        self.path, self.document = made.path, made.document
        self.sequential = sequential
        self._made = made
        self._load = load or (lambda path: compiled_denoiser.load(path, threads, key=made.signed_part(path.name)))
        self._loaded: dict[str, CompiledDenoiser] = {}
        about = self.document
        self.tokens = [Tokens.from_json(each, made.text(each["file"])) for each in about["tokens"]]
        self._encoders = [
            _Encoder(each["part"], Glue.from_json(each["inputs"]), tuple(each["outputs"])) for each in about["encoders"]
        ]
        self._conditions, self._constants = Glue.from_json(about["conditions"]), Glue.from_json(about["constants"])
        decoder = about["decoder"]
        self._decoded, self._images = Glue.from_json(decoder["latents"]), Glue.from_json(decoder["images"])

    def __repr__(self) -> str:
        return f"CompiledPipeline({self.document['name']}: {', '.join(self.document['parts'])})"

    def drop_in(self, name: str) -> CompiledDenoiser | CompiledEncoder | CompiledDecoder:
        """A part as it stands in for its module in diffusers' pipeline; a decoder with its encoder of images, if any.

        UserError: as `part`, and for that encoder alone.
        """
        part, role = self.part(name), self.document["parts"][name]["role"]
        if role == ENCODER:
            raise UserError(f"'{name}' stands in with its decoder: take that of '{self._of_role(DECODER)}'")
        if role == DECODER:
            encoders = self._made.of_role(ENCODER)
            return CompiledDecoder(part, (lambda: self.part(encoders[0])) if encoders else None)
        if role == DENOISER:
            return part
        (entry,) = (each for each in self.document["encoders"] if each["part"] == name)
        return CompiledEncoder(part, entry)

    def part(self, name: str) -> CompiledDenoiser:
        """A part by name, such as `unet` or `vae`, called by its own inputs.

        UserError: there is none, or this machine cannot run it.
        """
        if name not in self._loaded:
            loaded = self._load(self._made.part(name))
            self._made.require_part(name, loaded.manifest["artifact_sha256"])
            self._loaded[name] = loaded
        return self._loaded[name]

    @contextmanager
    def _part(self, name: str) -> Iterator[CompiledDenoiser]:
        try:
            yield self.part(name)
        finally:
            if self.sequential:
                self._loaded.pop(name, None)

    def _of_role(self, role: str) -> str:
        """The name of the part of a role. UserError: there is none."""
        if not (names := self._made.of_role(role)):
            more = f",{role}" if role == ENCODER else ""
            raise UserError(f"{self.path} has no {role}: compile the pipeline with --parts text,denoiser,decoder{more}")
        return names[0]

    @property
    def denoiser(self) -> str:
        """The name of the denoiser. UserError: there is none."""
        return self._of_role(DENOISER)

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of its pictures. UserError: it has no decoder."""
        manifest = self._made.manifest(self._of_role(DECODER))
        height, width = manifest["functions"][0]["output"]["shape"][-2:]
        return int(height or 0), int(width or 0)

    @property
    def guidance(self) -> float:
        """The guidance where none is asked for."""
        return 1.0 if self.document["guidance"] is None else float(self.document["guidance"])

    @property
    def steps(self) -> int:
        """The number of steps where none is asked for."""
        return int(self.document["steps"])

    def calls(self, count: int, steps: int, guidance: float, strength: float | None = None) -> int:
        """The calls of the denoiser for ``count`` pictures; ``strength`` is that of a picture to draw from."""
        guided = guidance != 1.0 and self.document["null"] is not None
        taken = steps if strength is None else steps - first_step(steps, strength)
        return -(-count // TOGETHER) * taken * (2 if guided else 1)

    def cut(self, prompt: str) -> list[str]:
        """What is cut off a prompt that is too long, in a sentence for each tokenizer; none where it fits."""
        lost = [(tokens.length, tokens.lost(prompt)) for tokens in self.tokens]
        return [f"the prompt has more than {length} tokens: '{text}' is cut off" for length, text in lost if text]

    def encode(self, prompts: Sequence[str]) -> dict[str, Array]:
        """The denoiser's conditions for prompts, f32 [N, ...] by name."""
        if not self._encoders:
            raise UserError(f"{self.path} has no text encoder: compile the pipeline with --parts text,denoiser,decoder")
        known = {
            prompt: {n: v for tokens in self.tokens for n, v in tokens.of([prompt]).items()}
            for prompt in dict.fromkeys(prompts)
        }
        for encoder in self._encoders:
            with self._part(encoder.part) as part:
                for row in known.values():
                    taken = encoder.inputs(**{name: row[name] for name in encoder.inputs.sources})
                    output = part(**taken, return_dict=False)
                    tensors = output if isinstance(output, tuple) else (output,)
                    row |= dict(zip(encoder.outputs, tensors, strict=True))
        sources = self._conditions.sources
        made = {prompt: self._conditions(**{name: row[name] for name in sources}) for prompt, row in known.items()}
        return {name: np.concatenate([made[prompt][name] for prompt in prompts]) for name in self._conditions.results}

    def decode(self, latents: Array, progress: Callable[[int], None] | None = None) -> Array:
        """Decodes latents [N, C, H, W] to pixels, f32 [N, H, W, channels] from 0 to 1."""
        name, found = self._of_role(DECODER), []
        with self._part(name) as part:
            for row in latents:
                z = self._decoded(latents=self._convention.pack(row[None]))["z"]
                images = self._images(sample=part(z, return_dict=False))["images"]
                found.append(images)
                if progress is not None:
                    progress(1)
        pixels: Array = np.concatenate(found).transpose(0, 2, 3, 1)
        return pixels

    def encode_image(self, pixels: Array) -> Array:
        """Encodes pixels, f32 [N, H, W, channels] from 0 to 1 and of the pipeline's size, to latents [N, C, H, W].

        UserError: the pipeline has no encoder of images, or they are of another size.
        """
        name, found = self._of_role(ENCODER), []
        if pixels.shape[1:3] != self.size:
            given, own = (" x ".join(map(str, size[::-1])) for size in (pixels.shape[1:3], self.size))
            raise UserError(f"the picture has {given} pixels, and {self.path} draws {own}")
        latents_of, numbers_of = self._ways_back
        with self._part(name) as part:
            for row in pixels:
                z = part(numbers_of(row.transpose(2, 0, 1)[None]), return_dict=False)
                found.append(latents_of(z[0] if isinstance(z, tuple) else z))
        return np.concatenate(found)

    @cached_property
    def _ways_back(self) -> tuple[Inverse, InverseOfPixels]:
        """From what the decoder takes to latents, and from pixels to what it gives."""
        shape = (1, *self._made.manifest(self.denoiser)["sampling"]["shape"])
        return inverse.of_decoded(self._decoded, self._convention, shape), inverse.of_images(self._images)

    @cached_property
    def _convention(self) -> Convention:
        call = self._made.manifest(self.denoiser)["model"].get("call", {})
        return Convention(**{**call, "baked": tuple(call.get("baked", ()))})

    def latents(
        self,
        prompts: Sequence[str],
        negative_prompts: Sequence[str] | None = None,
        *,
        steps: int | None = None,
        guidance: float | None = None,
        seed: int = 0,
        noise: Array | None = None,
        image: Array | None = None,
        strength: float = STRENGTH,
        scheduler: str | Mapping[str, object] | None = None,
        progress: loop.Progress | None = None,
    ) -> Array:
        """Draws the latents of prompts, f32 [N, C, H, W].

        Args:
            prompts: N of them.
            negative_prompts: what guidance leads away from; None takes what the pipeline does, most often "".
            steps: sampling steps; None takes the pipeline's.
            guidance: classifier-free guidance; None takes the pipeline's.
            seed: of the noise; a larger number of prompts begins with the same noise.
            noise: the noise itself, f32 [N, C, H, W], in place of the seed's.
            image: latents of pictures to draw from (`encode_image`), f32 [N, C, H, W].
            strength: how much is left to draw then, from 0 (nothing) to 1 (all, as without).
            scheduler: another than the pipeline's, by diffusers' name or its configuration (`schedulers.exchanged`).
            progress: is called with (done, total) after every call of the denoiser.

        Raises:
            UserError: a number out of range, guidance of a pipeline that has none, or a scheduler that is not known.
        """
        steps, guidance = steps or self.steps, self.guidance if guidance is None else guidance
        guided = guidance != 1.0 and self.document["null"] is not None
        if negative_prompts is not None and not guided:
            raise UserError(
                "a negative prompt is what guidance leads away from, and there is none: give a guidance above 1, or "
                "leave the negative prompt out"
            )
        given = {name: np.repeat(value, len(prompts), 0) for name, value in self._constants().items()}
        given |= self._encoded(prompts, negative_prompts) if guided else self.encode(prompts)
        with self._part(self.denoiser) as part:
            about = part.manifest["sampling"]
            own = Scheduler.from_config(about["scheduler"])
            conditioning = Conditioning.of_artifact(part.manifest)
            conditions = conditioning.from_arrays(given, "the pipeline's text")
            return loop.sample(
                part.steps(),
                own if scheduler is None else exchanged(own, scheduler),
                loop.gaussian(len(prompts), tuple(about["shape"]), seed) if noise is None else noise,
                steps=steps,
                **conditioning.arguments(conditions, len(prompts), guidance),
                latent=about["latent"],
                seed=seed,
                batch=TOGETHER,
                image=image,
                first=0 if image is None else first_step(steps, strength),
                progress=progress,
            )

    def _encoded(self, prompts: Sequence[str], negative_prompts: Sequence[str] | None) -> dict[str, Array]:
        """The conditions of prompts and of what guidance leads away from, `NULL` before the names of these."""
        count = len(prompts)
        if negative_prompts is None and self.document["null"] == "zeros":
            found = self.encode(prompts)
            return found | {NULL + name: np.zeros_like(value) for name, value in found.items()}
        both = self.encode([*prompts, *([""] if negative_prompts is None else negative_prompts)])
        away = {NULL + name: np.broadcast_to(value[count:], value[:count].shape) for name, value in both.items()}
        return {name: value[:count] for name, value in both.items()} | away

    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] | None = None,
        *,
        steps: int | None = None,
        guidance: float | None = None,
        seed: int = 0,
        image: Image | Array | None = None,
        strength: float = STRENGTH,
        scheduler: str | Mapping[str, object] | None = None,
        progress: loop.Progress | None = None,
    ) -> Pictures:
        """Draws a picture of each prompt.

        Args:
            prompt: a prompt, or several.
            negative_prompt: what guidance leads away from, one for all or one for each.
            steps: sampling steps; None takes the pipeline's.
            guidance: classifier-free guidance; None takes the pipeline's.
            seed: of the noise.
            image: a picture to draw from, of Pillow's or pixels [H, W, channels] from 0 to 1, of the pipeline's size.
            strength: how much of it is drawn anew, from 0 to 1.
            scheduler: another than the pipeline's, by diffusers' name or its configuration.
            progress: is called with (done, total) after every call of the denoiser.

        Raises:
            UserError: as `latents` and `encode_image`; Pillow is not installed.
        """
        prompts = [prompt] if isinstance(prompt, str) else [*prompt]
        for said in dict.fromkeys(said for each in prompts for said in self.cut(each)):
            warnings.warn(said, Notice, stacklevel=2)
        negative = [negative_prompt] * len(prompts) if isinstance(negative_prompt, str) else negative_prompt
        if not prompts or (negative is not None and len(negative) != len(prompts)):
            raise UserError(f"there are {len(negative or ())} negative prompts for {len(prompts)} prompts")
        begin = None if image is None else np.repeat(self.encode_image(pixels_of(image)[None]), len(prompts), 0)
        latents = self.latents(
            prompts, negative, steps=steps, guidance=guidance, seed=seed, image=begin, strength=strength,
            scheduler=scheduler, progress=progress,
        )  # fmt: skip
        pixels = self.decode(latents)
        return Pictures(pictures(pixels), pixels)


def pictures(pixels: Array) -> list[Image]:
    """Pictures of Pillow, of pixels f32 [N, H, W, channels] from 0 to 1."""
    from PIL import Image as pillow

    found = as_bytes(pixels)
    return [pillow.fromarray(image[..., 0] if image.shape[-1] == 1 else image) for image in found]


def as_bytes(pixels: Array) -> Array:
    """Pixels from 0 to 1 as bytes, rounded to the nearest."""
    return (pixels * 255).round().astype(np.uint8)


def pixels_of(image: Image | Array) -> Array:
    """Pixels f32 [H, W, channels] from 0 to 1, of a picture of Pillow's or of such pixels."""
    if isinstance(image, np.ndarray):
        return image.astype(np.float32)
    return np.asarray(image.convert("RGB"), np.float32) / np.float32(255)


def first_step(steps: int, strength: float) -> int:
    """The step to begin with where a picture is drawn from (as in diffusers). UserError: no step is left to draw."""
    taken = min(int(steps * strength), steps)
    if not 0 <= strength <= 1 or taken < 1:
        raise UserError(
            f"a strength of {strength:g} in {steps} steps is {max(taken, 0)} steps to draw: give more than "
            f"{1 / steps:.2g}, and at most 1"
        )
    return steps - taken


def load_pipeline(
    path: str | os.PathLike[str],
    threads: int | None = None,
    sequential: bool = False,
    key: Key | None = None,
) -> CompiledPipeline:
    """Loads a compiled pipeline.

    Args:
        path: the folder.
        threads: threads of a call, as for `load`.
        sequential: whether a part is dropped from memory when the next one is loaded.
        key: the public key of whoever has to have signed the pipeline, as for `load`; parts are held against the same
            signature whenever they are loaded.

    Raises:
        UserError: the pipeline is not sound; with a key, it is not signed with that, or is not what was signed.
    """
    return CompiledPipeline(pipelines.read(path, key), threads, sequential)

