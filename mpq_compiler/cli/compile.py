"""`mpqc compile`: a denoiser compiled to an artifact, and what the report says of it in one table."""

from __future__ import annotations

import argparse
import collections
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpq_compiler.cli import options, shares
from mpq_compiler.support import terminal, usage
from mpq_compiler.support.errors import UserError

if TYPE_CHECKING:
    from mpq_compiler.driver.estimate import Estimate
    from mpq_compiler.driver.pipeline import PipelineReport
    from mpq_compiler.driver.report import Report
    from mpq_compiler.ir.findings import ReusePlan

FEWEST_PROMPTS = 8
"""The fewest prompts to calibrate on."""
ANNOUNCED = ("weights", "activations", "bops", "latency", "effort", "minutes")
"""Options that the first line repeats."""
LARGE = 1 << 30
"""Bytes of memory from which on a compilation gives freed blocks back at once: they come anew, which takes time."""


def add(commands: options.Commands) -> None:
    """Add the command and its options to the command line."""
    parser = commands.add("compile", run, "compile a denoiser to an artifact", _announce)
    parser.add_argument("model", metavar="MODEL", help="folder, hub id, or bundled name (mpqc models)")
    parser.add_argument("-o", "--output", metavar="OUT", help="artifact: a folder, or a file OUT.zip")
    whole = parser.add_argument_group("pipelines, a folder with model_index.json")
    whole.add_argument(
        "--parts", metavar="PARTS",
        help="what is compiled of text, denoiser, decoder and encoder, with commas (default: the first three, for "
        "`generate --prompt`; the encoder is for its --image)",
    )  # fmt: skip
    whole.add_argument("--decoder", metavar="DIR", help="folder of an autoencoder that decodes in the pipeline's stead")
    whole.add_argument(
        "--prompts", type=Path, metavar="FILE",
        help="prompts to calibrate on, one a line (default: those of its prompts.txt, or 96 of our own)",
    )
    parser.add_argument("--target", default="native", help="mpqc targets lists them (default: this machine)")
    parser.add_argument(
        "--numerics",
        choices=("portable", "fast"),
        help="portable: the same bits on every CPU target (default on CPUs); fast: attentions in bfloat16 and in 8 "
        "bits too, float layers in bfloat16, values between kernels of GPUs in float16 (default on GPUs)",
    )
    parser.add_argument(
        "--tune", action="store_true",
        help="time the tiles of the integer kernels on this machine and take the fastest; kept in the cache",
    )  # fmt: skip
    parser.add_argument(
        "--emit", metavar="c",
        help="c: also a C program, built static, that runs the artifact with nothing installed (docs/standalone.md)",
    )  # fmt: skip
    parser.add_argument(
        "--standalone", action="store_true",
        help="also a C program that runs the artifact with TVM's runtime (docs/standalone.md)",
    )  # fmt: skip
    parser.add_argument(
        "--owner-key", metavar="PUBLIC",
        help="with either: the program opens only what the owner of this key has signed (mpqc sign, docs/artifact.md)",
    )  # fmt: skip
    parser.add_argument(
        "--wheels", type=Path, metavar="DIR",
        help="with --standalone for another architecture: TVM's wheels for it (default: what is installed)",
    )  # fmt: skip
    parser.add_argument(
        "--lora-rank", type=int, metavar="R",
        help="keep branches of this rank beside layers, whose factors a LoRA sets without compiling (docs/artifact.md)",
    )  # fmt: skip
    parser.add_argument(
        "--lora-layers", metavar="PATTERNS",
        help='layers with such a branch, by module path: "*.attn*,*.ff.*" (default: linear layers)',
    )  # fmt: skip
    parser.add_argument(
        "--estimate", action="store_true",
        help="print what each pass would take in seconds, memory and disk, and stop (docs/scale.md)",
    )  # fmt: skip
    parser.add_argument(
        "--memory-limit", metavar="SIZE",
        help="most memory, 8GB; where that is little there are fewer --jobs (default: 80%% of what is free)",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace an artifact that exists")
    parser.add_argument("--dumps", type=Path, metavar="DIR", help="write the program after every pass")
    options.add_threads(parser, "threads of a call, unless it says otherwise (default: every core it finds)")
    options.add_budgets(parser)
    parser.add_argument(
        "--reuse", type=int, metavar="STEPS",
        help="with --latency, then of a step on average: what steps of a sampler of so many take from earlier ones is "
        "decided together with the bits (docs/reuse.md)",
    )  # fmt: skip
    options.add_latency_table(parser)
    options.add_lowering(parser)


def _announce(args: argparse.Namespace) -> str:
    from mpq_compiler.targets.table import resolve

    target = resolve(args.target).name
    here = " (native)" if args.target == "native" else ""
    how = f"recipe {args.recipe}" if args.pipeline is None else "a pipeline by hand"
    given = [f"{name} {value}" for name in ANNOUNCED if (value := getattr(args, name)) is not None]
    doing = "estimating" if args.estimate else "compiling"
    return f"{doing} {args.model} for {target}{here}: {', '.join((how, *given))}"


def run(args: argparse.Namespace) -> Any:
    """Compile the model, print the summary of its report, and return the report; or estimate what that takes."""
    usage.ask_for_large_pages()
    usage.keep_freed_memory()
    usage.collect_seldom()
    from mpq_compiler.api.compile import compile, estimate
    from mpq_compiler.driver import pipeline as pipelines
    from mpq_compiler.driver.estimate import LONG
    from mpq_compiler.driver.pipeline import PipelineReport

    parts, prompts = _parts(args), prompts_of(args.prompts)
    whole = pipelines.is_pipeline(args.model) and parts != ("denoiser",)
    if args.estimate:
        if whole:
            raise UserError("--estimate is of a pipeline's denoiser: add --parts denoiser")
        found = estimate(args.model, terminal.progress, **options.of_compilation(args))
        _print_estimate(found)
        return found.to_json()
    if args.output is None:
        raise UserError("nothing says where the artifact goes: add -o OUT, or --estimate to see what it takes")

    told = []

    def planned(found: Estimate, lowered: str | None) -> None:
        if not whole:  # else nobody knows what the other parts take
            terminal.expect(terminal.elapsed() + found.seconds)
        if found.peak_bytes > LARGE:
            usage.return_freed_memory()
        if lowered is not None:
            told.append(lowered)
            terminal.note(f"note: {lowered}")
        if found.seconds >= LONG:
            terminal.note(_time(found, "this part" if whole else "this"))
        if args.memory_limit is not None:
            _print_memory(found)

    report = compile(
        args.model, args.output, terminal.progress, planned=planned, parts=parts, decoder=args.decoder,
        prompts=prompts, **options.of_compilation(args),
    )  # fmt: skip
    if isinstance(report, PipelineReport):
        _print_parts(args.output, report, told)
        return report.to_json()
    for note in report.notes:
        if note not in told:
            terminal.note(f"note: {note}")
    terminal.table(f"{args.output} for {report.target}, recipe {report.recipe}", ("what", "value"), _summary(report))
    for line in terminal.fallbacks(report.fallbacks):
        terminal.say(line)
    return report.to_json()


def _parts(args: argparse.Namespace) -> tuple[str, ...] | None:
    """The parts of a pipeline that are compiled; None: all."""
    return None if args.parts is None else tuple(part.strip() for part in args.parts.split(",") if part.strip())


def prompts_of(path: Path | None) -> list[str]:
    """The lines of the file of prompts; none without one. UserError: it cannot be read, or has too few."""
    if path is None:
        return []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read --prompts '{path}': {error}") from error
    if len(prompts := [line.strip() for line in lines if line.strip()]) < FEWEST_PROMPTS:
        raise UserError(f"--prompts '{path}' has {len(prompts)} prompts: give {FEWEST_PROMPTS} or more")
    return prompts


def _print_parts(path: str, report: PipelineReport, told: list[str]) -> None:
    for note in report.notes:
        if note.partition(": ")[2] not in told:
            terminal.note(f"note: {note}")
    rows = [
        (
            name,
            terminal.size(part.weights["bytes"]),
            f"{part.weights['average_bits']:.3f}",
            terminal.size(part.weights["float_bytes"]),
            terminal.count(part.cost["bops"] or 0),
            f"{part.quality['sqnr_db']:.2f} dB",
            len(part.fallbacks),
        )
        for name, part in report.parts.items()
    ]
    headers = ("part", "weights", "bits", "as f32", "BOPs", "SQNR", "fallbacks")
    terminal.table(f"{path} for {report.target}", headers, rows, numeric=(1, 2, 3, 4, 5, 6))
    if report.shares:
        shares.print_shares("one budget: the PSNR that is expected of pictures", report.shares)


def _print_estimate(found: Estimate) -> None:
    from mpq_compiler.driver.estimate import Step

    rows = [
        (s.name, *map(terminal.duration, (s.seconds, s.cpu_seconds)), *map(terminal.size, (s.peak_bytes, s.disk_bytes)))
        for s in (*found.steps, Step("all", found.cpu_seconds, found.seconds, found.peak_bytes, found.disk_bytes))
    ]
    title = f"estimate for {found.jobs} job{'s' if found.jobs > 1 else ''}; disk is that of TMPDIR"
    terminal.table(title, ("step", "time", "CPU", "memory", "disk"), rows, numeric=(1, 2, 3, 4))


def _time(found: Estimate, what: str) -> str:
    """How long a compilation takes from now on, in a sentence."""
    longest = sorted(found.steps, key=lambda step: -step.seconds)[:3]
    said = ", ".join(f"{step.name} {terminal.duration(step.seconds)}" for step in longest)
    cores = f"{found.jobs} idle core{'s' if found.jobs > 1 else ''}"
    time = terminal.duration(found.seconds)
    return f"{what} will take about {time} on {cores}: {said}, ...; --estimate has all passes"


def _print_memory(found: Estimate) -> None:
    rows = [(step.name, terminal.size(step.peak_bytes), terminal.size(step.disk_bytes)) for step in found.steps]
    terminal.table("most memory and disk, estimated", ("step", "memory", "disk"), rows, numeric=(1, 2))


def _summary(report: Report) -> list[tuple[str, object]]:
    weights, bops, float_bops = report.weights, report.cost["bops"], report.cost["float_bops"]
    assert bops is not None and float_bops is not None
    return [
        ("weights", f"{terminal.size(weights['bytes'])}, {weights['average_bits']:.3f} true average bits"),
        ("as f32", terminal.size(weights["float_bytes"])),
        ("activations", f"{report.activations['average_bits']:.2f} average bits"),
        *([("plan", terminal.additivity(report.additivity))] if report.additivity else []),
        ("numerics", _numerics(report.numerics)),
        ("SQNR", "{sqnr_db:.2f} dB, of {inputs} calls held out, run by the {executed_by}".format(**report.quality)),
        ("calibrated on", _calibrated(report.calibration)),
        *([("memory", terminal.memory(report.memory))] if report.memory else []),
        ("BOPs", f"{terminal.count(bops)} of a call, {terminal.count(float_bops)} in float"),
        *([("latency", _predicted(report.latency))] if report.latency else []),
        *([("reuse", _reused(report.reuse))] if report.reuse else []),
        *((f"trained: {phase['phase']}", _trained(phase)) for phase in report.training),
        ("fallbacks", f"{len(report.fallbacks)}{', right but slower or in floats' if report.fallbacks else ''}"),
        ("artifact", f"{terminal.size(report.artifact['bytes'])}, sha256 {report.artifact['sha256'][:16]}"),
    ]


def _predicted(about: dict[str, Any]) -> str:
    """The time that the latency table predicts for the artifact, in words."""
    budget = "" if about["budget_ms"] is None else f" of {about['budget_ms']:g} ms"
    several = f"{about['batch']} sample(s), {about['threads']} thread(s)"
    fixed = f"{about['fixed_ms']:.3g} ms of it in any format"
    if (average := about.get("average_ms")) is not None:
        whole = f"{about['predicted_ms']:.4g} ms of one that computes all"
        return f"{average:.4g} ms{budget} predicted of a step on average, {whole} ({several}), {fixed}"
    return f"{about['predicted_ms']:.4g} ms{budget} predicted ({several}), {fixed}"


def _reused(about: ReusePlan) -> str:
    """What steps reuse, in words."""
    noises = about["loss"], about["measured"], about["noise"], about["noise_reusing"]
    summed, together, bits, both = (f"{-10 * math.log10(noise):.1f}" for noise in noises)
    left = f"leave out {about['share']:.0%} of the multiplications, behind '{about['node']}'"
    if about["share"] == 1:
        left = "compute nothing, and sum earlier outputs"
    losses = f"{summed} dB by the sum of its losses, {together} measured together"
    return f"{about['reused']} of {about['steps']} steps {left}: {losses}; images {bits} dB without it, {both} with it"


def _trained(phase: dict[str, Any]) -> str:
    """The SQNR that a phase of training gained, in words."""
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
    found += ["f16 between kernels"] if about["halves"] else []
    return ", ".join(found)


def _calibrated(about: dict[str, Any]) -> str:
    """Where the calibration inputs came from, in few words."""
    if "file" in about:
        origin = f"a file, sha256 {about['file'][:16]}"
    else:
        origin = f"{about['samples']} trajectories of {about['steps']} steps ({about['scheduler']})"
    guidance = f", guidance {float(about['guidance']):g}" if float(about.get("guidance", 1)) != 1 else ""
    return f"{about['inputs']} inputs of {origin}{guidance}, seed {about['seed']}"
