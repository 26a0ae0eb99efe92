"""The parts of a diffusers pipeline from prompt to picture: text encoders, denoiser, decoder, and the glue between."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from mpq_compiler.frontend.input_specs import convention_of, specs_of
from mpq_compiler.frontend.watch_pipeline import (
    DiffusersPipeline,
    EncoderCall,
    Watched,
    begin_with,
    schedule_of,
    watch,
)
from mpq_compiler.frontend.watching import tensors_of
from mpq_compiler.sampling import inverse
from mpq_compiler.sampling.call_tree import TIME, Arguments, Tree, Value
from mpq_compiler.sampling.conditioning import EMBEDDED
from mpq_compiler.sampling.convention import Convention
from mpq_compiler.sampling.glue import Glue, Step
from mpq_compiler.sampling.prompt_tokens import Padding, Tokens
from mpq_compiler.sampling.schedulers import Scheduler
from mpq_compiler.support.errors import UserError

SAVED = {"architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path"}
"""What an encoder's configuration has of how it was saved."""
DECODE, ENCODE = "decode", "encode"
"""The methods of an autoencoder that make an image of latents, and latents of an image."""
PROBES = ("A red Fox in the snow", " two ships, and a Lighthouse by  the sea ")
"""Prompts that a pipeline is watched with: of different lengths, with capitals, and spaces that may be stripped."""


CALIBRATING = 96
"""The number of prompts that pipelines are calibrated on; those behind them are for judging."""
PROMPTS = "prompts.txt"
"""The file of prompts, one a line."""


def prompts(unseen: bool = False, folder: Path | None = None) -> list[str]:
    """The prompts that pipelines are calibrated on; or those that nothing is calibrated on.

    Those of the pipeline's folder where it has some in `PROMPTS`, else our own.
    """
    own = folder is not None and (folder / PROMPTS).is_file()
    file = folder / PROMPTS if folder is not None and own else Path(__file__).with_name(PROMPTS)
    found = file.read_text(encoding="utf-8").splitlines()
    return found[CALIBRATING:] if unseen else found[:CALIBRATING]


class TextEncoder(nn.Module):
    """A text encoder as a function from tokens to the tensors that its pipeline reads of what it returns."""

    def __init__(self, model: nn.Module, call: EncoderCall, taken: Sequence[str], read: Sequence[str]) -> None:
        """Takes the encoder as it was called.

        Args:
            model: the encoder.
            call: one of its calls.
            taken: the arguments that depend on the prompt.
            read: the paths of the tensors that are read.
        """
        super().__init__()
        self.model = model
        config: Arguments = model.config.to_dict()  # type: ignore[union-attr,operator]
        kept = {name: value for name, value in config.items() if name not in SAVED}
        self.config: Arguments = {"_class_name": type(model).__name__, **kept}
        self.taken, self.read = tuple(taken), tuple(read)
        self.others = {name: value for name, value in call.arguments.items() if name not in taken}

    def forward(self, **tokens: Tensor) -> Tensor | tuple[Tensor, ...]:
        """The tensors that are read, [B, ...] each."""
        output = self.model(**tokens, **self.others)
        found = tuple(_at(output, path) for path in self.read)
        return found if len(found) > 1 else found[0]


def _at(output: Value, path: str) -> Tensor:
    for key in path.split("."):
        output = output[int(key)] if key.isdigit() else output[key]
    assert isinstance(output, Tensor)
    return output


class Half(nn.Module):
    """What one method of an autoencoder runs of it."""

    method: ClassVar[str]

    def __init__(self, model: nn.Module, example: Tensor) -> None:
        """``example`` is what the method may be called with."""
        super().__init__()
        self.model = _used(model, self.method, example)
        self.config: Arguments = {"_class_name": type(model).__name__, **dict(getattr(model, "config", {}))}
        self.run: Callable[..., Sequence[Value]] = getattr(self.model, self.method)


class Decoder(Half):
    """The decoding half of an autoencoder as a function from latents to an image."""

    method = DECODE

    def forward(self, latents: Tensor) -> Tensor:
        """The image [B, channels, H, W]."""
        image: Tensor = self.run(latents, return_dict=False)[0]
        return image


class Encoder(Half):
    """The encoding half of an autoencoder as a function from an image to latents: of a distribution its mean."""

    method = ENCODE

    def forward(self, image: Tensor) -> Tensor:
        """The latents [B, C, H, W] as the decoder takes them."""
        found = self.run(image, return_dict=False)[0]
        latents: Tensor = found if isinstance(found, Tensor) else found.mode()
        return latents


