"""`mpqc eval`: all metrics of an artifact, or of a model compiled first, against the float model."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from mpq_compiler.cli.options import (
    Commands,
    add_budgets,
    add_key,
    add_latency_table,
    add_lowering,
    add_threads,
    of_compilation,
)
from mpq_compiler.support import terminal
from mpq_compiler.support.errors import Notice, UserError

if TYPE_CHECKING:
    from mpq_compiler.artifact.manifest import Cost
    from mpq_compiler.evaluation.conditional_difference import Figures, Told
    from mpq_compiler.evaluation.user_functions import Judged, UserFunction

METRICS = {
    "sqnr_db": ("SQNR of {calls} calls of the float model", " dB"),
    "trajectory_sqnr_db": ("SQNR of what is drawn, as latents", " dB"),
    "image_sqnr_db": ("SQNR of images", " dB"),
    "psnr_db": ("PSNR of images", " dB"),
    "ssim": ("SSIM of images (1: equal)", ""),
    "frechet_to_float": ("Fréchet distance to the float model's", ""),
    "frechet_to_data": ("Fréchet distance to data", ""),
    "class_accuracy": ("share whose class is recognized", ""),
}
"""The metrics (docs/metrics.md): the title of each in a table, and its unit."""
STEPS_SHOWN = 10
"""The most sampling steps in a table."""


def add(commands: Commands) -> None:
    """Add the command and its options to the command line."""
    text = "all metrics of an artifact, or of a model compiled first, against the float model"
    parser = commands.add("eval", run, text, lambda args: f"evaluating {args.artifact} against the float model")
    parser.add_argument("artifact", metavar="ARTIFACT|MODEL")
    parser.add_argument("--against", metavar="MODEL", help="the float model (default: the bundled one of its name)")
    parser.add_argument("--images", type=int, metavar="N", help="images to draw with both (200; of a pipeline 16)")
    parser.add_argument(
        "--prompts", type=Path, metavar="FILE", help="prompts to judge a pipeline by (default: 32 of our own)"
    )
    parser.add_argument(
        "--features", metavar="MODULE:FUNCTION", action="append", default=[],
        help="FID, KID, precision and recall by features of a function from images to [N, D], such as Inception; it is "
        "imported, in this folder too, and its code is run (docs/metrics.md); repeatable",
    )  # fmt: skip
    parser.add_argument(
        "--score", metavar="MODULE:FUNCTION", action="append", default=[],
        help="mean of a function from images and their prompts or classes to [N], such as a CLIP score, and the "
        "difference to the float model's; likewise",
    )  # fmt: skip
    parser.add_argument("--eval-steps", type=int, metavar="N", default=10, help="sampling steps (10)")
    parser.add_argument("--eval-seed", type=int, metavar="N", help="of the noise (default: calibration's and 1)")
    add_threads(parser)
    add_key(parser)
    add_budgets(parser)
    add_latency_table(parser)
    add_lowering(parser)


def run(args: argparse.Namespace) -> Any:
    """Evaluate the artifact or model, print the metrics with their intervals, and return them."""
    from mpq_compiler.artifact.pipeline import is_pipeline
    from mpq_compiler.evaluation.user_functions import functions

    given, judges = of_compilation(args), functions(args.features, args.score)
    if is_pipeline(args.artifact):
        result: Mapping[str, object] = _of_pipeline(args, given, judges)
    else:
        if args.prompts is not None:
            raise UserError(f"--prompts is of a pipeline, and {args.artifact} is none: leave it out")
        drawn = (200 if args.images is None else args.images, args.eval_steps, args.eval_seed)
        result = evaluate_path(args.artifact, args.against, *drawn, terminal.progress, given, args.key, judges)
    _show(args.artifact, result)
    return result


def _show(path: str, result: Mapping[str, object]) -> None:
    rows: list[tuple[str, str, str, str]] = []
    for name, (title, unit) in METRICS.items():
        if name not in result:
            continue
        said = title.format_map(result)
        match result[name]:
            case None:
                reasons = result.get("reasons")
                rows.append((said, "n/a", reasons.get(name, "") if isinstance(reasons, dict) else "", ""))
            case {"value": value, **more}:
                span = f"{more['low']:.4g} .. {more['high']:.4g}" if "low" in more else ""
                rows.append((said, f"{value:.4g}{unit}", span, f"{more['float']:.4g}" if "float" in more else ""))
            case value:
                rows.append((said, f"{value:.4g}{unit}", "", ""))
    judged = cast("Judged", result)
    for name, by in judged.get("features", {}).items():
        figures = {"FID": by["fid"], "KID": by["kid"], "precision": by["precision"], "recall": by["recall"]}
        for metric, of in figures.items():
            shown = ("n/a", "it needs more images") if of is None else (f"{of['value']:.4g}", _span(of))
            rows.append((f"{metric}, {name}", *shown, ""))
    for name, score in judged.get("scores", {}).items():
        span, apart = f"{score['low']:.4g} .. {score['high']:.4g}", score["difference"]
        rows.append((f"{name}, mean", f"{score['value']:.4g}", span, f"{score['float']:.4g}"))
        rows.append((f"{name}, less the float model's", f"{apart['value']:+.4g}", _span(apart), ""))
    guidance = "" if result["guidance"] is None else f", guidance {result['guidance']:g}"
    settings = f"{result['images']} images, {result['steps']} steps, seed {result['seed']}{guidance}"
    headers = ("metric", "value", "95 % interval", "float model")
    terminal.table(f"{path}: {settings}", headers, rows, numeric=(1, 3))
    if "conditional_difference" in result:
        _show_difference(cast("Told", result["conditional_difference"]))
    _show_costs(cast("Mapping[str, Cost]", result.get("parts") or {"": result["cost"]}))


def _span(found: Mapping[str, float]) -> str:
    return f"{found['low']:.4g} .. {found['high']:.4g}" if "low" in found else ""


def _show_difference(found: Told) -> None:
    """The table of what the condition changes, of some steps where there are many."""
    steps = found["steps"]
    shown = [*range(0, len(steps) - 1, -(-len(steps) // STEPS_SHOWN)), len(steps) - 1]
    lines: list[tuple[str, str, Figures]] = [(str(i + 1), f"{steps[i]['timestep']:.4g}", steps[i]) for i in shown]
    rows = [
        (step, time, *("" if x is None else f"{x:.4f}" for x in (of["float"], of["compiled"], of["cosine"])))
        for step, time, of in (*lines, ("all", "", found))
    ]
    title = f"what the condition changes in the output, |c - u| / |c|, of {found['images']} images"
    terminal.table(title, ("step", "timestep", "float", "compiled", "cosine"), rows, numeric=range(1, 5))


def _show_costs(costs: Mapping[str, Cost]) -> None:
    """The table of what each part costs, and the float model."""
    rows = [
        (
            part,
            *(x and terminal.size(x) for x in (of["bytes"], of["float_bytes"], of["peak_bytes"])),
            *(x and terminal.count(x) for x in (of["bops"], of["float_bops"])),
        )
        for part, of in costs.items()
    ]
    headers = ("part", "weights", "as f32", "peak memory", "BOPs", "in float")
    terminal.table("what it stores, and what a call costs", headers, rows, numeric=range(1, 6))


def _of_pipeline(
    args: argparse.Namespace, options: Mapping[str, object], judges: Sequence[UserFunction]
) -> dict[str, object]:
    """Draw the same prompts and noise with the compiled pipeline and with diffusers' own, and compare the pictures."""
    import numpy as np

    from mpq_compiler.artifact import bundle
    from mpq_compiler.artifact.manifest import cost
    from mpq_compiler.cli.compile import prompts_of
    from mpq_compiler.driver import pipeline as pipelines
    from mpq_compiler.evaluation import user_functions
    from mpq_compiler.evaluation.conditional_difference import PICTURES, ConditionalDifference, observed
    from mpq_compiler.evaluation.metrics import compare_images
    from mpq_compiler.evaluation.painter import check
    from mpq_compiler.frontend import checkpoint, pipeline_parts
    from mpq_compiler.runtime.pipeline import load_pipeline
    from mpq_compiler.sampling import loop

    _require_no_effect(args.artifact, options)
    if args.against is None:
        raise UserError(f"{args.artifact} is a pipeline: name the folder of the float one with --against")
    images, seed = 16 if args.images is None else args.images, args.eval_seed or 0
    check(images, args.eval_steps, seed)
    pipe = load_pipeline(args.artifact, args.threads, key=args.key)
    guidance = pipe.guidance if args.guidance is None else args.guidance
    unseen = pipeline_parts.prompts(unseen=True, folder=checkpoint.place_of(args.against))
    texts = np.resize(prompts_of(args.prompts) or unseen, images).tolist()
    user_functions.probe(judges, (3, *pipe.size), texts)
    source = pipelines.load(args.against)
    denoiser = pipelines.require_parts(source, pipelines.ROLES)
    shape = pipe.part(pipe.denoiser).manifest["sampling"]["shape"]
    noise = loop.gaussian(images, tuple(shape), seed)
    said = None if pipe.document["guidance"] is None else guidance
    difference = ConditionalDifference()
    with terminal.progress("drawing", 2 * images) as advance:
        ours, theirs = [], []
        for index, (text, one) in enumerate(zip(texts, noise, strict=True)):
            looked_at = index < PICTURES and pipe.document["null"] is not None
            called = getattr(source, denoiser), pipe.part(pipe.denoiser), difference
            with observed(*called) if looked_at else nullcontext():
                theirs.append(pipeline_parts.drawn(source, denoiser, text, one[None], args.eval_steps, said, pipe.size))
            advance(1)
            ours.append(pipe.decode(pipe.latents([text], steps=args.eval_steps, guidance=guidance, noise=one[None])))
            advance(1)
    pictures = 2 * np.concatenate(theirs) - 1, 2 * np.concatenate(ours).transpose(0, 3, 1, 2) - 1
    compared = compare_images(*pictures, None, "", None)
    return {
        **{name: compared[name] for name in ("images", "image_sqnr_db", "psnr_db", "ssim")},
        **user_functions.compare(judges, *pictures, texts),
        **({"conditional_difference": difference.to_json(min(images, PICTURES))} if difference.sums else {}),
        "parts": {name: cost(bundle.read_manifest(pipe.path / name)) for name in pipe.document["parts"]},
        "steps": args.eval_steps,
        "seed": seed,
        "guidance": guidance,
    }


