"""Records the inputs of a denoiser while a user's own diffusers pipeline draws."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mpq_compiler.frontend import call_file
from mpq_compiler.frontend.call_module import arguments_of
from mpq_compiler.frontend.input_specs import convention_of, latent_of, specs_of
from mpq_compiler.sampling import call_tree, schedulers
from mpq_compiler.sampling.call_tree import Arguments
from mpq_compiler.support import files, tensorfile
from mpq_compiler.support.errors import UserError


@contextmanager
def record_inputs(
    pipeline: Any, path: str | Path, every: int = 1, latent: str | None = None, time: str | None = None
) -> Iterator[None]:
    """Records the calls of a denoiser within the block, and writes them to a calibration file.

    Nothing is written when the block raises. A model whose inputs are known has them in the file by name, [N, ...]
    each (docs/calibration.md). Of any other, and of calls that give more or are of several kinds, the form is kept as
    well: a compiled one is called in that form.

    Args:
        pipeline: a diffusers pipeline, or the denoiser itself.
        path: the file to write.
        every: keeps one call in so many, with all rows of its batch.
        latent: the argument with the noisy latents, where its name does not tell.
        time: the argument with the time, where its name does not tell.

    Raises:
        UserError: no call was made, calls are of more than `MOST_KINDS`, or the file cannot be written.
    """
    path = Path(path)
    files.check_place(path)
    model = getattr(pipeline, "unet", None) or getattr(pipeline, "transformer", None) or pipeline
    calls: list[Arguments] = []
    stated: dict[str, set[str]] = {}
    seen = 0

    def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal seen
        seen += 1
        if (seen - 1) % every:
            return
        tree, tensors = call_tree.flatten(arguments_of(model, args, kwargs))
        kept = {path: torch.as_tensor(value).detach().cpu().clone() for path, value in tensors.items()}
        calls.append(call_tree.unflatten(tree, kept))
        for name, text in _sampled_by(pipeline).items():
            stated.setdefault(name, set()).add(text)

    handle = model.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
    if not calls:
        raise UserError(f"nothing to write to '{path}': the pipeline's {type(model).__name__} was not called")
    # What changed between the calls describes none of them.
    metadata = {name: next(iter(texts)) for name, texts in stated.items() if len(texts) == 1}
    if latent or time or (tensors := _known(model, calls)) is None:
        call_file.write(path, model, calls, metadata, latent, time)
        return
    try:
        files.write_whole(path, lambda stream: tensorfile.save(stream, tensors, metadata))
    except OSError as error:
        raise UserError(f"cannot write '{path}': {error.strerror}") from error


def _known(model: torch.nn.Module, calls: list[Arguments]) -> dict[str, np.ndarray] | None:
    """The inputs of a model of a known kind by name; None where it is of another, or is given more or several sizes."""
    try:
        latent_of(type(model).__name__, model.forward)
        convention = convention_of(model)
        rows = [_row(convention.inputs(call)) for call in calls]
        first = next(iter(rows))
        latents = first["sample" if "sample" in first else "hidden_states"]
        text = first.get("encoder_hidden_states")
        tokens = None if text is None else int(text.shape[1])
        specs, _ = specs_of(model, dict(getattr(model, "config", {})), tuple(latents.shape[2:]), tokens)
    except (UserError, KeyError, IndexError, AttributeError, TypeError, ValueError, RuntimeError):
        return None
    if any(row.keys() != specs.keys() for row in rows):
        return None
    if any(value.shape[1:] != first[name].shape[1:] for row in rows for name, value in row.items()):
        return None
    return {name: np.concatenate([row[name] for row in rows]) for name in first}


def _row(named: Arguments) -> dict[str, np.ndarray]:
    """The inputs of a call as arrays, with the time of each sample."""
    given = {name: value for name, value in named.items() if not (isinstance(value, dict) and not value)}
    row = {name: torch.as_tensor(value) for name, value in given.items()}
    batch = max(len(value) for value in row.values() if value.ndim)
    row["timestep"] = row["timestep"].reshape(-1).expand(batch)
    return {name: (value.float() if value.is_floating_point() else value).numpy() for name, value in row.items()}


def _sampled_by(pipeline: Any) -> dict[str, str]:
    """How a pipeline samples at present, as a calibration file's metadata; what it does not tell is left out."""
    scheduler = getattr(pipeline, "scheduler", None)
    steps = getattr(scheduler, "num_inference_steps", None)
    guidance = getattr(pipeline, "_guidance_scale", None)
    found = {} if steps is None else {"steps": str(steps)}
    if isinstance(guidance, int | float):  # of films each frame may have its own
        found["guidance"] = f"{float(guidance):g}"
    if scheduler is not None:
        found["scheduler"] = json.dumps(schedulers.config_of(scheduler), default=str)
    return found
