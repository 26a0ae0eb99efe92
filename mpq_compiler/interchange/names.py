"""The names that a model's parameters have in the checkpoint that diffusers' model was converted from.

stable-diffusion.cpp, ComfyUI and diffusers' `from_single_file` read those. The rules are diffusers' own conversion run
backwards (`diffusers.loaders.single_file_utils.convert_ldm_unet_checkpoint`), and that conversion checks the result.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

PREFIX = "model.diffusion_model."
_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_KINDS = "resnets|attentions|downsamplers|upsamplers"
_BLOCK = re.compile(rf"(down_blocks|mid_block|up_blocks)(?:\.(\d+))?\.({_KINDS})\.(\d+)\.")


def original(name: str, config: Mapping[str, object], parameters: Collection[str]) -> dict[str, str] | None:
    """The original name of each parameter; None where diffusers knows none.

    Args:
        name: of diffusers' class.
        config: of the model.
        parameters: their names in diffusers' model.
    """
    if name != "UNet2DConditionModel":
        return None
    from diffusers.loaders import single_file_utils as known

    tables: dict[str, dict[str, str]] = known.DIFFUSERS_TO_LDM_MAPPING["unet"]  # type: ignore[assignment]
    table = {**tables["layers"], "class_embedding.weight": "label_emb.weight"}
    if config.get("class_embed_type") in ("timestep", "projection"):
        table |= tables["class_embed_type"]
    if config.get("addition_embed_type") == "text_time":
        table |= tables["addition_embed_type"]
    layers = config["layers_per_block"]
    if not isinstance(layers, int):
        return None
    parts = [match for p in parameters if (match := _BLOCK.match(p)) is not None]
    crossed = {match[2] for match in parts if match[1] == "up_blocks" and match[3] == "attentions"}
    found = {p: PREFIX + (table.get(p) or _in_block(p, layers, crossed)) for p in parameters}
    try:
        back = known.convert_ldm_unet_checkpoint({new: p for p, new in found.items()}, dict(config))  # type: ignore[no-untyped-call]
    except (KeyError, IndexError):
        return None
    return found if {p: p for p in parameters} == {p: old for p, old in back.items() if old is not None} else None


def _in_block(parameter: str, layers: int, crossed: Collection[str | None]) -> str:
    """The original name of a parameter of a block; the parameter's own where it is in none.

    layers: of a block. crossed: the up blocks that have attentions, which stand before the upsampler there.
    """
    match = _BLOCK.match(parameter)
    if match is None:
        return parameter
    side, block, kind, number = match[1], int(match[2] or 0), match[3], int(match[4])
    rest = parameter[match.end() :]
    if kind == "resnets":
        head, dot, leaf = rest.partition(".")
        rest = _RESNET.get(head, head) + dot + leaf
    part = {"resnets": "0", "attentions": "1"}.get(kind, "0")
    if side == "mid_block":
        return f"middle_block.{2 * number + int(part)}.{rest}"
    first = block * (layers + 1)
    if kind == "downsamplers":
        return f"input_blocks.{first + layers + 1}.0.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":
        return f"output_blocks.{first + layers}.{2 if match[2] in crossed else 1}.{rest}"
    if side == "down_blocks":
        return f"input_blocks.{first + 1 + number}.{part}.{rest}"
    return f"output_blocks.{first + number}.{part}.{rest}"
