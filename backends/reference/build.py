"""A packed program as an artifact for the interpreter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mpq_compiler import storage
from mpq_compiler.backends import Built, Progress
from mpq_compiler.backends.reference import GRAPH, dumps, type_name
from mpq_compiler.program import Program, operand, shapes
from mpq_compiler.targets import Target

FUNCTION = "denoise"
OUTPUT = "sample"


def build(
    program: Program,
    target: Target,
    batches: Sequence[int] = (),
    jobs: int = 1,
    progress: Progress | None = None,
    cache: Any = None,
) -> Built:
    """The packed program as an artifact for the interpreter: one function for any batch size.

    The arguments behind the program are those of the other backends; none of them matters here.
    """
    del target, batches, jobs, progress, cache
    stored = storage.stored(program)
    sample = shapes(program, 2)[operand(program.graph.output_node(), 0).name].shape[1:]
    inputs = [
        {"name": s.name, "shape": [None if d == "B" else d for d in s.shape], "dtype": type_name(s.dtype)}
        for s in program.inputs
    ]
    function: dict[str, Any] = {"name": FUNCTION, "batch": None, "inputs": inputs}
    function["output"] = {"name": OUTPUT, "shape": [None, *sample], "dtype": "float32"}
    return Built(
        files={GRAPH: dumps(program).encode()},
        tensors={name: tensor.array for name, tensor in stored.items()},
        entries=[tensor.entry(name) for name, tensor in stored.items()],
        functions=[function],
        prepare=None,
        facts={},
    )
