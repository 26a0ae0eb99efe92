"""Layers and attentions of latent diffusion models, alone on a GPU: our kernels, and what they must compute.

The kernels of a case are one library, made without a GPU. What they are given is described, and drawn on both sides
(`there.data`); what they must return of it is computed here, of the first and of the last lines.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks.gpu_kit.there import data
from mpq_compiler.backends.tvm import kernels as templates
from mpq_compiler.backends.tvm.kernels.cuda import (
    fast_attention,
    gemm,
    norms,
    rounding,
    weights,
    wgmma,
    wgmma_attention,
)
from mpq_compiler.backends.tvm.kernels.cuda import weight_only as cuda_weight_only
from mpq_compiler.backends.tvm.kernels.problems import attention
from mpq_compiler.backends.tvm.kernels.problems import norms as problems_of_norms
from mpq_compiler.backends.tvm.kernels.problems import rounding as problems_of_rounding
from mpq_compiler.backends.tvm.kernels.problems.argument import Argument
from mpq_compiler.backends.tvm.kernels.problems.dequantize import DequantizeTable, WeightOnly
from mpq_compiler.backends.tvm.kernels.problems.epilogue import Epilogue, Step
from mpq_compiler.backends.tvm.kernels.problems.fast_attention import FastAttention
from mpq_compiler.backends.tvm.kernels.problems.float_gemm import Conv2d, Linear
from mpq_compiler.backends.tvm.kernels.problems.norms import GroupNorm, LayerNorm
from mpq_compiler.backends.tvm.kernels.problems.quant_matmul import Gate, QuantMatmul
from mpq_compiler.backends.tvm.kernels.problems.rounding import Rounding
from mpq_compiler.backends.tvm.toolchain import machine_code
from mpq_compiler.formats.packing import unpack_codes
from mpq_compiler.ir import ops
from mpq_compiler.targets import numerics, nvidia
from mpq_compiler.targets.numerics import BF16
from tests.harness.cuda import kernels
from tests.harness.fast_attention import meaning, roundings
from tests.harness.shapes import Case as Product
from tests.harness.shapes import concrete, make_case, quantize, reference

BITS: Mapping[str, int | None] = {"W8A8": 8, "W4A8": 4, "W3A8": 3, "W2A8": 2, "W4A16": None}
"""Of weights of products of integers; None of the product in bfloat16, whose weights are codes of 4 bits."""
ATTENTION, NORM = "attention bf16", "norm, codes"
REQUANTIZED = Epilogue((Step("quantize", value=8),))
LINES = 12
"""Of the input, first and last, whose results are looked at."""
PICKED = 4096
"""Of these results where they are floats that tensor cores have added up."""


@dataclass(frozen=True)
class Layer:
    """A linear layer of ``height`` rows a sample (kernel 1), or a convolution that keeps the size (kernel 3).

    gated: the second half of its outputs gates the first (GEGLU)
    """

    model: str
    height: int
    width: int
    channels: int
    outputs: int
    kernel: int = 1
    gated: bool = False

    @property
    def name(self) -> str:
        kind, rows = ("linear", f"{self.height}") if self.linear else ("conv3x3", f"{self.height}x{self.width}")
        kind = "geglu" if self.gated else kind
        return f"{kind} {self.model} {rows}x{self.channels}->{self.outputs}"

    @property
    def linear(self) -> bool:
        return self.kernel == 1

    def scaled(self, size: float) -> Layer:
        height, width = (n if n == 1 else max(8, round(n * size)) for n in (self.height, self.width))
        channels, outputs = (max(16, round(n * size / 16) * 16) for n in (self.channels, self.outputs))
        outputs = max(64, round(outputs / 64) * 64) if self.gated else outputs
        return replace(self, height=height, width=width, channels=channels, outputs=outputs)

    def problem(self, bits: int) -> QuantMatmul:
        """Linear layers write floats, those with a gate and convolutions codes, as they mostly do in a model."""
        own: dict[str, Any] = {"bits": bits, "integers": bits == 4}
        if self.gated:
            own |= {"gate": Gate("gelu"), "epilogue": REQUANTIZED}
        if self.linear:
            return QuantMatmul.linear((self.height,), self.channels, self.outputs, **own)
        return QuantMatmul(
            *(self.height, self.width, self.channels, self.outputs, (3, 3)),
            padding=(1, 1, 1, 1), epilogue=REQUANTIZED, **own,
        )  # fmt: skip

    def weight_only(self) -> WeightOnly:
        floats = {"packed": True, "numerics": BF16}
        made: Linear | Conv2d = Conv2d(self.height, self.width, self.channels, self.outputs, **floats)
        if self.linear:
            made = Linear(self.height, self.channels, self.outputs, **floats)
        columns = self.kernel**2 * self.channels
        return WeightOnly(made, DequantizeTable(self.outputs, columns, (self.channels,), 4, integers=True))

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


@dataclass(frozen=True)
class Norm:
    """A group norm of 32 groups with SiLU, or a layer norm, of floats, whose result is codes of 8 bits."""

    model: str
    positions: int
    channels: int
    groups: bool = False

    @property
    def name(self) -> str:
        return f"{'groupnorm' if self.groups else 'layernorm'} {self.model} {self.positions}x{self.channels}"

    def scaled(self, size: float) -> Norm:
        positions, channels = max(1, round(self.positions * size)), max(32, round(self.channels * size / 32) * 32)
        return replace(self, positions=positions, channels=channels)

    @property
    def problem(self) -> GroupNorm | LayerNorm:
        if not self.groups:
            return LayerNorm(self.positions, self.channels, epilogue=REQUANTIZED)
        steps = (Step("silu"), *REQUANTIZED.steps)
        return GroupNorm(self.positions, self.channels, 32, epilogue=Epilogue(steps))

    def macs(self, batch: int) -> float:
        """None: it is memory's."""
        return 0.0