def _require_no_effect(path: str, options: Mapping[str, Any]) -> None:
    """UserError where a compiled model is to be evaluated with options of a compilation."""
    from mpq_compiler.driver.options import Options

    used = {"guidance", "conditions", "threads", "jobs", "cache"}
    idle = [
        f"--{name.replace('_', '-')}"
        for name, value in options.items()
        if name not in used and value != getattr(Options, name)
    ]
    if idle:
        raise UserError(
            f"'{path}' is compiled already, and {', '.join(idle)} would change nothing: leave it out, or name the model"
        )


def _require_drawing(model: str, steps: int, options: dict[str, Any], judges: Sequence[UserFunction]) -> None:
    """UserError where the model cannot draw in so many steps, or a function not judge what it draws.

    The model is not held while its artifact is made.
    """
    from mpq_compiler.driver.lower import load_denoiser
    from mpq_compiler.driver.options import Options
    from mpq_compiler.evaluation.evaluate import probe
    from mpq_compiler.evaluation.painter import from_denoiser
    from mpq_compiler.support import cluster

    cluster.require(options.get("distributed"))
    loaded = load_denoiser(model, Options(**options))
    loaded.scheduler.timesteps(steps)
    loaded.conditioning.arguments(loaded.conditioning.varied(1), 1, options.get("guidance"))
    probe(judges, from_denoiser(loaded))


