"""The plans of kernel calls of small models after every stage of the lowering, and dumps of them.

>>> lowered = lowering.after_stages("flux", "int8")       # stage name -> (stage, plan)
>>> with lowering.running() as runner:                    # runs plans call by call
...     InspectablePlan(plan, runner).run(inputs)
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from mpq_compiler.backends.tvm import inspect, lowering
from mpq_compiler.backends.tvm.build import compile_objects
from mpq_compiler.backends.tvm.compile.worker import Worker
from mpq_compiler.backends.tvm.plan.calls import Kernel, Lowered
from mpq_compiler.ir import stored_tensors
from mpq_compiler.targets import table as targets
from tests.harness import packed

TARGET = "x86-64-avx2"
MODELS = (("flux", "int8", ""), ("unet2d-class", "int4", "rotate{rule=everywhere,rows=8}"))
"""Between them every stage has something to do: joint attention; skip connections, upsampling and rotations."""
Model = tuple[str, str, str]


def target(name: str = TARGET) -> targets.Target:
    """The CPU target of that name, whether this machine runs it or not."""
    return targets.resolve(name)


@functools.cache
def after_stages(model: Model) -> dict[str, tuple[lowering.Stage, Lowered]]:
    """The plan after each stage of a CPU's lowering."""
    found: dict[str, tuple[lowering.Stage, Lowered]] = {}
    stages = [lowering.SelectKernels(packed.program(*model).program.fork(), (1, 2)), *lowering.behind_selection()]
    lowering.run(stages, lambda index, stage, plan: found.__setitem__(stage.name(), (stage, plan)))
    return found


@contextmanager
def running(model: Model) -> Iterator[inspect.Runner]:
    """What runs plans of the model on this machine."""
    row = target()
    if targets.missing_features(row):
        pytest.skip("not this machine's target")
    stored = stored_tensors.stored(packed.program(*model).program)

    def compiled(kernels: Mapping[Kernel, str], workers: Sequence[Worker]) -> list[Path]:
        return [*compile_objects(kernels, row, workers, cache=packed.kernel_cache()).values()]

    with inspect.runner(row, {name: each.array for name, each in stored.items()}, compiled, 2) as runner:
        yield runner