Case = Layer | Attention | Norm
CASES: Sequence[Case] = (
    Layer("sd15", 4096, 1, 320, 320),
    Layer("sd15", 4096, 1, 320, 2560),
    Layer("sd15", 1024, 1, 640, 640),
    Layer("sd15", 256, 1, 1280, 10240),
    Layer("sdxl", 4096, 1, 640, 5120),
    Layer("sdxl", 1024, 1, 1280, 1280),
    Layer("sdxl", 1024, 1, 1280, 10240),
    Layer("sdxl", 1024, 1, 5120, 1280),
    Layer("sd15", 4096, 1, 320, 2560, gated=True),
    Layer("sdxl", 4096, 1, 640, 5120, gated=True),
    Layer("sdxl", 1024, 1, 1280, 10240, gated=True),
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
    Norm("sd15", 4096, 320, True),
    Norm("sd15", 256, 1280, True),
    Norm("sdxl", 16384, 320, True),
    Norm("sdxl", 1024, 1280, True),
    Norm("sd15", 4096, 320),
    Norm("sdxl", 4096, 640),
    Norm("sdxl", 1024, 1280),
)


# --- libraries ----------------------------------------------------------------------------------------------


Products = Mapping[str, tuple[int | None, Callable[[Any, str], Any]]]
"""Bits as in `BITS`, and what builds the kernel, by name."""


def products(level: int) -> Products:
    """Bits and builders of the quantized products by name; on Hopper `mma.sync` stands beside `wgmma`."""
    plain = {name: (bits, gemm.build if bits else cuda_weight_only.build) for name, bits in BITS.items()}
    if level != nvidia.HOPPER:
        return plain
    both = {f"{name}_mma": plain[name] for name in ("W8A8", "W4A8", "W4A16")}
    return {name: (b, wgmma.build if b else cuda_weight_only.build_on_hopper) for name, b in BITS.items()} | both


def functions(case: Case, level: int, others: Products | None = None) -> dict[str, Any]:
    """The kernels by name, for a compute capability; each `prepare` makes the weights of its neighbour.

    others: products in place of ours
    """
    if isinstance(case, Norm):
        return {"norm": norms.build(case.problem, "norm")}
    if isinstance(case, Attention):
        rounded = {f"round_{name}": own for name, own in roundings(case.problem).items()}
        made = {name: rounding.build(own, name) for name, own in rounded.items()}
        return {"attention": _attention_of(level)(case.problem, "attention"), **made}
    found = {}
    for name, (bits, build) in _of_case(case, others or products(level)).items():
        prepare, problem = (weights.build, case.problem(bits)) if bits else _of_codes(case)
        found |= {name: build(problem, name), f"{name}_prepare": prepare(problem, f"{name}_prepare")}
        if not bits:
            found["round"] = rounding.build(_rounding(case), "round")
    return found