def evaluate_path(
    path: str,
    against: str | None,
    images: int,
    steps: int,
    seed: int | None,
    progress: Any,
    options: dict[str, Any],
    key: str | None = None,
    judges: Sequence[UserFunction] = (),
) -> dict[str, Any]:
    """`evaluate` of an artifact, or of a model that is compiled for this machine first, against its float model.

    seed: of the noise; None: one that calibration did not draw from (`Painter.unseen`). key: that of `load`. judges: as
    `evaluate` takes them for features and scores.
    """
    import tempfile

    from mpq_compiler.artifact import bundle
    from mpq_compiler.evaluation.evaluate import evaluate
    from mpq_compiler.evaluation.painter import (
        BATCH,
        check,
        float_model,
        from_artifact,
        from_denoiser,
        sampled_like,
        with_conditions,
    )
    from mpq_compiler.frontend import checkpoint

    check(images, steps, seed or 0)
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(path)
        if not (target / bundle.MANIFEST).exists() and target.suffix != ".zip":
            from mpq_compiler.api.compile import compile

            if key is not None:
                raise UserError(f"--key is of an artifact that is signed, and {path} is a model: leave it out")
            against = against or path
            target = Path(scratch) / "compiled.mpq"
            _require_drawing(path, steps, options, judges)  # before it is compiled
            compile(path, target, progress, **options)
        else:
            _require_no_effect(path, options)
        painter = with_conditions(from_artifact(target, options.get("threads"), key), options.get("conditions"))
        if against is None and painter.name not in checkpoint.bundled():
            raise UserError(f"'{painter.name}' is no bundled model: name the float model with --against")
        loaded = float_model(against or painter.name, painter)
        reference = with_conditions(sampled_like(from_denoiser(loaded), painter), options.get("conditions"))
        if painter.undecoded:
            warnings.warn(painter.undecoded, Notice, stacklevel=2)
        guidance = options.get("guidance")
        guided = "null_conditions" in painter.conditioning.arguments(painter.conditioning.varied(1), 1, guidance)
        seed = painter.unseen if seed is None else seed
        with progress("evaluating", -(-images // BATCH) * steps * (1 + guided)) as advance:
            return evaluate(
                *(painter, reference, images, steps, seed, loaded.features, guidance), lambda done, total: advance(1),
                features=[each for each in judges if not each.scores], score=[each for each in judges if each.scores],
            )  # fmt: skip
