"""Compiles diffusion denoisers to mixed-precision low-bit edge artifacts, and runs them.

>>> import mpq_compiler
>>> mpq_compiler.compile("fashion-unet", "out.mpq", weights=4)
>>> unet = mpq_compiler.load("out.mpq")             # needs no torch; drops in for diffusers' pipeline.unet
>>> mpq_compiler.allocate(mpq_compiler.Problem.load("problem.json"))

Names are imported when first used, so that running an artifact never imports torch.
Their types are in __init__.pyi, which `python -m tests.harness.stub` writes.
"""

from __future__ import annotations

from importlib import metadata
from typing import Any

from mpq_compiler import _moved
from mpq_compiler.runtime import pretrained
from mpq_compiler.support import plugins
from mpq_compiler.support.checkout import require_links

require_links()
_moved.install()

_API = {  # public name: where it is
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
    "export": "interchange.export:export",
    "inspect": "cli.inspect:inspect",
    "load": "runtime.compiled_denoiser:load",
    "load_denoiser": "frontend.denoiser:load",
    "load_pipeline": "runtime.pipeline:load_pipeline",
    "measure_latency": "driver.measure:measure_latency",
    "measure_sensitivity": "driver.measure:measure_sensitivity",
    "record_inputs": "frontend.record:record_inputs",
    "verify": "artifact.bundle:read",
}

__all__ = [*_API]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return metadata.version("mpq-compiler")
    if name not in _API:
        raise AttributeError(f"module 'mpq_compiler' has no attribute '{name}'")
    found = plugins.attribute(f"mpq_compiler.{_API[name]}")
    if name == pretrained.NAME:
        pretrained.register()  # diffusers asks for it by this name when it loads a pipeline
    return found


def __dir__() -> list[str]:
    return [*__all__, *(name for name in (*globals(), "__version__") if name.startswith("__"))]