def _rounding(case: Layer) -> Rounding:
    """What rounds the input of a layer."""
    size = case.height * case.width * case.channels
    return Rounding(1, size, size)


def _of_case(case: Layer, asked: Products) -> Products:
    """Those that a layer has: floats have no gate."""
    return {name: own for name, own in asked.items() if own[0] or not case.gated}


def _of_codes(case: Layer) -> tuple[Callable[[Any, str], Any], WeightOnly]:
    return cuda_weight_only.build_pack, case.weight_only()


def _attention_of(level: int) -> Callable[[FastAttention, str], Any]:
    """The builder of attentions, as artifacts for a compute capability have it."""
    if level != nvidia.HOPPER:
        return fast_attention.build
    return lambda problem, name: wgmma_attention.build(problem, name) or fast_attention.build(problem, name)


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
class Contestant:
    """One of ours as `there.tables` makes it, and the arrays that it is given or must return, by name."""

    description: dict[str, Any]
    stored: dict[str, np.ndarray]


def described(
    case: Case, batch: int, level: int, others: Products | None = None
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(the description of a case at a batch size, the arrays to store with it)"""
    kind = case.name.split()[0]
    found = {**asdict(case), "name": f"{case.name}, batch {batch}", "kind": kind, "batch": batch, "level": level}
    made: dict[str, Contestant] = {}
    if isinstance(case, Attention):
        made[ATTENTION] = _attention(case, batch)
    elif isinstance(case, Norm):
        made[NORM] = _norm(case, batch)
    else:
        problems_: dict[int | None, Contestant] = {}
        for name, (bits, _) in _of_case(case, others or products(level)).items():
            if bits not in problems_:
                problems_[bits] = _product(case.problem(bits), batch) if bits else _weight_only(case, batch)
            made[name] = _named(problems_[bits], name)
    stored = {f"{name}.{key}": array for name, own in made.items() for key, array in own.stored.items()}
    ours = {name: _placed(own.description, name) for name, own in made.items()}
    return {**found, "macs": case.macs(batch), "ours": ours}, stored


def _named(own: Contestant, name: str) -> Contestant:
    """With the kernels' names of a contestant in place of `{}`."""
    kernels_ = {
        key: [[kernel.format(name), names] for kernel, names in own.description[key]] for key in ("prepare", "kernels")
    }
    return replace(own, description={**own.description, **kernels_})


def _placed(description: dict[str, Any], name: str) -> dict[str, Any]:
    """With the names under which arrays are stored."""
    arrays = {
        key: {"stored": f"{name}.{what['stored']}"} if "stored" in what else what
        for key, what in description["arrays"].items()
    }
    keys = {key: f"{name}.{description[key]}" for key in ("at", "expected") if key in description}
    return {**description, "arrays": arrays, **keys}


def _empty(argument: Argument, batch: int) -> dict[str, Any]:
    return {"shape": list(concrete(argument.shape, batch)), "dtype": argument.dtype}


def _drawn(shape: Sequence[int], dtype: str, seed: int, **how: float) -> dict[str, Any]:
    return {"shape": list(shape), "dtype": dtype, "seed": seed, **how}


def _product(problem: QuantMatmul, batch: int) -> Contestant:
    case = make_case(problem, batch, 0)
    stored = {name: array for name, array in case.stored().items() if name not in ("x", "codes")}
    packed = case.stored()["codes"]
    whole = {"low": -127, "high": 128} if problem.bits == 8 else {"low": 0, "high": 256}
    large = {
        "x": _drawn(case.data["x"].shape, "uint8", 1, low=0, high=256),
        "codes": _drawn(packed.shape, str(packed.dtype), 2, **whole),
    }
    codes = data.drawn(large["codes"])
    if problem.bits == 8:
        codes = codes.view(np.int8).reshape(problem.outputs, problem.reduction)
    else:
        codes = unpack_codes(codes, (problem.outputs, problem.reduction), problem.bits)
    case = replace(case, data={**case.data, "x": data.drawn(large["x"]), "codes": codes})
    given, made = weights.arguments(problem)
    taken = gemm.parameters(problem)
    arrays: dict[str, Any] = {a.name: _empty(a, batch) for a in (*taken, *made)}
    arrays |= {name: {"stored": name} for name in stored} | large
    used = {a.name for a in (*given, *taken)}
    lines = edges(case)
    description = {
        "arrays": {name: what for name, what in arrays.items() if name in used or name in {a.name for a in made}},
        "prepare": [["{}_prepare", [a.name for a in (*given, *made)]]],
        "prepared": [a.name for a in made],
        "kernels": [["{}", [a.name for a in taken]]],
        "result": "out",
        "as": [batch, problem.out_height, problem.out_width * problem.results],
    }
    kept = {name: array for name, array in stored.items() if name in used}
    if problem.gate is not None:  # whose function is ours to a few units in the last place
        found = _picked(description, lines.astype(np.float32), 1.01 / 255)
        return replace(found, stored=found.stored | kept)
    exact = {"lines": lines.shape[1] // 2, "sha256": hashlib.sha256(lines.tobytes()).hexdigest()}
    return Contestant(description | exact, kept)


def edges(case: Product) -> np.ndarray:
    """The first and the last lines that the definition gives [B, lines, width * outputs]."""
    p, d = case.problem, case.data
    lines = min(LINES, p.height)
    images = d["x"].reshape(case.batch, p.height, p.width, p.channels)
    top, bottom, left, right = p.padding
    found = []
    for first, padding in ((0, (top, 0, left, right)), (p.height - lines, (0, bottom, left, right))):
        part = replace(p, height=lines, padding=padding)
        x = images[:, first : first + lines].reshape(concrete(part.input_shape(), case.batch))
        own = reference(replace(case, problem=part, data={**d, "x": x}))
        if p.gate is not None:
            kept, through = np.split(own, 2, -1)
            own = kept * F.gelu(torch.from_numpy(through)).numpy()
        if p.epilogue is not None:
            own = quantize(own, d["qscale"], d["qzero"], d["group"], 8)
        found.append(own.reshape(case.batch, part.out_height, -1))
    return np.ascontiguousarray(np.concatenate(found, 1))


def _weight_only(layer: Layer, batch: int) -> Contestant:
    problem, seed = layer.weight_only(), 0
    given, panel = cuda_weight_only.pack_arguments(problem)
    *taken, y = cuda_weight_only.arguments(problem)
    spaces, (x, rounded) = cuda_weight_only.workspaces(problem), problems_of_rounding.arguments(_rounding(layer))
    arrays: dict[str, Any] = {"weight": _empty(panel, 1), "rounded": _empty(rounded, batch)}
    arrays |= {a.name: _empty(a, batch) for a in (y, *spaces)}
    for a in (given, x, *(a for a in taken if a.name not in ("x", "weight"))):
        shape, seed = concrete(a.shape, batch), seed + 1
        deviation = {"x": 1.0, "bias": 1.0, "scale": 0.02}
        how: dict[str, float] = {"low": 0, "high": 256} if a.dtype == "uint8" else {"low": -128, "high": 128}
        how = {"deviation": deviation[a.name]} if a.dtype.startswith("float") else how
        arrays[a.name] = _drawn(shape, a.dtype, seed, **how)
    stored = {"tables": np.arange(-8, 8, dtype=np.int8)[None]}  # codes are integers
    arrays["tables"] = {"stored": "tables"}
    drawn = stored | {name: data.drawn(what) for name, what in arrays.items() if "seed" in what}
    table = problem.table
    codes = unpack_codes(drawn["codes"], (table.rows, table.columns), table.bits)
    decoded = drawn["tables"][0][codes].astype(np.float32) * drawn["scale"].astype(np.float32)
    values, weight, bias = (torch.from_numpy(value) for value in (drawn["x"], decoded, drawn["bias"]))
    lines = min(LINES, layer.height)
    if layer.linear:
        values = values.reshape(batch, layer.height, -1)
        parts = [ops.linear(values[:, at], weight, bias, numerics=BF16) for at in (slice(lines), slice(-lines, None))]
    else:
        taps = weight.reshape(layer.outputs, 3, 3, layer.channels)
        values = values.reshape(batch, layer.height, layer.width, layer.channels)
        parts = [
            ops.conv2d(values[:, at], taps, bias, (1, 1), padding, numerics=BF16)
            for at, padding in ((slice(lines), (1, 0, 1, 1)), (slice(-lines, None), (0, 1, 1, 1)))
        ]
    description = {
        "arrays": arrays,
        "prepare": [["{}_prepare", [given.name, "weight"]], ["round", ["x", "rounded"]]],
        "prepared": ["weight", "rounded"],
        "shaped": {"rounded": list(concrete(taken[0].shape, batch))},
        "kernels": [["{}", ["rounded", *(a.name for a in (*taken[1:], y, *spaces))]]],
        "result": y.name,
        "as": [batch, layer.height, layer.width * layer.outputs],
    }
    expected = torch.cat([part.reshape(batch, part.shape[1], -1) for part in parts], 1).numpy()
    found = _picked(description, expected, 2e-5)  # tensor cores may cut what they add by two bits
    return replace(found, stored=found.stored | stored)


def _attention(case: Attention, batch: int) -> Contestant:
    problem, inputs = case.problem, attention.arguments(case.problem)[:3]
    rounded, y = fast_attention.arguments(problem)[:3], fast_attention.arguments(problem)[-1]
    by_heads = {name: problems_of_rounding.arguments(own) for name, own in roundings(problem).items()}
    arrays: dict[str, Any] = {name: _empty(to, batch) for name, (_, to) in by_heads.items()}
    arrays[y.name] = _empty(y, batch)
    for i, a in enumerate(inputs):
        arrays[f"float {a.name}"] = _drawn(concrete(by_heads[a.name][0].shape, batch), a.dtype, i, deviation=1.0)
    q, k, v = (data.drawn(arrays[f"float {a.name}"]).reshape(concrete(a.shape, batch)) for a in inputs)
    lines = min(LINES, case.queries)
    few = replace(problem, queries=lines)
    parts = [meaning(few, [np.ascontiguousarray(q[:, at]), k, v], BF16) for at in (slice(lines), slice(-lines, None))]
    names = [a.name for a in inputs]
    description = {
        "arrays": arrays,
        "prepare": [[f"round_{name}", [f"float {name}", name]] for name in names],
        "prepared": names,
        "shaped": {a.name: list(concrete(a.shape, batch)) for a in rounded},
        "kernels": [["attention", [*names, y.name]]],
        "result": y.name,
        "as": [batch, case.queries, -1],
    }
    return _picked(description, np.concatenate(parts, 1).reshape(batch, 2 * lines, -1), numerics.BOUNDS[BF16])


def _norm(case: Norm, batch: int) -> Contestant:
    problem, rows = case.problem, (batch, case.positions, case.channels)
    *inputs, y = problems_of_norms.arguments(problem)
    spaces = norms.workspaces(problem)
    stored = {"qscale": np.array([0.03], np.float32), "qzero": np.array([90], np.int32)}
    stored["group"] = np.zeros(batch, np.int64)
    arrays: dict[str, Any] = {a.name: _empty(a, batch) for a in (y, *spaces)}
    for i, a in enumerate(inputs):
        drawn = _drawn(concrete(a.shape, batch), a.dtype, i, deviation=1.0)
        arrays[a.name] = {"stored": a.name} if a.name in stored else drawn
    x, gamma, beta = (torch.from_numpy(data.drawn(arrays[name])) for name in ("x", "gamma", "beta"))
    if case.groups:
        found = F.silu(F.group_norm(x.transpose(1, 2), 32, gamma, beta).transpose(1, 2))
    else:
        found = F.layer_norm(x, (case.channels,), gamma, beta)
    codes = quantize(found.numpy(), stored["qscale"], stored["qzero"], stored["group"], 8).astype(np.float32)
    lines = min(LINES, case.positions)
    description = {
        "arrays": arrays,
        "prepare": [],
        "prepared": [],
        "kernels": [["norm", [a.name for a in (*inputs, y, *spaces)]]],
        "result": y.name,
        "as": list(rows),
    }
    made = _picked(description, data.edges(codes, lines), 1.01 / float(codes.max()))  # a code beside the border of two
    return replace(made, stored=made.stored | stored)


def _picked(description: dict[str, Any], expected: np.ndarray, bound: float) -> Contestant:
    """With some of the expected floats."""
    at = np.random.RandomState(0).randint(0, expected.size, min(PICKED, expected.size)).astype(np.int32)
    how = {"lines": expected.shape[1] // 2, "at": "at", "expected": "expected", "bound": bound}
    return Contestant(description | how, {"at": at, "expected": expected.reshape(-1)[at].astype(np.float32)})