def _used(model: nn.Module, method: str, argument: Tensor) -> nn.Module:
    """The model without the children that a method does not run, such as its encoder; they share all else."""
    ran: set[nn.Module] = set()
    hooks = [m.register_forward_pre_hook(lambda module, args: ran.add(module)) for m in model.modules()]
    try:
        with torch.no_grad():
            getattr(model, method)(argument, return_dict=False)
    finally:
        for hook in hooks:
            hook.remove()
    half = copy.copy(model)
    half._modules = {name: child for name, child in model._modules.items() if child in ran}
    return half


@dataclass(frozen=True)
class Encoding:
    """A text encoder of a pipeline."""

    name: str
    """The pipeline's attribute."""
    module: TextEncoder
    inputs: Glue
    """Its arguments, of the tokens."""
    outputs: tuple[str, ...]
    """The sources of later glue that its tensors are, in their order."""
    returned: Tree
    """What the model itself returns: a tree of tensors, of which the module gives those that are read."""
    dimensions: Mapping[str, int]
    """The number of dimensions of all these tensors, by path."""

    def called(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """The tensors that the pipeline reads, of inputs by argument."""
        output = self.module(**inputs)
        return [*output] if isinstance(output, tuple) else [output]


RunEncoder = Callable[[Encoding, dict[str, Tensor]], Sequence[Tensor]]
"""Encodes in place of an encoder: of inputs by argument, the tensors that the pipeline reads."""


@dataclass(frozen=True)
class SeenCall:
    """A call of a denoiser as its pipeline was seen to make it."""

    arguments: Mapping[str, Tensor]
    inputs: tuple[str, ...]
    """The arguments that vary, the latents first; others are constants, but for the time."""
    unit: float
    """What the scheduler's times are divided by."""
    scheduler: Scheduler


@dataclass(frozen=True)
class Parts:
    """A pipeline taken apart."""

    name: str
    """The class of the pipeline."""
    denoiser: str
    """The attribute of the denoiser."""
    latent_shape: tuple[int, ...]
    """The shape of its latents, [1, C, H, W]; of a denoiser that is compiled as it was seen, perhaps of rows."""
    convention: Convention
    """How diffusers calls it with them."""
    tokens: tuple[Tokens, ...]
    encodings: tuple[Encoding, ...]
    """The text encoders in the order of their calls."""
    conditions: Glue
    """The denoiser's conditions by name, of tokens and of what encoders give."""
    constants: Glue
    """Its conditions that are the same for every prompt, such as the size of the image: [1, ...] by name."""
    decoder_name: str
    """The attribute of the decoder."""
    decoder: Decoder
    decoded: Glue
    """What the decoder takes (``z``), of ``latents`` as the scheduler gives them."""
    images: Glue
    """Images from 0 to 1 (``images``), of the decoder's ``sample``."""
    seen: SeenCall | None
    """The denoiser's call, where it is of no known form; None: it is (`input_specs`)."""
    guidance: float | None
    """The pipeline's guidance where none is asked for; None: it has none."""
    null: str | None
    """What classifier-free guidance leads away from: "empty", the empty prompt, or "zeros"; None: it has none."""
    steps: int
    """The pipeline's number of steps where none is asked for."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the denoiser's latents."""
        height, width = self.latent_shape[-2:]
        return height, width

    def require_encoder(self, decoder: nn.Module) -> None:
        """Raises a UserError where no picture could be drawn from another: ``decoder`` is the pipeline's."""
        try:
            inverse.of_decoded(self.decoded, self.convention, self.latent_shape)
            inverse.of_images(self.images)
        except ValueError as error:
            raise UserError(
                f"{self.name} cannot draw from a picture: what it does to latents before they are decoded, or behind "
                f"that to pixels, has no way back, for {error}; leave 'encoder' out of --parts"
            ) from error
        if not hasattr(decoder, ENCODE):
            raise UserError(f"the decoder of {self.name} encodes nothing: leave 'encoder' out of --parts")

    def encode(self, prompts: Sequence[str]) -> dict[str, np.ndarray]:
        """The conditions of prompts by the float encoders, f32 [N, ...] by name."""
        rows = [self.encoded(prompt) for prompt in prompts]
        return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}

    def unconditional(self) -> dict[str, np.ndarray] | None:
        """The conditions [1, ...] that guidance leads away from; None where there is none."""
        if self.null is None:
            return None
        found = self.encoded("")
        return {name: np.zeros_like(value) for name, value in found.items()} if self.null == "zeros" else found

    def token_inputs(self, prompts: Sequence[str], encoding: Encoding) -> dict[str, np.ndarray]:
        """The inputs of an encoder for prompts, [N, ...] by argument."""
        given = {name: value for tokens in self.tokens for name, value in tokens.of(prompts).items()}
        return encoding.inputs(**{name: given[name] for name in encoding.inputs.sources})

    @torch.no_grad()
    def encoded(self, prompt: str, run: RunEncoder | None = None) -> dict[str, np.ndarray]:
        """The conditions of a prompt, [1, ...] by name; ``run`` encodes in place of the float encoders."""
        known = {name: value for tokens in self.tokens for name, value in tokens.of([prompt]).items()}
        for encoding in self.encodings:
            taken = encoding.inputs(**{name: known[name] for name in encoding.inputs.sources})
            inputs = {name: torch.from_numpy(np.array(value)) for name, value in taken.items()}
            tensors = encoding.called(inputs) if run is None else run(encoding, inputs)
            known |= {name: tensor.numpy() for name, tensor in zip(encoding.outputs, tensors, strict=True)}
        return self.conditions(**{name: known[name] for name in self.conditions.sources})


