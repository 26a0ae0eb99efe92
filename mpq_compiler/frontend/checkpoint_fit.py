"""Whether a checkpoint's weights are those of the model that its config.json describes, by headers alone."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch

from mpq_compiler.frontend import checkpoint, custom_code
from mpq_compiler.support.errors import UserError, named


def renamed(model: torch.nn.Module, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights by the model's own names, without those that its class lets checkpoints have and does not take."""
    weights = dict(weights)
    # diffusers' own renaming of the attention layers of old checkpoints
    if callable(rename := getattr(model, "_fix_state_dict_keys_on_load", None)):
        rename(weights)
    ignored = _ignored(model, weights)
    return {name: tensor for name, tensor in weights.items() if name not in ignored}


def _ignored(model: torch.nn.Module, names: Mapping[str, torch.Tensor]) -> list[str]:
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    found = [name for name in names if any(re.search(pattern, name) for pattern in patterns)]
    return sorted(set(found) - model.state_dict().keys()) if found else []


def require(model: torch.nn.Module, promised: dict[str, torch.Tensor], folder: Path) -> None:
    """UserError: the weights are not exactly the model's tensors, of its shapes and kinds of numbers.

    Args:
        model: of which only names, shapes and types are read.
        promised: the checkpoint's tensors, without values.
        folder: of the checkpoint.
    """
    expected, given = model.state_dict(), renamed(model, promised)
    for name in sorted(expected.keys() & given.keys()):
        here, there = expected[name].dtype, given[name].dtype
        if here != there and not (here.is_floating_point and there.is_floating_point):
            kind, wanted = (str(dtype).removeprefix("torch.") for dtype in (there, here))
            raise UserError(
                f"the tensor '{name}' in '{folder}' is {kind}, and the model has {wanted} there; "
                "weights are compiled from floats: give the checkpoint that was not quantized"
            )
    for names, fault in (
        (sorted(expected.keys() - given.keys()), "lack"),
        (sorted(given.keys() - expected.keys()), "have, beyond what the model takes,"),
    ):
        if names:
            what = "the tensor" if len(names) == 1 else f"{len(names)} tensors:"
            raise UserError(
                f"the weights in '{folder}' {fault} {what} {named(names)}; config.json and the "
                "weights are not of one model"
            )
    for name, tensor in expected.items():
        if tensor.shape != given[name].shape:
            raise UserError(
                f"the tensor '{name}' in '{folder}' is {list(given[name].shape)} and config.json asks for "
                f"{list(tensor.shape)}; they are not of one model"
            )


def notes(model: torch.nn.Module, place: checkpoint.Location) -> tuple[str, ...]:
    """What a user should know of a checkpoint that was taken, one sentence each: its commit, what was left aside."""
    found = checkpoint.headers(place.denoiser)
    said: list[str] = []
    if place.source is not None:
        said.append("the weights are '{file}' of '{repository}' at commit {commit}".format_map(place.source))
    if scales := found.scales.activations:
        said.append(
            f"scales of activations in the checkpoint ({named(scales, 1)}) are left aside: activations are calibrated"
        )
    if ignored := _ignored(model, found.promised()):
        said.append(
            f"tensors of the checkpoint ({named(ignored, 1)}) are left aside: {type(model).__name__} allows them, and "
            "does not take them"
        )
    if code := custom_code.files(place.denoiser):
        said.append(f"code beside the model ({named(code)} in '{place.denoiser}') was not run: it is not needed")
    return tuple(said)
