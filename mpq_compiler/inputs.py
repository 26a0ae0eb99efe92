"""The tensors that a denoiser takes, found by its structure: the parameters of its forward, and its configuration."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from mpq_compiler.errors import UserError

# Parameters of diffusers' forward methods that may be left out without changing which function is computed.
_OPTIONAL = {
    "added_cond_kwargs",
    "attention_mask",
    "class_labels",
    "cross_attention_kwargs",
    "down_block_additional_residuals",
    "down_intrablock_additional_residuals",
    "encoder_attention_mask",
    "encoder_hidden_states",
    "hidden_states",
    "mid_block_additional_residual",
    "return_dict",
    "sample",
    "timestep",
    "timestep_cond",
}
_ADDED = ("text_embeds", "time_ids", "resolution", "aspect_ratio")
_TIME_IDS = 6
"""SDXL: original height and width, crop top and left, target height and width."""


@dataclass(frozen=True)
class InputSpec:
    """One input of a denoiser: its shape without the leading batch, and its type."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.").replace("float", "f").replace("int", "i")
        return f"{name}[{','.join(['B', *map(str, self.shape)])}]"


class TensorModule(torch.nn.Module):
    """A diffusers denoiser as a function of named tensors to one tensor; its parameters are below
    `model.`."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        sample: torch.Tensor | None = None,
        hidden_states: torch.Tensor | None = None,
        timestep: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        class_labels: torch.Tensor | None = None,
        text_embeds: torch.Tensor | None = None,
        time_ids: torch.Tensor | None = None,
        resolution: torch.Tensor | None = None,
        aspect_ratio: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The predicted noise, image or velocity [B, C, H, W]; takes exactly the inputs of
        `input_specs`."""
        plain = {
            "sample": sample,
            "hidden_states": hidden_states,
            "timestep": timestep,
            "encoder_hidden_states": encoder_hidden_states,
            "class_labels": class_labels,
        }
        added = dict(zip(_ADDED, (text_embeds, time_ids, resolution, aspect_ratio), strict=True))
        given: dict[str, Any] = {key: value for key, value in plain.items() if value is not None}
        if conditions := {key: value for key, value in added.items() if value is not None}:
            given["added_cond_kwargs"] = conditions
        return self.model(**given, return_dict=False)[0]


def specs_of(
    model: torch.nn.Module, config: Mapping[str, Any], size: int | tuple[int, int] | None, tokens: int | None
) -> tuple[dict[str, InputSpec], list[str]]:
    """The inputs of `model`, by the parameters of its forward and its configuration, and what was
    assumed."""
    kind, notes = type(model).__name__, []
    taken = list(inspect.signature(model.forward).parameters)
    latent = next((name for name in ("sample", "hidden_states") if name in taken), None)
    if latent is None or "timestep" not in taken:
        raise UserError(
            f"{kind} takes no noisy latents with a timestep; name a diffusion denoiser (UNet or transformer)"
        )
    if strange := [name for name in taken if name not in _OPTIONAL]:
        raise UserError(f"{kind} takes the input '{strange[0]}', which is not supported")

    channels, sides = config.get("in_channels"), size or config.get("sample_size")
    if not isinstance(channels, int) or sides is None:
        raise UserError(f"the configuration of {kind} does not say the size of its latents; give their shape")
    height, width = (sides, sides) if isinstance(sides, int) else sides
    specs = {
        latent: InputSpec((channels, height, width), torch.float32),
        "timestep": InputSpec((), torch.int64),
    }

    if "encoder_hidden_states" in taken:
        features = (
            config.get("encoder_hid_dim")
            or config.get("caption_channels")
            or config.get("cross_attention_dim")
        )
        if config.get("encoder_hid_dim_type") not in (None, "text_proj"):
            raise UserError(
                f"the encoder_hid_dim_type '{config['encoder_hid_dim_type']}' of {kind} is not supported"
            )
        if isinstance(features, list | tuple):
            if len(set(features)) != 1:
                raise UserError(
                    f"{kind} has cross_attention_dim {features}: blocks of unequal width are not supported"
                )
            features = features[0]
        if not isinstance(features, int):
            raise UserError(f"the configuration of {kind} does not say the width of its text condition")
        if tokens is None:
            tokens = 120 if latent == "hidden_states" else 77
            notes.append(f"the text condition is taken to be {tokens} tokens long")
        specs["encoder_hidden_states"] = InputSpec((tokens, features), torch.float32)

    if getattr(model, "class_embedding", None) is not None or config.get("num_class_embeds"):
        if config.get("class_embed_type") is not None or not config.get("num_class_embeds"):
            raise UserError(
                f"the class_embed_type '{config.get('class_embed_type')}' of {kind} is not supported"
            )
        specs["class_labels"] = InputSpec((), torch.int64)

    if (added := config.get("addition_embed_type")) == "text_time":
        width_of_all = config["projection_class_embeddings_input_dim"]
        pooled = width_of_all - _TIME_IDS * config["addition_time_embed_dim"]
        specs["text_embeds"] = InputSpec((pooled,), torch.float32)
        specs["time_ids"] = InputSpec((_TIME_IDS,), torch.float32)
    elif added is not None:
        raise UserError(f"the addition_embed_type '{added}' of {kind} is not supported")
    if getattr(model, "use_additional_conditions", False):
        specs["resolution"] = InputSpec((2,), torch.float32)
        specs["aspect_ratio"] = InputSpec((1,), torch.float32)
    return specs, notes
