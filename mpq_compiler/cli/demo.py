"""`mpqc demo`: the bundled denoiser compiled for this machine, and what became of it in one picture and one table."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpq_compiler.cli.options import Commands, add_machine
from mpq_compiler.support import terminal
from mpq_compiler.support.errors import UserError, nearest

if TYPE_CHECKING:
    from mpq_compiler.evaluation.painter import Painter

MODEL = "fashion-unet"
ROUNDS = 7
TIMED_BATCH = 2


def add(commands: Commands) -> None:
    """Add the command and its options to the command line."""
    parser = commands.add(
        "demo", run, "compile the bundled denoiser for this machine and draw images with both",
        lambda args: f"compiling {args.model} to {args.weights} bits, and drawing with both",
    )  # fmt: skip
    parser.add_argument(
        "-o", "--output", metavar="DIR", default="mpq-demo", help="for picture and artifact (default: mpq-demo)"
    )
    parser.add_argument("--model", metavar="NAME", default=MODEL, help=f"bundled model (default: {MODEL})")
    parser.add_argument("--weights", metavar="BUDGET", default="4", help="true average bits, or bytes as 800kB (4)")
    parser.add_argument("--images", type=int, metavar="N", default=20, help="images in the picture (20)")
    parser.add_argument("--steps", type=int, metavar="N", default=10, help="sampling steps (10)")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier demo")
    add_machine(parser)


def run(args: argparse.Namespace) -> Any:
    """Run the demo with the options of the command line."""
    where, asked = Path(args.output), (args.weights, args.images, args.steps, args.overwrite)
    return demo(where, *asked, jobs=args.jobs, cache=args.cache, model=args.model)


def demo(
    folder: Path,
    weights: str,
    images: int,
    steps: int,
    overwrite: bool,
    jobs: int = 1,
    cache: Path | None = None,
    model: str = MODEL,
) -> dict[str, Any]:
    """Compiles a bundled model, draws the same noise with both, writes ``samples.png`` and prints the table."""
    from mpq_compiler.api.compile import compile
    from mpq_compiler.evaluation import image_grid, metrics
    from mpq_compiler.evaluation.painter import check, from_artifact, from_denoiser
    from mpq_compiler.frontend import checkpoint, denoiser
    from mpq_compiler.ir.interpreter import single_threaded

    check(images, steps)
    if model not in checkpoint.bundled():
        raise UserError(f"there is no bundled model '{model}'; {nearest(model, checkpoint.bundled())}")
    picture, output = folder / "samples.png", folder / f"{model}.mpq"
    _require_new(folder, (picture, output), overwrite)
    loaded = denoiser.load(model)
    report = compile(loaded, output, terminal.progress, weights=weights, jobs=jobs, cache=cache, overwrite=overwrite)
    painters = [from_denoiser(loaded), from_artifact(output, threads=1)]
    with single_threaded():
        drawn = _draw(painters, images, steps, seed=painters[1].unseen)
        times = _milliseconds([p.call for p in painters], painters[0])
    image_grid.grid(drawn, picture, columns=5, scale=3, titles=[f"float32 ({model})", f"compiled, {weights} bits"])
    result = {
        "picture": str(picture),
        "artifact": str(output),
        "model": model,
        "target": report.target,
        "weights": report.weights,
        "quality": report.quality,
        "psnr_db": metrics.psnr_db(drawn[0], drawn[1]),
        "ms_per_step": {"torch": times[0], "mpq": times[1], "speedup": times[0] / times[1]},
    }
    _print(result)
    return result


def _require_new(folder: Path, outputs: tuple[Path, ...], overwrite: bool) -> None:
    """Makes the folder. UserError: it cannot be made, or holds an output that may not be replaced."""
    for existing in outputs:
        if existing.exists() and not overwrite:
            raise UserError(f"'{existing}' exists; add --overwrite, or name another folder with --output")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the folder '{folder}' cannot be made: {error.strerror}") from error


def _draw(painters: list[Painter], images: int, steps: int, seed: int) -> list[Any]:
    """Images of each painter, the float model's first, from the same noise."""
    drawn = []
    for title, painter in zip(("drawing with the float model", "drawing with the artifact"), painters, strict=True):
        with terminal.progress(title, steps) as advance:
            varied = painter.conditioning.varied(images)
            drawn.append(painter.decode(painter.draw(varied, images, steps, seed, progress=_stepwise(advance))))
    return drawn


def _stepwise(advance: Callable[[int], None]) -> Callable[[int, int], None]:
    return lambda done, total: advance(1)


def _milliseconds(calls: list[Any], painter: Painter) -> list[float]:
    """Median milliseconds of one denoiser call of each, in interleaved rounds on one thread."""
    import numpy as np

    from mpq_compiler.sampling import loop

    conditions = painter.conditioning.varied(TIMED_BATCH)
    inputs = {
        painter.latent: loop.gaussian(TIMED_BATCH, painter.shape, 0),
        "timestep": np.full(TIMED_BATCH, 500, np.float32),
        **painter.conditioning.arguments(conditions, TIMED_BATCH, None)["conditions"],
    }
    rounds: list[list[float]] = [[] for _ in calls]
    for _ in range(ROUNDS):
        for times, call in zip(rounds, calls, strict=True):
            call(**inputs)
            start = time.perf_counter()
            call(**inputs)
            times.append((time.perf_counter() - start) * 1e3)
    return [float(np.median(times)) for times in rounds]


def _print(result: dict[str, Any]) -> None:
    weights, times = result["weights"], result["ms_per_step"]
    terminal.table(
        f"{result['model']} for {result['target']}",
        ("", "float32", "compiled"),
        (
            ("weights", terminal.size(weights["float_bytes"]), terminal.size(weights["bytes"])),
            ("true average bits", "32", f"{weights['average_bits']:.2f}"),
            (f"ms per step (batch {TIMED_BATCH}, 1 thread)", f"{times['torch']:.2f}", f"{times['mpq']:.2f}"),
            ("SQNR of the output", "", f"{result['quality']['sqnr_db']:.1f} dB ({result['quality']['executed_by']})"),
            ("PSNR of the images", "", f"{result['psnr_db']:.1f} dB"),
        ),
        numeric=(1, 2),
    )
    artifact, model = result["artifact"], result["model"]
    terminal.say(
        f"The picture is {result['picture']}. Next:\n"
        f"  mpqc inspect {artifact} --layers\n"
        f"  mpqc eval {artifact} --against {model} --images 200\n"
        f"  mpqc compile {model} -o smaller.mpq --weights 3 --dumps dumps && mpqc inspect dumps --diff bit-allocation"
    )
