"""Compiles a diffusers pipeline from prompt to picture: each part to an artifact, and what lies between them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from logging import ERROR
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from mpq_compiler.allocation import pose
from mpq_compiler.artifact import bundle
from mpq_compiler.artifact import pipeline as pipelines
from mpq_compiler.artifact.pipeline import DECODER, DENOISER, ENCODER, TEXT, Description, EncoderEntry, Share
from mpq_compiler.driver.budgets import parse_budget
from mpq_compiler.driver.check import check
from mpq_compiler.driver.compile import compile_denoiser
from mpq_compiler.driver.options import Options, parse_shapes
from mpq_compiler.driver.report import Report
from mpq_compiler.driver.resolve import resolve, with_role
from mpq_compiler.driver.shared_budget import STEPS, TOGETHER, Drawing, Part, conditions_of, shares
from mpq_compiler.frontend import call_file, checkpoint, checkpoint_module, pipeline_parts
from mpq_compiler.frontend import denoiser as denoisers
from mpq_compiler.frontend.checkpoint_module import one_line
from mpq_compiler.frontend.pipeline_parts import Encoding, Parts
from mpq_compiler.frontend.watch_pipeline import DiffusersPipeline, denoiser_of, require_cpu
from mpq_compiler.frontend.widened import widen
from mpq_compiler.ir.interpreter import single_threaded
from mpq_compiler.pipeline.backend import EmittingBackend, Progress, backend_of
from mpq_compiler.pipeline.passes import Role
from mpq_compiler.sampling import loop, schedulers
from mpq_compiler.sampling.conditioning import NULL
from mpq_compiler.support import tensorfile
from mpq_compiler.support.errors import UserError, nearest
from mpq_compiler.support.execution import RunContext, batches
from mpq_compiler.targets import table as targets

ROLES = (TEXT, DENOISER, DECODER)
"""The parts that draw a prompt, in the order of their work; they are compiled where no others are asked for."""
KNOWN = (*ROLES, ENCODER)
"""The parts that can be compiled."""
DRAWN = 96
"""Latents that a decoder is calibrated on, of small denoisers."""
DRAWN_LARGE = 16
"""Their number for denoisers of more than `SMALL` parameters: each is a trajectory of the float model."""
Budgets = dict[str, str | float | None]
"""What each part is given as ``--weights``."""
LOADED: dict[str, object] = {"dtype": torch.float32, "local_files_only": True, "low_cpu_mem_usage": False}
"""How diffusers loads what is compiled."""
SMALL = 50_000_000


@dataclass
class PipelineReport:
    """The report of a compiled pipeline."""

    name: str
    target: str
    parts: dict[str, Report]
    """The report of each part, in the order of their work."""
    roles: dict[str, str]
    shares: dict[str, Share]
    """What each part got of one budget, and why; empty without one."""
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, object]:
        """The report as a JSON document (schemas/compile-pipeline.json)."""
        parts = {name: {"role": self.roles[name], **report.to_json()} for name, report in self.parts.items()}
        return {
            "name": self.name,
            "target": self.target,
            "parts": parts,
            "shares": self.shares,
            "notes": self.notes,
        }


def compile_pipeline(
    source: DiffusersPipeline,
    output: str | Path,
    progress: Progress | None = None,
    planned: Callable[..., None] | None = None,
    *,
    parts: Sequence[str] = ROLES,
    decoder: torch.nn.Module | None = None,
    prompts: Sequence[str] = (),
    **options: Any,
) -> PipelineReport:
    """Compiles a pipeline to a folder of artifacts that draws by itself (`load_pipeline`).

    Args:
        source: a diffusers pipeline on the CPU, in float32. It is left as it is, but for a decoder from elsewhere.
        output: the folder.
        progress: opens progress bars, or None.
        planned: is called for each part, as `compile_denoiser` does.
        parts: the roles of the parts that are compiled.
        decoder: takes the place of the pipeline's own.
        prompts: what text encoders are calibrated on, and what is drawn to calibrate the others; none: `prompts`.
        options: fields of `Options`. A budget of weights is one for all parts (`shared_budget`), or one for each
            (`budgets_apart`). Options of sampling, training, time and LoRAs are the denoiser's.

    Raises:
        UserError: whatever cannot be compiled; nothing is left at ``output`` then.
    """
    apart = budgets_apart(options.get("weights"), parts)
    chosen = Options(**(options | {"weights": None} if apart else options))
    pipelines.check_output(output, chosen.overwrite)
    check(chosen)
    if chosen.plan is not None:
        raise UserError("--plan is of one denoiser: compile that of the pipeline alone with --parts denoiser")
    denoiser = require_parts(source, parts)
    texts = [*prompts] or pipeline_parts.prompts()
    if decoder is not None:
        source.vae = decoder
    context = RunContext(jobs=chosen.jobs, progress=progress)
    with single_threaded():
        taken = pipeline_parts.take_apart(source, denoiser, _size(chosen))
    if ENCODER in parts:
        taken.require_encoder(getattr(source, taken.decoder_name))
    reports: dict[str, Report] = {}
    shared: dict[str, Share] = {}

    def fill(folder: Path) -> tuple[Description, dict[str, bytes]]:
        with single_threaded(), tempfile.TemporaryDirectory() as scratch:
            work = Path(scratch)
            encodings = taken.encodings if TEXT in parts else ()
            made = {each.name: _encoder(taken, each, texts, chosen, work) for each in encodings}
            drawn = len(encodings) > 1 or {*parts} - {TEXT}  # else nothing is
            main = _denoiser(source, taken, texts, chosen, work, context) if drawn else None
            if main is not None and DENOISER in parts:
                made[denoiser] = main
            if main is not None and {DECODER, ENCODER} & {*parts}:
                rows = _latents(taken, main, chosen, context)
                if DECODER in parts:
                    made[taken.decoder_name] = _decoder(taken, rows, chosen, work)
                if ENCODER in parts:
                    made[encoder_name(taken)] = _image_encoder(source, taken, rows, chosen, work)
            role = {name: _role(name, taken) for name in made}
            if apart:
                alike = {each: [part for n, part in made.items() if role[n] == each] for each in apart}
                budgets: Budgets = {n: _of_role(apart[role[n]], part, alike[role[n]]) for n, part in made.items()}
            else:
                budgets, limit = _alone(made, role, chosen)
                drawing = {name: part for name, part in made.items() if role[name] != ENCODER}
                if main is not None and limit is not None and len(drawing) > 1:
                    how = Drawing(taken, drawing, main.sampled, texts, main.options.guidance, chosen.seed, context)
                    judged, found = shares(drawing, limit, how, work, progress)
                    made |= judged
                    shared.update(found)
                    budgets |= {name: f"{share['bytes']}B" for name, share in found.items()}
            for index, (name, part) in enumerate(made.items(), 1):
                dumps = None if chosen.dumps is None else chosen.dumps / name
                own = replace(part.options, weights=budgets[name], overwrite=False, dumps=dumps)
                with context.track(f"part {index} of {len(made)}: {name}", 1) as advance:
                    reports[name] = compile_denoiser(part.model, folder / name, progress, planned, **vars(own))
                    advance(1)
        files = {_tokenizer_file(tokens.name): tokens.model.encode() for tokens in taken.tokens if TEXT in parts}
        if chosen.emit and {*parts} >= {*ROLES}:  # with less nothing is drawn
            files |= _program(folder, sorted(name for name in reports if role[name] != ENCODER), chosen)
        described = describe(taken, parts)
        if chosen.guidance is not None and taken.guidance is not None:
            described["guidance"] = chosen.guidance  # what it is calibrated with is its own from now on
        return described | ({"shares": shared} if shared else {}), files

    document = pipelines.write(output, fill, chosen.overwrite)
    roles = {name: part["role"] for name, part in document["parts"].items()}
    notes = [f"{name}: {note}" for name, report in reports.items() for note in report.notes]
    return PipelineReport(taken.name, chosen.target, reports, roles, shared, notes)


def _program(folder: Path, parts: Sequence[str], options: Options) -> dict[str, bytes]:
    """The files of the C program that draws with all parts."""
    target = targets.resolve(options.target)
    hashes = {name: bundle.read_manifest(folder / name)["artifact_sha256"] for name in parts}
    backend = cast(EmittingBackend, backend_of(target))
    return backend.join([folder / name for name in parts], pipelines.digests(hashes), target)


def require_parts(pipeline: DiffusersPipeline, parts: Sequence[str]) -> str:
    """The attribute of the pipeline's denoiser. UserError: it has none, or a part is of no known role."""
    if unknown := [part for part in parts if part not in KNOWN]:
        raise UserError(f"there is no part '{unknown[0]}' of a pipeline: {nearest(unknown[0], KNOWN)}")
    if not parts:
        raise UserError(f"--parts names no part: give one or more of {', '.join(KNOWN)}")
    if (name := denoiser_of(pipeline)) is None:
        raise UserError(f"{type(pipeline).__name__} has no unet and no transformer")
    require_cpu(pipeline, name)
    return name


