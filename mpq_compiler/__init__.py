"""Compiles diffusion denoisers to mixed-precision low-bit edge artifacts, and runs them.

>>> import mpq_compiler
>>> mpq_compiler.compile("fashion-unet", "out.mpq", weights=4)
>>> unet = mpq_compiler.load("out.mpq")             # needs no torch; drops in for diffusers' pipeline.unet
>>> mpq_compiler.allocate(mpq_compiler.Problem.load("problem.json"))

Names are imported when first used, so that running an artifact never imports torch.
"""

from __future__ import annotations

import importlib
from typing import Any

from mpq_compiler._checkout import require_links

require_links()

_API = {
    "Problem": "allocation:Problem",
    "Report": "compiler:Report",
    "UserError": "errors:UserError",
    "allocate": "allocation:solve",
    "compile": "compiler:compile",
    "demo": "demonstration:demo",
    "evaluate": "evaluation:evaluate",
    "inspect": "inspection:inspect",
    "load": "runtime:load",
    "load_denoiser": "denoiser:load",
    "measure_latency": "compiler:measure_latency",
    "measure_sensitivity": "compiler:measure_sensitivity",
    "record_inputs": "recording:record_inputs",
    "verify": "artifact:read",
}

__all__ = sorted(_API)


def __getattr__(name: str) -> Any:
    if name not in _API:
        raise AttributeError(f"module 'mpq_compiler' has no attribute '{name}'")
    module, _, attribute = _API[name].partition(":")
    return getattr(importlib.import_module(f"mpq_compiler.{module}"), attribute)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
