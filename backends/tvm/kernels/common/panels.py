"""Places of output channels in packed float weights, as expressions (`problems.float_gemm.panel_shape`)."""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from mpq_compiler.backends.tvm.kernels.problems.float_gemm import Conv2d, Linear, plan_of


def panel_column(problem: Linear | Conv2d, output: Any) -> tuple[Any, Any]:
    """(vector, lane) of an output channel in the packed weight."""
    plan = plan_of(problem)
    size = plan.outputs if plan.form == "depthwise" else plan.group_outputs
    group, own = tirx.truncdiv(output, size), tirx.truncmod(output, size)
    vector = tirx.truncdiv(own, plan.lanes)
    return group * plan.vectors + vector, own - T.min(vector * plan.lanes, size - plan.lanes)


def first_output(problem: Linear | Conv2d, vector: Any) -> Any:
    """The output channel of the first lane of a vector of the packed weight."""
    plan = plan_of(problem)
    size = plan.outputs if plan.form == "depthwise" else plan.group_outputs
    group = tirx.truncdiv(vector, plan.vectors)
    return group * size + T.min((vector - group * plan.vectors) * plan.lanes, size - plan.lanes)
