"""The inputs of a denoiser, derived from its structure: the parameters of its forward, and its configuration."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch

from mpq_compiler.ir.program import InputSpec
from mpq_compiler.sampling.convention import Convention
from mpq_compiler.support.errors import UserError

# Parameters of diffusers' forward methods that may be left out without changing the function that is computed.
MOST_PIXELS = 1 << 14
"""The most pixels of a side of latents."""
_OPTIONAL = {
    "attention_kwargs",
    "attention_mask",
    "block_controlnet_hidden_states",
    "controlnet_block_samples",
    "controlnet_blocks_repeat",
    "controlnet_single_block_samples",
    "cross_attention_kwargs",
    "down_block_additional_residuals",
    "down_intrablock_additional_residuals",
    "joint_attention_kwargs",
    "mid_block_additional_residual",
    "return_dict",
    "skip_layers",
}
# Parameters that the code below understands.
_KNOWN = {
    "added_cond_kwargs",
    "class_labels",
    "encoder_attention_mask",
    "encoder_hidden_states",
    "encoder_hidden_states_t5",
    "guidance",
    "hidden_states",
    "image_meta_size",
    "image_rotary_emb",
    "img_ids",
    "pooled_projections",
    "sample",
    "style",
    "text_embedding_mask",
    "text_embedding_mask_t5",
    "timestep",
    "timestep_cond",
    "txt_ids",
}
_ADDED = ("text_embeds", "time_ids", "resolution", "aspect_ratio")
_TIME_IDS = 6
"""The number of size conditions of SDXL and Hunyuan-DiT: original size, crop's top and left, target size."""
_CONTINUOUS_TIME = {"guidance", "image_rotary_emb", "pooled_projections"}
"""Parameters of models with continuous time: flow matching (SD3, Flux, Sana), and Hunyuan-DiT."""
_POSITIONS = "FluxTransformer2DModel"
"""The model whose token positions, `img_ids` and `txt_ids`, are made here."""
_TEXT_TOKENS = {"img_ids": 512, "pooled_projections": 333, "guidance": 300, "hidden_states": 120, "sample": 77}
"""The text lengths of diffusers' pipelines, in tokens; the first of these parameters that a model takes decides."""
_VAE_SCALE = 8
"""Pixels along a side of a latent, in the pipelines that condition on sizes in pixels."""


class TensorModule(torch.nn.Module):
    """A diffusers denoiser as a function from named tensors to one image; its parameters are below `model.`.

    It takes exactly the inputs of ``specs``: latents [B, C, H, W], the timestep on the scale that the model embeds, and
    conditions. Other arguments of the model depend on their sizes alone (position indices, tables of rotary
    embeddings), and are kept here as buffers.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        specs: Mapping[str, InputSpec],
        convention: Convention | None = None,
        constants: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """Takes a model of a known kind, or one whose ``convention`` and constant arguments were seen in a call."""
        super().__init__()
        self.model = model
        self.convention = convention or convention_of(model)
        self.latent = next(iter(specs))
        self.seen = convention is not None
        """Whether its call is of no known form."""
        self.tables: dict[str, list[str]] = {}
        held = _constants(model, specs) if constants is None else {name: (value,) for name, value in constants.items()}
        for name, tensors in held.items():
            self.tables[name] = [f"{name}_{index}" for index in range(len(tensors))]
            for buffer, tensor in zip(self.tables[name], tensors, strict=True):
                self.register_buffer(buffer, tensor, persistent=False)

    def constants(self) -> dict[str, torch.Tensor]:
        """The tables that the model is called with, by their path in a call."""
        return {
            name if len(buffers) == 1 else f"{name}.{index}": self.get_buffer(buffer)
            for name, buffers in self.tables.items()
            for index, buffer in enumerate(buffers)
        }

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        """Predicts the noise, image or velocity [B, C, H, W]."""
        given: dict[str, Any] = {name: value for name, value in inputs.items() if name not in _ADDED}
        if added := {name: inputs[name] for name in _ADDED if name in inputs}:
            given["added_cond_kwargs"] = added
        for name, buffers in self.tables.items():
            tables = tuple(self.get_buffer(buffer) for buffer in buffers)
            given[name] = tables if len(tables) > 1 else tables[0]
        height, width = inputs[self.latent].shape[-2:]
        given[self.latent] = self.convention.pack(given[self.latent])
        if self.convention.timestep_unit != 1:
            given["timestep"] = given["timestep"] / self.convention.timestep_unit
        output: torch.Tensor = self.convention.unpack(self.model(**given, return_dict=False)[0], height, width)
        return output


def convention_of(model: torch.nn.Module) -> Convention:
    """The convention by which diffusers' pipelines call the model."""
    taken = inspect.signature(model.forward).parameters
    baked = tuple(name for name in ("img_ids", "txt_ids", "image_rotary_emb") if name in taken)
    if "img_ids" in taken:
        return Convention(patch=2, timestep_unit=1000.0, baked=baked)
    # A model that multiplies its time by 1000 is given fractions of it, as AuraFlow is.
    scales = {getattr(module, "scale", 1) for module in model.modules() if type(module).__name__ == "Timesteps"}
    return Convention(timestep_unit=1000.0 if 1000 in scales else 1.0, baked=baked)


