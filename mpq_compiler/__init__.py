"""Compiles diffusion denoisers to mixed-precision low-bit edge artifacts, and runs them.

>>> import mpq_compiler
>>> mpq_compiler.compile("fashion-unet", "out.mpq", weights=4)
>>> unet = mpq_compiler.load("out.mpq")             # needs no torch; drops in for diffusers' pipeline.unet
>>> mpq_compiler.allocate(mpq_compiler.Problem.load("problem.json"))

Names are imported when first used, so that running an artifact never imports torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mpq_compiler import _moved
from mpq_compiler.runtime import pretrained
from mpq_compiler.support import plugins
from mpq_compiler.support.checkout import require_links

require_links()
_moved.install()

if TYPE_CHECKING:
    from mpq_compiler.allocation.problem import Problem
    from mpq_compiler.allocation.solver import solve as allocate
    from mpq_compiler.api.compile import compile, estimate
    from mpq_compiler.artifact.bundle import read as verify
    from mpq_compiler.cli.demo import demo
    from mpq_compiler.cli.inspect import inspect
    from mpq_compiler.driver.measure import measure_latency, measure_sensitivity
    from mpq_compiler.driver.report import Report
    from mpq_compiler.evaluation.evaluate import evaluate
    from mpq_compiler.frontend.denoiser import load as load_denoiser
    from mpq_compiler.frontend.record import record_inputs
    from mpq_compiler.runtime.compiled_denoiser import CompiledDenoiser, load
    from mpq_compiler.runtime.pipeline import CompiledPipeline, load_pipeline
    from mpq_compiler.support.errors import UserError

_API = {
    "CompiledDenoiser": "runtime.compiled_denoiser:CompiledDenoiser",
    "CompiledPipeline": "runtime.pipeline:CompiledPipeline",
    "Problem": "allocation.problem:Problem",
    "Report": "driver.report:Report",
    "UserError": "support.errors:UserError",
    "allocate": "allocation.solver:solve",
    "compile": "api.compile:compile",
    "demo": "cli.demo:demo",
    "estimate": "api.compile:estimate",
    "evaluate": "evaluation.evaluate:evaluate",
    "inspect": "cli.inspect:inspect",
    "load": "runtime.compiled_denoiser:load",
    "load_denoiser": "frontend.denoiser:load",
    "load_pipeline": "runtime.pipeline:load_pipeline",
    "measure_latency": "driver.measure:measure_latency",
    "measure_sensitivity": "driver.measure:measure_sensitivity",
    "record_inputs": "frontend.record:record_inputs",
    "verify": "artifact.bundle:read",
}

__all__ = [
    "CompiledDenoiser",
    "CompiledPipeline",
    "Problem",
    "Report",
    "UserError",
    "allocate",
    "compile",
    "demo",
    "estimate",
    "evaluate",
    "inspect",
    "load",
    "load_denoiser",
    "load_pipeline",
    "measure_latency",
    "measure_sensitivity",
    "record_inputs",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _API:
        raise AttributeError(f"module 'mpq_compiler' has no attribute '{name}'")
    found = plugins.attribute(f"mpq_compiler.{_API[name]}")
    if name == pretrained.NAME:
        pretrained.register()  # diffusers asks for it by this name when it loads a pipeline
    return found


def __dir__() -> list[str]:
    return [*globals(), *__all__]
