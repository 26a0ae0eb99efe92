# The types of the public names: `python -m tests.harness.stub` writes this file.

from collections.abc import Sequence
from pathlib import Path
from typing import Any, overload

import torch

from mpq_compiler.allocation.problem import Problem as Problem
from mpq_compiler.allocation.solver import solve as allocate
from mpq_compiler.api.compile import Planned
from mpq_compiler.artifact.bundle import read as verify
from mpq_compiler.cli.demo import demo as demo
from mpq_compiler.cli.inspect import inspect as inspect
from mpq_compiler.driver.estimate import Estimate
from mpq_compiler.driver.report import Report as Report
from mpq_compiler.evaluation.evaluate import evaluate as evaluate
from mpq_compiler.frontend.denoiser import Denoiser
from mpq_compiler.frontend.denoiser import load as load_denoiser
from mpq_compiler.frontend.record import record_inputs as record_inputs
from mpq_compiler.interchange.export import export as export
from mpq_compiler.ir.findings import SensitivityTable
from mpq_compiler.latency.table import Table
from mpq_compiler.pipeline.backend import Progress
from mpq_compiler.runtime.compiled_denoiser import CompiledDenoiser as CompiledDenoiser
from mpq_compiler.runtime.compiled_denoiser import load as load
from mpq_compiler.runtime.pipeline import CompiledPipeline as CompiledPipeline
from mpq_compiler.runtime.pipeline import load_pipeline as load_pipeline
from mpq_compiler.sampling.call_tree import Arguments
from mpq_compiler.support.errors import UserError as UserError

__version__: str
__all__ = [
    "CompiledDenoiser",
    "CompiledPipeline",
    "Problem",
    "Report",
    "UserError",
    "allocate",
    "compile",
    "demo",
    "estimate",
    "evaluate",
    "export",
    "inspect",
    "load",
    "load_denoiser",
    "load_pipeline",
    "measure_latency",
    "measure_sensitivity",
    "record_inputs",
    "verify",
]

