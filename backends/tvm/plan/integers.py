"""Codes of 4 bits that number integers without a gap: a GPU makes values of them by shifts, others it looks up."""

from __future__ import annotations

from dataclasses import replace

from mpq_compiler.backends.tvm.kernels.problems.quant_matmul import MOST_INTEGERS
from mpq_compiler.backends.tvm.plan.calls import Call, Kernel, Lowered


def decode_by_shifts(lowered: Lowered) -> Lowered:
    """Let `prepare` lay out integers (`QuantMatmul.integers`), and products decode them without a table."""
    plain = {dict(call.results)["lut"]: call for call in lowered.preparation if _is_plain(call, lowered.integers)}

    def changed(call: Call, table: str | None) -> Call:
        if table not in plain:
            return call
        kernel = Kernel(call.kernel.template, call.kernel.problem.replace(integers=True))
        operands, results = (tuple(e for e in each if e != ("lut", table)) for each in (call.operands, call.results))
        return replace(call, kernel=kernel, operands=operands, results=results)

    preparation = tuple(changed(call, dict(call.results).get("lut")) for call in lowered.preparation)
    functions = tuple(f.mapped(lambda call: changed(call, dict(call.operands).get("lut"))) for f in lowered.functions)
    return replace(lowered, preparation=preparation, functions=functions).linked()


def _is_plain(call: Call, integers: frozenset[str]) -> bool:
    """Whether a call lays out codes of 4 bits of one width for products that cannot overflow."""
    if call.kernel.template != "prepare" or "lut" not in dict(call.results):
        return False
    problem = call.kernel.problem
    taps = problem.get("kernel") if "kernel" in dict(problem.fields) else (1, 1)
    few = taps[0] * taps[1] * problem.get("channels") <= MOST_INTEGERS
    fits = problem.get("bits") == 4 and "widths" not in dict(problem.fields) and few
    return fits and dict(call.operands).get("tables") in integers
