"""The executor: runs the functions of an artifact for `mpq_compiler.load`."""

from __future__ import annotations

import gzip
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from mpq_compiler.artifact.bundle import Artifact
from mpq_compiler.backends.reference import loads
from mpq_compiler.ir import stored_tensors
from mpq_compiler.ir.interpreter import Interpreter


def load(artifact: Artifact, threads: int) -> Profiler:
    """What the entry point names: an executor for a verified artifact."""
    arrays = artifact.tensors()
    tensors = {entry["name"]: stored_tensors.restored(entry, arrays) for entry in artifact.manifest["tensors"]}
    text = gzip.decompress(artifact.file("graph.json.gz").read_bytes()).decode()
    return Profiler({name: TimedInterpreter(program) for name, program in loads(text, tensors).items()})


class TimedInterpreter(Interpreter):
    """Runs a program node by node, and adds up the seconds of each operator."""

    def __init__(self, program: Any) -> None:
        super().__init__(program)
        self.seconds: Counter[str] = Counter()

    def call(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        begin = time.perf_counter()
        value = super().call(node, args, kwargs)
        self.seconds[getattr(node.target, "__name__", str(node.target))] += time.perf_counter() - begin
        return value


class Profiler:
    """Executes the functions by name; `slowest` says what took longest so far."""

    def __init__(self, functions: dict[str, TimedInterpreter]) -> None:
        self.functions = functions

    def run(self, function: str, inputs: Sequence[np.ndarray]) -> np.ndarray:
        """The output for the inputs in the order of the program."""
        interpreter = self.functions[function]
        names = (spec.name for spec in interpreter.program.inputs)
        named = {name: torch.from_numpy(np.array(array)) for name, array in zip(names, inputs, strict=True)}
        with torch.no_grad():
            return interpreter.run(named).numpy()

    def slowest(self, count: int = 3) -> list[tuple[str, float]]:
        """The operators that took most seconds, over all calls."""
        total: Counter[str] = Counter()
        for interpreter in self.functions.values():
            total.update(interpreter.seconds)
        return total.most_common(count)
