"""A plan run call by call, so that the value of every node can be looked at. Imports TVM: for workers.

Nothing but the kernels is shared with the library of an artifact: neither Relax nor its plan of memory.
"""

from __future__ import annotations

import math
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tvm

from mpq_compiler.backends.tvm import templates
from mpq_compiler.backends.tvm.kernels.problems.argument import sized
from mpq_compiler.backends.tvm.plan.calls import Call, Lowered, Value
from mpq_compiler.backends.tvm.toolchain.linker import linker
from mpq_compiler.targets.table import Target

Arrays = Mapping[str, np.ndarray]


def execute(
    lowered: Lowered, target: Target, objects: Sequence[str], tensors: Arrays, inputs: Arrays, known: Arrays
) -> dict[str, np.ndarray]:
    """The values of the first function's calls by name, in the order in which they are made.

    objects: of the kernels. tensors: as they are stored. known: values that are read in place of those that calls make
    under the same names.
    """
    with tempfile.TemporaryDirectory(prefix="mpq-") as folder:
        library = Path(folder, "kernels.so")
        subprocess.run(
            [linker(target), "-shared", "-fPIC", *objects, "-o", str(library), "-lm"], check=True, capture_output=True
        )
        kernels = _Kernels(tvm.runtime.load_module(str(library)), target)
        prepared = dict(tensors)
        for call in lowered.preparation:
            prepared |= kernels.call(call, prepared, 0)
        return _run(kernels, lowered, prepared, inputs, known)


class _Kernels:
    """The loaded kernels of a plan."""

    def __init__(self, module: Any, target: Target) -> None:
        self.module, self.target = module, target
        self.signatures: dict[Any, Any] = {}

    def call(self, call: Call, env: Arrays, batch: int, into: Arrays | None = None) -> dict[str, np.ndarray]:
        """The results of a call by their names; with ``into``, the buffer of which it writes a part."""
        if call.kernel not in self.signatures:
            self.signatures[call.kernel] = templates.arguments(call.kernel, self.target)
        inputs, outputs = self.signatures[call.kernel]
        operands, results = dict(call.operands), dict(call.results)
        read = {a.name: np.ascontiguousarray(env[operands[a.name]]).reshape(sized(a.shape, batch)) for a in inputs}
        made = {a.name: np.zeros(sized(a.shape, batch), a.dtype) for a in outputs}
        if call.into and into is not None and call.into in into:
            made[outputs[0].name] = into[call.into].reshape(sized(outputs[0].shape, batch))
        buffers = {name: tvm.runtime.tensor(array) for name, array in made.items()}
        self.module[call.kernel.name](*map(tvm.runtime.tensor, read.values()), *buffers.values())
        if call.into:
            return {call.into: buffers[outputs[0].name].numpy()}
        return {results[name]: buffer.numpy() for name, buffer in buffers.items() if name in results}


def _run(kernels: _Kernels, lowered: Lowered, prepared: Arrays, inputs: Arrays, known: Arrays) -> dict[str, np.ndarray]:
    function, batch = lowered.functions[0], len(next(iter(inputs.values())))
    values = function.values
    shapes = {name: sized(value.shape, batch) for name, value in values.items()}
    forced = {name: known[name].reshape(shapes[name]) for name in _alike(known, values, batch)}
    found: dict[str, np.ndarray] = {}
    env = {**prepared, **inputs}
    for part in function.parts:
        rows = []
        for row in range(batch):
            own = {name: array if name in prepared else array[row : row + 1] for name, array in env.items()}
            read = {name: array[row : row + 1] if values[name].batched else array for name, array in forced.items()}
            rows.append(_calls(kernels, part.calls, own, read, 1))
        for name in rows[0]:
            batched = name in values and values[name].batched
            found[name] = np.concatenate([each[name] for each in rows]) if batched else rows[0][name]
        env |= {value.name: forced.get(value.name, found[value.name]) for value in part.outputs}
    found |= _calls(kernels, function.own, env, forced, batch)
    return {name: array.reshape(shapes[name]) for name, array in found.items() if name in values}


def _alike(known: Arrays, values: Mapping[str, Value], batch: int) -> list[str]:
    """The known values that the plan has in the same size and type."""
    both = [name for name in known if name in values]
    sizes = {name: math.prod(sized(values[name].shape, batch)) for name in both}
    return [n for n in both if known[n].size == sizes[n] and str(known[n].dtype) == values[n].dtype]


def _calls(kernels: _Kernels, calls: Sequence[Call], env: Arrays, forced: Arrays, batch: int) -> dict[str, np.ndarray]:
    made: dict[str, np.ndarray] = {}
    for call in calls:
        places: tuple[Arrays, ...] = (forced, made, env)
        read = {name: next(each[name] for each in places if name in each) for _, name in call.operands}
        made |= kernels.call(call, read, batch, made)
    return made
