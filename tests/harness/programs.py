"""Programs for tests, after every pass, made once a session.

>>> from tests.harness import programs
>>> programs.after("unet2d", "bit-allocation")     # the Program after that pass, default test pipeline
>>> programs.steps("unet2d", pipeline)             # every (pass, program before, program after)
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from mpq_compiler.driver.instruments import observe
from mpq_compiler.frontend import denoiser as denoisers
from mpq_compiler.frontend.denoiser import Denoiser
from mpq_compiler.ir import ops
from mpq_compiler.ir.facts import Facts
from mpq_compiler.ir.program import PARAMETERS, InputSpec, Program, Stage, TensorStore
from mpq_compiler.pipeline import manager, parser, registry
from mpq_compiler.pipeline.passes import Pass
from mpq_compiler.pipeline.session import Session
from mpq_compiler.quantization.fitting import FitCache
from mpq_compiler.support import cache
from mpq_compiler.targets.numerics import BF16
from tests.harness import tiny

BUNDLED = "fashion-unet"
MODELS = (BUNDLED, *tiny.FAMILIES)

FRONT = "trace,layout,calibrate{samples=3,steps=5},time-groups{groups=3}"
BACK = "insert-fake-quant,residual-branch,round-weights,fold-fake-quant,fuse-epilogues"
MIXED = f"{FRONT},sensitivity{{inputs=3,formats=int2/int2+b/int8}},bit-allocation{{weights=5.5}},{BACK}"
"""All passes; plain and residual formats side by side."""
RESIDUAL = f"{FRONT},bit-allocation{{uniform=int2+b}},{BACK}"
"""One format with tables, offsets and branches in every layer."""
REWRITES = f"{FRONT},bit-allocation{{uniform=int4}},{BACK}".replace(
    "layout,", "layout,split-shortcut,bos-split,equalize{samples=3,steps=5,rows=64},"
)
"""With the exact rewrites that are options."""
ROTATED = f"{FRONT},bit-allocation{{uniform=int4}},{BACK}".replace("layout,", "layout,rotate{rule=everywhere,rows=8},")
"""Every layer on rotated channels."""
LOW_RANK = f"{FRONT},bit-allocation{{uniform=int3+r4}},{BACK}".replace("round-weights", "low-rank,round-weights")
"""A float branch beside every layer."""
FAST = f"{FRONT},bit-allocation{{uniform=int8}},numerics{{mode=fast,noise=0.3,inputs=3}},{BACK}"
"""Attentions in bfloat16 and in 8 bits."""
TRAINED = RESIDUAL.replace("round-weights", "round-weights,distill{updates=4,latent=0.5,samples=2,steps=4,images=0}")
"""Weights, scales and all else trained for two updates each."""
SCORED = (
    f"{FRONT},predict-scores{{formats=int3/int4,configurations=30,inputs=3,folds=2,epochs=20}},"
    f"bit-allocation{{objective=scores}},{BACK}"
)
"""Formats by the scores of predictors that have hardly been trained."""
REUSED = (
    f"{FRONT},sensitivity{{inputs=3,formats=int8}},step-reuse{{steps=4,images=1,cuts=1,places=2}},"
    f"bit-allocation{{weights=10}},keep-values{{every=2,steps=4,share=0.97,images=2,rounds=1}},{BACK}"
)
"""Steps that keep a value for later ones, of which a budget of time decides nothing."""
KEPT = f"{FRONT},bit-allocation{{uniform=int8}},keep-values{{every=2,steps=4,share=0.97,images=2,rounds=1}},{BACK}"
"""Steps that keep a value, by hand."""
PIPELINES = (MIXED, REWRITES, LOW_RANK, FAST, TRAINED, SCORED, ROTATED, REUSED)
ACTIVATIONS = (
    f"{FRONT},sensitivity{{inputs=3,formats=int8,method=ablation}},"
    f"bit-allocation{{dynamic=true,attention=8}},{BACK}"
)
"""Dynamic activations and quantized attentions, as they are measured."""

SMALL_FLOATS = f"{FRONT},bit-allocation{{uniform=fp4,activation_format=float,activations=4}},{BACK}"
"""Weights and activations in FP4: tables that float layers read."""

TIMESTEPS = (1, 200, 400, 600, 800, 999)


@dataclass(frozen=True)
class Step:
    step: Pass
    before: Program
    after: Program
    planned: Program | None = None
    """The last program before quantizers were inserted."""
    fits: FitCache = field(default_factory=FitCache)
    """Those of the pipeline's session."""


@functools.cache
def denoiser(name: str) -> Denoiser:
    return denoisers.load(name) if name == BUNDLED else denoisers.wrap(tiny.model(name), name=name)


