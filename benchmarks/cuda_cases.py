"""Layers and attentions of latent diffusion models, alone on a GPU: our kernels, and what they must compute.

The kernels of a case are one library, made without a GPU. A contestant is made several times, each with weights and
activations of its own, so that together they are more than the level-2 cache holds.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tvm

from mpq_compiler.backends.tvm import kernels as templates
from mpq_compiler.backends.tvm.kernels.cuda import fast_attention, gemm, weights, wgmma
from mpq_compiler.backends.tvm.kernels.cuda import weight_only as cuda_weight_only
from mpq_compiler.backends.tvm.kernels.problems import attention
from mpq_compiler.backends.tvm.kernels.problems import fast_attention as problems
from mpq_compiler.backends.tvm.kernels.problems.argument import Argument
from mpq_compiler.backends.tvm.kernels.problems.dequantize import DequantizeTable, WeightOnly
from mpq_compiler.backends.tvm.kernels.problems.epilogue import Epilogue, Step
from mpq_compiler.backends.tvm.kernels.problems.fast_attention import FastAttention
from mpq_compiler.backends.tvm.kernels.problems.float_gemm import Conv2d, Linear
from mpq_compiler.backends.tvm.kernels.problems.quant_matmul import QuantMatmul
from mpq_compiler.backends.tvm.toolchain import machine_code
from mpq_compiler.formats.packing import unpack_codes
from mpq_compiler.ir import ops
from mpq_compiler.targets import numerics, nvidia
from mpq_compiler.targets.numerics import BF16
from tests.harness.cuda import kernels
from tests.harness.fast_attention import meaning, ready
from tests.harness.float_kernels import error, random_inputs
from tests.harness.shapes import Case as Product
from tests.harness.shapes import concrete, make_case, quantize, reference

Call = Callable[[], object]
BITS = {"W8A8": 8, "W4A8": 4, "W3A8": 3, "W2A8": 2}
WEIGHT_ONLY = "W4A16"
ATTENTION = "attention bf16"
REQUANTIZED = Epilogue((Step("quantize", value=8),))
LINES = 12
"""Of the input, first and last, whose results are looked at."""


@dataclass(frozen=True)
class Layer:
    """A linear layer of ``height`` rows a sample (kernel 1), or a convolution that keeps the size (kernel 3)."""

    model: str
    height: int
    width: int
    channels: int
    outputs: int
    kernel: int = 1

    @property
    def name(self) -> str:
        kind, rows = ("linear", f"{self.height}") if self.linear else ("conv3x3", f"{self.height}x{self.width}")
        return f"{kind} {self.model} {rows}x{self.channels}->{self.outputs}"

    @property
    def linear(self) -> bool:
        return self.kernel == 1

    def scaled(self, size: float) -> Layer:
        height, width = (n if n == 1 else max(8, round(n * size)) for n in (self.height, self.width))
        channels, outputs = (max(16, round(n * size / 16) * 16) for n in (self.channels, self.outputs))
        return replace(self, height=height, width=width, channels=channels, outputs=outputs)

    def problem(self, bits: int) -> QuantMatmul:
        """Linear layers write floats, convolutions codes, as they mostly do in a model."""
        if self.linear:
            return QuantMatmul.linear((self.height,), self.channels, self.outputs, bits=bits)
        return QuantMatmul(
            *(self.height, self.width, self.channels, self.outputs, (3, 3)),
            padding=(1, 1, 1, 1), bits=bits, epilogue=REQUANTIZED,
        )  # fmt: skip

    def weight_only(self) -> WeightOnly:
        floats = {"packed": True, "numerics": BF16}
        made: Linear | Conv2d = Conv2d(self.height, self.width, self.channels, self.outputs, **floats)
        if self.linear:
            made = Linear(self.height, self.channels, self.outputs, **floats)
        return WeightOnly(made, DequantizeTable(self.outputs, self.kernel**2 * self.channels, (self.channels,), 4))

    def macs(self, batch: int) -> float:
        return batch * self.problem(8).rows * self.kernel**2 * self.channels * self.outputs


@dataclass(frozen=True)
class Attention:
    """As `FastAttention`, of a model; keys and values are made ready in every call."""

    model: str
    heads: int
    dim: int
    queries: int
    keys: int

    @property
    def name(self) -> str:
        return f"attention {self.model} {self.heads}x{self.dim} {self.queries}x{self.keys}"

    def scaled(self, size: float) -> Attention:
        heads, queries, keys = (max(1, round(n * size)) for n in (self.heads, self.queries, self.keys))
        return replace(self, heads=heads, queries=queries, keys=keys)

    @property
    def problem(self) -> FastAttention:
        return FastAttention(self.queries, self.keys, self.heads, self.dim)

    def macs(self, batch: int) -> float:
        return 2.0 * batch * self.heads * self.queries * self.keys * self.dim


Case = Layer | Attention
CASES: Sequence[Case] = (
    Layer("sd15", 4096, 1, 320, 320),
    Layer("sd15", 4096, 1, 320, 2560),
    Layer("sd15", 1024, 1, 640, 640),
    Layer("sd15", 256, 1, 1280, 10240),
    Layer("sdxl", 4096, 1, 640, 5120),
    Layer("sdxl", 1024, 1, 1280, 1280),
    Layer("sdxl", 1024, 1, 1280, 10240),
    Layer("sdxl", 1024, 1, 5120, 1280),
    Layer("pixart", 4096, 1, 1152, 1152),
    Layer("pixart", 4096, 1, 1152, 4608),
    Layer("sd15", 64, 64, 320, 320, 3),
    Layer("sd15", 32, 32, 640, 640, 3),
    Layer("sd15", 16, 16, 1280, 1280, 3),
    Layer("sd15", 8, 8, 1280, 1280, 3),
    Layer("sdxl", 128, 128, 320, 320, 3),
    Layer("sdxl", 64, 64, 640, 640, 3),
    Layer("sdxl", 32, 32, 1280, 1280, 3),
    Attention("sd15", 8, 40, 4096, 4096),
    Attention("sd15", 8, 80, 1024, 1024),
    Attention("sd15", 8, 40, 4096, 77),
    Attention("sdxl", 10, 64, 4096, 4096),
    Attention("sdxl", 20, 64, 1024, 1024),
    Attention("pixart", 16, 72, 4096, 4096),
)


# --- libraries ----------------------------------------------------------------------------------------------


def products(level: int) -> dict[str, tuple[int, Callable[[QuantMatmul, str], Any]]]:
    """Bits and builders of the quantized products by name; on Hopper `mma.sync` stands beside `wgmma`."""
    if level != nvidia.HOPPER:
        return {name: (bits, gemm.build) for name, bits in BITS.items()}
    both = {f"{name}_mma": (BITS[name], gemm.build) for name in ("W8A8", "W4A8")}
    return {name: (bits, wgmma.build) for name, bits in BITS.items()} | both


def functions(case: Case, level: int) -> dict[str, Any]:
    """The kernels by name, for a compute capability; each `prepare` makes the weights of its neighbour."""
    if isinstance(case, Attention):
        made = ready(case.problem)
        return {
            "ready": fast_attention.build(made, "ready"),
            "attention": fast_attention.build(case.problem, "attention"),
        }
    found = {}
    for name, (bits, build) in products(level).items():
        found[name] = build(case.problem(bits), name)
        found[f"{name}_prepare"] = weights.build(case.problem(bits), f"{name}_prepare")
    found[WEIGHT_ONLY] = cuda_weight_only.build(case.weight_only(), WEIGHT_ONLY)
    found[f"{WEIGHT_ONLY}_prepare"] = cuda_weight_only.build_pack(case.weight_only(), f"{WEIGHT_ONLY}_prepare")
    return found


def library(case: Case, level: int, folder: Path) -> Path:
    """The library of a case, for GPUs of one compute capability; compiled where it is not there."""
    sources = b"".join(path.read_bytes() for path in sorted(Path(templates.__path__[0]).rglob("*.py")))
    path = folder / f"{hashlib.sha256(repr(case).encode() + sources).hexdigest()[:24]}-sm{level}.so"
    if not path.is_file():
        partial = path.with_suffix(".partial")
        kernels.write(functions(case, level), partial, lambda source: machine_code.fatbin(source, [level]))
        partial.replace(path)
    return path


# --- contestants --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ours:
    """make: a call with tensors of its own, and the tensor of its result. bytes: that they take."""

    make: Callable[[], tuple[Call, Any]]
    bytes: int
    wrong: Callable[[np.ndarray], str | None]
    """What is wrong with a result."""


def names(case: Case, level: int) -> tuple[str, ...]:
    """Of our contestants on a compute capability."""
    return (ATTENTION,) if isinstance(case, Attention) else (*products(level), WEIGHT_ONLY)


def ours(case: Case, batch: int, path: Path, level: int) -> dict[str, Ours]:
    """Our kernels for a case, of the library for a compute capability."""
    compiled = tvm.runtime.load_module(str(path))
    if isinstance(case, Attention):
        return {ATTENTION: _attention(case, batch, compiled)}
    found = {name: _product(name, case.problem(bits), batch, compiled) for name, (bits, _) in products(level).items()}
    return found | {WEIGHT_ONLY: _weight_only(case, batch, compiled)}


def _tensors(arrays: Sequence[np.ndarray]) -> list[Any]:
    return [tvm.runtime.tensor(np.ascontiguousarray(array), tvm.cuda(0)) for array in arrays]


def _prepared(function: Any, data: dict[str, np.ndarray], inputs: Sequence[Argument], made: Sequence[Argument]) -> None:
    """Adds what a kernel makes of stored weights."""
    tensors = _tensors([data[a.name] for a in inputs] + [kernels.empty(a, 1) for a in made])
    function(*tensors)
    data |= {a.name: tensor.numpy() for a, tensor in zip(made, tensors[len(inputs) :], strict=True)}


def _ours(
    function: Any,
    data: Mapping[str, np.ndarray],
    arguments: Sequence[Argument],
    result: str,
    batch: int,
    wrong: Callable[[np.ndarray], str | None],
) -> Ours:
    arrays = [data[a.name] if a.name in data else kernels.empty(a, batch) for a in arguments]
    at = [a.name for a in arguments].index(result)

    def make() -> tuple[Call, Any]:
        tensors = _tensors(arrays)
        return functools.partial(function, *tensors), tensors[at]

    return Ours(make, sum(array.nbytes for array in arrays), wrong)


def _product(name: str, problem: QuantMatmul, batch: int, compiled: Any) -> Ours:
    case = make_case(problem, batch, 0)
    data = case.stored()
    _prepared(compiled[f"{name}_prepare"], data, *weights.arguments(problem))
    arguments = gemm.parameters(problem)
    return _ours(compiled[name], data, arguments, "out", batch, functools.partial(_wrong_product, case))


def _wrong_product(case: Product, found: np.ndarray) -> str | None:
    """The bits of the definition, of the first and of the last lines."""
    p, d = case.problem, case.data
    lines = min(LINES, p.height)
    images = d["x"].reshape(case.batch, p.height, p.width, p.channels)
    results = found.reshape(case.batch, p.out_height, p.out_width, p.outputs)
    top, bottom, left, right = p.padding
    for first, padding in ((0, (top, 0, left, right)), (p.height - lines, (0, bottom, left, right))):
        part = replace(p, height=lines, padding=padding)
        x = images[:, first : first + lines].reshape(concrete(part.input_shape(), case.batch))
        expected = reference(replace(case, problem=part, data={**d, "x": x}))
        if p.epilogue is not None:
            expected = quantize(expected, d["qscale"], d["qzero"], d["group"], 8)
        expected = expected.reshape(case.batch, part.out_height, p.out_width, p.outputs)
        own = results[:, : part.out_height] if first == 0 else results[:, -part.out_height :]
        if off := int((own != expected).sum()):
            return f"{off} of {own.size} values differ from the definition"
    return None


def _weight_only(layer: Layer, batch: int, compiled: Any) -> Ours:
    problem, draw = layer.weight_only(), np.random.default_rng(0)
    data: dict[str, np.ndarray] = {}
    inputs, panel = cuda_weight_only.pack_arguments(problem)
    *arguments, y = cuda_weight_only.arguments(problem)
    for a in (inputs, *(a for a in arguments if a.name != "weight")):
        shape = concrete(a.shape, batch)
        if a.dtype.startswith("float"):
            value = draw.standard_normal(shape)
            data[a.name] = (0.02 * np.abs(value) if a.name == "scale" else value).astype(a.dtype)
        else:
            data[a.name] = draw.integers(np.iinfo(a.dtype).min, np.iinfo(a.dtype).max + 1, shape).astype(a.dtype)
    _prepared(compiled[f"{WEIGHT_ONLY}_prepare"], data, [inputs], [replace(panel, name="weight")])

    def wrong(found: np.ndarray) -> str | None:
        table = problem.table
        codes = unpack_codes(data["codes"], (table.rows, table.columns), table.bits)
        decoded = data["tables"][0][codes].astype(np.float32) * data["scale"].astype(np.float32)
        x, weight, bias = (torch.from_numpy(value) for value in (data["x"], decoded, data["bias"]))
        if isinstance(problem.product, Linear):
            expected = ops.linear(x, weight, bias, numerics=BF16)
        else:
            taps = weight.reshape(layer.outputs, 3, 3, layer.channels)
            expected = ops.conv2d(x, taps, bias, (1, 1), (1, 1, 1, 1), numerics=BF16)
        off = error(found, expected.numpy())
        return None if off <= 1e-5 else f"{off:.1e} off its meaning"

    return _ours(compiled[WEIGHT_ONLY], data, [*arguments, y], y.name, batch, wrong)


def _attention(case: Attention, batch: int, compiled: Any) -> Ours:
    problem = case.problem
    inputs = random_inputs(attention.arguments(problem), batch, 0)
    made = [kernels.empty(a, batch) for a in problems.outputs(problem)]
    output = kernels.empty(problems.arguments(problem)[-1], batch)

    def make() -> tuple[Call, Any]:
        query, keys, values = _tensors(inputs)
        words, result = _tensors(made), _tensors([output])[0]

        def call() -> None:
            compiled["ready"](keys, values, *words)
            compiled["attention"](query, *words, result)

        return call, result

    def wrong(found: np.ndarray) -> str | None:
        off = error(found, meaning(problem, inputs, BF16))
        return None if off <= numerics.BOUNDS[BF16] else f"{off:.1e} off its meaning"

    return Ours(make, sum(array.nbytes for array in (*inputs, *made, output)), wrong)