def budgets_apart(weights: str | float | None, parts: Sequence[str]) -> dict[str, str]:
    """The budget of each role, where they are apart: ``"text=8,denoiser=3.5,decoder=20MB"``; empty where there is one.

    UserError: a role is named twice, not at all, or is not compiled; a budget is malformed.
    """
    if not isinstance(weights, str) or "=" not in weights:
        return {}
    found: dict[str, str] = {}
    for item in weights.split(","):
        role, _, budget = (text.strip() for text in item.partition("="))
        if role not in parts:
            raise UserError(f"--weights '{weights}' has a budget of '{role}', which is no part: {nearest(role, parts)}")
        if role in found:
            raise UserError(f"--weights '{weights}' has two budgets of '{role}'")
        parse_budget(budget)
        found[role] = budget
    if missing := [part for part in parts if part not in found]:
        raise UserError(f"--weights '{weights}' has no budget of '{missing[0]}': give all parts one, or one for all")
    return found


def _role(name: str, parts: Parts) -> str:
    known = {parts.denoiser: DENOISER, parts.decoder_name: DECODER, encoder_name(parts): ENCODER}
    return known.get(name, TEXT)


def _of_role(budget: str, part: Part, alike: Sequence[Part]) -> str:
    """The budget of a part: of bytes its share by parameters, where several parts have the role."""
    bits, size = parse_budget(budget)
    if size is None:
        return str(bits)
    return f"{size * part.model.parameters // sum(each.model.parameters for each in alike)}B"