def take_apart(pipeline: DiffusersPipeline, denoiser: str, size: tuple[int, int] | None = None) -> Parts:
    """Takes a pipeline apart, by what is seen of it while it draws.

    Args:
        pipeline: a diffusers pipeline from prompts to images, in float32 on the CPU. It is left as it is.
        denoiser: the attribute of its denoiser.
        size: height and width of the decoder's latents; None takes the pipeline's.

    Raises:
        UserError: it cannot be taken apart; the sentence names what stands in the way.
    """
    signature = inspect.signature(pipeline.__call__).parameters
    if "prompt" not in signature:
        raise UserError(
            f"{type(pipeline).__name__} draws without a prompt: compile its denoiser alone with --parts denoiser"
        )
    pipeline.set_progress_bar_config(disable=True)
    usual = {name: signature[name].default for name in ("guidance_scale", "num_inference_steps") if name in signature}
    plain: Arguments = {"num_inference_steps": 1, "output_type": "pt"}
    if "use_resolution_binning" in signature:
        plain["use_resolution_binning"] = False  # images of the size that is asked for, and not resized to it
    if size is not None:
        plain |= {name: edge * pipeline.vae_scale_factor for name, edge in zip(("height", "width"), size, strict=True)}
    alone = {"guidance_scale": 1.0} if "guidance_scale" in usual else {}
    first, second = (
        watch(pipeline, denoiser, prompt=probe, generator=torch.Generator().manual_seed(0), **plain, **alone)
        for probe in PROBES
    )
    _require_whole(pipeline, first)
    assert first.decoder and first.decoded is not None and first.called is not None and first.latents is not None
    module = getattr(pipeline, denoiser)
    known = _is_known(module, first.called)
    convention = convention_of(module) if known else Convention()
    given = convention.inputs(first.called)
    latent = next(name for name in ("sample", "hidden_states") if name in given)
    conditions, constants = _conditions(first, given, latent)
    seen = None
    if not known:
        seen, constants = _seen(pipeline, first, latent, conditions, {**plain, "prompt": PROBES[0]}), Glue((), (), {})
    decoded = first.recorder.glue({"z": first.decoded}, "what its decoder takes")
    assert first.images is not None
    images = first.recorder.glue({"images": first.images}, "its images")
    encodings = _encodings(pipeline, first, conditions)
    needed = {*conditions.sources, *(s for encoding in encodings for s in encoding.inputs.sources)}
    parts = Parts(
        name=type(pipeline).__name__,
        denoiser=denoiser,
        latent_shape=tuple(given[latent].shape),
        convention=convention,
        tokens=_tokens(pipeline, first, second, needed),
        encodings=encodings,
        conditions=conditions,
        constants=constants,
        decoder_name=first.decoder,
        decoder=Decoder(getattr(pipeline, first.decoder), first.decoded),
        decoded=decoded,
        images=images,
        seen=seen,
        guidance=usual.get("guidance_scale"),
        null=None,
        steps=int(usual.get("num_inference_steps") or 50),
    )
    _require_same(parts, convention.inputs(second.called or {}), PROBES[1])
    return _with_guidance(parts, pipeline, {**plain, "prompt": PROBES[0]}, given, convention)


