"""What torch and torchao make of a layer, of an attention and of a denoiser on the same GPU."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.cuda_cases import Attention, Case, Layer

Call = Callable[[], object]
HALF, INT8 = "torch fp16", "torch int8 (_int_mm)"
GRAPH = "torch fp16, CUDA graph"
LINEAR = (HALF, INT8, "torch.compile bf16", "torchao int8 dynamic", "torchao int4 weight-only", "TileLang int8")
CONV = (HALF, "torch.compile bf16")
ATTENTION = ("torch SDPA bf16", "torch SDPA fp16")
DENOISER = (HALF, "torch bf16", GRAPH, "torch.compile fp16", "torch.compile fp16, CUDA graphs")


def of(case: Case) -> tuple[str, ...]:
    """The peers of a case."""
    if isinstance(case, Attention):
        return ATTENTION
    return LINEAR if case.linear else CONV


def missing(name: str) -> str | None:
    """Why a peer cannot be run here."""
    if name.startswith("TileLang"):
        return "it needs an apache-tvm-ffi before 0.1.13, with which TVM 0.27 does not run: not in one process"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no GPU, or was built without CUDA"
    package = name.split()[0]
    needed = {"torchao": "torchao", "torch.compile": "triton"}.get(package, "torch")
    return None if importlib.util.find_spec(needed) else f"{needed} is not installed"


def forget() -> None:
    """What torch has compiled: of a second shape it would make kernels for all shapes, of a ninth none."""
    if torch.cuda.is_available():
        torch.compiler.reset()


def make(name: str, case: Case, batch: int) -> Call:
    """A call of a peer on random tensors of its own."""
    if isinstance(case, Attention):
        return _attention(case, batch, torch.bfloat16 if name.endswith("bf16") else torch.float16)
    if name == INT8:
        return _int8(case, batch)
    dtype = torch.float16 if name == HALF else torch.bfloat16
    module, x = _module(case, dtype), _input(case, batch, dtype)
    if name.startswith("torchao"):
        from torchao import quantization

        int8 = quantization.Int8DynamicActivationInt8WeightConfig
        quantization.quantize_(module, int8() if "int8" in name else quantization.Int4WeightOnlyConfig())
    if not name.startswith("torch fp16"):
        module = torch.compile(module, dynamic=False)
    return _without_gradients(lambda: module(x))


def graph(calls: Sequence[Call]) -> Call:
    """One launch of all that torch launches in some calls, which have been made before."""
    made = torch.cuda.CUDAGraph()
    with torch.cuda.graph(made):
        for call in calls:
            call()
    return made.replay


def denoiser(name: str, module: torch.nn.Module, inputs: Mapping[str, torch.Tensor]) -> Callable[[], torch.Tensor]:
    """A call of the float model as a peer runs it, its inputs on the GPU already."""
    dtype = torch.bfloat16 if name.endswith("bf16") else torch.float16
    own = copy.deepcopy(module).to("cuda", dtype).to(memory_format=torch.channels_last)
    wide = {n: t.cuda() for n, t in inputs.items()}
    given = {n: t.to(dtype) if t.dtype == torch.float32 and t.ndim > 1 else t for n, t in wide.items()}
    run: Any = own
    if name.startswith("torch.compile"):
        run = torch.compile(own, dynamic=False, mode="reduce-overhead" if name.endswith("graphs") else None)
    call = _without_gradients(lambda: run(**given))
    if name != GRAPH:
        return call
    found: list[torch.Tensor] = []
    for _ in range(3):
        call()
    replay = graph([lambda: found.append(call())])

    def replayed(kept: object = call) -> torch.Tensor:  # whose weights the graph reads
        replay()
        return found[0]

    return replayed


def _without_gradients(call: Callable[[], Any]) -> Callable[[], Any]:
    return torch.no_grad()(call)


def _input(layer: Layer, batch: int, dtype: torch.dtype) -> torch.Tensor:
    if layer.linear:
        return torch.randn(batch * layer.height, layer.channels, dtype=dtype, device="cuda")
    x = torch.randn(batch, layer.channels, layer.height, layer.width, dtype=dtype, device="cuda")
    return x.to(memory_format=torch.channels_last)


def _module(layer: Layer, dtype: torch.dtype) -> torch.nn.Module:
    if layer.linear:
        return torch.nn.Linear(layer.channels, layer.outputs, dtype=dtype, device="cuda")
    made = torch.nn.Conv2d(layer.channels, layer.outputs, 3, padding=1, dtype=dtype, device="cuda")
    return made.to(memory_format=torch.channels_last)


def _int8(layer: Layer, batch: int) -> Call:
    """cuBLAS's product alone, without scales or bias."""
    shapes = (batch * layer.height, layer.channels), (layer.outputs, layer.channels)
    x, weight = (torch.randint(-127, 128, shape, dtype=torch.int8, device="cuda") for shape in shapes)
    return lambda: torch._int_mm(x, weight.t())


def _attention(case: Attention, batch: int, dtype: torch.dtype) -> Call:
    shapes = ((batch, case.heads, tokens, case.dim) for tokens in (case.queries, case.keys, case.keys))
    q, k, v = (torch.randn(shape, dtype=dtype, device="cuda") for shape in shapes)
    return lambda: F.scaled_dot_product_attention(q, k, v)