def _alone(made: Mapping[str, Part], role: Mapping[str, str], options: Options) -> tuple[Budgets, int | None]:
    """The budget of each part where no picture decides, and the bytes of those parts together that draw a prompt.

    An encoder of images is none of these: it has its share of the bytes by its parameters, or the bits of all. No
    number of bytes: the recipe does not choose formats by their losses.
    """
    usual = _shared(options)
    if usual is None:
        return dict.fromkeys(made, options.weights), None
    bits, size = parse_budget(usual)
    count = {name: part.model.parameters for name, part in made.items()}
    apart = {name for name in made if role[name] == ENCODER} if size is not None else set()
    given = {name: size * count[name] // sum(count.values()) for name in apart if size is not None}
    rest = None if size is None else size - sum(given.values())
    budgets: Budgets = dict.fromkeys(made, options.weights if not apart else f"{rest}B")
    budgets |= {name: f"{taken}B" for name, taken in given.items()}
    return budgets, pose.byte_limit(sum(n for name, n in count.items() if role[name] != ENCODER), bits, rest)


def _shared(options: Options) -> str | float | None:
    """The budget that parts share, or the recipe's; None where the recipe does not choose formats by their losses."""
    passes = resolve(options)
    allocation = with_role(passes, Role.ALLOCATES)
    if allocation is None or with_role(passes, Role.MEASURES) is None:
        return None
    usual: str | float | None = allocation.options().get("weights")
    return usual if options.weights is None else options.weights


def _size(options: Options) -> tuple[int, int] | None:
    """Height and width of the latents, where they are asked for. UserError: there are several sizes."""
    sizes = {latent[1:] for latent in parse_shapes(options.shapes) if latent is not None}
    if len(sizes) > 1:
        raise UserError("--shapes of a whole pipeline has one size: compile its denoiser alone with --parts denoiser")
    return next(iter(sizes), None)


def describe(parts: Parts, roles: Sequence[str]) -> Description:
    """The document of the pipeline with the parts of these roles, but for what writing adds."""
    names = {each.name: TEXT for each in parts.encodings} | {
        parts.denoiser: DENOISER,
        parts.decoder_name: DECODER,
        encoder_name(parts): ENCODER,
    }
    texts = TEXT in roles
    encoders: list[EncoderEntry] = [
        {
            "part": each.name,
            "inputs": each.inputs.to_json(),
            "outputs": list(each.outputs),
            "returned": each.returned,
            "fields": list(each.returned["dict"]),
            "dimensions": dict(each.dimensions),
        }
        for each in parts.encodings
    ]
    return {
        "name": parts.name,
        "parts": {name: {"role": role} for name, role in names.items() if role in roles},
        "tokens": [{**each.to_json(), "file": _tokenizer_file(each.name)} for each in parts.tokens if texts],
        "encoders": encoders if texts else [],
        "conditions": parts.conditions.to_json(),
        "constants": parts.constants.to_json(),
        "decoder": {
            "part": parts.decoder_name, "latents": parts.decoded.to_json(), "images": parts.images.to_json(),
        },
        "guidance": parts.guidance,
        "null": parts.null,
        "steps": parts.steps,
    }  # fmt: skip


def _tokenizer_file(name: str) -> str:
    return f"{name}.json"


def _by_calls(
    name: str, module: torch.nn.Module, rows: Mapping[str, np.ndarray], more: str, options: Options, scratch: Path
) -> Part:
    """A part as the function of its recorded inputs, with the options that are its own; ``more`` gets more inputs."""
    file, first = scratch / f"{name}.safetensors", next(iter(rows))
    half = len(next(iter(rows.values()))) // 2  # two calls, so that what varies is seen to
    calls = [
        {n: torch.from_numpy(np.ascontiguousarray(v[part])) for n, v in rows.items()}
        for part in (slice(half), slice(half, 2 * half))
    ]
    call_file.write(file, module, calls, latent=first)
    own = replace(
        options, samples=None, steps=None, scheduler=None, prediction_type=None, guidance=None, conditions=None,
        shapes=None, effort=None, minutes=None, sensitivity=None, latency=None, latency_table=None, bops=None,
        reuse=None, lora_rank=None, lora_layers=None, calibration=file,
    )  # fmt: skip
    return Part(replace(denoisers.wrap_calls(module, file, name=name, latent=first), more_inputs=more), own)


def _encoder(parts: Parts, encoding: Encoding, texts: Sequence[str], options: Options, scratch: Path) -> Part:
    """A text encoder, calibrated on the tokens of the prompts."""
    rows = parts.token_inputs(texts, encoding)
    return _by_calls(encoding.name, encoding.module, rows, "give more --prompts", options, scratch)


def _denoiser(
    source: DiffusersPipeline, parts: Parts, texts: Sequence[str], options: Options, scratch: Path, context: RunContext
) -> Part:
    """The denoiser, conditioned on what the float text encoders make of the prompts."""
    given = conditions_of(parts, texts, context, parts.encoded)
    with (scratch / "conditions.safetensors").open("wb") as stream:
        tensorfile.save(stream, given)
    module, note = getattr(source, parts.denoiser), None
    if (seen := parts.seen) is not None:
        made = denoisers.wrap_seen(
            module, seen.arguments, seen.inputs, name=parts.denoiser, unit=seen.unit, scheduler=seen.scheduler
        )
        options = replace(options, shapes=None)  # it is of the size at which it was seen
    else:
        scheduler, note = schedulers.from_config(schedulers.config_of(source.scheduler))
        tokens = next((v.shape[1] for n, v in given.items() if n == "encoder_hidden_states"), None)
        made = denoisers.wrap(module, name=parts.denoiser, size=parts.size, tokens=tokens, scheduler=scheduler)
    guidance = parts.guidance if options.guidance is None else options.guidance
    known = {n for n in given if n.removeprefix(NULL) in made.conditioning.inputs}
    if missing := [name for name in made.conditioning.needed if name not in known]:
        raise UserError(f"{parts.name} gives its denoiser '{missing[0]}', which does not come from the prompt")
    own = replace(options, conditions=scratch / "conditions.safetensors", guidance=guidance)
    return Part(replace(made, notes=(*made.notes, note)) if note else made, own)


def _latents(parts: Parts, main: Part, options: Options, context: RunContext) -> np.ndarray:
    """Latents of pictures of the float denoiser as the decoder takes them, [N, ...]."""
    denoiser = main.sampled
    count = DRAWN if denoiser.parameters <= SMALL else DRAWN_LARGE
    conditioning, steps = denoiser.conditioning, min(STEPS, options.steps or STEPS)
    arguments = conditioning.arguments(conditioning.varied(count), count, denoiser.guidance)
    with context.track("drawing for the decoder", steps * (2 if "null_conditions" in arguments else 1)) as advance:

        def called(**inputs: np.ndarray) -> np.ndarray:
            found = context.map(lambda part: denoiser(**part).numpy(), batches(inputs, TOGETHER))
            advance(1)
            return np.concatenate(found)

        found = loop.sample(
            called,
            denoiser.scheduler,
            loop.gaussian(count, denoiser.latent_shape, options.seed),
            steps=steps,
            **arguments,
            latent=denoiser.latent,
            seed=options.seed,
        )
    packed = parts.convention.pack(found)
    return np.concatenate([parts.decoded(latents=row[None])["z"] for row in packed])


def _decoder(parts: Parts, latents: np.ndarray, options: Options, scratch: Path) -> Part:
    """The decoder, calibrated on the latents of pictures."""
    return _by_calls(parts.decoder_name, parts.decoder, {"latents": latents}, "", options, scratch)


def _image_encoder(
    source: DiffusersPipeline, parts: Parts, latents: np.ndarray, options: Options, scratch: Path
) -> Part:
    """The encoder of images, calibrated on pictures of these latents by the float decoder."""
    with torch.no_grad():
        images = torch.cat([parts.decoder(torch.from_numpy(row[None])) for row in latents]).clamp(-1, 1)
    module = pipeline_parts.Encoder(getattr(source, parts.decoder_name), images[:1])
    return _by_calls(encoder_name(parts), module, {"image": images.numpy()}, "", options, scratch)


def encoder_name(parts: Parts) -> str:
    """The name of the encoder of images, which a pipeline has in one module with its decoder."""
    return f"{parts.decoder_name}_encoder"


def is_pipeline(model: str | Path) -> bool:
    """Whether a folder holds a diffusers pipeline that draws prompts, whole or not."""
    index = checkpoint.place_of(model) / "model_index.json"
    if not index.is_file():
        return False
    parts = checkpoint.read_json(index).items()
    return any(name.startswith("text_encoder") and isinstance(kind, list) and kind[0] for name, kind in parts)


def load(source: str | Path) -> DiffusersPipeline:
    """Loads the diffusers pipeline of a folder or a bundled name, in float32 to its code. UserError: it does not load.

    Large weights in half precision stay so, those of the denoiser in their file (`frontend.widened`).
    """
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
    place, folder = checkpoint.locate(source), checkpoint.place_of(source)
    index = checkpoint.read_json(folder / "model_index.json")
    parts: dict[str, torch.nn.Module] = {place.denoiser.name: checkpoint_module.read(place, by_calls=True).eval()}
    try:
        _import_quietly(str(index.get("_class_name")))
        for name, kind in index.items():
            if name.startswith("text_encoder") and isinstance(kind, list) and kind[0] == transformers.__name__:
                encoder = getattr(transformers, kind[1])
                parts[name] = encoder.from_pretrained(folder / name, dtype="auto", local_files_only=True).eval()
                widen(parts[name])
        from_pretrained: Callable[..., DiffusersPipeline] = diffusers.DiffusionPipeline.from_pretrained
        made = from_pretrained(folder, **LOADED, **parts)
    except Exception as error:  # loading runs code of two libraries
        raise UserError(
            f"the pipeline '{source}' cannot be loaded ({type(error).__name__}: {one_line(error)}); "
            "--parts denoiser compiles its denoiser alone"
        ) from error
    return made


def _import_quietly(kind: str) -> None:
    """Imports a class of diffusers' pipelines without the warnings that image processors would like torchvision."""
    import diffusers
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity(ERROR)
    try:
        getattr(diffusers, kind, None)
    finally:
        logging.set_verbosity(level)


def load_decoder(folder: str | Path) -> torch.nn.Module:
    """Loads an autoencoder of diffusers in float32, to decode in a pipeline's stead. UserError: it is none."""
    import diffusers

    kind = str(checkpoint.read_json(Path(folder) / "config.json").get("_class_name"))
    found = getattr(diffusers, kind, None)
    if found is None or not hasattr(found, "decode"):
        raise UserError(f"--decoder '{folder}' is a {kind}, and no autoencoder of diffusers: give the folder of one")
    try:
        made: torch.nn.Module = found.from_pretrained(folder, **LOADED)
    except Exception as error:  # loading runs the library's code
        raise UserError(
            f"the decoder '{folder}' cannot be loaded ({type(error).__name__}: {one_line(error)})"
        ) from error
    return made
