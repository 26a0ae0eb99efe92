"""The plans of kernel calls of small models after every stage of the lowering, and dumps of them.

>>> lowered = lowering.after_stages("flux", "int8")       # stage name -> (stage, plan)
>>> with lowering.running() as runner:                    # runs plans call by call
...     InspectablePlan(plan, runner).run(inputs)
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx

from mpq_compiler.backends.tvm import build, inspect, lowering
from mpq_compiler.backends.tvm.compile.objects import Objects
from mpq_compiler.backends.tvm.compile.worker import Worker
from mpq_compiler.backends.tvm.plan.calls import Kernel, Lowered
from mpq_compiler.ir import ops, stored_tensors
from mpq_compiler.ir.aten import aten
from mpq_compiler.ir.facts import Facts
from mpq_compiler.ir.program import PARAMETERS, InputSpec, Program, Stage, TensorStore
from mpq_compiler.passes.fuse_epilogues import FuseEpilogues
from mpq_compiler.pipeline.session import Session
from mpq_compiler.targets import table as targets
from tests.harness import packed

TARGET = "x86-64-avx2"
MODELS = (("flux", "int8", ""), ("unet2d", "int8", ""), ("unet2d-class", "int4", "rotate{rule=everywhere,rows=8}"))
"""Between them every stage has something to do: joint attention; skip connections and upsampling; rotations."""
Model = tuple[str, str, str]


def target(name: str = TARGET) -> targets.Target:
    """The CPU target of that name, whether this machine runs it or not."""
    return targets.resolve(name)


BY_HAND: Model = ("by hand", "", "")
"""Stands for the program of `by_hand`."""


def program(model: Model) -> Program:
    """The packed program of a model."""
    return by_hand() if model == BY_HAND else packed.program(*model).program


@functools.cache
def after_stages(model: Model) -> dict[str, tuple[lowering.Stage, Lowered]]:
    """The plan after each stage of a CPU's lowering."""
    found: dict[str, tuple[lowering.Stage, Lowered]] = {}
    stages = [lowering.SelectKernels(program(model).fork(), (1, 2)), *lowering.behind_selection()]
    lowering.run(stages, lambda index, stage, plan: found.__setitem__(stage.name(), (stage, plan)))
    return found


@contextmanager
def running(model: Model) -> Iterator[inspect.Runner]:
    """What runs plans of the model on this machine."""
    row = target()
    if targets.missing_features(row):
        pytest.skip("not this machine's target")
    stored = stored_tensors.stored(program(model))

    with tempfile.TemporaryDirectory() as folder:
        objects = Objects(row, build.sources(), Path(folder), packed.kernel_cache())

        def compiled(kernels: Mapping[Kernel, str], workers: Sequence[Worker]) -> list[Path]:
            objects.compile(kernels, workers)
            return [*map(objects.path, kernels)]

        with inspect.runner(row, {name: each.array for name, each in stored.items()}, compiled, 2) as runner:
            yield runner


@functools.cache
def by_hand() -> Program:
    """A packed program of a dozen nodes in which most stages have something to do, on latents and a timestep.

    Two products of codes, a group norm of a concatenation that a quantizer reads too, a bias by the timestep.
    """
    generator = torch.Generator().manual_seed(0)
    graph, store = fx.Graph(), TensorStore()
    x, timestep = graph.placeholder("sample"), graph.placeholder("timestep")

    def get(name: str, tensor: torch.Tensor) -> fx.Node:
        return graph.get_attr(store.add(name, tensor))

    def call(name: str, target: Any, *arguments: Any) -> fx.Node:
        node = graph.call_function(target, arguments)
        node.name = name
        return node

    def tables(name: str) -> tuple[fx.Node, fx.Node]:
        scale, zero = torch.tensor([0.02, 0.03]).half(), torch.tensor([120, 128], dtype=torch.uint8)
        return get(f"{name}:scale", scale), get(f"{name}:zero_point", zero)

    def product(name: str, codes: fx.Node, edge: tuple[fx.Node, fx.Node], rows: int, columns: int) -> fx.Node:
        weight = torch.randint(-127, 128, (rows, columns), generator=generator, dtype=torch.int8)
        scale = (torch.rand((rows, 1), generator=generator) * 0.01 + 0.01).half()
        stored = (get(f"{name}.weight:codes", weight), get(f"{name}.weight:scale", scale), None, None, None)
        bias = get(f"{name}.bias:f16", torch.rand(rows, generator=generator).half())
        return call(name, ops.quant_linear, codes, group, *stored, [edge[0]], [edge[1]], bias, [columns])

    group = call("g", ops.time_group, timestep, get("time_groups.boundaries", torch.tensor([500.0])))
    shift = call("shift", aten.reshape.default, call("time", aten.to.dtype, timestep, torch.float32), [-1, 1, 1, 1])
    shift = call("shift_scaled", aten.mul.Tensor, shift, 0.001)
    norm = call("norm", ops.group_norm, x, 2, None, None, 1e-5)
    both = call("both", aten.cat.default, [norm, call("shifted", aten.add.Tensor, x, shift)], -1)
    first, raw, last = tables("norm_2"), tables("both"), tables("first")
    normed = call("norm_2_q", ops.quantize, call("norm_2", ops.group_norm, both, 4, None, None, 1e-5), *first, group, 8)
    y = product("first", normed, first, 8, 16)
    codes = call("first_q", ops.quantize, y, *last, group, 8)
    z = product("second", codes, last, 8, 8)
    side = product("side", call("both_q", ops.quantize, both, *raw, group, 8), raw, 8, 16)
    graph.output(call("result", aten.add.Tensor, call("sum", aten.add.Tensor, z, y), side))
    inputs = (InputSpec("sample", ("B", 4, 4, 8), torch.float32), InputSpec("timestep", ("B",), torch.int64))
    program = Program(graph, store, inputs, Stage.PACKED, facts=Facts({PARAMETERS: 320}))
    return FuseEpilogues().run(program, Session())
