"""LoRA files: the factors that they hold, by layer, in the spellings of kohya's scripts and of PEFT and diffusers.

    kohya              lora_unet_mid_block_attentions_0_proj_in.lora_down.weight, .lora_up.weight, .alpha
    PEFT, diffusers    unet.mid_block.attentions.0.proj_in.lora_A.weight, .lora_B.weight
    older diffusers    unet.mid_block.attentions.0.proj_in.lora.down.weight, .lora.up.weight

Kohya's scripts train SDXL in Stable Diffusion's original code, whose names are translated.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict, cast

import numpy as np

from mpq_compiler.artifact import documents
from mpq_compiler.support import tensorfile
from mpq_compiler.support.errors import UserError

METADATA = "lora_adapter_metadata"
"""The key of diffusers' adapter settings in the metadata of a file."""
ADAPTER = "adapter_config.json"
"""PEFT's adapter settings, in a file beside the tensors."""
_WRAPPED = "base_model.model."
_PREFIXES = (_WRAPPED, "unet.", "transformer.", "diffusion_model.", "lora_unet_", "lora_transformer_")
"""What stands before the path of a layer of the denoiser."""
_OF_TEXT = re.compile(r"lora_te\d?_|text_encoder")
_DOWN = re.compile(r"(.+?)(?:\.lora_down|\.lora_A(?:\.\w+)?|[._]lora\.down|\.lora_linear_layer\.down)\.weight")
_UP = re.compile(r"(.+?)(?:\.lora_up|\.lora_B(?:\.\w+)?|[._]lora\.up|\.lora_linear_layer\.up)\.weight")
_ALPHA = re.compile(r"(.+?)\.alpha")


@dataclass(frozen=True)
class Factors:
    """The change of a layer's weight: ``up`` f32 [O, r] times ``down`` f32 [r, I] or [r, I, kh, kw], scaled already."""

    up: np.ndarray
    down: np.ndarray

    @property
    def rank(self) -> int:
        return len(self.down)


def read(path: str | os.PathLike[str], names: Mapping[str, str]) -> tuple[dict[str, Factors], list[str]]:
    """Reads a LoRA.

    Args:
        path: a safetensors file.
        names: the layers that can take factors, by every name that a file may have for them (`spellings`).

    Returns:
        The factors by layer, and sentences on what is left out.

    Raises:
        UserError: the file is damaged or no LoRA, it changes another layer, or is of a kind that cannot be taken.
    """
    tensors = tensorfile.load(path)
    ours = {key: value for key, value in tensors.items() if not _OF_TEXT.match(key)}
    if not ours:
        raise UserError(f"{path} holds no LoRA of a denoiser" + (", only of a text encoder" if tensors else ""))
    parts: dict[str, dict[str, np.ndarray]] = {}
    for key, value in ours.items():
        for kind, pattern in (("down", _DOWN), ("up", _UP), ("alpha", _ALPHA)):
            if match := pattern.fullmatch(key):
                parts.setdefault(match[1], {})[kind] = value
                break
        else:
            raise UserError(
                f"{path} holds '{key}', which is no factor of a plain LoRA: of DoRA, LoHa, LoKr and others an artifact "
                "has no branches; fuse it into the model before compiling"
            )
    layers = _layers(path, parts, names)
    settings = _settings(path, parts)
    found = {}
    for layer, spelled in layers.items():
        found[layer] = _factors(path, spelled, parts[spelled], settings)
    notes = []
    if left := len(tensors) - len(ours):
        notes.append(f"{left} tensors of {path} are of a text encoder, which is no part of this artifact: left out")
    return found, notes


def spellings(paths: Iterable[str], layers_per_block: object = None) -> dict[str, str]:
    """The paths of layers by every name that files have for them.

    layers_per_block: of a UNet's configuration; names of Stable Diffusion's original code count blocks by it.
    """
    found: dict[str, str] = {}
    for path in paths:
        block, _, layer = re.sub(r"\.to_out\.0$", ".to_out", path).rpartition(".")
        names = [path, f"{block}.processor.{layer}"]
        if isinstance(layers_per_block, int):
            names += _original_names(path, layers_per_block)
        for name in names:
            found |= {name: path, name.replace(".", "_"): path}
    return found


_ORIGINAL = {
    **{"conv_in": "input_blocks.0.0", "conv_out": "out.2"},
    **{"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"},
    **{"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"},
    **{"mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1"},
    **{"mid_block.resnets.1": "middle_block.2"},
}
_ORIGINAL_RESNET = {"conv1": "in_layers.2", "conv2": "out_layers.3", "time_emb_proj": "emb_layers.1"}
_ORIGINAL_RESNET |= {"conv_shortcut": "skip_connection"}


def _original_names(path: str, layers: int) -> Iterator[str]:
    """The names of a UNet's layer in Stable Diffusion's original code, which kohya's scripts train for SDXL."""
    block = re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.", path)
    begin, rest = "", path
    if block:
        first, kind, layer = int(block[2]) * (layers + 1), block[3], int(block[4])
        rest = path[block.end() :]
        at = {"downsamplers": first + layers + 1, "upsamplers": first + layers}
        number = at.get(kind, first + layer + (block[1] == "down"))
        begin = f"{'input' if block[1] == 'down' else 'output'}_blocks.{number}."
        if kind == "downsamplers":
            yield f"{begin}0.op"
        elif kind == "upsamplers":  # behind the attention, where there is one
            yield from (f"{begin}{place}.{rest}" for place in (1, 2))
        begin += "1." if kind == "attentions" else "0."
    else:
        for name, original in _ORIGINAL.items():
            if path == name or path.startswith(name + "."):
                begin, rest = original, path[len(name) :].removeprefix(".")
                begin += "." if rest else ""
    if begin:
        yield begin + _ORIGINAL_RESNET.get(rest, rest)


