"""Writes mpq_compiler/__init__.pyi, the types of the public names: ``python -m tests.harness.stub``.

The package imports them when they are first used, which no type checker sees; options are written out.
"""

from __future__ import annotations

import inspect
import textwrap
import typing
from collections.abc import Callable

import mpq_compiler
from mpq_compiler.driver.documented import expanded
from tests.harness.tree import ROOT

STUB = ROOT / "mpq_compiler" / "__init__.pyi"

HEAD = """\
# The types of the public names: `python -m tests.harness.stub` writes this file.

from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

import torch

"""
USED = (
    "api.compile:Planned",
    "driver.estimate:Estimate",
    "frontend.denoiser:Denoiser",
    "ir.findings:SensitivityTable",
    "latency.table:Table",
    "pipeline.backend:Progress",
    "sampling.call_tree:Arguments",
)
"""What the signatures name beside."""


def stub() -> str:
    """The text of the file as it should be."""
    imports, functions = [_import(place) for place in USED], []
    for name, place in mpq_compiler._API.items():
        found = getattr(mpq_compiler, name)
        if hasattr(found, "__signature__"):
            functions.append(_function(name, found))
        else:
            imports.append(f"{_import(place)} as {name}")
    listed = "".join(f'    "{name}",\n' for name in mpq_compiler._API)
    return "\n".join([HEAD + "\n".join(sorted(imports)), "", f"__version__: str\n__all__ = [\n{listed}]", *functions])


def _import(place: str) -> str:
    module, _, name = place.partition(":")
    return f"from mpq_compiler.{module} import {name}"


def _function(name: str, function: Callable[..., object]) -> str:
    """A function with its options written out in each of its overloads; what they mean stands once, in `compile`."""
    overloads = typing.get_overloads(function)
    made = "\n"
    for one in overloads or [function]:
        signature = expanded(inspect.signature(one))
        parameters = "".join(f"    {line},\n" for line in _parameters(signature))
        made += "@overload\n" if overloads else ""
        made += f"def {name}(\n{parameters}) -> {signature.return_annotation}:"
        told = name == "compile" and one is overloads[0]
        made += textwrap.indent(f'\n"""{function.__doc__}\n"""\n', "    ") if told else " ...\n"
    return made


def _parameters(signature: inspect.Signature) -> list[str]:
    lines, named = [], False
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not named:
            lines, named = [*lines, "*"], True
        default = "" if parameter.default is parameter.empty else f" = {parameter.default!r}"
        lines.append(f"{parameter.name}: {parameter.annotation}{default}")
    return lines


if __name__ == "__main__":
    STUB.write_text(stub(), encoding="utf-8")