def _constants(model: torch.nn.Module, specs: Mapping[str, InputSpec]) -> dict[str, tuple[torch.Tensor, ...]]:
    convention = convention_of(model)
    _, height, width = next(iter(specs.values())).sample
    found: dict[str, tuple[torch.Tensor, ...]] = {}
    if "img_ids" in convention.baked:
        rows, columns = height // convention.patch, width // convention.patch
        grid = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"), -1)
        # axis 0 counts images; text tokens stand at the origin (diffusers' FluxPipeline)
        found["img_ids"] = (torch.nn.functional.pad(grid, (1, 0)).reshape(-1, 3).float(),)
        found["txt_ids"] = (torch.zeros(specs["encoder_hidden_states"].sample[0], 3),)
    if "image_rotary_emb" in convention.baked:
        found["image_rotary_emb"] = _rotary_tables(dict(getattr(model, "config", {})), height, width)
    return found


def _rotary_tables(config: Mapping[str, Any], height: int, width: int) -> tuple[torch.Tensor, ...]:
    """Hunyuan-DiT's rotary embeddings, cos and sin [tokens, head_dim], after diffusers' HunyuanDiTPipeline.

    The positions are those of an image of 512 pixels, stretched over the grid of this size.
    """
    from diffusers.models.embeddings import get_2d_rotary_pos_embed

    patch = config["patch_size"]
    rows, columns, base = height // patch, width // patch, 512 // _VAE_SCALE // patch
    covered = [round(base / max(rows, columns) * side) for side in (rows, columns)]
    top, left = (round((base - side) / 2) for side in covered)
    region = ((top, left), (top + covered[0], left + covered[1]))
    cos, sin = get_2d_rotary_pos_embed(config["attention_head_dim"], region, (rows, columns), output_type="pt")
    return cos, sin


def latent_of(kind: str, forward: Callable[..., Any]) -> str:
    """The name of the input with the noisy latents, by a class's ``forward``. UserError: the class is no denoiser."""
    taken = inspect.signature(forward).parameters
    latent = next((name for name in ("sample", "hidden_states") if name in taken), None)
    if latent is None or "timestep" not in taken:
        raise UserError(
            f"{kind} is no denoiser, for it takes no noisy latents with a timestep; name a diffusion denoiser "
            "(UNet or transformer)"
        )
    return latent


