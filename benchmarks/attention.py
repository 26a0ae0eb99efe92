"""Attention kernels against torch, onnxruntime and OpenVINO on the same tensors, one thread.

    python -m benchmarks.attention [--runs N] [--rounds N] [--only TEXT] [--numerics f32,bf16,int8] [--json FILE]
                                   [--artifacts PORTABLE.mpq FAST.mpq]

Everything runs interleaved, in rounds; a figure of a run is the median over the rounds of the process's CPU time, and
what is told the median over the runs, with the least and the most. Each of our numerics is held against the best peer
of its class: f32 against those that compute in float32, bf16 and int8 against those in bfloat16 (no peer has an
attention in int8), and against our own float32, which tiles (AMX) are to be four times as fast as. Times include
making keys and values ready. Peers read and write their own layout, without transposes: onnxruntime [B, T, H*D] as
ours, torch and OpenVINO [B, H, T, D]. `error` is the root mean square against
float64, relative to that of the result, on Gaussian queries and keys whose logits have a standard deviation of 2.25: a
hard case. With `--artifacts`, two of one model that differ in `--numerics`, a step of each is timed too: what the same
bits on every CPU cost.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = os.environ["TVM_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torch.nn.functional as F
import tvm

from benchmarks.machine import provenance
from benchmarks.timing import interleaved
from mpq_compiler.backends.tvm.kernels.cpu import attention, fast_attention, tile_attention
from mpq_compiler.backends.tvm.kernels.cpu.isa import ISAS
from mpq_compiler.backends.tvm.kernels.problems import fast_attention as problems
from mpq_compiler.backends.tvm.kernels.problems.attention import Attention
from mpq_compiler.backends.tvm.kernels.problems.fast_attention import FastAttention, Ready
from mpq_compiler.latency import timing
from mpq_compiler.runtime import compiled_denoiser
from mpq_compiler.support import terminal
from mpq_compiler.targets import numerics
from mpq_compiler.targets import table as targets
from tests.harness.float_kernels import shape_of, tvm_target

RESULTS = Path(__file__).parent / "results" / "attention.json"
# (heads, dim, queries, keys): self-attention, then on a text of 77 tokens
SHAPES = (
    *((8, 40, 4096, 4096), (8, 40, 1024, 1024), (8, 80, 1024, 1024), (8, 80, 256, 256), (8, 64, 256, 256)),
    *((8, 64, 1024, 1024), (8, 64, 4096, 4096), (4, 64, 64, 64), (8, 128, 1024, 1024)),
    *((8, 40, 4096, 77), (8, 80, 1024, 77), (8, 64, 64, 77)),
)
CLASSES = {"f32": "f32", "bf16": "bf16", "int8": "bf16"}
"""The peers that each of our numerics is held against, by the end of their names."""
GOALS = {"f32": 1.0, "bf16": 1.1, "int8": 1.5}
TILES = 4.0
"""How many times as long as bf16 on tiles float32 is to take, for 1024 tokens and more."""
Tensors = Sequence[np.ndarray]


def ours(kind: str, heads: int, operands: Tensors, target: targets.Target) -> tuple[Callable[[], Any], Any]:
    """A call of the kernels at batch 1 and the tensor that it writes."""
    q, k, _ = operands
    shape = {"keys": k.shape[1], "heads": heads, "dim": q.shape[2] // heads}
    output = tvm.runtime.tensor(np.zeros(q.shape, np.float32))
    query, *read = (tvm.runtime.tensor(x) for x in operands)
    if kind == "f32":
        kernel = attention.build(Attention(queries=q.shape[1], **shape), target.isa, "attention")
        library = tvm.compile(tvm.IRModule({"attention": kernel}), target=tvm_target(target.name))
        return functools.partial(library["attention"], query, *read, output), output
    ready = Ready(numerics=kind, **shape)
    functions = {
        "ready": fast_attention.build(ready, target.isa, "ready"),
        "attention": fast_attention.build(
            FastAttention(queries=q.shape[1], numerics=kind, **shape), target.isa, "attention"
        ),
    }
    options = targets.with_features(target, numerics.features_of(kind, target.arch)).tvm
    library = tvm.compile(tvm.IRModule(functions), target=tvm.target.Target(dict(options)))
    made = [tvm.runtime.tensor(np.zeros(shape_of(a, 1), a.dtype)) for a in problems.outputs(ready)]
    first, second = library["ready"], library["attention"]

    def call() -> None:
        first(*read, *made)
        second(query, *made, output)

    return call, output


def torch_call(dtype: torch.dtype, heads: int, operands: Tensors) -> Callable[[], object]:
    q, k, v = (torch.from_numpy(x).to(dtype).unflatten(-1, (heads, -1)).transpose(1, 2) for x in operands)
    return lambda: F.scaled_dot_product_attention(q, k, v)


def onnxruntime_call(heads: int, operands: Tensors) -> Callable[[], object]:
    import onnxruntime
    from onnx import TensorProto, helper

    node = helper.make_node("MultiHeadAttention", ["q", "k", "v"], ["y"], domain="com.microsoft", num_heads=heads)
    given = dict(zip("qkv", operands, strict=True))
    inputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, x.shape) for n, x in given.items()]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, operands[0].shape)]
    domains = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(helper.make_graph([node], "g", inputs, outputs), opset_imports=domains, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    for n, x in given.items():
        binding.bind_ortvalue_input(n, onnxruntime.OrtValue.ortvalue_from_numpy(x))
    binding.bind_output("y")
    return lambda: session.run_with_iobinding(binding)


def openvino_call(precision: str, heads: int, operands: Tensors) -> Callable[[], object]:
    import openvino
    from openvino import opset13

    split = [np.ascontiguousarray(x.reshape(*x.shape[:2], heads, -1).swapaxes(1, 2)) for x in operands]
    inputs = [opset13.parameter(x.shape, openvino.Type.f32) for x in split]
    model = openvino.Model([opset13.result(opset13.scaled_dot_product_attention(*inputs))], inputs, "m")
    options = {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": precision}
    request = openvino.Core().compile_model(model, "CPU", options).create_infer_request()
    for i, x in enumerate(split):
        request.set_input_tensor(i, openvino.Tensor(x))
    return request.infer


def peers(heads: int, operands: Tensors) -> dict[str, Callable[[], object]]:
    return {
        "torch f32": torch_call(torch.float32, heads, operands),
        "torch bf16": torch_call(torch.bfloat16, heads, operands),
        "onnxruntime f32": onnxruntime_call(heads, operands),
        "openvino f32": openvino_call("f32", heads, operands),
        "openvino bf16": openvino_call("bf16", heads, operands),
    }


def exact(heads: int, operands: Tensors) -> np.ndarray:
    q, k, v = (torch.from_numpy(x).double().unflatten(-1, (heads, -1)).transpose(1, 2) for x in operands)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).numpy()


def microseconds(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """CPU time of each call in each round."""
    return {name: [1e6 * t for t in times] for name, times in interleaved(calls, rounds, process=True).items()}


@dataclass(frozen=True)
class Run:
    """What one run has found: medians over the rounds, by name.

    against: of each of ours the best peer, its time over ours
    over:    of our fast ones the time of our float32 over theirs
    """

    us: dict[str, float]
    against: dict[str, tuple[str, float]]
    over: dict[str, float]
    errors: dict[str, float]


def measured(shape: tuple[int, ...], kinds: Sequence[str], target: targets.Target, rounds: int) -> Run:
    heads, dim, queries, keys = shape
    rng = np.random.default_rng(0)
    spread = {"q": 1.5, "k": 1.5, "v": 1.0}
    sizes = {"q": queries, "k": keys, "v": keys}
    operands = [(s * rng.standard_normal((1, sizes[n], heads * dim))).astype(np.float32) for n, s in spread.items()]
    expected, calls, errors = exact(heads, operands), {}, {}
    for kind in kinds:
        calls[kind], output = ours(kind, heads, operands, target)
        calls[kind]()
        difference = output.numpy() - expected
        errors[kind] = float(np.sqrt((difference**2).mean() / (expected**2).mean()))
    times = microseconds(calls | peers(heads, operands), rounds)
    middle = {name: statistics.median(found) for name, found in times.items()}
    against = {}

    def ratio(slow: str, fast: str) -> float:
        return statistics.median(a / b for a, b in zip(times[slow], times[fast], strict=True))

    for kind in kinds:
        best = min((n for n in middle if n not in kinds and n.endswith(CLASSES[kind])), key=middle.__getitem__)
        against[kind] = best, ratio(best, kind)
    over = {kind: ratio("f32", kind) for kind in kinds if kind != "f32" and "f32" in kinds}
    return Run(middle, against, over, errors)


def row(shape: tuple[int, ...], runs: Sequence[Run]) -> dict[str, Any]:
    """Of the report: medians over the runs, with [least, most]."""
    heads, dim, queries, keys = shape
    made: dict[str, Any] = {"heads": heads, "dim": dim, "queries": queries, "keys": keys}
    made["us"] = {name: _over([run.us[name] for run in runs], 1) for name in runs[0].us}
    made["error"] = runs[0].errors
    macs = 2e-3 * queries * keys * heads * dim
    made["gmacs"] = {name: round(macs / us["median"], 1) for name, us in made["us"].items()}
    made["against"] = {}
    for kind in runs[0].against:
        peer = statistics.mode(run.against[kind][0] for run in runs)
        ratio = _over([run.against[kind][1] for run in runs], 3)
        made["against"][kind] = {"peer": peer, **ratio, "goal": GOALS[kind], "met": ratio["median"] >= GOALS[kind]}
    made["over_f32"] = {kind: _over([run.over[kind] for run in runs], 3) for kind in runs[0].over}
    return made


def _over(values: Sequence[float], digits: int) -> dict[str, Any]:
    return {
        "median": round(statistics.median(values), digits),
        "spread": [round(min(values), digits), round(max(values), digits)],
    }


def _fast_on_tiles(made: dict[str, Any], target: targets.Target) -> bool:
    """Whether bfloat16 has no tiles for a row, or is as many times as fast as float32 as it is to be."""
    shape = {name: made[name] for name in ("heads", "dim", "keys")}
    own = target.name in ISAS and tile_attention.fits(Ready(numerics="bf16", **shape), ISAS[target.name])
    return not own or made["keys"] < 1024 or made["over_f32"].get("bf16", {}).get("median", TILES) >= TILES


def whole_models(paths: Sequence[str], rounds: int) -> dict[str, Any]:
    """Milliseconds of a step of artifacts, and those of the first over those of the last."""
    loaded = [compiled_denoiser.load(path, threads=1) for path in paths]
    inputs = timing.random_inputs(loaded[0].manifest, 1)
    names = [f"{m.manifest['name']} {m.manifest['target']['numerics']}" for m in loaded]
    calls = {name: functools.partial(m.run, inputs) for name, m in zip(names, loaded, strict=True)}
    middle = {name: statistics.median(found) / 1e3 for name, found in microseconds(calls, 5 * rounds).items()}
    return {
        "ms": {name: round(ms, 3) for name, ms in middle.items()},
        "ratio": round(middle[names[0]] / middle[names[-1]], 3),
        "attentions": [m.manifest["plan"].get("numerics", {}) for m in loaded],
        "sqnr_db": [m.manifest["quality"]["reference_sqnr_db"] for m in loaded],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="native")
    parser.add_argument("--runs", type=int, default=3, help="each measures everything (default 3)")
    parser.add_argument("--rounds", type=int, default=9, help="of a run (default 9)")
    parser.add_argument("--only", default="", help="shapes whose name contains this text")
    parser.add_argument("--numerics", default="f32,bf16,int8")
    parser.add_argument("--artifacts", nargs=2, default=(), metavar="MPQ", help="of one model: portable, fast")
    parser.add_argument("--json", default=str(RESULTS), help="'' for none")
    options = parser.parse_args()
    torch.set_num_threads(1)
    target = targets.resolve(options.target)
    targets.require_runnable(target)
    kinds = options.numerics.split(",")
    named = {f"{heads} heads of {dim}, {queries}x{keys}": (heads, dim, queries, keys)
             for heads, dim, queries, keys in SHAPES}  # fmt: skip
    shapes = {name: shape for name, shape in named.items() if options.only in name}
    found: dict[str, list[Run]] = {name: [] for name in shapes}
    for run in range(options.runs):
        with torch.inference_mode(), terminal.progress(f"run {run + 1} of {options.runs}", len(shapes)) as advance:
            for name, shape in shapes.items():
                found[name].append(measured(shape, kinds, target, options.rounds))
                advance(1)
    rows = [{"name": name, **row(shape, found[name])} for name, shape in shapes.items()]
    headers = ["us on one thread", *(h for kind in kinds for h in (kind, f"times (goal {GOALS[kind]:g})", "of", "met"))]
    headers += [f"{kind} against f32" for kind in rows[0]["over_f32"]]
    terminal.table(f"attention, {target.name}", headers, [cells(made) for made in rows])
    if low := [made["name"] for made in rows if not _fast_on_tiles(made, target)]:
        print(f"bf16 on tiles below {TILES:g} x of f32, from 1024 tokens on: {', '.join(low)}")
    whole = whole_models(options.artifacts, options.rounds) if options.artifacts else None
    if whole:
        print(", ".join(f"{name} {ms:.2f} ms" for name, ms in whole["ms"].items()), f"ratio {whole['ratio']:.3f}")
    if options.json:
        record = {**provenance(), "target": target.name, "threads": 1, "runs": options.runs, "rounds": options.rounds}
        record["versions"] |= {peer: version(peer) for peer in ("onnxruntime", "openvino")}
        record |= {"rows": rows} | ({"whole_models": whole} if whole else {})
        Path(options.json).write_text(json.dumps(record, indent=1) + "\n")


def cells(made: dict[str, Any]) -> list[str]:
    """A row as it is printed."""
    found = [made["name"]]
    for kind, peer in made["against"].items():
        low, high = peer["spread"]
        times = f"{peer['median']:.2f} ({low:.2f}-{high:.2f})"
        found += [f"{made['us'][kind]['median']:.1f}", times, peer["peer"], "yes" if peer["met"] else "NO"]
    return [*found, *(f"{ratio['median']:.2f}" for ratio in made["over_f32"].values())]


if __name__ == "__main__":
    main()