def _layers(path: object, parts: Iterable[str], names: Mapping[str, str]) -> dict[str, str]:
    """The name in the file of each layer that it changes. UserError: there is no branch for a layer, or it has two."""
    found: dict[str, str] = {}
    lacking = []
    for spelled in parts:
        stripped = next((spelled[len(p) :] for p in _PREFIXES if spelled.startswith(p)), spelled)
        layer = names.get(stripped) or names.get(spelled)
        if layer is None:
            lacking.append(stripped)
        elif layer in found:
            raise UserError(f"{path} is damaged: '{found[layer]}' and '{spelled}' are one layer; get the file again")
        else:
            found[layer] = spelled
    if lacking:
        more = f" and {len(lacking) - 1} other layers" if len(lacking) > 1 else ""
        known = sorted({*names.values()})
        raise UserError(
            f"{path} changes '{lacking[0]}'{more}, for which this artifact has no branch (it has {len(known)}, such as "
            f"'{known[0]}'): compile it with --lora-layers that name them, or fuse the LoRA into the model before that"
        )
    return found


def _factors(path: object, name: str, parts: Mapping[str, np.ndarray], settings: _Settings) -> Factors:
    def damaged(what: str) -> UserError:
        return UserError(f"{path} is damaged: {what} of '{name}'; get the file again")

    if missing := [kind for kind in ("down", "up") if kind not in parts]:
        raise damaged(f"it lacks the factor {missing[0]}")
    stored = {}
    for kind, value in parts.items():
        if value.dtype.kind != "f":
            raise damaged(f"{kind} is {value.dtype}")
        with np.errstate(over="ignore"):
            stored[kind] = value.astype(np.float32)
        if not np.isfinite(stored[kind]).all():
            raise damaged(f"NaN or infinity in {kind}")
    up, down, alpha = stored["up"], stored["down"], stored.get("alpha")
    sides = f"up {list(up.shape)} and down {list(down.shape)}"
    if {up.ndim, down.ndim} - {2, 4} or up.shape[2:] not in ((), (1, 1)) or not (up.size and down.size):
        raise damaged(f"{sides} are no factors of a weight")
    if up.shape[1] != len(down):
        raise damaged(f"{sides} have different ranks")
    if alpha is not None and alpha.size != 1:
        raise damaged(f"alpha {list(alpha.shape)} is no number")
    with np.errstate(over="ignore"):
        up = up.reshape(len(up), -1) * np.float32(_scale(name, alpha, len(down), settings))
    if not np.isfinite(up).all():
        raise damaged("alpha makes infinity of up")
    return Factors(up, down)


def _scale(name: str, alpha: np.ndarray | None, rank: int, settings: _Settings) -> float:
    """The factor of ``up @ down``: alpha / rank, where the file or its settings have an alpha, else 1."""
    if alpha is not None:
        return float(alpha.item()) / rank
    value = settings.get("lora_alpha")
    for pattern, other in (settings.get("alpha_pattern") or {}).items():
        if _ending(pattern).fullmatch(name):
            value = other
    if value is None:
        return 1.0
    return float(value) / (rank**0.5 if settings.get("use_rslora") else rank)


class _Settings(TypedDict, total=False):
    """PEFT's settings of an adapter (schemas/lora-settings.json)."""

    lora_alpha: float | None
    alpha_pattern: dict[str, float | None] | None
    use_rslora: bool | None
    use_dora: bool | None


def _settings(path: str | os.PathLike[str], names: Iterable[str]) -> _Settings:
    """The adapter's settings, of the file or beside it; {} where it has none. UserError: it is no plain LoRA."""
    beside = Path(path).with_name(ADAPTER)
    text = tensorfile.metadata(path).get(METADATA)
    of_peft = text is None and any(name.startswith(_WRAPPED) for name in names)
    if of_peft and not beside.is_file():
        raise UserError(f"{path} is of PEFT, which keeps its scale in {ADAPTER}: put that file beside it")
    try:
        if of_peft:
            with beside.open("rb") as stream:
                given = documents.parse(documents.read(stream))
        else:
            given = documents.parse((text or "{}").encode(errors="replace"))
            given = {re.sub(r"^(unet|transformer)\.", "", key): value for key, value in given.items()}
        documents.require(given, "lora-settings")
        settings = cast(_Settings, given)
        for pattern in settings.get("alpha_pattern") or {}:
            _ending(pattern)
    except (documents.Unsound, OSError) as error:
        raise UserError(f"the settings of {path} are damaged: the document {error}; get the file again") from error
    if settings.get("use_dora"):
        raise UserError(f"{path} is a DoRA, which scales whole weights: fuse it into the model before compiling")
    return settings


_INVOLVED = re.compile(r"\)[*+?{]|([*+?{].*){4}")
"""What may take for ever to match: repeated groups, and more than three repetitions."""


def _ending(pattern: str) -> re.Pattern[str]:
    """The expression of names that end as a pattern says, from a name's beginning or from behind a dot.

    Unsound: the pattern is no regular expression, or a long or involved one, which no layers are named by.
    """
    if len(pattern) > 200 or _INVOLVED.search(pattern):
        raise documents.Unsound(f"has an alpha_pattern '{pattern}' that is too involved: name the layers")
    try:
        return re.compile(rf"(.*\.)?({pattern})")
    except (re.error, OverflowError) as error:
        raise documents.Unsound(f"has an alpha_pattern '{pattern}' that is no regular expression ({error})") from error
