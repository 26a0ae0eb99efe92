"""`mpq_compiler.compile`: a model, a folder or a diffusers pipeline in, an artifact out."""

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
    """Compiles ``model`` to an artifact at ``output``; options as in `driver.options.Options`.

    A diffusers pipeline is given back with its denoiser replaced (`diffusers.compile_pipeline`). Raises UserError for
    every input that cannot be compiled; nothing is left at ``output`` then.
    """
    if diffusers.part_of(model) is not None:
        return diffusers.compile_pipeline(model, output, progress, **options)
    if not isinstance(model, str | Path | Denoiser):
        raise UserError(
            f"cannot compile a {type(model).__name__}: give a folder, a hub id, a bundled name, a diffusers pipeline, "
            "or a denoiser in memory as mpq_compiler.frontend.denoiser.wrap(module)"
        )
    return compile_denoiser(model, output, progress, **options)
