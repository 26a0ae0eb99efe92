"""Compiles the denoiser of a diffusers pipeline, and puts the artifact in its place.

>>> pipeline = mpq_compiler.compile(pipeline, "out.mpq", calls=["a red fox in the snow", "a harbour"], weights=4)
>>> pipeline("a lighthouse").images
>>> pipeline.unet.report.quality
"""

from __future__ import annotations

import copy
import inspect
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mpq_compiler.frontend import call_file, record
from mpq_compiler.frontend import denoiser as denoisers
from mpq_compiler.frontend.denoiser import Denoiser
from mpq_compiler.frontend.watch_pipeline import denoiser_of, require_cpu
from mpq_compiler.runtime import compiled_denoiser
from mpq_compiler.sampling import schedulers
from mpq_compiler.sampling.conditioning import TEXT
from mpq_compiler.support import tensorfile
from mpq_compiler.support.errors import Notice, UserError
from mpq_compiler.targets import table as targets


def compile_pipeline(
    pipeline: Any,
    output: str | Path,
    progress: Any = None,
    planned: Callable[..., None] | None = None,
    *,
    calls: Sequence[str | Mapping[str, Any]] = (),
    **options: Any,
) -> Any:
    """Compiles the denoiser of a diffusers pipeline, and returns the pipeline with the artifact in its place.

    Notes of the compilation become warnings.

    Args:
        pipeline: on the CPU; it is changed in place.
        output: the artifact.
        progress: opens progress bars, or None.
        planned: is called before anything is measured, as `compile_denoiser` does.
        calls: what the pipeline draws for calibration, as prompts or as keyword arguments of its call. Without them the
            options must name recorded inputs, or the denoiser is sampled alone where it takes no text.
        options: fields of `Options`. `steps`, `guidance` and `seed` apply to `calls`, too, unless these say otherwise.

    Returns:
        The pipeline; `pipeline.unet.report` or `pipeline.transformer.report` is the `Report`.

    Raises:
        UserError: whatever `compile` refuses; a target that this machine cannot run; a pipeline on a GPU; a call that
            the pipeline does not take.
    """
    from mpq_compiler.driver.check import check
    from mpq_compiler.driver.compile import compile_denoiser
    from mpq_compiler.driver.options import Options

    part = denoiser_of(pipeline)
    assert part is not None
    target = targets.resolve(options.get("target", "native"))
    if missing := sorted(targets.missing_features(target)):
        raise UserError(
            f"the pipeline could not run here with an artifact for '{target.name}', which needs {', '.join(missing)}: "
            "compile its denoiser alone"
        )
    require_cpu(pipeline, part)
    check(Options(**options), output)
    with tempfile.TemporaryDirectory() as scratch:
        if calls:
            if options.get("calibration") is not None:
                raise UserError("the calibration comes from a file or from calls of the pipeline: give one of them")
            options["calibration"] = Path(scratch) / "calls.safetensors"
            latent, time = options.get("latent"), options.get("time")
            with record.record_inputs(pipeline, options["calibration"], latent=latent, time=time):
                for index, call in enumerate(calls):
                    _draw(pipeline, call, index, options)
        calibration = options.get("calibration")
        said = {}
        if call_file.has_call(calibration):
            said = {name: options.pop(name, None) for name in ("latent", "time")}
        report = compile_denoiser(_denoiser(pipeline, part, calibration, **said), output, progress, planned, **options)
    for note in report.notes:
        warnings.warn(note, Notice, stacklevel=3)
    compiled = compiled_denoiser.load(output)
    compiled.report = report
    setattr(pipeline, part, compiled)
    return pipeline


def _denoiser(
    pipeline: Any, part: str, calibration: str | Path | None, latent: str | None = None, time: str | None = None
) -> Denoiser:
    """Wraps the pipeline's denoiser, with the latents' size and the number of tokens of the calibration file."""
    model = getattr(pipeline, part)
    if next(model.parameters()).dtype != torch.float32:
        model = copy.deepcopy(model)  # it is compiled from float32; the pipeline keeps its own until then
    name = Path(getattr(pipeline, "name_or_path", "") or type(pipeline).__name__).name
    if calibration is not None and call_file.has_call(calibration):
        return denoisers.wrap_calls(model, calibration, name=name, latent=latent, time=time)
    sizes: dict[str, Any] = {}
    if calibration is not None:
        header, _ = tensorfile.read_header(calibration)
        latents = next((header[name]["shape"] for name in ("sample", "hidden_states") if name in header), None)
        sizes["size"] = tuple(latents[2:]) if latents and len(latents) == 4 else None
        sizes["tokens"] = header[TEXT]["shape"][1] if TEXT in header else None
    scheduler, note = schedulers.from_config(schedulers.config_of(pipeline.scheduler))
    made = denoisers.wrap(model, name=name, scheduler=scheduler, **sizes)
    # What stands in for the pipeline's scheduler matters only where it is used.
    return replace(made, notes=(*made.notes, note)) if note and calibration is None else made


def _draw(pipeline: Any, call: str | Mapping[str, Any], index: int, options: Mapping[str, Any]) -> None:
    """Calls the pipeline once, up to the latents where it can stop there. UserError: the call fails."""
    taken = inspect.signature(pipeline.__call__).parameters
    named = {"prompt": call} if isinstance(call, str) else dict(call)
    if unknown := [name for name in named if name not in taken]:
        raise UserError(f"{type(pipeline).__name__} does not take '{unknown[0]}', which a call for calibration gives")
    usual = {
        "num_inference_steps": options.get("steps"),
        "guidance_scale": options.get("guidance"),
        "generator": torch.Generator().manual_seed(options.get("seed", 0) + index),
        "output_type": "latent",
    }
    given = {name: value for name, value in usual.items() if name in taken and value is not None} | named
    try:
        pipeline(**given)
    except Exception as error:  # a pipeline may raise anything
        what = f"{type(error).__name__}: {' '.join(str(error).split())}"
        given_as = ", ".join(map(_said, named.items()))
        raise UserError(
            f"call {index + 1} for calibration, of {given_as}, failed in {type(pipeline).__name__} ({what}); "
            "the pipeline must draw before its denoiser can be compiled"
        ) from error


def _said(argument: tuple[str, object]) -> str:
    """An argument of a call as a sentence names it: a tensor by its shape."""
    name, value = argument
    return f"{name} {list(value.shape)}" if isinstance(value, torch.Tensor) else f"{name} {value!r}"
