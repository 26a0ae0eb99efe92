"""Modules of diffusers made from checkpoints: built without drawing what the checkpoint holds, and filled with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from mpq_compiler.frontend import checkpoint
from mpq_compiler.frontend.input_specs import latent_of
from mpq_compiler.support.errors import UserError, nearest


def read(place: checkpoint.Location, by_calls: bool = False) -> torch.nn.Module:
    """Reads the module of a checkpoint, in float32.

    Args:
        place: where it lies.
        by_calls: whether it is called as recorded calls say, whatever its arguments are named.

    UserError: config.json describes no denoiser, or the weights are damaged or another model's.
    """
    config = checkpoint.read_json(place.denoiser / "config.json")
    module = _build(config, place.denoiser, by_calls)
    _fill(module, checkpoint.read_weights(place.denoiser), place.denoiser)
    return module


def _build(config: Mapping[str, Any], folder: Path, by_calls: bool) -> torch.nn.Module:
    """Builds the diffusers module that `config` describes, with weights still to be filled in."""
    import diffusers

    where = f"'{folder / 'config.json'}'"
    name = config.get("_class_name")
    if not isinstance(name, str):
        raise UserError(f"{where} has no _class_name; name a denoiser that diffusers saved")
    cls = getattr(diffusers, name, None)
    if not (isinstance(cls, type) and issubclass(cls, torch.nn.Module)):
        known = [key for key in dir(diffusers) if key.endswith("Model") and ("UNet" in key or "Transformer" in key)]
        raise UserError(
            f"{where} names the class '{name}', which diffusers does not have; {_did_you_mean(name, known)}"
        )
    try:
        if not by_calls:
            latent_of(name, cls.forward)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    try:
        with torch.random.fork_rng(devices=[]), _Unfilled():
            module: torch.nn.Module = cls.from_config({**config})  # type: ignore[attr-defined]
            return module
    except Exception as error:  # a constructor given arbitrary values can raise anything
        raise UserError(f"{where} does not describe a {name}: {one_line(error)}") from error


class _Unfilled(TorchFunctionMode):
    """Leaves parameters as they are allocated, in memory that is not touched: the checkpoint's take their place."""

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        first, *_ = *args, *(kwargs or {}).values(), None
        if getattr(func, "__module__", None) == torch.nn.init.__name__ and isinstance(first, torch.nn.Parameter):
            return first
        return func(*args, **(kwargs or {}))


def _fill(module: torch.nn.Module, weights: dict[str, torch.Tensor], folder: Path) -> None:
    """Puts `weights` into `module`; they must be exactly its tensors, of the same shapes and types."""
    # diffusers' own renaming of the attention layers of old checkpoints
    if callable(rename := getattr(module, "_fix_state_dict_keys_on_load", None)):
        rename(weights)
    expected = module.state_dict()
    for names, fault in (
        (sorted(expected.keys() - weights.keys()), "lack"),
        (sorted(weights.keys() - expected.keys()), "have, beyond what the model takes,"),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(
                f"the weights in '{folder}' {fault} the tensor '{names[0]}'{more}; config.json and "
                "the weights are not of one model"
            )
    for name, tensor in expected.items():
        if tensor.shape != weights[name].shape:
            raise UserError(
                f"the tensor '{name}' in '{folder}' is {_shape(weights[name])} and config.json asks for "
                f"{_shape(tensor)}; they are not of one model"
            )
        if tensor.dtype != weights[name].dtype:
            kind, wanted = (str(t.dtype).removeprefix("torch.") for t in (weights[name], tensor))
            raise UserError(
                f"the tensor '{name}' in '{folder}' is {kind}, and the model has {wanted} there; "
                "weights are compiled from floats: give the checkpoint that was not quantized"
            )
    module.load_state_dict(weights, assign=True)


def _did_you_mean(name: str, known: list[str]) -> str:
    hint = nearest(name, known)
    return hint if hint.startswith("did you mean") else "name a UNet or transformer of diffusers"


def _shape(tensor: torch.Tensor) -> str:
    return "[" + ", ".join(map(str, tensor.shape)) + "]"


def one_line(error: Exception) -> str:
    """What an error of a model's own code says, as part of a sentence."""
    return " ".join(str(error).split())[:200] or type(error).__name__
