"""A real artifact of a denoiser small enough to check by hand, for tests of the runtime.

    y[b] = x[b] * codes * scale + timestep[b] + offset[class_labels[b]]

`prepare` computes codes * scale; there are specializations for batches of 1 and 2, and of 2 at another size.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from mpq_compiler.artifact import bundle, interface
from mpq_compiler.targets.table import Target, resolve

WIDTH = 16
TENSORS = {
    "w.codes": np.arange(WIDTH, dtype=np.uint8),
    "w.scale": np.array([0.5], np.float16),
    "offset": np.linspace(0, 900, 10, dtype=np.float32),
}
INPUTS = ("sample", "timestep", "class_labels")


def expected(sample: np.ndarray, timestep: Any, class_labels: np.ndarray) -> np.ndarray:
    """What the artifact computes, of a sample [B, H, 16]."""
    column = np.zeros((len(sample), 1, 1), np.float32)
    weight = TENSORS["w.codes"].astype(np.float32) * TENSORS["w.scale"].astype(np.float32)
    shift = (column + np.reshape(timestep, (-1, 1, 1))) + TENSORS["offset"][class_labels].reshape(-1, 1, 1)
    return sample * weight + shift.astype(np.float32)


def build(
    path: Path, target: str = "native", tensors: Mapping[str, np.ndarray] = TENSORS, **further: object
) -> dict[str, Any]:
    """Compiles the artifact to `path` and returns its manifest, which has further entries where they are given."""
    resolved = resolve(target)
    sizes = [("denoise_b1", 1, 3), ("denoise_b2", 2, 3), ("denoise_b2_tall", 2, 5)]
    manifest = {
        "name": "tiny",
        "target": {
            "name": resolved.name,
            "arch": resolved.arch,
            "backend": resolved.backend,
            "features": list(resolved.features),
        },
        "model": {
            "class": "UNet2DModel",
            "config": {"in_channels": 3, "sample_size": WIDTH},
            "parameters": WIDTH,
            "signature": list(INPUTS),
            "below": {"class_labels": 10},
        },
        "functions": [
            {
                "name": name,
                "batch": batch,
                "inputs": [
                    {"name": "sample", "shape": [batch, height, WIDTH], "dtype": "float32"},
                    {"name": "timestep", "shape": [batch], "dtype": "int64"},
                    {"name": "class_labels", "shape": [batch], "dtype": "int64"},
                ],
                "output": {"name": "sample", "shape": [batch, height, WIDTH], "dtype": "float32"},
            }
            for name, batch, height in sizes
        ],
        "prepare": {"name": "prepare", "tensors": list(tensors)},
        "tensors": [{"name": name} for name in tensors],
        "versions": {"apache-tvm": version("apache-tvm")},
        **further,
    }

    def kernels(path: Path) -> None:
        library(sizes, resolved, path, stated(manifest, tensors))

    return bundle.write(path, manifest, {bundle.KERNELS: kernels, bundle.IR: b""}, tensors)


def stated(manifest: Mapping[str, Any], tensors: Mapping[str, np.ndarray] = TENSORS) -> str:
    """The hash of the interface that the manifest describes."""
    types = {name: (str(tensor.dtype), tensor.shape) for name, tensor in tensors.items()}
    return interface.digest(manifest["functions"], [], manifest["prepare"], types)


def library(sizes: list[tuple[str, int, int]], target: Target, path: Path, stated: str) -> None:
    """Writes kernels.so, which states the hash of its interface."""
    import tvm
    from tvm import relax
    from tvm.script import tirx as T

    from mpq_compiler.backends.tvm.compile.link import export

    @T.prim_func(s_tir=True)
    def dequantize(w: T.Buffer((16,), "uint8"), s: T.Buffer((1,), "float16"), o: T.Buffer((16,), "float32")):
        for i in T.serial(16):
            with T.sblock("o"):
                vi = T.axis.spatial(16, i)
                o[vi] = T.Cast("float32", w[vi]) * T.Cast("float32", s[0])

    @T.prim_func(s_tir=True)
    def scale_and_shift(
        xh: T.handle,
        th: T.handle,
        ch: T.handle,
        w: T.Buffer((16,), "float32"),
        o: T.Buffer((10,), "float32"),
        yh: T.handle,
    ):
        B, H = T.int32(), T.int32()
        x = T.match_buffer(xh, (B, H, 16), "float32")
        t = T.match_buffer(th, (B,), "int64")
        c = T.match_buffer(ch, (B,), "int64")
        y = T.match_buffer(yh, (B, H, 16), "float32")
        for b in T.parallel(B):
            for h, i in T.grid(H, 16):
                with T.sblock("y"):
                    vb, vh, vi = T.axis.remap("SSS", [b, h, i])
                    y[vb, vh, vi] = x[vb, vh, vi] * w[vi] + (T.Cast("float32", t[vb]) + o[c[vb]])

    def tensor(*shape: int, dtype: str = "float32") -> Any:
        return relax.TensorType(shape, dtype)

    builder = relax.BlockBuilder()
    stored = [
        relax.Var("w_codes", tensor(WIDTH, dtype="uint8")),
        relax.Var("w_scale", tensor(1, dtype="float16")),
        relax.Var("offset", tensor(10)),
    ]
    with builder.function("prepare", stored):
        with builder.dataflow():
            call = relax.call_tir(builder.add_func(dequantize, "dequantize"), stored[:2], tensor(WIDTH))
            result = builder.emit_output(relax.Tuple([builder.emit(call), stored[2]]))
        builder.emit_func_output(result)
    for name, batch, height in sizes:
        arguments = [
            relax.Var("sample", tensor(batch, height, WIDTH)),
            relax.Var("timestep", tensor(batch, dtype="int64")),
            relax.Var("class_labels", tensor(batch, dtype="int64")),
        ]
        prepared = relax.Var("prepared", relax.TupleType([tensor(WIDTH), tensor(10)]))
        with builder.function(name, [*arguments, prepared]):
            with builder.dataflow():
                arguments += [builder.emit(relax.TupleGetItem(prepared, i)) for i in range(2)]
                kernel = builder.add_func(scale_and_shift, "scale_and_shift")
                output = builder.emit_output(
                    builder.emit(relax.call_tir(kernel, arguments, tensor(batch, height, WIDTH)))
                )
            builder.emit_func_output(output)
    export(tvm.compile(builder.get(), tvm.target.Target(dict(target.tvm))).mod, target, path, (), stated)


if __name__ == "__main__":
    build(Path(sys.argv[1]))
