"""Signatures and docstrings of functions that take ``**options``, with every option written out."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable
from dataclasses import fields
from inspect import Parameter, Signature
from typing import TypeVar

from mpq_compiler.driver.options import Options
from mpq_compiler.pipeline.describe import field_docs

WIDTH = 112
Function = TypeVar("Function", bound=Callable[..., object])


def expanded(signature: Signature) -> Signature:
    """The signature of a function with every option in the place of its ``**options``."""
    own = [parameter for parameter in signature.parameters.values() if parameter.kind is not Parameter.VAR_KEYWORD]
    if len(own) == len(signature.parameters):
        return signature
    options = [Parameter(f.name, Parameter.KEYWORD_ONLY, default=f.default, annotation=f.type) for f in fields(Options)]
    return signature.replace(parameters=[*own, *options])


def documented(function: Function) -> Function:
    """Gives a function that takes ``**options`` its whole signature, and in its doc what they mean and their defaults.

    The types are also in `mpq_compiler/__init__.pyi`, for what does not run the code.
    """
    notes, listed = field_docs(Options), []
    for field in fields(Options):
        text = f"{field.name}: {' '.join(notes[field.name].split())} Default: {field.default!r}."
        listed.append(textwrap.fill(text, WIDTH, initial_indent=" " * 4, subsequent_indent=" " * 8))
    function.__doc__ = "\n".join([inspect.getdoc(function) or "", "", "Options:", *listed])
    vars(function)["__signature__"] = expanded(inspect.signature(function))
    return function
