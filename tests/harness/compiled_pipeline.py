"""A small pipeline, compiled once a run."""

from __future__ import annotations

from pathlib import Path

from mpq_compiler.driver.pipeline import KNOWN, compile_pipeline
from tests.harness import once, packed, tiny_pipelines

PIPELINE = (
    "trace,layout,calibrate{{samples=2,steps=4}},time-groups,bit-allocation{{uniform=int8}},{},insert-fake-quant,"
    "round-weights,fold-fake-quant,fuse-epilogues"
)


def path(name: str = "stable-diffusion", target: str = "native", kept: str = "") -> Path:
    """The folder of a pipeline at 8 bits with all parts, and its C program; read only.

    kept: the pass by which steps of the denoiser keep values; none do without.
    """

    def make(folder: Path) -> None:
        size = tiny_pipelines.SIZES.get(name)
        compile_pipeline(
            tiny_pipelines.pipeline(name),
            folder,
            parts=KNOWN,
            **({"pipeline": PIPELINE.format(kept)} if kept else {"recipe": "w8a8", "samples": 2, "steps": 4}),
            shapes=size and f"1x4x{size[0]}x{size[1]}",
            cache=packed.kernel_cache(),
            target=target,
            emit="c",
        )

    return once.made(f"{name}-{target}{kept}.pipeline.mpq", make)