@overload
def compile(
    model: str | Path | Denoiser,
    output: str | Path,
    progress: Progress | None = None,
    *,
    parts: Sequence[str] | None = None,
    decoder: str | Path | torch.nn.Module | None = None,
    prompts: Sequence[str] = (),
    planned: Planned | None = None,
    target: str = 'native',
    recipe: str | Path = 'default',
    pipeline: str | None = None,
    weights: str | float | None = None,
    activations: float | None = None,
    bops: str | float | None = None,
    latency: str | float | None = None,
    reuse: int | None = None,
    objective: str | None = None,
    latency_table: str | Path | None = None,
    shapes: str | None = None,
    calibration: str | Path | None = None,
    latent: str | None = None,
    time: str | None = None,
    samples: int | None = None,
    steps: int | None = None,
    scheduler: str | Path | None = None,
    prediction_type: str | None = None,
    guidance: float | None = None,
    conditions: str | Path | None = None,
    sensitivity: str | Path | None = None,
    plan: str | Path | None = None,
    numerics: str | None = None,
    effort: str | None = None,
    minutes: float | None = None,
    lora_rank: int | None = None,
    lora_layers: str | tuple[str, ...] | None = None,
    seed: int = 0,
    threads: int | None = None,
    emit: str | None = None,
    standalone: bool = False,
    owner_key: str | Path | None = None,
    wheels: Path | None = None,
    tune: bool = False,
    jobs: int = 1,
    memory_limit: str | None = None,
    distributed: str | None = None,
    device: str = 'cpu',
    cache: Path | None = None,
    dumps: Path | None = None,
    overwrite: bool = False,
) -> Report:
    """Compiles a model to an artifact, or a pipeline to a folder of them.

    Args:
        model: a folder, a hub id, a bundled name, a `Denoiser`, a diffusers pipeline, or any module.
        output: the artifact, a folder or a .zip.
        progress: opens progress bars, or None.
        example: the keyword arguments of a call of the module; it is calibrated with other noise in its latents. What
            calibrates better are recorded calls (`record_inputs`), in the option ``calibration``. A list has calls of
            several kinds, the first of which is calibrated (docs/calibration.md).
        calls: what a diffusers pipeline draws for calibration, as prompts or as keyword arguments of its call.
        parts: the parts of a pipeline that are compiled, `text`, `denoiser` and `decoder`; `load_pipeline` draws with
            what all of them make. None: all of a folder, and of a pipeline in memory the denoiser, which is replaced.
        decoder: the autoencoder that decodes in place of the pipeline's own, or its folder.
        prompts: what the parts of a pipeline are calibrated on, in place of those of its folder's prompts.txt, or of
            ours.
        planned: is called before anything is measured, with the `Estimate`, and with a sentence where the memory
            lowered the number of jobs, or None.
        options: as listed below.

    Returns:
        The `Report`; of several parts a `PipelineReport`; for a pipeline in memory the pipeline itself, with its
        denoiser replaced (`diffusers.compile_pipeline`).

    Raises:
        UserError: an input that cannot be compiled; nothing is left at ``output`` then.

    Options:
        target: The target, one of `mpqc targets`; "native" is this machine. Default: 'native'.
        recipe: The recipe: a name of `mpqc recipes`, or a .toml file. Default: 'default'.
        pipeline: The passes by hand, in the recipe's place: "trace,layout,calibrate{samples=64},...". Default:
            None.
        weights: The budget of weights: true average bits, or bytes as "40MB". None takes the recipe's. Default:
            None.
        activations: The budget of activations: their average bits. Default: None.
        bops: The budget of bit operations per sample: 2.5e12 or "2.5T". Default: None.
        latency: The budget of latency: milliseconds of a call, or "800us"; for the table's samples and threads.
            Default: None.
        reuse: The sampling steps for which a budget of latency, then of a step on average, may have steps reuse
            parts of the network as they were (docs/reuse.md). None: every step computes all. Default: None.
        objective: The objective: "noise", or "paper-db", the summed SQNR of layers in dB (MixDQ). None takes the
            recipe's. Default: None.
        latency_table: The file that `mpqc latency` wrote (docs/latency.md); without one a budget measures a table
            here. Default: None.
        shapes: The shapes of latents, "1x4x64x64,2x4x64x64"; by default batches 1 and 2 at the configuration's
            size. Default: None.
        calibration: The safetensors with recorded inputs (docs/calibration.md). None samples them. Default: None.
        latent: The argument of the recorded calls with the noisy latents, where it is not the one that was found.
            Default: None.
        time: The argument of the recorded calls with the time, where it is not the one that was found. Default:
            None.
        samples: The number of sampling trajectories that calibrate. None takes the recipe's, usually 32. Default:
            None.
        steps: The number of steps of each trajectory. None takes the recipe's, usually 20. Default: None.
        scheduler: The scheduler_config.json to sample with, in the place of the model's. Default: None.
        prediction_type: What the model predicts: "epsilon", "sample" or "v_prediction". None takes the scheduler's.
            Default: None.
        guidance: The classifier-free guidance of the calibration's sampling. None samples without. Default: None.
        conditions: A safetensors file with the conditions to sample with, for models whose encoders are elsewhere.
            Default: None.
        sensitivity: A sensitivity table of the model, in place of measuring one. Default: None.
        plan: A plan that `mpqc allocate -o` wrote, in place of budgets and of measuring what they need. Default:
            None.
        numerics: The numerics mode: "portable" has equal bits on every CPU target, "fast" adds bfloat16 and 8-bit
            attentions, and on GPUs values between kernels in half precision. None takes the recipe's or, where it
            states none, portable on CPUs and fast on GPUs. A pipeline by hand is taken as it stands. Default: None.
        effort: The effort of training: "none", "fast" (scales), "balanced" (packed weights first, some 8 minutes),
            "best" (30). None takes the recipe's. Default: None.
        minutes: The minutes of training, in place of the effort's. Default: None.
        lora_rank: The rank of the branches that layers keep for a LoRA, which `CompiledDenoiser.load_lora` sets;
            None: none. Default: None.
        lora_layers: The layers with such a branch: patterns of module paths, "*.attn*.to_?,proj_out"; None takes
            linear layers. Default: None.
        seed: The seed of everything that is drawn at random. Default: 0.
        threads: The default threads of a call of the artifact; None takes every core where it is loaded. Default:
            None.
        emit: The value "c" adds a C program that runs the artifact without TVM's runtime (docs/standalone.md).
            Default: None.
        standalone: Whether to add a program that runs the artifact on TVM's runtime. Default: False.
        owner_key: The public key whose owner has to have signed what that program opens: in hexadecimal, or a file
            with it. Default: None.
        wheels: The folder with the wheels of that runtime for the target; by default the installed packages.
            Default: None.
        tune: Whether to search for the fastest tiles of the integer kernels, measured here; no result depends on
            them. Default: False.
        jobs: The number of workers. The result is the same. Default: 1.
        memory_limit: The most memory of the compilation, anonymous and shared, over all its processes: "8GB". Where
            it is too little for `jobs`, there are fewer. None: 80 % of what is free. The result is the same.
            Default: None.
        distributed: The machines that tasks run on: "ray" starts `jobs` processes here, "ray://host:port" and
            "host:port" are a Ray cluster's (docs/scale.md). None: the threads of this process. The result is the
            same. Default: None.
        device: Where torch runs the model to calibrate and measure: "cpu", or "cuda" for a GPU that it sees
            (docs/scale.md). The result differs by what last bits decide. Default: 'cpu'.
        cache: The folder of the cache. None takes the user's. Default: None.
        dumps: The folder for dumps of the program after every pass. None writes none. Default: None.
        overwrite: Whether to replace an artifact that exists. Default: False.
    """