def _is_known(module: nn.Module, call: Arguments) -> bool:
    """Whether a call is of a form that is known of the module's arguments (`input_specs`)."""
    try:
        convention = convention_of(module)
        given = convention.inputs(call)
        latents = given["sample" if "sample" in given else "hidden_states"]
        text = given.get("encoder_hidden_states")
        tokens = None if text is None else text.shape[1]
        specs_of(module, dict(getattr(module, "config", {})), tuple(latents.shape[-2:]), tokens)
    except (UserError, KeyError, IndexError, RuntimeError, ValueError):
        return False
    return True


def _seen(pipeline: DiffusersPipeline, watched: Watched, latent: str, conditions: Glue, call: Arguments) -> SeenCall:
    """The denoiser's call, which is of no known form. UserError: the scheduler is not given what the denoiser gives."""
    arguments, kind = watched.called or {}, type(pipeline).__name__
    alone = "; compile its denoiser alone with --parts denoiser"
    if odd := [name for name, value in arguments.items() if not isinstance(value, Tensor)]:
        raise UserError(f"{kind} gives its denoiser '{odd[0]}', which is no tensor{alone}")
    predicted, time, latents = watched.taken
    if not torch.equal(latents.float(), arguments[latent].float()):
        raise UserError(f"{kind} gives its denoiser other latents than its scheduler{alone}")
    if not torch.equal(predicted.float(), tensors_of(watched.predicted)[0].float()):
        raise UserError(f"{kind} gives its scheduler another prediction than its denoiser's{alone}")
    given = arguments[TIME].reshape(-1)[0].double()
    unit = next((unit for unit in (1.0, 1000.0) if torch.isclose(given * unit, time.double(), rtol=1e-5)), None)
    if unit is None:
        raise UserError(f"{kind} gives its denoiser {float(given):g} for the time {float(time):g}{alone}")
    inputs = (latent, *conditions.results, *(name for name in EMBEDDED if name in arguments))
    return SeenCall(dict(arguments), inputs, unit, schedule_of(pipeline, **call))


def _require_whole(pipeline: DiffusersPipeline, seen: Watched) -> None:
    kind = type(pipeline).__name__
    if not seen.encoded:
        raise UserError(f"{kind} encodes no text: compile its denoiser alone with --parts denoiser")
    if seen.decoder is None or not isinstance(seen.images, Tensor):
        raise UserError(f"{kind} has no decoder of images: compile its denoiser alone with --parts denoiser")


def _conditions(seen: Watched, given: Arguments, latent: str) -> tuple[Glue, Glue]:
    """The glue of the denoiser's tensors that depend on the prompt, and of those that do not."""
    others = (latent, "timestep", *EMBEDDED)
    tensors = {name: value for name, value in given.items() if name not in others and isinstance(value, Tensor)}
    made = {name: value for name, value in tensors.items() if seen.recorder.comes_from_sources(value)}
    rest = {name: value for name, value in tensors.items() if name not in made}
    stored = [Step("array", (value.tolist(), str(value.dtype).removeprefix("torch."))) for value in rest.values()]
    constants = Glue((), tuple(stored), {name: index for index, name in enumerate(rest)})
    return seen.recorder.glue(made, "its denoiser's conditions"), constants


def _encodings(pipeline: DiffusersPipeline, seen: Watched, conditions: Glue) -> tuple[Encoding, ...]:
    made = []
    for call in seen.encoded:
        read = [path for path in call.outputs if f"{call.name}:{path}" in conditions.sources]
        if not read:
            continue
        taken = {n: v for n, v in call.arguments.items() if isinstance(v, Tensor)}
        inputs = seen.recorder.glue(taken, f"what '{call.name}' takes")
        module = TextEncoder(getattr(pipeline, call.name), call, [*taken], read)
        outputs = tuple(f"{call.name}:{path}" for path in read)
        dimensions = {path: tensor.ndim for path, tensor in call.outputs.items()}
        made.append(Encoding(call.name, module, inputs, outputs, call.tree, dimensions))
    return tuple(made)