def bfloat16_layers() -> tuple[Program, Tensor]:
    """A packed program of layers in bfloat16, an input of batch 2.

    A convolution, a linear layer of few outputs, one of many, and one whose weight is a table of 4 bits.
    """
    generator = torch.Generator().manual_seed(0)
    tensors, graph = TensorStore(), fx.Graph()
    x = graph.placeholder("x")
    for name, shape in {"conv": (20, 3, 3, 5), "few": (7, 20), "many": (33, 7)}.items():
        weight = graph.get_attr(tensors.add(name, torch.randn(shape, generator=generator).half()))
        if name == "conv":
            x = graph.call_function(ops.conv2d, (x, weight, None, [1, 1], [1, 1, 1, 1]), {"numerics": BF16})
        else:
            x = graph.call_function(ops.linear, (x, weight), {"numerics": BF16})
    table = {
        "codes": torch.randint(16, (40, 33), generator=generator, dtype=torch.uint8),
        "scale": torch.rand((40, 1), generator=generator).half(),
        "offset": torch.rand(40, generator=generator).half(),
        "lut": torch.randint(-128, 128, (2, 16), generator=generator, dtype=torch.int8),
        "row_class": torch.tensor([1, 0, 1], dtype=torch.uint8),
    }
    parts = [graph.get_attr(tensors.add(name, part)) for name, part in table.items()]
    weight = graph.call_function(ops.dequantize_weight, (*parts, [40, 33]))
    graph.output(graph.call_function(ops.linear, (x, weight), {"numerics": BF16}))
    spec = InputSpec("x", ("B", 6, 4, 5), torch.float32)
    program = Program(graph, tensors, (spec,), Stage.PACKED, facts=Facts({PARAMETERS: 1}))
    return program, torch.randn(2, 6, 4, 5, generator=generator)


def empty() -> Program:
    return Program(fx.Graph(), TensorStore(), (), Stage.FLOAT)


@functools.cache
def calibration(name: str) -> dict[str, Tensor] | None:
    """Random inputs at a few timesteps; the bundled model records its own."""
    if name == BUNDLED:
        return None
    inputs = _with_one_first_token(denoiser(name).random_inputs(12, 3))
    inputs["timestep"] = torch.tensor([t for t in TIMESTEPS for _ in range(2)])
    return inputs


def _with_one_first_token(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Texts that all begin with the same token, as those of CLIP do."""
    for name, value in inputs.items():
        if name.startswith("encoder_hidden_states"):
            value[:, 0] = torch.linspace(-8, 8, value.shape[2])
    return inputs


def steps(name: str, pipeline: str = MIXED) -> tuple[Step, ...]:
    """Every pass of the pipeline with the program before and after it."""
    return _steps(name, pipeline)


@functools.cache
def _steps(name: str, pipeline: str) -> tuple[Step, ...]:
    found: list[Step] = []
    session = Session(denoiser(name), calibration(name), cache=cache.folder())

    def add(index: int, step: Pass, before: Program, after: Program) -> None:
        last = after if after.stage == Stage.PLANNED else found[-1].planned if found else None
        found.append(Step(step, before, after, last, session.fits))

    manager.run_pipeline(parser.parse(pipeline), empty(), session, [observe, add])
    return tuple(found)


def having(pass_name: str) -> str:
    """The first of `PIPELINES` that has the pass; where none has, what the registry has before it, and the pass."""
    for pipeline in PIPELINES:
        if pass_name in (name for name, _ in _PASS.findall(pipeline)):
            return pipeline
    order = registry.all_names()
    earlier = [p for p in _PASS.findall(RESIDUAL) if order.index(p[0]) < order.index(pass_name)]
    return ",".join([*map("".join, earlier), pass_name])


_PASS = re.compile(r"([\w-]+)(\{[^}]*\})?")
"""A pass in a pipeline: its name, and its options."""


def step(name: str, pass_name: str, pipeline: str | None = None) -> Step:
    """The step of that pass, in the pipeline that `having` gives where none is given."""
    return next(s for s in steps(name, pipeline or having(pass_name)) if s.step.name() == pass_name)


def after(name: str, pass_name: str, pipeline: str | None = None) -> Program:
    return step(name, pass_name, pipeline).after


def inputs(name: str, batch: int) -> Mapping[str, Tensor]:
    """Random inputs whose timesteps differ within the batch."""
    found = _with_one_first_token(denoiser(name).random_inputs(batch, 11))
    found["timestep"] = torch.linspace(999, 0, batch).round().to(found["timestep"].dtype)
    return found
