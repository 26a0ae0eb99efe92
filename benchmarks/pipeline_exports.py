"""Parts of a diffusers pipeline as functions of tensors, which an exporter takes, and the pipeline drawn by a runtime.

Of two kinds: Stable Diffusion (a text encoder of CLIP's, a UNet, an AutoencoderKL), and FLUX.2 klein (a language model
of which three layers are read, a transformer, an autoencoder).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

LAYERS = (9, 18, 27)
"""The layers of its language model that FLUX.2 klein reads."""
Run = Callable[..., np.ndarray]
"""Runs a part by its name (text, denoiser, decoder) on arrays."""


class Part(nn.Module):
    """A part as a function of tensors in their order."""

    def __init__(self, model: nn.Module, call: Callable[..., Tensor]) -> None:
        super().__init__()
        self.model, self.call = model, call

    def forward(self, *tensors: Tensor) -> Tensor:
        return self.call(self.model, *tensors)


@dataclass(frozen=True)
class Export:
    """What an exporter takes: the module, and tensors to trace it with."""

    module: nn.Module
    example: tuple[Tensor, ...]


def _hidden(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    found = model(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False).hidden_states
    return torch.stack([found[layer] for layer in LAYERS])


def denoiser_of(pipeline: Any) -> Any:
    return pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer


def exports(pipeline: Any, latents: Sequence[int]) -> dict[str, Export]:
    """The parts of a pipeline by name.

    Args:
        pipeline: of one of the two kinds.
        latents: shape of what its denoiser draws, [1, C, H, W].
    """
    tokens, noise = pipeline.tokenizer.model_max_length, torch.zeros(*latents)
    ids = torch.zeros(1, tokens, dtype=torch.int64)
    if hasattr(pipeline, "unet"):
        states = torch.zeros(2, tokens, pipeline.text_encoder.config.hidden_size)
        found = {
            "text": (pipeline.text_encoder, lambda model, ids: model(ids)[0], (ids,)),
            "denoiser": (
                pipeline.unet,
                lambda model, x, t, c: model(x, t, c, return_dict=False)[0],
                (noise.repeat(2, 1, 1, 1), torch.tensor(500), states),
            ),
            "decoder": (pipeline.vae, lambda model, z: model.decode(z, return_dict=False)[0], (noise,)),
        }
    else:
        rows, width = latents[2] * latents[3], len(LAYERS) * pipeline.text_encoder.config.hidden_size
        _, channels, height, side = latents
        found = {
            "text": (pipeline.text_encoder, _hidden, (ids, torch.ones_like(ids))),
            "denoiser": (
                pipeline.transformer,
                lambda model, x, t, c, text, image: model(
                    hidden_states=x, timestep=t, encoder_hidden_states=c, txt_ids=text, img_ids=image,
                    return_dict=False,
                )[0],
                (
                    torch.zeros(1, rows, channels), torch.tensor([0.5]), torch.zeros(1, tokens, width),
                    torch.zeros(1, tokens, 4, dtype=torch.int64), torch.zeros(1, rows, 4, dtype=torch.int64),
                ),
            ),
            "decoder": (
                pipeline.vae,
                lambda model, z: model.decode(z, return_dict=False)[0],
                (torch.zeros(1, channels // 4, 2 * height, 2 * side),),
            ),
        }  # fmt: skip
    return {name: Export(Part(model, call).eval(), example) for name, (model, call, example) in found.items()}


def run_by(pipeline: Any, run: Run) -> Any:
    """The pipeline with a runtime in place of its parts, whose weights are dropped."""

    def called(part: str, *tensors: Tensor) -> Tensor:
        return torch.from_numpy(run(part, *(each.numpy() for each in tensors)))

    if hasattr(pipeline, "unet"):

        def text(ids: Tensor, **rest: Any) -> Any:
            return (called("text", ids),)

        def denoise(x: Tensor, t: Tensor, encoder_hidden_states: Tensor, **rest: Any) -> Any:
            return (called("denoiser", x, t, encoder_hidden_states),)
    else:

        def text(input_ids: Tensor, attention_mask: Tensor, **rest: Any) -> Any:  # type: ignore[misc]
            states = called("text", input_ids, attention_mask)
            return SimpleNamespace(hidden_states=dict(zip(LAYERS, states, strict=True)))

        def denoise(  # type: ignore[misc]
            hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, txt_ids: Tensor, img_ids: Tensor,
            **rest: Any,
        ) -> Any:  # fmt: skip
            return (called("denoiser", hidden_states, timestep, encoder_hidden_states, txt_ids, img_ids),)

    def decode(z: Tensor, **rest: Any) -> Any:
        return (called("decoder", z),)

    denoiser = denoiser_of(pipeline)
    pipeline.text_encoder.forward, denoiser.forward, pipeline.vae.decode = text, denoise, decode
    for part in (pipeline.text_encoder, denoiser, pipeline.vae):
        first = next(part.parameters())
        for module in part.modules():
            for name, parameter in [*module._parameters.items()]:
                if parameter is not None and parameter is not first:
                    module._parameters[name] = None
    return pipeline
