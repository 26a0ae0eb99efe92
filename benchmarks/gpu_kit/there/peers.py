"""What torch makes of a layer, of an attention and of a denoiser on the same GPU, at its own best settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

Call = Callable[[], object]
HALF, INT8, FP8 = "torch fp16", "torch int8 (_int_mm)", "torch fp8 (_scaled_mm)"
OF = {
    "linear": (HALF, INT8, FP8),
    "geglu": (HALF,),
    "conv3x3": (HALF,),
    "attention": ("torch SDPA bf16", "torch SDPA fp16"),
    "groupnorm": (HALF,),
    "layernorm": (HALF,),
}
GRAPH, COMPILED = "torch fp16, CUDA graph", "torch.compile fp16, CUDA graphs"


def settle() -> None:
    """The settings under which torch is fastest here; float32 stays float32."""
    torch.backends.cudnn.benchmark = True
    torch.set_grad_enabled(False)


def make(name: str, case: Mapping[str, Any]) -> Call:
    """A call of a peer on random tensors of its own."""
    if case["kind"] == "attention":
        return _attention(case, torch.bfloat16 if name.endswith("bf16") else torch.float16)
    if case["kind"] == "conv3x3":
        return _convolution(case)
    if case["kind"].endswith("norm"):
        return _norm(case)
    rows, channels, outputs = case["batch"] * case["height"], case["channels"], case["outputs"]
    if name == INT8:  # cuBLAS's product alone, without scales or bias
        x = torch.randint(-127, 128, (rows, channels), dtype=torch.int8, device="cuda")
        weight = torch.randint(-127, 128, (outputs, channels), dtype=torch.int8, device="cuda")
        return lambda: torch._int_mm(x, weight.t())
    if name == FP8:
        fp8 = torch.float8_e4m3fn
        a = torch.randn(rows, channels, device="cuda").to(fp8)
        b = torch.randn(outputs, channels, device="cuda").to(fp8)
        one, fast = torch.ones((), device="cuda"), {"out_dtype": torch.bfloat16, "use_fast_accum": True}
        return lambda: torch._scaled_mm(a, b.t(), scale_a=one, scale_b=one, **fast)
    half = {"dtype": torch.float16, "device": "cuda"}
    x, weight, bias = (torch.randn(shape, **half) for shape in ((rows, channels), (outputs, channels), (outputs,)))
    if case["kind"] == "geglu":
        return lambda: _gated(F.linear(x, weight, bias))
    return lambda: F.linear(x, weight, bias)


def _gated(x: torch.Tensor) -> torch.Tensor:
    kept, through = x.chunk(2, -1)
    return kept * F.gelu(through)


def _norm(case: Mapping[str, Any]) -> Call:
    batch, rows, channels = case["batch"], case["positions"], case["channels"]
    weight, bias = (torch.randn(channels, dtype=torch.float16, device="cuda") for _ in range(2))
    if case["kind"] == "layernorm":
        x = torch.randn(batch, rows, channels, dtype=torch.float16, device="cuda")
        return lambda: F.layer_norm(x, (channels,), weight, bias)
    x = torch.randn(batch, channels, rows, dtype=torch.float16, device="cuda")
    return lambda: F.silu(F.group_norm(x, 32, weight, bias))


def _convolution(case: Mapping[str, Any]) -> Call:
    last = {"memory_format": torch.channels_last}
    shape = (case["batch"], case["channels"], case["height"], case["width"])
    x = torch.randn(shape, dtype=torch.float16, device="cuda").to(**last)
    weight = torch.randn(case["outputs"], case["channels"], 3, 3, dtype=torch.float16, device="cuda").to(**last)
    bias = torch.randn(case["outputs"], dtype=torch.float16, device="cuda")
    return lambda: F.conv2d(x, weight, bias, padding=1)


def _attention(case: Mapping[str, Any], dtype: torch.dtype) -> Call:
    shapes = ((case["batch"], case["heads"], n, case["dim"]) for n in (case["queries"], case["keys"], case["keys"]))
    q, k, v = (torch.randn(shape, dtype=dtype, device="cuda") for shape in shapes)
    return lambda: F.scaled_dot_product_attention(q, k, v)


def graph(calls: Sequence[Call]) -> Call:
    """One launch of all that torch launches in some calls, which have been made before."""
    made = torch.cuda.CUDAGraph()
    with torch.cuda.graph(made):
        for call in calls:
            call()
    return made.replay


def denoiser(name: str, module: torch.nn.Module, inputs: Mapping[str, Any]) -> Callable[[], torch.Tensor]:
    """A call of a model in fp16 as a peer runs it, its inputs on the GPU already."""
    run: Any = module
    if name == COMPILED:
        run = torch.compile(module, dynamic=False, mode="reduce-overhead")

    def call() -> torch.Tensor:
        found = run(**inputs, return_dict=False)[0]
        assert isinstance(found, torch.Tensor)
        return found

    if name != GRAPH:
        return call
    found: list[torch.Tensor] = []
    with torch.cuda.stream(torch.cuda.Stream()):  # what is captured has been called on a stream of its own
        for _ in range(3):
            call()
    torch.cuda.synchronize()
    replay = graph([lambda: found.append(call())])

    def replayed(kept: object = call) -> torch.Tensor:  # whose weights the graph reads
        replay()
        return found[0]

    return replayed
