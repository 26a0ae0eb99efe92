"""Modules of diffusers made from checkpoints: built without drawing what the checkpoint holds, and filled with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from mpq_compiler.frontend import checkpoint, checkpoint_fit, custom_code
from mpq_compiler.frontend.input_specs import latent_of
from mpq_compiler.frontend.widened import held
from mpq_compiler.support.errors import UserError, nearest


def read(place: checkpoint.Location, by_calls: bool = False) -> torch.nn.Module:
    """Reads the module of a checkpoint, in float32; large weights in half precision stay in their files (`widened`).

    Args:
        place: where it lies.
        by_calls: whether it is called as recorded calls say, whatever its arguments are named.

    UserError: config.json describes no denoiser, or the weights are damaged or another model's.
    """
    config = checkpoint.read_json(place.denoiser / "config.json")
    index = place.denoiser.parent / "model_index.json"
    pipeline = checkpoint.read_json(index) if index.is_file() else {}
    custom_code.require_none(config, place.denoiser, pipeline, _known)
    promised = checkpoint.headers(place.denoiser).promised()
    module = _build(config, place.denoiser, by_calls)
    checkpoint_fit.require(module, promised, place.denoiser)  # all that can be wrong, before any weight is read
    _fill(module, checkpoint_fit.renamed(module, checkpoint.read_weights(place.denoiser)))
    return module


def _known(name: str) -> bool:
    """Whether diffusers has a class or a module of pipelines of that name."""
    import diffusers

    return name == diffusers.__name__ or hasattr(diffusers, name) or hasattr(diffusers.pipelines, name)


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


def _fill(module: torch.nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Puts `weights` into `module`, which are those that it takes (`checkpoint_fit.require`)."""
    module.load_state_dict({name: held(tensor) for name, tensor in weights.items()}, assign=True)


def _did_you_mean(name: str, known: list[str]) -> str:
    hint = nearest(name, known)
    if hint.startswith("did you mean"):
        return hint
    return (
        "name a UNet or transformer of diffusers, or build the module yourself and use "
        "mpq_compiler.compile(module, out, example=...)"
    )


def one_line(error: Exception) -> str:
    """What an error of a model's own code says, as part of a sentence."""
    return " ".join(str(error).split())[:200] or type(error).__name__
