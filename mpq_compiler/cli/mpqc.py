"""`mpqc`: the commands, their options and how errors end."""

from __future__ import annotations

import argparse
import collections
import functools
import json
import math
import os
import signal
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO

from mpq_compiler.support import terminal
from mpq_compiler.support.errors import UserError

TEACH = """\
Compiles diffusion denoisers (any UNet or transformer of diffusers) to
mixed-precision low-bit artifacts.

  mpqc demo                                    see it work: images, sizes, times
  mpqc compile MODEL -o out.mpq --weights 3.5  to 3.5 true average bits
  mpqc generate out.mpq -o grid.png --compare MODEL
                                               the same noise drawn with both
  mpqc inspect out.mpq --layers                which layer got which bits
  mpqc compile MODEL -o out.mpq --dumps d      keep the program after every pass
  mpqc inspect d --diff bit-allocation         ... and see what a pass did
  mpqc inspect d --why LAYER                   ... and why a layer is as it is

MODEL is a folder with config.json and safetensors, a pipeline's folder, a hub
id, or a bundled name (mpqc models).
"""

PER_CALL = "threads of a call (default: what the artifact was compiled with, else every core)"
# What a bare installation lacks: the distribution of a module, and what brings it.
REQUIREMENTS = {
    "torch": ("torch", "mpq-compiler[compile]"),
    "diffusers": ("diffusers", "mpq-compiler[compile]"),
    "highspy": ("highspy", "highspy"),
    "PIL": ("Pillow", "pillow"),
    "tvm": ("apache-tvm", "mpq-compiler[runtime]"),
    "onnx": ("onnx", "mpq-compiler[onnx]"),
    "onnxruntime": ("onnxruntime", "mpq-compiler[onnx]"),
}


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--json", metavar="FILE", help="write the result as JSON ('-': to standard output)")
    shared.add_argument("--debug", action="store_true", help="show the traceback of an error")
    top = argparse.ArgumentParser(prog="mpqc", description=TEACH, formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("--version", action="version", version=f"mpqc {version('mpq-compiler')}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, run: Callable[[argparse.Namespace], Any], text: str) -> argparse.ArgumentParser:
        made = commands.add_parser(name, parents=[shared], help=text, description=text)
        made.set_defaults(run=run)
        return made

    demo = add("demo", _demo, "compile the bundled denoiser for this machine and draw images with both")
    demo.add_argument(
        "-o", "--output", metavar="DIR", default="mpq-demo", help="for picture and artifact (default: mpq-demo)"
    )
    demo.add_argument("--model", metavar="NAME", default="fashion-unet", help="bundled model (default: fashion-unet)")
    demo.add_argument("--weights", metavar="BUDGET", default="4", help="true average bits, or bytes as 800kB (4)")
    demo.add_argument("--images", type=int, metavar="N", default=20, help="images in the picture (20)")
    demo.add_argument("--steps", type=int, metavar="N", default=10, help="sampling steps (10)")
    demo.add_argument("--overwrite", action="store_true", help="replace an earlier demo")
    _machine_options(demo)

    compile_ = add("compile", _compile, "compile a denoiser to an artifact")
    compile_.add_argument("model", metavar="MODEL", help="folder, hub id, or bundled name (mpqc models)")
    compile_.add_argument("-o", "--output", required=True, metavar="OUT", help="artifact: a folder, or a file OUT.zip")
    compile_.add_argument("--target", default="native", help="mpqc targets lists them (default: this machine)")
    compile_.add_argument(
        "--numerics",
        choices=("portable", "fast"),
        help="portable: the same bits on every CPU target (default); fast: attentions in bfloat16 and in 8 bits too, "
        "float layers in bfloat16",
    )
    compile_.add_argument(
        "--tune", action="store_true",
        help="time the tiles of the integer kernels on this machine and take the fastest; kept in the cache",
    )  # fmt: skip
    compile_.add_argument(
        "--emit", metavar="c",
        help="c: also a C program, built static, that runs the artifact with nothing installed (docs/standalone.md)",
    )  # fmt: skip
    compile_.add_argument(
        "--standalone", action="store_true",
        help="also a C program that runs the artifact with TVM's runtime (docs/standalone.md)",
    )  # fmt: skip
    compile_.add_argument(
        "--wheels", type=Path, metavar="DIR",
        help="with --standalone for another architecture: TVM's wheels for it (default: what is installed)",
    )  # fmt: skip
    compile_.add_argument("--overwrite", action="store_true", help="replace an artifact that exists")
    compile_.add_argument("--dumps", type=Path, metavar="DIR", help="write the program after every pass")
    _threads_option(compile_, "threads of a call, unless it says otherwise (default: every core it finds)")
    _budget_options(compile_)
    _latency_table_option(compile_, "times of kernels, by `mpqc latency` (default with --latency: measured here)")
    _lowering_options(compile_)

    generate = add("generate", _generate, "draw images with an artifact")
    generate.add_argument("artifact", metavar="ARTIFACT")
    generate.add_argument("-o", "--output", required=True, metavar="FILE", help="PNG file")
    generate.add_argument("--compare", metavar="MODEL", help="draw the same noise with the float model beside it")
    generate.add_argument("--images", type=int, metavar="N", default=20, help="images in the picture (20)")
    generate.add_argument("--steps", type=int, metavar="N", default=10, help="sampling steps (10)")
    generate.add_argument("--seed", type=int, metavar="N", help="of the noise (default: calibration's and 1)")
    generate.add_argument("--class", dest="label", type=int, metavar="K", help="only images of class K")
    generate.add_argument("--prompt", metavar="TEXT", help="only images of this prompt, such as 'dark plain boot'")
    _condition_options(generate)
    _threads_option(generate, PER_CALL)
    generate.add_argument("--overwrite", action="store_true", help="replace a picture that exists")

    evaluate = add("eval", _eval, "all metrics of an artifact, or of a model compiled first, against the float model")
    evaluate.add_argument("artifact", metavar="ARTIFACT|MODEL")
    evaluate.add_argument("--against", metavar="MODEL", help="the float model (default: the bundled one of its name)")
    evaluate.add_argument("--images", type=int, metavar="N", default=200, help="images to draw with both (200)")
    evaluate.add_argument("--eval-steps", type=int, metavar="N", default=10, help="sampling steps (10)")
    evaluate.add_argument("--eval-seed", type=int, metavar="N", help="of the noise (default: calibration's and 1)")
    _threads_option(evaluate, PER_CALL)
    _budget_options(evaluate)
    _latency_table_option(evaluate, "times of kernels, by `mpqc latency` (default with --latency: measured here)")
    _lowering_options(evaluate)

    run = add("run", _run, "run an artifact once on tensors from a file")
    run.add_argument("artifact", metavar="ARTIFACT")
    run.add_argument("--input", required=True, metavar="FILE", help="safetensors with the inputs by name")
    run.add_argument("--output", required=True, metavar="FILE", help="safetensors to write, with the tensor 'output'")
    _threads_option(run, PER_CALL)
    run.add_argument("--overwrite", action="store_true", help="replace a file that exists")

    verify = add("verify", _verify, "check every byte of an artifact, and whether this machine can run it")
    verify.add_argument("artifact", metavar="ARTIFACT")

    bench = add("bench", _bench, "the speed of artifacts on this machine, whole and kernel by kernel, beside others")
    bench.add_argument("artifacts", metavar="ARTIFACT", nargs="+", help="of one model; --kernels looks at the first")
    bench.add_argument(
        "--against", metavar="PEERS", default="",
        help="torch,onnxruntime,openvino: the float model there, as it is and in 8 bits; or one variant (torch-bf16)",
    )  # fmt: skip
    bench.add_argument("--model", metavar="MODEL", help="the float model (default: the bundled one of its name)")
    bench.add_argument("--threads", type=int, metavar="N", default=1, help="of every call (1: CPU time is compared)")
    bench.add_argument("--batch", type=int, metavar="N", default=1, help="samples of a call (1)")
    bench.add_argument("--rounds", type=int, metavar="N", default=15, help="in which all take turns (15)")
    bench.add_argument("--kernels", action="store_true", help="also the time of each kernel call")
    bench.add_argument(
        "--latency-table", metavar="FILE",
        help="of `mpqc latency`: predicted against measured time, and layers that would be faster in another format",
    )  # fmt: skip
    bench.add_argument("--plot", metavar="FILE", help="write the kernels under the machine's roofs, as SVG")
    bench.add_argument("--no-memory", action="store_true", help="leave out peak memory, measured in processes apart")
    bench.add_argument(
        "--rpc", metavar="HOST:PORT",
        help="on the device where mpq_rpc listens; the environment's MPQ_TOKEN is its token (docs/standalone.md)",
    )  # fmt: skip
    bench.add_argument("--overwrite", action="store_true", help="replace a plot that exists")

    inspect = add("inspect", _inspect, "look at the dumps of a compilation, or into an artifact")
    inspect.add_argument("path", metavar="DUMPS|ARTIFACT")
    what = inspect.add_mutually_exclusive_group()
    what.add_argument("--pass", dest="pass_name", metavar="NAME", help="print the program after that pass")
    what.add_argument("--diff", nargs="+", metavar="PASS", help="what a pass changed, or the difference of two")
    what.add_argument("--bisect", action="store_true", help="the pass and the layer where the program went wrong")
    what.add_argument("--why", metavar="LAYER", help="what decided on a layer's formats, with the numbers")
    what.add_argument("--scores", action="store_true", help="by operation, unit and block (recipe qua2sedimo)")
    what.add_argument("--html", metavar="FILE", help="everything as one page, charts included")
    inspect.add_argument("--layers", action="store_true", help="layer by layer: bits, bytes, loss")
    inspect.add_argument("--overwrite", action="store_true", help="replace a page that exists")

    allocate = add("allocate", _allocate, "solve an allocation problem, or the one that a sensitivity table poses")
    allocate.add_argument("problem", metavar="PROBLEM.json|TABLE.json")
    allocate.add_argument("-o", "--output", metavar="FILE", help="where the solution goes, as JSON")
    _budget_options(allocate)
    allocate.add_argument("--gap", type=float, metavar="X", default=1e-6, help="relative gap at which to stop (1e-6)")
    allocate.add_argument("--time-limit", type=float, metavar="SECONDS", default=60.0, help="when to give up (60)")
    allocate.add_argument("--overwrite", action="store_true", help="replace a file that exists")

    sensitivity = add("sensitivity", _sensitivity, "measure what each layer costs in quality at each format")
    sensitivity.add_argument("model", metavar="MODEL", help="folder, hub id, or bundled name (mpqc models)")
    sensitivity.add_argument("-o", "--output", required=True, metavar="TABLE.json", help="for `mpqc allocate`")
    sensitivity.add_argument("--overwrite", action="store_true", help="replace a table that exists")
    sensitivity.add_argument("--activations", type=float, metavar="BITS", help="average that the table is for (8)")
    _latency_table_option(sensitivity, "adds the times of layers, for `mpqc allocate --latency`")
    _lowering_options(sensitivity, table=False)

    latency = add("latency", _latency, "measure how long kernels take, here or on a device, for `compile --latency`")
    latency.add_argument(
        "sources", metavar="MODEL|ARTIFACT|TABLE", nargs="+",
        help="models are compiled in each format and timed whole, artifacts as they are; tables of this machine are "
        "merged with what is measured",
    )  # fmt: skip
    latency.add_argument("-o", "--output", required=True, metavar="TABLE.json", help="for --latency-table")
    latency.add_argument("--target", default="native", help="mpqc targets lists them (default: this machine)")
    latency.add_argument(
        "--formats", metavar="NAMES", help="weight formats, as int4,int8 (default: those the recipe chooses from)"
    )
    latency.add_argument("--batch", type=int, metavar="N", default=1, help="samples of a call (1)")
    _threads_option(latency, "threads of a call (1: CPU time is measured, with more the wall clock)")
    latency.add_argument(
        "--numerics", choices=("portable", "fast"), help="fast: attentions in bfloat16 and in 8 bits are timed too"
    )
    latency.add_argument(
        "--rpc", metavar="HOST:PORT",
        help="on the device where mpq_rpc listens, with its --target (docs/standalone.md); artifacts need --emit c",
    )  # fmt: skip
    latency.add_argument("--overwrite", action="store_true", help="replace a table that exists")
    _lowering_options(latency, table=False)

    passes = add("passes", _passes, "the passes, or one of them with its options")
    passes.add_argument("name", nargs="?", metavar="PASS")
    recipes = add("recipes", _recipes, "the recipes, or the pipeline of one")
    recipes.add_argument("name", nargs="?", metavar="RECIPE")
    add("targets", _targets, "the targets and the CPU features each needs")
    add("models", _models, "the models that ship with the package")
    cache = add("cache", _cache, "what the cache holds, or: clear it")
    cache.add_argument("action", nargs="?", choices=("list", "clear"), default="list")
    cache.add_argument("--cache", type=Path, metavar="DIR", help="cache folder (default: the user's)")
    return top


def _machine_options(made: argparse._ActionsContainer) -> None:
    cores = os.cpu_count() or 1
    made.add_argument(
        "--jobs", type=int, metavar="N", default=cores, help=f"workers; the result is the same (default: {cores})"
    )
    made.add_argument("--cache", type=Path, metavar="DIR", help="cache folder (default: the user's)")


def _condition_options(made: argparse._ActionsContainer) -> None:
    made.add_argument("--guidance", type=float, metavar="X", help="classifier-free guidance (default: without)")
    made.add_argument(
        "--conditions", metavar="FILE", help="safetensors with conditions to sample with (docs/calibration.md)"
    )


def _threads_option(made: argparse.ArgumentParser, described: str) -> None:
    made.add_argument("--threads", type=int, metavar="N", help=described)


def _budget_options(made: argparse.ArgumentParser) -> None:
    budgets = made.add_argument_group("budgets")
    budgets.add_argument("--weights", metavar="BUDGET", help="true average bits (3.7), or bytes (40MB)")
    budgets.add_argument("--activations", type=float, metavar="BITS", help="average bits of the activations")
    budgets.add_argument("--bops", metavar="N", help="bit operations per sample and step: 2.5e12, 2.5T")
    budgets.add_argument("--latency", metavar="TIME", help="of a call: 12ms, 800us (docs/latency.md)")
    made.add_argument(
        "--objective",
        choices=("noise", "paper-db"),
        help="what is to be least: the summed noise power (default), or that of each layer in dB, summed (as in MixDQ)",
    )


def _latency_table_option(made: argparse.ArgumentParser, described: str) -> None:
    made.add_argument("--latency-table", metavar="FILE", help=described)


def _lowering_options(parser: argparse.ArgumentParser, table: bool = True) -> None:
    made = parser.add_argument_group("how to compile")
    made.add_argument("--recipe", default="default", help="name or .toml file (mpqc recipes)")
    made.add_argument("--pipeline", metavar="PASSES", help='passes by hand: "trace,layout,calibrate{samples=64},..."')
    if table:
        made.add_argument(
            "--effort",
            choices=("none", "fast", "balanced", "best"),
            help="training against the float model: fast tunes scales at frozen codes (half a minute), balanced trains "
            "weights first (8 minutes), best goes on for 30 (default: the recipe's)",
        )
        made.add_argument("--minutes", type=float, metavar="N", help="of training, in place of the effort's")
    made.add_argument(
        "--shapes",
        help="batch x channels x height x width, comma-separated (default: batch 1 and 2); several image sizes share "
        "the weights, and the first is calibrated",
    )
    if table:
        made.add_argument("--sensitivity", metavar="TABLE.json", help="use this table instead of measuring")
    _machine_options(made)
    made = parser.add_argument_group("calibration")
    made.add_argument(
        "--calibration", metavar="FILE", help="recorded inputs, safetensors (docs/calibration.md); else by sampling"
    )
    made.add_argument("--samples", type=int, metavar="N", help="sampling trajectories (default: the recipe's, 32)")
    made.add_argument("--steps", type=int, metavar="N", help="steps of each trajectory (default: the recipe's, 20)")
    made.add_argument("--scheduler", metavar="FILE", help="scheduler_config.json to use instead of the model's")
    made.add_argument(
        "--prediction-type",
        choices=("epsilon", "sample", "v_prediction"),
        metavar="TYPE",
        help="epsilon, sample or v_prediction (default: the scheduler's)",
    )
    _condition_options(made)
    made.add_argument("--seed", type=int, metavar="N", default=0, help="of everything drawn at random (0)")


def _options(args: argparse.Namespace, **more: Any) -> dict[str, Any]:
    names = (
        *("recipe", "pipeline", "weights", "activations", "bops", "shapes", "calibration", "samples", "steps"),
        *("scheduler", "prediction_type", "guidance", "conditions", "sensitivity", "numerics", "seed"),
        *("latency", "latency_table", "objective", "effort", "minutes", "threads", "jobs", "cache"),
    )
    given = {name: getattr(args, name) for name in names if hasattr(args, name)}
    if given.get("jobs", 1) < 1:
        raise UserError(f"--jobs {given['jobs']} must be 1 or more")
    return given | more


# --- commands -----------------------------------------------------------------------------------------------


def _demo(args: argparse.Namespace) -> Any:
    from mpq_compiler.cli.demo import demo

    where, machine = Path(args.output), _options_of_machine(args)
    return demo(where, args.weights, args.images, args.steps, args.overwrite, **machine, model=args.model)


def _options_of_machine(args: argparse.Namespace) -> dict[str, Any]:
    return {"jobs": args.jobs, "cache": args.cache}


def _compile(args: argparse.Namespace) -> Any:
    from mpq_compiler.api.compile import compile

    report = compile(
        args.model,
        args.output,
        terminal.progress,
        **_options(
            args,
            target=args.target,
            overwrite=args.overwrite,
            dumps=args.dumps,
            tune=args.tune,
            emit=args.emit,
            standalone=args.standalone,
            wheels=args.wheels,
        ),
    )
    for note in report.notes:
        terminal.note(f"note: {note}")
    weights = report.weights
    terminal.table(
        f"{args.output} for {report.target}, recipe {report.recipe}",
        ("what", "value"),
        (
            ("weights", f"{terminal.size(weights['bytes'])}, {weights['average_bits']:.3f} true average bits"),
            ("as f32", terminal.size(weights["float_bytes"])),
            ("activations", f"{report.activations['average_bits']:.2f} average bits"),
            *([("plan", terminal.additivity(report.additivity))] if report.additivity else []),
            ("numerics", _numerics(report.numerics)),
            ("SQNR", f"{report.quality['sqnr_db']:.2f} dB, executed by the {report.quality['executed_by']}"),
            ("calibrated on", _calibrated(report.calibration)),
            *([("memory", terminal.memory(report.memory))] if report.memory else []),
            *([("latency", _predicted(report.latency))] if report.latency else []),
            *((f"trained: {phase['phase']}", _trained(phase)) for phase in report.training),
            ("fallbacks", len(report.fallbacks)),
            ("artifact", f"{terminal.size(report.artifact['bytes'])}, sha256 {report.artifact['sha256'][:16]}"),
        ),
    )
    for name, reason in report.fallbacks.items():
        terminal.say(f"fallback: {name}: {reason}")
    return report.to_json()


def _predicted(about: dict[str, Any]) -> str:
    """What the latency table says of the artifact."""
    budget = "" if about["budget_ms"] is None else f" of {about['budget_ms']:g} ms"
    several = f"{about['batch']} sample(s), {about['threads']} thread(s)"
    fixed = f"{about['fixed_ms']:.3g} ms of it in any format"
    return f"{about['predicted_ms']:.4g} ms{budget} predicted ({several}), {fixed}"


def _trained(phase: dict[str, Any]) -> str:
    """What a phase of training gave."""
    stages = phase["stages"]
    updates = sum(stage["steps"] for stage in stages)
    ends = [f"{-10 * math.log10(noise):.2f}" for noise in (stages[0]["before"], stages[-1]["after"])]
    said = f"SQNR of held-out calls {' to '.join(ends)} dB" if len(stages) == 1 else f"{len(stages)} blocks"
    return f"{said} in {updates} updates" + ("" if phase["kept"] else ", undone: held-out images were worse")


def _numerics(about: dict[str, Any]) -> str:
    found = [about["mode"]]
    for what in ("attentions", "layers"):
        counts = collections.Counter(about[what].values())
        found += [f"{count} {what} in {kind}" for kind, count in sorted(counts.items())]
    return ", ".join(found)


def _calibrated(about: dict[str, Any]) -> str:
    """Where the calibration inputs came from, in few words."""
    if "file" in about:
        origin = f"a file, sha256 {about['file'][:16]}"
    else:
        origin = f"{about['samples']} trajectories of {about['steps']} steps ({about['scheduler']})"
    guidance = f", guidance {float(about['guidance']):g}" if float(about.get("guidance", 1)) != 1 else ""
    return f"{about['inputs']} inputs of {origin}{guidance}, seed {about['seed']}"


def _generate(args: argparse.Namespace) -> Any:
    from mpq_compiler.evaluation import image_grid
    from mpq_compiler.evaluation import painter as evaluation_painter

    picture = Path(args.output)
    if picture.suffix.lower() != ".png":
        raise UserError(f"-o {picture}: the picture is written as PNG; name it {picture.stem}.png")
    _require_new(picture, args.overwrite)
    evaluation_painter.check(args.images, args.steps, args.seed or 0)
    painter = evaluation_painter.from_artifact(args.artifact, args.threads)
    painter = evaluation_painter.with_conditions(painter, args.conditions)
    seed = painter.unseen if args.seed is None else args.seed
    conditions = painter.conditioning.chosen(args.images, args.label, args.prompt)
    painter.conditioning.arguments(conditions, args.images, args.guidance)  # refuses before the work begins
    painters = [painter]
    if args.compare:
        reference = evaluation_painter.from_denoiser(evaluation_painter.float_model(args.compare, painter))
        painters.insert(0, evaluation_painter.sampled_like(reference, painter))
    drawn: list[Any] = []
    for p, kind in zip(reversed(painters), ("artifact", "float model"), strict=False):
        calls = args.steps * -(-args.images // evaluation_painter.BATCH)
        with terminal.progress(f"drawing with the {kind}", calls) as advance:
            step = functools.partial(_advance, advance)
            latents = p.draw(conditions, args.images, args.steps, seed, args.guidance, progress=step)
        drawn.insert(0, p.decode(latents))
    titles = ["float", "compiled"] if args.compare else None
    image_grid.grid(drawn if args.compare else drawn[0], args.output, titles=titles)
    terminal.say(f"wrote {args.output}")
    guidance = painter.conditioning.usual_guidance() if args.guidance is None else args.guidance
    asked = {"prompt": args.prompt, "class": args.label}
    result: dict[str, Any] = {
        "output": str(args.output),
        "images": args.images,
        "steps": args.steps,
        "seed": seed,
        "guidance": guidance,
        **{name: value for name, value in asked.items() if value is not None},
    }
    if args.compare:
        from mpq_compiler.evaluation.metrics import psnr_db

        result["psnr_db"] = psnr_db(drawn[0], drawn[1])
        terminal.say(f"PSNR {result['psnr_db']:.2f} dB against {args.compare}")
    return result


def _advance(advance: Callable[[int], None], done: int, total: int) -> None:
    advance(1)


def _eval(args: argparse.Namespace) -> Any:
    from mpq_compiler.cli.evaluate import evaluate_path

    options = _options(args)
    result = evaluate_path(
        args.artifact, args.against, args.images, args.eval_steps, args.eval_seed, terminal.progress, options
    )
    rows = []
    for name, value in result.items():
        if isinstance(value, dict) and "value" in value:
            span = f"{value['low']:.4g} .. {value['high']:.4g}" if "low" in value else ""
            rows.append((name, f"{value['value']:.4g}", span))
        elif isinstance(value, int | float):
            rows.append((name, f"{value:.4g}", ""))
        elif value is None:
            rows.append((name, "n/a", result.get("reasons", {}).get(name, "")))
    terminal.table(f"{args.artifact}", ("metric", "value", "95 % interval"), rows, numeric=(1,))
    return result


def _run(args: argparse.Namespace) -> Any:
    from mpq_compiler.runtime import compiled_denoiser
    from mpq_compiler.support import tensorfile

    output = Path(args.output)
    _require_new(output, args.overwrite)
    inputs = tensorfile.load(args.input)
    result = compiled_denoiser.load(args.artifact, args.threads).run(inputs)
    _write_whole(output, lambda stream: tensorfile.save(stream, {"output": result}))
    terminal.say(f"wrote {output}: f32{list(result.shape)}")
    return {"output": str(output), "shape": list(result.shape)}


def _verify(args: argparse.Namespace) -> Any:
    from mpq_compiler.artifact import bundle
    from mpq_compiler.targets import table as targets

    read = bundle.read(args.artifact)
    target = read.manifest["target"]
    missing = sorted(targets.missing(target["arch"], target["features"], target.get("cuda", 0)))
    terminal.say(
        f"{args.artifact} is intact: {len(read.manifest['files'])} files for {target['name']}, "
        f"sha256 {read.manifest['artifact_sha256'][:16]}"
        + (f"; this machine cannot run it: it lacks {', '.join(missing)}" if missing else "")
    )
    return {"intact": True, "sha256": read.manifest["artifact_sha256"], "missing_features": missing}


def _bench(args: argparse.Namespace) -> Any:
    from mpq_compiler.bench import remote, roofline, show
    from mpq_compiler.bench import run as bench_run

    plot = Path(args.plot) if args.plot else None
    if plot is not None:
        if plot.suffix != ".svg":
            raise UserError(f"--plot {plot}: the plot is drawn as SVG; name it {plot.stem}.svg")
        _require_new(plot, args.overwrite)
    if args.rpc:
        if args.against or args.kernels or plot is not None or args.latency_table:
            raise UserError("--rpc times artifacts alone: leave --against, --kernels, --plot and --latency-table out")
        found = remote.bench(args.artifacts, args.rpc, args.threads, args.batch, args.rounds, terminal.progress)
        show.show(found, False)
        return found
    found = bench_run.bench(
        args.artifacts,
        [name.strip() for name in args.against.split(",") if name.strip()],
        args.model,
        args.threads,
        args.batch,
        args.rounds,
        kernels=args.kernels or plot is not None,
        memory=not args.no_memory,
        progress=terminal.progress,
        latency_table=args.latency_table,
    )
    show.show(found, args.kernels)
    if plot is not None:
        picture = roofline.roofline(found)
        _write_whole(plot, lambda stream: stream.write(picture.encode()))
        terminal.say(f"wrote {plot}")
    return found


def _inspect(args: argparse.Namespace) -> Any:
    from mpq_compiler.cli.inspect import inspect

    path = Path(args.path)
    if args.html:
        from mpq_compiler.cli.inspect import write_page

        output = Path(args.html)
        _require_new(output, args.overwrite)
        page = write_page(path)
        _write_whole(output, lambda stream: stream.write(page.encode()))
        terminal.say(f"wrote {output}")
        return {"output": str(output)}
    return inspect(path, args.pass_name, args.diff, args.layers, args.bisect, args.why, args.scores)


def _allocate(args: argparse.Namespace) -> Any:
    from mpq_compiler.allocation import pose, sensitivity_table
    from mpq_compiler.allocation.problem import Problem
    from mpq_compiler.allocation.solver import solve
    from mpq_compiler.driver import budgets as driver_budgets

    output = Path(args.output) if args.output else None
    if output is not None:
        _require_new(output, args.overwrite)
    if sensitivity_table.is_table(args.problem):
        table = sensitivity_table.load(args.problem)
        limit = pose.byte_limit(table, *driver_budgets.parse_budget(args.weights))
        latency = driver_budgets.parse_latency(args.latency)
        bops, terms = driver_budgets.parse_bops(args.bops), pose.Terms(args.objective == "paper-db")
        problem = Problem.from_json(pose.problem(table, limit, args.activations, bops, latency, terms))
    else:
        if args.weights or args.activations or args.bops or args.latency or args.objective:
            raise UserError("budgets and objectives go with a sensitivity table; a problem has its own")
        problem = Problem.load(args.problem)
    solution = solve(problem, gap=args.gap, time_limit=args.time_limit).to_json()
    counts: dict[str, int] = {}
    for choice in solution["choices"].values():
        counts[choice] = counts.get(choice, 0) + 1
    terminal.table(
        f"loss {solution['objective']:.6g}" + ("" if solution["optimal"] else ", not proven optimal"),
        ("choice", "layers"),
        sorted(counts.items()),
        numeric=(1,),
    )
    if output is not None:
        _write_json(solution, output)
    return solution


def _sensitivity(args: argparse.Namespace) -> Any:
    from mpq_compiler.driver.measure import measure_sensitivity

    output = Path(args.output)
    _require_new(output, args.overwrite)
    table = measure_sensitivity(args.model, terminal.progress, **_options(args))
    _write_json(table, output)
    formats = list(next(iter(table["weights"].values())))
    rows = sorted(table["weights"].items(), key=lambda item: -item[1][formats[0]])
    terminal.table(
        "relative noise power of the output, most sensitive layers first",
        ("layer", *formats),
        [(name, *(f"{losses[f]:.1e}" for f in formats)) for name, losses in rows[:20]],
        numeric=range(1, len(formats) + 1),
    )
    return table


def _latency(args: argparse.Namespace) -> Any:
    from mpq_compiler.artifact import bundle
    from mpq_compiler.latency import measure
    from mpq_compiler.latency import remote as latency_remote
    from mpq_compiler.latency import table as latency_table
    from mpq_compiler.runtime import compiled_denoiser
    from mpq_compiler.support import host

    output = Path(args.output)
    _require_new(output, args.overwrite)
    threads, names = args.threads or 1, [name.strip() for name in (args.formats or "").split(",") if name.strip()]
    sources = [Path(source) for source in args.sources]
    tables = [latency_table.load(source) for source in sources if source.suffix == ".json"]
    if tables:
        given = latency_table.merged(tables)
        if not args.rpc and len(tables) < len(sources):  # before the others are measured
            latency_table.require_alike(given, cpu=host.cpu(), threads=threads, batch=args.batch)
    artifacts = [path for path in sources if path.suffix == ".zip" or (path / bundle.MANIFEST).is_file()]
    if artifacts and args.rpc:
        opened = [bundle.read(path) for path in artifacts]
        tables.append(latency_remote.measured(opened, args.rpc, args.batch, threads, terminal.progress))
    elif artifacts:
        loaded = [compiled_denoiser.load(path, threads, reuse_bytes=0) for path in artifacts]
        tables.append(measure.measured(loaded, args.batch, threads, terminal.progress))
    for model, path in zip(args.sources, sources, strict=True):
        if path.suffix != ".json" and path not in artifacts:
            from mpq_compiler.driver.measure import measure_latency

            options = _options(args, target=args.target)
            tables.append(measure_latency(model, terminal.progress, names, args.batch, args.rpc, **options))
    table = latency_table.merged(tables)
    _write_json(table.to_json(), output)
    terminal.say(
        f"wrote {output}: {len(table.kernels)} kernels of {', '.join(table.models)} for {table.target} on {table.cpu}, "
        f"{table.threads} thread(s), batch {table.batch}"
    )
    return table.to_json()


def _passes(args: argparse.Namespace) -> Any:
    from mpq_compiler.pipeline import describe, registry

    if args.name:
        described = describe.describe_pass(registry.find(args.name))
        terminal.say(describe.pass_text(described, min(110, terminal.output.width)))
        return described
    found, broken = registry.usable()
    everything = [describe.describe_pass(p) for p in found.values()]
    everything += [{"name": name, "broken": reason} for name, reason in broken.items()]
    terminal.table(
        "passes, in the order of the default recipe",
        ("pass", "contract", "purpose"),
        [(d["name"], d.get("contract", "broken"), d.get("summary") or d["broken"]) for d in everything],
    )
    return everything


def _recipes(args: argparse.Namespace) -> Any:
    from mpq_compiler.pipeline import parser as pipeline_parser
    from mpq_compiler.pipeline import recipes as pipeline_recipes

    found = [pipeline_recipes.load(n) for n in ([args.name] if args.name else pipeline_recipes.names())]
    described = [
        {"name": r.name, "description": r.description, "pipeline": pipeline_parser.to_text(r.passes())} for r in found
    ]
    rows = [(d["name"], d["description"], d["pipeline"].replace(",", ", ")) for d in described]
    terminal.table("recipes", ("recipe", "what it does", "pipeline"), rows)
    return described


def _targets(args: argparse.Namespace) -> Any:
    from mpq_compiler.targets import table as targets

    native = None
    try:
        native = targets.resolve("native").name
    except UserError as error:
        terminal.note(str(error))
    described: list[dict[str, Any]] = []
    for name in targets.names():
        try:
            target = targets.resolve(name)
        except UserError as error:  # one of another package; the others go on
            terminal.note(str(error))
            continue
        missing = sorted(targets.missing_features(target))
        described.append(
            {
                "name": target.name,
                "features": list(target.features),
                "implemented": True,
                "status": target.status,
                "missing_here": missing,
                "native": target.name == native,
            }
        )
    rows = []
    for row in described:
        here = "native" if row["native"] else "no" if row["missing_here"] else "yes"
        rows.append((row["name"], here, row["status"], " ".join(row["features"][-6:])))
    terminal.table("targets", ("target", "runs here", "its kernels", "what it needs, the last of it"), rows)
    return described


def _models(args: argparse.Namespace) -> Any:
    from mpq_compiler.frontend import checkpoint

    described = []
    for name, folder in checkpoint.bundled().items():
        config = next(folder.glob("*/config.json"))
        size = sum(f.stat().st_size for f in folder.rglob("*.safetensors"))
        kind = json.loads(config.read_text(encoding="utf-8"))["_class_name"]
        described.append({"name": name, "class": kind, "bytes": size, "folder": str(folder)})
    rows = [(d["name"], d["class"], terminal.size(d["bytes"])) for d in described]
    terminal.table("bundled models", ("model", "class", "weights"), rows, numeric=(2,))
    return described


def _cache(args: argparse.Namespace) -> Any:
    from mpq_compiler.support import cache as support_cache

    if args.action == "clear":
        freed = support_cache.clear(args.cache)
        terminal.say(f"freed {terminal.size(freed)} in {support_cache.folder(args.cache)}")
        return {"freed": freed}
    kinds: dict[str, list[int]] = {}
    for kind, _, size in support_cache.entries(args.cache):
        kinds.setdefault(kind, []).append(size)
    rows = [(kind, len(sizes), terminal.size(sum(sizes))) for kind, sizes in sorted(kinds.items())]
    terminal.table(str(support_cache.folder(args.cache)), ("kind", "entries", "size"), rows, numeric=(1, 2))
    return {"folder": str(support_cache.folder(args.cache)), "kinds": {k: sum(v) for k, v in kinds.items()}}


# --- how it ends --------------------------------------------------------------------------------------------


def _write_json(document: Any, path: Path) -> None:
    _write_whole(path, lambda stream: stream.write((json.dumps(document, indent=1) + "\n").encode()))


def _write_whole(path: Path, fill: Callable[[BinaryIO], object]) -> None:
    from mpq_compiler.support.files import write_whole

    write_whole(path, fill)


def _require_new(path: str | Path, overwrite: bool) -> None:
    """UserError where an output cannot be written, or exists and may not be replaced."""
    from mpq_compiler.artifact.bundle import MANIFEST
    from mpq_compiler.support.files import check_place

    path = Path(path)
    check_place(path)
    if (path.parent / MANIFEST).is_file():
        raise UserError(f"'{path.parent}' is an artifact, which another file would damage; name another place")
    if path.is_dir():
        raise UserError(f"'{path}' is a folder; name a file")
    if path.exists() and not overwrite:
        raise UserError(f"'{path}' exists; choose another name or add --overwrite")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command: 0 done, 1 a clear error, 130 Ctrl-C; argparse exits with 2 for a wrong command line."""
    if not (sys.argv[1:] if arguments is None else arguments):
        print(parser().format_help(), end="", file=sys.stderr)
        return 2
    args = parser().parse_args(arguments)
    terminal.output.stderr = args.json == "-"
    try:
        if args.json not in (None, "-"):
            _require_new(args.json, overwrite=True)
        result = args.run(args)
        if args.json == "-":
            print(json.dumps(result, indent=1))
        elif args.json:
            _write_json(result, Path(args.json))
        sys.stdout.flush()
        return 0
    except UserError as error:
        return _fail(args, str(error))
    except KeyboardInterrupt:
        print("mpqc: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read us has seen enough: `mpqc passes | head -3`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except ModuleNotFoundError as error:
        if (module := (error.name or "").partition(".")[0]) not in REQUIREMENTS:
            return _defect(args, error)
        name, package = REQUIREMENTS[module]
        return _fail(args, f"`mpqc {args.command}` needs {name}, which is not installed: pip install '{package}'")
    except OSError as error:
        where = f" '{error.filename}'" if error.filename else ""
        return _fail(args, f"the system refused{where}: {error.strerror or error}; free space or choose another place")
    except MemoryError:
        return _fail(args, "out of memory; use a smaller model, fewer --samples or fewer --jobs")
    except Exception as error:
        return _defect(args, error)
    finally:
        terminal.output.stderr = False


def _defect(args: argparse.Namespace, error: Exception) -> int:
    """A defect of ours still ends in one sentence."""
    text = " ".join(str(error).split())
    return _fail(args, f"internal error, report it with what --debug shows: {type(error).__name__}: {text[:300]}")


def _fail(args: argparse.Namespace, sentence: str) -> int:
    if args.debug:
        raise
    print(f"mpqc: {sentence}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
