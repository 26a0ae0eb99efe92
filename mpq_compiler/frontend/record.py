"""Records the inputs of a denoiser while a user's own diffusers pipeline draws."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mpq_compiler.frontend.input_specs import convention_of
from mpq_compiler.sampling import schedulers
from mpq_compiler.support import files, tensorfile
from mpq_compiler.support.errors import UserError


@contextmanager
def record_inputs(pipeline: Any, path: str | Path, every: int = 1) -> Iterator[None]:
    """Records the calls of a diffusers pipeline's denoiser within the block, and writes them to a calibration file.

    Nothing is written when the block raises.

    Args:
        pipeline: a pipeline, or the denoiser itself.
        path: the file to write.
        every: keeps one call in so many, with all rows of its batch.

    Raises:
        UserError: no call was made, calls differ in their inputs' shapes, or the file cannot be written.
    """
    path = Path(path)
    files.check_place(path)
    model = getattr(pipeline, "unet", None) or getattr(pipeline, "transformer", None) or pipeline
    parameters = inspect.signature(model.forward)
    convention = convention_of(model)
    kept: list[dict[str, np.ndarray]] = []
    stated: dict[str, set[str]] = {}
    seen = 0

    def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal seen
        seen += 1
        if (seen - 1) % every:
            return
        named = convention.inputs(parameters.bind(*args, **kwargs).arguments)
        row = {n: torch.as_tensor(v).detach().cpu() for n, v in named.items() if not isinstance(v, dict | list | tuple)}
        batch = max(len(v) for v in row.values() if v.ndim)
        row["timestep"] = row["timestep"].reshape(-1).expand(batch)
        made = {n: (v.float() if v.is_floating_point() else v).numpy() for n, v in row.items()}
        shapes = [{n: v.shape[1:] for n, v in call.items()} for call in (made, *kept[:1])]
        if different := [n for n in shapes[0].keys() | shapes[-1].keys() if shapes[0].get(n) != shapes[-1].get(n)]:
            name = min(different)
            first, now = (list(shape.get(name, ())) if name in shape else "none" for shape in reversed(shapes))
            raise UserError(
                f"a call gives '{name}' of {now}, the first one of {first}: record calls of one size and kind in a file"
            )
        kept.append(made)
        for name, text in _sampled_by(pipeline).items():
            stated.setdefault(name, set()).add(text)

    handle = model.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
    if not kept:
        raise UserError(f"nothing to write to '{path}': the pipeline's {type(model).__name__} was not called")
    tensors = {name: np.concatenate([call[name] for call in kept]) for name in kept[0]}
    # What changed between the calls describes none of them.
    metadata = {name: next(iter(texts)) for name, texts in stated.items() if len(texts) == 1}
    try:
        files.write_whole(path, lambda stream: tensorfile.save(stream, tensors, metadata))
    except OSError as error:
        raise UserError(f"cannot write '{path}': {error.strerror}") from error


def _sampled_by(pipeline: Any) -> dict[str, str]:
    """How a pipeline samples at present, as a calibration file's metadata; what it does not tell is left out."""
    scheduler = getattr(pipeline, "scheduler", None)
    steps = getattr(scheduler, "num_inference_steps", None)
    guidance = getattr(pipeline, "_guidance_scale", None)
    found = {} if steps is None else {"steps": str(steps)}
    if guidance is not None:
        found["guidance"] = f"{float(guidance):g}"
    if scheduler is not None:
        found["scheduler"] = json.dumps(schedulers.config_of(scheduler), default=str)
    return found