def _tokens(pipeline: DiffusersPipeline, first: Watched, second: Watched, needed: set[str]) -> tuple[Tokens, ...]:
    """How prompts become the tokens that encoders take, found by both prompts."""
    found = []
    for index, pair in enumerate(zip(first.tokenized, second.tokenized, strict=True)):
        sources = {f"{index}:{name}": name for name in pair[0].outputs if f"{index}:{name}" in needed}
        if not sources:
            continue
        tokenizer = getattr(pipeline, pair[0].name)
        given = {prompt: each.text for prompt, each in zip(PROBES, pair, strict=True)}
        made = {
            prompt: {source: each.outputs[name].numpy() for source, name in sources.items()}
            for prompt, each in zip(PROBES, pair, strict=True)
        }
        padding: Padding = {
            "pad_id": int(tokenizer.pad_token_id or 0),
            "pad_token": str(tokenizer.pad_token),
            "direction": tokenizer.padding_side,
        }
        found.append(Tokens.like(pair[0].name, tokenizer.backend_tokenizer.to_str(), padding, given, made))
    return tuple(found)


def _require_same(parts: Parts, given: Arguments, prompt: str) -> None:
    """Raises a UserError where the parts make other conditions of a prompt than the pipeline did."""
    for name, ours in parts.encode([prompt]).items():
        theirs = given[name].numpy()
        if ours.shape != theirs.shape or not np.allclose(ours, theirs, rtol=1e-4, atol=1e-5):
            raise UserError(
                f"the parts of {parts.name} make another '{name}' of a prompt than the pipeline does: it computes what "
                "was not seen; compile its denoiser alone with --parts denoiser"
            )


def _with_guidance(
    parts: Parts, pipeline: DiffusersPipeline, call: Arguments, given: Arguments, convention: Convention
) -> Parts:
    """The parts with what guidance leads away from: in a guided call it is the first half of the batch.

    Where the denoiser takes the guidance as an input (``given`` are its inputs), there is none.
    """
    if parts.guidance is None or any(name in given for name in EMBEDDED):
        return parts
    seen = watch(pipeline, parts.denoiser, **call, guidance_scale=max(2.0, parts.guidance))
    calls = [convention.inputs(each) for each in seen.calls]
    for null in ("empty", "zeros"):
        tried = replace(parts, null=null)
        found = tried.unconditional()
        assert found is not None
        if any(_is_guided(given, found, len(calls)) for given in calls):
            return tried
    return replace(parts, guidance=None)


def _is_guided(given: Arguments, null: Mapping[str, np.ndarray], calls: int) -> bool:
    """Whether a guided call has these conditions: in the first half of its batch, or in one of two calls."""
    return all(
        len(given[name]) * calls == 2 and np.allclose(given[name][:1].numpy(), value, rtol=1e-4, atol=1e-5)
        for name, value in null.items()
    )


@torch.no_grad()
def drawn(
    pipeline: DiffusersPipeline,
    denoiser: str,
    prompt: str,
    noise: np.ndarray,
    steps: int,
    guidance: float | None,
    size: tuple[int, int],
) -> np.ndarray:
    """What a pipeline itself draws of a prompt, f32 [1, channels, H, W] from 0 to 1.

    Args:
        pipeline: a diffusers pipeline; left as it is.
        denoiser: the attribute of its denoiser.
        prompt: what is drawn.
        noise: the initial latents [1, C, H, W], or [1, tokens, C] where the denoiser's call is of no known form.
        steps: sampling steps.
        guidance: the pipeline's guidance; None leaves its own.
        size: height and width of the picture.
    """
    pipeline.set_progress_bar_config(disable=True)
    call: Arguments = {"prompt": prompt, "num_inference_steps": steps, "output_type": "pt"}
    call |= {} if guidance is None else {"guidance_scale": guidance}
    taken = inspect.signature(pipeline.__call__).parameters
    if "height" in taken:
        call |= {"height": size[0], "width": size[1]}
    if "use_resolution_binning" in taken:
        call["use_resolution_binning"] = False
    with ExitStack() as stack:
        if noise.ndim == 4:
            call["latents"] = convention_of(getattr(pipeline, denoiser)).pack(torch.from_numpy(noise))
        else:  # what a pipeline makes of latents that it is given is not known, what it makes of its own is
            begin_with(stack, pipeline, torch.from_numpy(noise))
        images: np.ndarray = pipeline(**call).images.numpy()
    return images