@overload
def compile(
    model: Any,
    output: str | Path,
    progress: Progress | None = None,
    *,
    example: Arguments | Sequence[Arguments] | None = None,
    calls: Sequence[str | Arguments] = (),
    parts: Sequence[str] | None = None,
    decoder: str | Path | torch.nn.Module | None = None,
    prompts: Sequence[str] = (),
    planned: Planned | None = None,
    target: str = 'native',
    recipe: str | Path = 'default',
    pipeline: str | None = None,
    weights: str | float | None = None,
    activations: float | None = None,
    bops: str | float | None = None,
    latency: str | float | None = None,
    reuse: int | None = None,
    objective: str | None = None,
    latency_table: str | Path | None = None,
    shapes: str | None = None,
    calibration: str | Path | None = None,
    latent: str | None = None,
    time: str | None = None,
    samples: int | None = None,
    steps: int | None = None,
    scheduler: str | Path | None = None,
    prediction_type: str | None = None,
    guidance: float | None = None,
    conditions: str | Path | None = None,
    sensitivity: str | Path | None = None,
    plan: str | Path | None = None,
    numerics: str | None = None,
    effort: str | None = None,
    minutes: float | None = None,
    lora_rank: int | None = None,
    lora_layers: str | tuple[str, ...] | None = None,
    seed: int = 0,
    threads: int | None = None,
    emit: str | None = None,
    standalone: bool = False,
    owner_key: str | Path | None = None,
    wheels: Path | None = None,
    tune: bool = False,
    jobs: int = 1,
    memory_limit: str | None = None,
    distributed: str | None = None,
    device: str = 'cpu',
    cache: Path | None = None,
    dumps: Path | None = None,
    overwrite: bool = False,
) -> Any: ...


