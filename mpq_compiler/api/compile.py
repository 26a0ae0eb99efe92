"""The entry point `mpq_compiler.compile`, which compiles a model, a folder or a diffusers pipeline to an artifact."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, overload

import torch

from mpq_compiler.api import diffusers
from mpq_compiler.artifact.pipeline import DENOISER
from mpq_compiler.driver import pipeline as pipelines
from mpq_compiler.driver.compile import compile_denoiser
from mpq_compiler.driver.documented import documented
from mpq_compiler.driver.estimate import Estimate, estimate_denoiser
from mpq_compiler.driver.options import require_known
from mpq_compiler.driver.report import Report
from mpq_compiler.frontend import calibration_file, call_file, pipeline_parts
from mpq_compiler.frontend.call_module import variations
from mpq_compiler.frontend.checkpoint import place_of
from mpq_compiler.frontend.denoiser import Denoiser, wrap, wrap_calls
from mpq_compiler.frontend.watch_pipeline import denoiser_of
from mpq_compiler.pipeline.backend import Progress
from mpq_compiler.sampling.call_tree import Arguments
from mpq_compiler.support.errors import UserError

EXAMPLES = 16
"""Calls that calibrate a model of which one is given."""
ARGUMENTS = ("example", "calls", "parts", "decoder", "prompts")
"""The keyword arguments of `compile` that are no options."""
Planned = Callable[[Estimate, str | None], None]


@overload
def compile(
    model: str | Path | Denoiser,
    output: str | Path,
    progress: Progress | None = None,
    *,
    parts: Sequence[str] | None = None,
    decoder: str | Path | torch.nn.Module | None = None,
    prompts: Sequence[str] = (),
    planned: Planned | None = None,
    **options: Any,
) -> Report: ...


@overload
def compile(
    model: Any,
    output: str | Path,
    progress: Progress | None = None,
    *,
    example: Arguments | Sequence[Arguments] | None = None,
    calls: Sequence[str | Arguments] = (),
    parts: Sequence[str] | None = None,
    decoder: str | Path | torch.nn.Module | None = None,
    prompts: Sequence[str] = (),
    planned: Planned | None = None,
    **options: Any,
) -> Any: ...


@documented
def compile(
    model: Any,
    output: str | Path,
    progress: Progress | None = None,
    *,
    example: Arguments | Sequence[Arguments] | None = None,
    calls: Sequence[str | Arguments] = (),
    parts: Sequence[str] | None = None,
    decoder: str | Path | torch.nn.Module | None = None,
    prompts: Sequence[str] = (),
    planned: Planned | None = None,
    **options: Any,
) -> Any:
    """Compiles a model to an artifact, or a pipeline to a folder of them.

    Args:
        model: a folder, a hub id, a bundled name, a `Denoiser`, a diffusers pipeline, or any module.
        output: the artifact, a folder or a .zip.
        progress: opens progress bars, or None.
        example: the keyword arguments of a call of the module; it is calibrated with other noise in its latents. What
            calibrates better are recorded calls (`record_inputs`), in the option ``calibration``. A list has calls of
            several kinds, the first of which is calibrated (docs/calibration.md).
        calls: what a diffusers pipeline draws for calibration, as prompts or as keyword arguments of its call.
        parts: the parts of a pipeline that are compiled, `text`, `denoiser` and `decoder`; `load_pipeline` draws with
            what all of them make. None: all of a folder, and of a pipeline in memory the denoiser, which is replaced.
        decoder: the autoencoder that decodes in place of the pipeline's own, or its folder.
        prompts: what the parts of a pipeline are calibrated on, in place of those of its folder's prompts.txt, or of
            ours.
        planned: is called before anything is measured, with the `Estimate`, and with a sentence where the memory
            lowered the number of jobs, or None.
        options: as listed below.

    Returns:
        The `Report`; of several parts a `PipelineReport`; for a pipeline in memory the pipeline itself, with its
        denoiser replaced (`diffusers.compile_pipeline`).

    Raises:
        UserError: an input that cannot be compiled; nothing is left at ``output`` then.
    """
    require_known(options, ARGUMENTS)
    folder = isinstance(model, str | Path) and pipelines.is_pipeline(model) and parts != (DENOISER,)
    if folder or (denoiser_of(model) is not None and parts is not None):
        decodes = pipelines.load_decoder(decoder) if isinstance(decoder, str | Path) else decoder
        whole = pipelines.load(model) if folder else model
        chosen = pipelines.ROLES if parts is None else parts
        if isinstance(model, str | Path) and not prompts:
            prompts = pipeline_parts.prompts(folder=place_of(model))
        return pipelines.compile_pipeline(
            whole, output, progress, planned, parts=chosen, decoder=decodes, prompts=prompts, **options
        )
    if parts not in (None, (DENOISER,)):
        raise UserError("parts are those of a pipeline, with a text encoder and a decoder: leave --parts out")
    if decoder or prompts:
        idle = "decoder" if decoder else "prompts"
        raise UserError(f"--{idle} is of a pipeline that is compiled with all its parts: leave it out")
    if denoiser_of(model) is not None:
        return diffusers.compile_pipeline(model, output, progress, planned, calls=calls, **options)
    if calls:
        raise UserError("calls are those of a diffusers pipeline in memory: give that, or leave them out")
    if isinstance(model, torch.nn.Module):
        return _by_calls(model, output, progress, planned, example, options)
    if not isinstance(model, str | Path | Denoiser):
        raise UserError(
            f"cannot compile a {type(model).__name__}: give a folder, a hub id, a bundled name, a diffusers pipeline, "
            "or a module"
        )
    if example is not None:
        raise UserError("an example is of a module in memory: give the module, or recorded calls with `calibration`")
    return compile_denoiser(model, output, progress, planned, **options)


@documented
def estimate(model: str | Path | Denoiser, progress: Progress | None = None, **options: Any) -> Estimate:
    """Estimates what compiling a model takes: seconds, memory and disk of each pass. Nothing but the trace is run.

    Args:
        model: a folder, a hub id, a bundled name, or a `Denoiser`.
        progress: opens progress bars, or None.
        options: as listed below.

    Raises:
        UserError: an input that cannot be compiled, or that takes more memory or disk than there is.
    """
    return estimate_denoiser(model, progress, **options)


def _by_calls(
    model: torch.nn.Module,
    output: str | Path,
    progress: Progress | None,
    planned: Planned | None,
    example: Arguments | Sequence[Arguments] | None,
    options: dict[str, Any],
) -> Report:
    """Compiles a module by an example of its calls, or by those that a file holds."""
    calibration, kind = options.get("calibration"), type(model).__name__
    if (example is None) == (calibration is None):
        raise UserError(
            f"{kind} is compiled by its calls: give one with `example`, or a file of `record_inputs` with `calibration`"
        )
    if example is None and not call_file.has_call(calibration):
        tokens = calibration_file.tokens(calibration)
        return compile_denoiser(wrap(model, name=kind, tokens=tokens), output, progress, planned, **options)
    latent, time = options.pop("latent", None), options.pop("time", None)
    with tempfile.TemporaryDirectory() as scratch:
        if example is not None:
            options["calibration"] = Path(scratch) / "calls.safetensors"
            examples, seed = [example] if isinstance(example, dict) else [*example], options.get("seed", 0)
            calls = [call for one in examples for call in variations(model, one, EXAMPLES, seed, latent)]
            call_file.write(options["calibration"], model, calls, latent=latent, time=time)
        denoiser = wrap_calls(model, options["calibration"], name=kind, latent=latent, time=time)
        return compile_denoiser(denoiser, output, progress, planned, **options)
