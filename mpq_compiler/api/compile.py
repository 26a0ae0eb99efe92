"""The entry point `mpq_compiler.compile`, which compiles a model, a folder or a diffusers pipeline to an artifact."""

from __future__ import annotations

from pathlib import Path
from typing import Any, overload

from mpq_compiler.api import diffusers
from mpq_compiler.driver.compile import compile_denoiser
from mpq_compiler.driver.report import Report
from mpq_compiler.frontend.denoiser import Denoiser
from mpq_compiler.support.errors import UserError


@overload
def compile(model: str | Path | Denoiser, output: str | Path, progress: Any = None, **options: Any) -> Report: ...


@overload
def compile(model: Any, output: str | Path, progress: Any = None, **options: Any) -> Any: ...


def compile(model: Any, output: str | Path, progress: Any = None, **options: Any) -> Any:
    """Compiles a model to an artifact.

    Args:
        model: a folder, a hub id, a bundled name, a `Denoiser`, or a diffusers pipeline.
        output: the artifact, a folder or a .zip.
        progress: opens progress bars, or None.
        options: fields of `driver.options.Options`.

    Returns:
        The `Report`; for a pipeline the pipeline itself, with its denoiser replaced (`diffusers.compile_pipeline`).

    Raises:
        UserError: an input that cannot be compiled; nothing is left at ``output`` then.
    """
    if diffusers.part_of(model) is not None:
        return diffusers.compile_pipeline(model, output, progress, **options)
    if not isinstance(model, str | Path | Denoiser):
        raise UserError(
            f"cannot compile a {type(model).__name__}: give a folder, a hub id, a bundled name, a diffusers pipeline, "
            "or a denoiser in memory as mpq_compiler.frontend.denoiser.wrap(module)"
        )
    return compile_denoiser(model, output, progress, **options)
