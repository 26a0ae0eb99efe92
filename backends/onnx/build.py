"""Builds ONNX models of a packed program; they read the common weight file in place."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnxruntime  # noqa: F401  (what was compiled is judged with it; better missed now than then)

from mpq_compiler.backends.onnx import FUNCTION, inspect, lowering, model_file
from mpq_compiler.backends.onnx.emit import emit
from mpq_compiler.ir import stored_tensors
from mpq_compiler.ir.graph import operand
from mpq_compiler.ir.interpreter import shapes
from mpq_compiler.ir.program import Program
from mpq_compiler.ir.stored_tensors import Stored
from mpq_compiler.pipeline.backend import Built
from mpq_compiler.pipeline.stages import StageInstrument, run_stages
from mpq_compiler.support import tensorfile
from mpq_compiler.support.errors import UserError

if TYPE_CHECKING:
    from mpq_compiler.ir.specialization import Specialization


def build(
    program: Program, others: Sequence[Specialization] = (), instruments: Sequence[StageInstrument] = ()
) -> Built:
    """Builds a model of any batch size, beside the stored tensors.

    Nodes that do not run as planned are added to ``program.fallbacks``.

    Args:
        program: the packed program.
        others: the program at other image sizes, each of which gets a model over the same tensors.
        instruments: look at every stage of the lowering.

    Raises:
        UserError: a node that ONNX cannot express.
    """
    programs = {FUNCTION: program} | {f"{FUNCTION}_{other.name}": other.program for other in others}
    stored = stored_tensors.stored(program, *(other.program for other in others), coded=False)
    tensors = {name: tensor.array for name, tensor in stored.items()}

    def observe(index: int, stage: lowering.Stage, plan: lowering.Models) -> None:
        for instrument in instruments:
            instrument(index, stage, inspect.InspectableModels(plan, program, tensors))

    stages = [lowering.SelectOperators(program, stored, others), *(each() for each in lowering.BEHIND_SELECTION)]
    lowered = run_stages(stages, lowering.Models(), lowering.verify, observe)
    models = {name: selected.model for name, selected in lowered.models.items()}
    return Built(
        files={model_file(name): model.SerializeToString(deterministic=True) for name, model in models.items()},
        tensors=tensors,
        entries=[tensor.entry(name) for name, tensor in stored.items()],
        functions=[_describe(name, each, models[name].graph.output[0].name) for name, each in programs.items()],
        prepare=None,
        facts={},
        stages=lowering.names(),
    )


def _describe(name: str, program: Program, output: str) -> dict[str, Any]:
    """The manifest's entry for a function."""
    sample = shapes(program, 2)[operand(program.graph.output_node(), 0).name].shape[1:]
    inputs = []
    for spec in program.inputs:
        shape = [None if d == "B" else d for d in spec.shape]
        inputs.append({"name": spec.name, "shape": shape, "dtype": str(spec.dtype).removeprefix("torch.")})
    result = {"name": output, "shape": [None, *sample], "dtype": "float32"}
    return {"name": name, "batch": None, "inputs": inputs, "output": result}


def export_float(program: Program, path: str | Path) -> None:
    """Writes a program before quantization (stage float, rewritten or planned) as an f32 model.

    Its weights lie beside it, in a file of the same name that ends in .safetensors.

    Raises:
        UserError: a node that ONNX cannot express, or a path that does not end in .onnx.
    """
    path = Path(path)
    if path.suffix != ".onnx":
        raise UserError(f"cannot write {path}: the name of an ONNX model must end in .onnx")
    names = sorted({str(n.target) for n in program.graph.nodes if n.op == "get_attr"})
    arrays = {name: program.tensors.read(name).contiguous().numpy() for name in names}
    weights = path.with_suffix(".safetensors")
    model = emit(program.fork(), {name: Stored(array, name) for name, array in arrays.items()}, weights.name)
    with weights.open("wb") as stream:
        tensorfile.save(stream, arrays)
    path.write_bytes(model.SerializeToString(deterministic=True))


__all__ = ["build", "export_float"]