def specs_of(
    model: torch.nn.Module, config: Mapping[str, Any], size: int | tuple[int, int] | None, tokens: int | None
) -> tuple[dict[str, InputSpec], list[str]]:
    """Derives the inputs of a model from the parameters of its forward and its configuration.

    Args:
        model: a diffusers UNet or transformer.
        config: its configuration.
        size: height and width of the latents; None takes the configuration's sample_size.
        tokens: length of the text condition; None takes the configuration's, else diffusers' usual one.

    Returns:
        The inputs by name, latents and timestep first, and a sentence for each assumption.

    Raises:
        UserError: a structure that is not supported, or a size that the model does not take.
    """
    kind, notes = type(model).__name__, []
    taken = list(inspect.signature(model.forward).parameters)
    latent = latent_of(kind, model.forward)
    if strange := [name for name in taken if name not in _OPTIONAL | _KNOWN]:
        raise UserError(f"{kind} takes the input '{strange[0]}', which is not supported")

    if any(isinstance(module, torch.nn.Conv1d | torch.nn.Conv3d) for module in model.modules()):
        raise UserError(
            f"{kind} denoises no images, for it convolves over one axis or three: give recorded calls with "
            "--calibration, or an example of one"
        )
    if "img_ids" in taken and not any(base.__name__ == _POSITIONS for base in type(model).__mro__):
        raise UserError(f"{kind} takes 'img_ids', and how its pipeline numbers tokens is not known; that of Flux is")
    patch = convention_of(model).patch
    channels, sides = config.get("in_channels"), size or config.get("sample_size")
    if not isinstance(channels, int) or sides is None:
        raise UserError(f"the configuration of {kind} does not say the size of its latents; give their shape")
    height, width = _sides(kind, sides)
    if height % patch or width % patch:
        raise UserError(f"{kind} takes latents of {patch}x{patch} pixels a token, and {height}x{width} is no multiple")
    continuous = not _CONTINUOUS_TIME.isdisjoint(taken) or convention_of(model).timestep_unit != 1
    specs = [
        _spec(latent, (channels // patch**2, height, width), torch.float32),
        _spec("timestep", (), torch.float32 if continuous else torch.int64),
    ]
    if "encoder_hidden_states" in taken and (features := _text_features(kind, config)):
        length = config.get("text_len")
        if tokens and length and tokens != length:
            raise UserError(f"the text condition of {kind} is {length} tokens long, and {tokens} are asked for")
        if not (tokens := tokens or length):
            tokens = next(count for name, count in _TEXT_TOKENS.items() if name in taken)
            notes.append(f"the text condition is taken to be {tokens} tokens long")
        specs += _text_specs(taken, config, tokens, features)
    if classes := label_count(model, config):
        specs.append(_spec("class_labels", (), torch.int64, below=classes))

    if (added := config.get("addition_embed_type")) == "text_time":
        width_of_all = config["projection_class_embeddings_input_dim"]
        pooled = width_of_all - _TIME_IDS * config["addition_time_embed_dim"]
        specs.append(_spec("text_embeds", (pooled,), torch.float32))
        specs.append(_spec("time_ids", (_TIME_IDS,), torch.float32))
    elif added is not None:
        raise UserError(f"the addition_embed_type '{added}' of {kind} is not supported")
    if "timestep_cond" in taken and (conditioned := config.get("time_cond_proj_dim")):
        specs.append(_spec("timestep_cond", (conditioned,), torch.float32))  # the guidance of latent consistency models
    if getattr(model, "use_additional_conditions", False):
        specs.append(_spec("resolution", (2,), torch.float32))
        specs.append(_spec("aspect_ratio", (1,), torch.float32))
    return {spec.name: spec for spec in specs}, notes


def _sides(kind: str, sides: object) -> tuple[int, int]:
    """Height and width of latents, by one number or two. UserError: they are none."""
    both = [sides, sides] if isinstance(sides, int) else sides
    if isinstance(both, list | tuple) and len(both) == 2:
        height, width = both
        if all(type(side) is int and 0 < side <= MOST_PIXELS for side in both):
            return height, width
    raise UserError(
        f"'sample_size' of {kind} has to be one number of pixels or two, each from 1 to {MOST_PIXELS}, and is {sides!r}"
    )


def _spec(name: str, sample: tuple[int, ...], dtype: torch.dtype, below: int | None = None) -> InputSpec:
    """The input of batches of samples of the shape ``sample``."""
    return InputSpec(name, ("B", *sample), dtype, below)


def _text_features(kind: str, config: Mapping[str, Any]) -> int:
    """The width of the text condition, in features. UserError: the configuration does not say one width."""
    keys = ("encoder_hid_dim", "caption_channels", "joint_attention_dim", "cross_attention_dim")
    features = next((config[key] for key in keys if config.get(key)), None)
    if config.get("encoder_hid_dim_type") not in (None, "text_proj"):
        raise UserError(f"the encoder_hid_dim_type '{config['encoder_hid_dim_type']}' of {kind} is not supported")
    if isinstance(features, list | tuple):
        if len(set(features)) != 1:
            raise UserError(f"{kind} has cross_attention_dim {features}: blocks of unequal width are not supported")
        features = features[0]
    if not isinstance(features, int):
        raise UserError(f"the configuration of {kind} does not say the width of its text condition")
    return features


def _text_specs(taken: list[str], config: Mapping[str, Any], tokens: int, features: int) -> list[InputSpec]:
    """The inputs of the text condition: embeddings, masks (1 for a token, 0 for padding) and what goes with them."""
    floats = torch.float32
    specs = [_spec("encoder_hidden_states", (tokens, features), floats)]
    # UNets have the parameter as well, and no pipeline that uses it
    if "encoder_attention_mask" in taken and "hidden_states" in taken:
        specs.append(_spec("encoder_attention_mask", (tokens,), floats))
    if "encoder_hidden_states_t5" in taken:
        second = config["text_len_t5"]
        specs.append(_spec("text_embedding_mask", (tokens,), floats))
        specs.append(_spec("encoder_hidden_states_t5", (second, config["cross_attention_dim_t5"]), floats))
        specs.append(_spec("text_embedding_mask_t5", (second,), floats))
        if config.get("use_style_cond_and_image_meta_size"):
            specs.append(_spec("image_meta_size", (_TIME_IDS,), floats))
            specs.append(_spec("style", (), torch.int64, below=1))
    if "pooled_projections" in taken:
        specs.append(_spec("pooled_projections", (config["pooled_projection_dim"],), floats))
    if "guidance" in taken and config.get("guidance_embeds"):
        specs.append(_spec("guidance", (), floats))
    return specs


def label_count(model: torch.nn.Module, config: Mapping[str, Any]) -> int | None:
    """The number of class labels that the model takes, "no class" included; None where it takes none."""
    kind = type(model).__name__
    if "class_labels" in inspect.signature(model.forward).parameters and config.get("norm_type") == "ada_norm_zero":
        return int(config["num_embeds_ada_norm"]) + 1  # LabelEmbedding adds a row for dropped labels
    if getattr(model, "class_embedding", None) is None and not config.get("num_class_embeds"):
        return None
    if config.get("class_embed_type") is not None or not config.get("num_class_embeds"):
        raise UserError(f"the class_embed_type '{config.get('class_embed_type')}' of {kind} is not supported")
    return int(config["num_class_embeds"])


def fixed_values(specs: Mapping[str, InputSpec]) -> dict[str, list[float]]:
    """Values of the inputs that need not be chosen: sizes of the image for SDXL, PixArt and Hunyuan-DiT."""
    latents = next(iter(specs.values())).sample
    if len(latents) != 3:
        return {}  # no image: the call is of no known form
    _, height, width = latents
    pixels = [float(_VAE_SCALE * side) for side in (height, width)]
    fixed = {
        "time_ids": [*pixels, 0.0, 0.0, *pixels],
        "image_meta_size": [*pixels, *pixels, 0.0, 0.0],
        "style": [0.0],
        "resolution": pixels,
        "aspect_ratio": [pixels[0] / pixels[1]],
    }
    return {name: fixed[name] for name in specs if name in fixed}


def random_values(
    specs: Mapping[str, InputSpec], batch: int, steps: int, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """Draws random inputs by name: normal values; timesteps, labels and text lengths that differ within the batch.

    Args:
        specs: the inputs.
        batch: the number of samples.
        steps: the number of training timesteps.
        generator: source of the randomness.
    """
    fixed = fixed_values(specs)
    values = {}
    for name, spec in specs.items():
        if name in fixed:
            values[name] = torch.tensor(fixed[name], dtype=spec.dtype).repeat(batch, 1).reshape(batch, *spec.sample)
        elif name == "timestep" or spec.below is not None:
            values[name] = torch.randint(0, spec.below or steps, (batch,), generator=generator).to(spec.dtype)
        elif name.endswith("_mask") or "_mask_" in name:
            lengths = torch.randint(1, spec.sample[0] + 1, (batch, 1), generator=generator)
            values[name] = (torch.arange(spec.sample[0]) < lengths).to(spec.dtype)
        elif name == "guidance":
            values[name] = 1 + 6 * torch.rand(batch, generator=generator)
        else:
            values[name] = torch.randn(batch, *spec.sample, generator=generator)
    return values
