"""Builds the artifact of a packed program for the interpreter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mpq_compiler.backends.reference import GRAPH, dumps, type_name
from mpq_compiler.ir import stored_tensors
from mpq_compiler.ir.graph import operand
from mpq_compiler.ir.interpreter import shapes
from mpq_compiler.ir.program import Program
from mpq_compiler.ir.specialization import Specialization
from mpq_compiler.pipeline.backend import Built

FUNCTION = "denoise"
OUTPUT = "sample"


def build(program: Program, others: Sequence[Specialization] = ()) -> Built:
    """Builds the artifact of a packed program: one function of any batch size for each image size.

    others: the program at other image sizes.
    """
    named = {FUNCTION: program} | {f"{FUNCTION}_{other.name}": other.program for other in others}
    stored = stored_tensors.stored(program, *(other.program for other in others))
    return Built(
        files={GRAPH: dumps(named).encode()},
        tensors={name: tensor.array for name, tensor in stored.items()},
        entries=[tensor.entry(name) for name, tensor in stored.items()],
        functions=[_describe(name, each) for name, each in named.items()],
        prepare=None,
        facts={},
    )


def _describe(name: str, program: Program) -> dict[str, Any]:
    """The manifest's entry for a function."""
    sample = shapes(program, 2)[operand(program.graph.output_node(), 0).name].shape[1:]
    inputs = [
        {"name": s.name, "shape": [None if d == "B" else d for d in s.shape], "dtype": type_name(s.dtype)}
        for s in program.inputs
    ]
    output = {"name": OUTPUT, "shape": [None, *sample], "dtype": "float32"}
    return {"name": name, "batch": None, "inputs": inputs, "output": output}