def estimate(
    model: str | Path | Denoiser,
    progress: Progress | None = None,
    *,
    target: str = 'native',
    recipe: str | Path = 'default',
    pipeline: str | None = None,
    weights: str | float | None = None,
    activations: float | None = None,
    bops: str | float | None = None,
    latency: str | float | None = None,
    reuse: int | None = None,
    objective: str | None = None,
    latency_table: str | Path | None = None,
    shapes: str | None = None,
    calibration: str | Path | None = None,
    latent: str | None = None,
    time: str | None = None,
    samples: int | None = None,
    steps: int | None = None,
    scheduler: str | Path | None = None,
    prediction_type: str | None = None,
    guidance: float | None = None,
    conditions: str | Path | None = None,
    sensitivity: str | Path | None = None,
    plan: str | Path | None = None,
    numerics: str | None = None,
    effort: str | None = None,
    minutes: float | None = None,
    lora_rank: int | None = None,
    lora_layers: str | tuple[str, ...] | None = None,
    seed: int = 0,
    threads: int | None = None,
    emit: str | None = None,
    standalone: bool = False,
    owner_key: str | Path | None = None,
    wheels: Path | None = None,
    tune: bool = False,
    jobs: int = 1,
    memory_limit: str | None = None,
    distributed: str | None = None,
    device: str = 'cpu',
    cache: Path | None = None,
    dumps: Path | None = None,
    overwrite: bool = False,
) -> Estimate: ...


def measure_latency(
    model: str | Path | Denoiser,
    progress: Any = None,
    formats: Sequence[str] = (),
    batch: int = 1,
    rpc: str | None = None,
    *,
    target: str = 'native',
    recipe: str | Path = 'default',
    pipeline: str | None = None,
    weights: str | float | None = None,
    activations: float | None = None,
    bops: str | float | None = None,
    latency: str | float | None = None,
    reuse: int | None = None,
    objective: str | None = None,
    latency_table: str | Path | None = None,
    shapes: str | None = None,
    calibration: str | Path | None = None,
    latent: str | None = None,
    time: str | None = None,
    samples: int | None = None,
    steps: int | None = None,
    scheduler: str | Path | None = None,
    prediction_type: str | None = None,
    guidance: float | None = None,
    conditions: str | Path | None = None,
    sensitivity: str | Path | None = None,
    plan: str | Path | None = None,
    numerics: str | None = None,
    effort: str | None = None,
    minutes: float | None = None,
    lora_rank: int | None = None,
    lora_layers: str | tuple[str, ...] | None = None,
    seed: int = 0,
    threads: int | None = None,
    emit: str | None = None,
    standalone: bool = False,
    owner_key: str | Path | None = None,
    wheels: Path | None = None,
    tune: bool = False,
    jobs: int = 1,
    memory_limit: str | None = None,
    distributed: str | None = None,
    device: str = 'cpu',
    cache: Path | None = None,
    dumps: Path | None = None,
    overwrite: bool = False,
) -> Table: ...


def measure_sensitivity(
    model: str | Path | Denoiser,
    progress: Any = None,
    *,
    target: str = 'native',
    recipe: str | Path = 'default',
    pipeline: str | None = None,
    weights: str | float | None = None,
    activations: float | None = None,
    bops: str | float | None = None,
    latency: str | float | None = None,
    reuse: int | None = None,
    objective: str | None = None,
    latency_table: str | Path | None = None,
    shapes: str | None = None,
    calibration: str | Path | None = None,
    latent: str | None = None,
    time: str | None = None,
    samples: int | None = None,
    steps: int | None = None,
    scheduler: str | Path | None = None,
    prediction_type: str | None = None,
    guidance: float | None = None,
    conditions: str | Path | None = None,
    sensitivity: str | Path | None = None,
    plan: str | Path | None = None,
    numerics: str | None = None,
    effort: str | None = None,
    minutes: float | None = None,
    lora_rank: int | None = None,
    lora_layers: str | tuple[str, ...] | None = None,
    seed: int = 0,
    threads: int | None = None,
    emit: str | None = None,
    standalone: bool = False,
    owner_key: str | Path | None = None,
    wheels: Path | None = None,
    tune: bool = False,
    jobs: int = 1,
    memory_limit: str | None = None,
    distributed: str | None = None,
    device: str = 'cpu',
    cache: Path | None = None,
    dumps: Path | None = None,
    overwrite: bool = False,
) -> SensitivityTable: ...
