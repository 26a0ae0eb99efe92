"""Everything a compilation depends on besides the model."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from mpq_compiler.support.errors import UserError

DEFAULT_BATCHES = (1, 2)
MOST_SEED = 2**31 - 1
EFFORTS = ("none", "fast", "balanced", "best")
"""How much is trained; passes say what each means for them (`Pass.efforts`)."""


@dataclass
class Options:
    """Everything a compilation depends on besides the model; what `mpqc compile` takes."""

    target: str = "native"
    recipe: str | Path = "default"
    pipeline: str | None = None
    weights: str | float | None = None
    """Budget: true average bits, or bytes as "40MB"."""
    activations: float | None = None
    bops: str | float | None = None
    """Budget: bit operations a sample, 2.5e12 or "2.5T"."""
    latency: str | float | None = None
    """Budget: milliseconds of a call, or as "800us"; of the table's samples and threads."""
    objective: str | None = None
    """"noise", or "paper-db": the sum of the layers' SQNR in dB (MixDQ). By default as the recipe says."""
    latency_table: str | Path | None = None
    """What `mpqc latency` measured (docs/latency.md); without one a budget has one measured here."""
    shapes: str | None = None
    """"1x4x64x64,2x4x64x64"; by default batches 1 and 2 at the configuration's size."""
    calibration: str | Path | None = None
    samples: int | None = None
    steps: int | None = None
    scheduler: str | Path | None = None
    prediction_type: str | None = None
    guidance: float | None = None
    """Classifier-free guidance of the calibration's sampling."""
    conditions: str | Path | None = None
    """Safetensors with the conditions to sample with, for models whose encoders are elsewhere."""
    sensitivity: str | Path | None = None
    numerics: str | None = None
    """"portable": the same bits on every CPU target; "fast": also bfloat16 and 8 bits in attentions. By default the
    recipe's, which is portable."""
    effort: str | None = None
    """How much is trained: "none", "fast" (frozen codes), "balanced" (weights, then frozen codes; some 8 minutes) or
    "best" (30). By default as the recipe says."""
    minutes: float | None = None
    """Of training, in place of the effort's."""
    seed: int = 0
    threads: int | None = None
    """Of a call of the artifact, where whoever loads it says nothing else; by default every core it finds then."""
    emit: str | None = None
    """"c": also a C program that runs the artifact without TVM's runtime (docs/standalone.md)."""
    standalone: bool = False
    """Also a program that runs it, with TVM's runtime."""
    wheels: Path | None = None
    """Folder with the wheels of that runtime for the target; by default the installed one."""
    tune: bool = False
    """Search for the fastest tiles of the integer kernels, measured here; no result depends on them."""
    jobs: int = 1
    cache: Path | None = None
    dumps: Path | None = None
    """Folder for the program after every pass."""
    overwrite: bool = False

    def __post_init__(self) -> None:
        for name in ("wheels", "cache", "dumps"):
            if (path := getattr(self, name)) is not None:
                setattr(self, name, Path(path))
        if self.jobs < 1:
            raise UserError(f"--jobs {self.jobs} must be 1 or more")


def parse_shapes(text: str | None) -> dict[tuple[int, int, int] | None, tuple[int, ...]]:
    """Latent shapes [C, H, W] of "1x4x64x64,2x4x64x64,1x4x96x64", in order, with the batch sizes for each.

    The first is the one that is calibrated. None stands for the configuration's.
    """
    if text is None:
        return {None: DEFAULT_BATCHES}
    found: dict[tuple[int, int, int] | None, tuple[int, ...]] = {}
    for item in text.split(","):
        if not re.fullmatch(r"\s*[1-9]\d*(x[1-9]\d*){3}\s*", item):
            raise UserError(f"--shapes '{item.strip()}' must be batch x channels x height x width, such as 1x4x64x64")
        batch, *latent = (int(d) for d in item.split("x"))
        shape = latent[0], latent[1], latent[2]
        found[shape] = tuple(sorted({*found.get(shape, ()), batch}))
    return found
