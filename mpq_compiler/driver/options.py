"""The options of a compilation: everything that it depends on besides the model."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from mpq_compiler.support.errors import UserError, nearest
from mpq_compiler.support.execution import require_counts

DEFAULT_BATCHES = (1, 2)
MOST_SEED = 2**31 - 1
"""The largest seed."""
EFFORTS = ("none", "fast", "balanced", "best")
"""The efforts of training; each pass declares their meaning for it (`Pass.efforts`)."""


@dataclass
class Options:
    """The options of a compilation, which are those of `mpqc compile` and the keyword arguments of `compile`."""

    target: str = "native"
    """The target, one of `mpqc targets`; "native" is this machine."""
    recipe: str | Path = "default"
    """The recipe: a name of `mpqc recipes`, or a .toml file."""
    pipeline: str | None = None
    """The passes by hand, in the recipe's place: "trace,layout,calibrate{samples=64},..."."""
    weights: str | float | None = None
    """The budget of weights: true average bits, or bytes as "40MB". None takes the recipe's."""
    activations: float | None = None
    """The budget of activations: their average bits."""
    bops: str | float | None = None
    """The budget of bit operations per sample: 2.5e12 or "2.5T"."""
    latency: str | float | None = None
    """The budget of latency: milliseconds of a call, or "800us"; for the table's samples and threads."""
    reuse: int | None = None
    """The sampling steps for which a budget of latency, then of a step on average, may have steps reuse parts of the
    network as they were (docs/reuse.md). None: every step computes all."""
    objective: str | None = None
    """The objective: "noise", or "paper-db", the summed SQNR of layers in dB (MixDQ). None takes the recipe's."""
    latency_table: str | Path | None = None
    """The file that `mpqc latency` wrote (docs/latency.md); without one a budget measures a table here."""
    shapes: str | None = None
    """The shapes of latents, "1x4x64x64,2x4x64x64"; by default batches 1 and 2 at the configuration's size."""
    calibration: str | Path | None = None
    """The safetensors with recorded inputs (docs/calibration.md). None samples them."""
    latent: str | None = None
    """The argument of the recorded calls with the noisy latents, where it is not the one that was found."""
    time: str | None = None
    """The argument of the recorded calls with the time, where it is not the one that was found."""
    samples: int | None = None
    """The number of sampling trajectories that calibrate. None takes the recipe's, usually 32."""
    steps: int | None = None
    """The number of steps of each trajectory. None takes the recipe's, usually 20."""
    scheduler: str | Path | None = None
    """The scheduler_config.json to sample with, in the place of the model's."""
    prediction_type: str | None = None
    """What the model predicts: "epsilon", "sample" or "v_prediction". None takes the scheduler's."""
    guidance: float | None = None
    """The classifier-free guidance of the calibration's sampling. None samples without."""
    conditions: str | Path | None = None
    """A safetensors file with the conditions to sample with, for models whose encoders are elsewhere."""
    sensitivity: str | Path | None = None
    """A sensitivity table of the model, in place of measuring one."""
    plan: str | Path | None = None
    """A plan that `mpqc allocate -o` wrote, in place of budgets and of measuring what they need."""
    numerics: str | None = None
    """The numerics mode: "portable" has equal bits on every CPU target, "fast" adds bfloat16 and 8-bit attentions,
    and on GPUs values between kernels in half precision.

    None takes the recipe's or, where it states none, portable on CPUs and fast on GPUs. A pipeline by hand is taken as
    it stands.
    """
    effort: str | None = None
    """The effort of training: "none", "fast" (scales), "balanced" (packed weights first, some 8 minutes), "best" (30).

    None takes the recipe's.
    """
    minutes: float | None = None
    """The minutes of training, in place of the effort's."""
    lora_rank: int | None = None
    """The rank of the branches that layers keep for a LoRA, which `CompiledDenoiser.load_lora` sets; None: none."""
    lora_layers: str | tuple[str, ...] | None = None
    """The layers with such a branch: patterns of module paths, "*.attn*.to_?,proj_out"; None takes linear layers."""
    seed: int = 0
    """The seed of everything that is drawn at random."""
    threads: int | None = None
    """The default threads of a call of the artifact; None takes every core where it is loaded."""
    emit: str | None = None
    """The value "c" adds a C program that runs the artifact without TVM's runtime (docs/standalone.md)."""
    standalone: bool = False
    """Whether to add a program that runs the artifact on TVM's runtime."""
    owner_key: str | Path | None = None
    """The public key whose owner has to have signed what that program opens: in hexadecimal, or a file with it."""
    wheels: Path | None = None
    """The folder with the wheels of that runtime for the target; by default the installed packages."""
    tune: bool = False
    """Whether to search for the fastest tiles of the integer kernels, measured here; no result depends on them."""
    jobs: int = 1
    """The number of workers. The result is the same."""
    memory_limit: str | None = None
    """The most memory of the compilation, anonymous and shared, over all its processes: "8GB". Where it is too little
    for `jobs`, there are fewer. None: 80 % of what is free. The result is the same."""
    distributed: str | None = None
    """The machines that tasks run on: "ray" starts `jobs` processes here, "ray://host:port" and "host:port" are a Ray
    cluster's (docs/scale.md). None: the threads of this process. The result is the same."""
    device: str = "cpu"
    """Where torch runs the model to calibrate and measure: "cpu", or "cuda" for a GPU that it sees (docs/scale.md). The
    result differs by what last bits decide."""
    cache: Path | None = None
    """The folder of the cache. None takes the user's."""
    dumps: Path | None = None
    """The folder for dumps of the program after every pass. None writes none."""
    overwrite: bool = False
    """Whether to replace an artifact that exists."""

    def __new__(cls, *values: object, **named: object) -> Self:
        """Refuses names that are no options by a sentence, where the constructor would raise a TypeError."""
        require_known(named)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for name in ("wheels", "cache", "dumps"):
            if (path := getattr(self, name)) is not None:
                setattr(self, name, Path(path))
        if isinstance(self.lora_layers, str):
            self.lora_layers = tuple(pattern.strip() for pattern in self.lora_layers.split(",") if pattern.strip())
        require_counts(jobs=self.jobs)


def require_known(names: Iterable[str], beside: Iterable[str] = ()) -> None:
    """UserError: a name is neither an option nor one of the arguments ``beside`` them."""
    known = [*Options.__dataclass_fields__, *beside]
    for name in names:
        if name not in known:
            raise UserError(f"there is no option '{name}': {nearest(name, known)}")


def parse_shapes(text: str | None) -> dict[tuple[int, int, int] | None, tuple[int, ...]]:
    """Parses shapes such as "1x4x64x64,2x4x64x64,1x4x96x64": latents [C, H, W] in order, with the batch sizes of each.

    The first shape is calibrated. None stands for the configuration's.
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
