"""Describes a compilation for the manifest, and collects the artifact's files."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from mpq_compiler import formats
from mpq_compiler.artifact import bundle, tvm_wheels
from mpq_compiler.artifact.manifest import Calls, Ends, Reuse
from mpq_compiler.driver import lora
from mpq_compiler.driver.lower import Packed
from mpq_compiler.driver.options import Options
from mpq_compiler.frontend import calibration_file
from mpq_compiler.frontend.denoiser import Denoiser
from mpq_compiler.ir import costs, device, printer, provenance, reuse, rewrites
from mpq_compiler.ir.edges import input_edge
from mpq_compiler.ir.findings import ALLOCATION, ASSUMPTIONS, ATTENTION_NUMERICS, NO_LOSSES, SENSITIVITY, STORED_HALVES
from mpq_compiler.ir.program import PARAMETERS, TIME_GROUPS, Program
from mpq_compiler.ir.specialization import kind_name
from mpq_compiler.latency import kernel_schedule
from mpq_compiler.pipeline import parser
from mpq_compiler.pipeline.backend import Built
from mpq_compiler.pipeline.passes import Pass, Role
from mpq_compiler.quantization.statistics import CALIBRATION
from mpq_compiler.sampling import call_tree, text_encoder
from mpq_compiler.sampling.reuse import OUTPUT, Schedule
from mpq_compiler.support import tensorfile
from mpq_compiler.support.files import encode_json, sha256
from mpq_compiler.targets import table as targets


def numerics_choices(planned: Program) -> dict[str, dict[str, str]]:
    """The chosen numerics of attentions and of float layers, by call."""
    chosen, calls = planned.facts.get(ATTENTION_NUMERICS, {}), {node.name for node in planned.attentions}
    attentions = {name: kind for name, kind in chosen.items() if name in calls}
    return {"attentions": attentions, "layers": {n: kind for n, kind in chosen.items() if n not in calls}}


def numerics_of(program: Program) -> str:
    """The numerics mode that the program needs, "fast" or "portable", whatever was allowed."""
    chosen = program.facts.get(ATTENTION_NUMERICS) or program.facts.get(STORED_HALVES)
    return "fast" if chosen else "portable"


def describe(
    denoiser: Denoiser,
    lowering: Packed,
    built: Built,
    options: Options,
    target: targets.Target,
    predicted: dict[str, Any] | None,
) -> dict[str, Any]:
    """Describes a compilation: the manifest, but for ``quality`` and the hashes that writing adds.

    Args:
        denoiser: the model.
        lowering: the results of the passes.
        built: the results of the backend.
        options: of the compilation.
        target: with the features that the kernels need.
        predicted: the predicted latency (`report.predicted_latency`), or None.
    """
    program, planned = lowering.program, lowering.planned
    document = {
        **_origin(denoiser, program, planned, built, options, lowering.passes),
        "target": describe_target(target) | {"numerics": numerics_of(program)},
        "functions": built.functions,
        "tensors": built.entries,
        "rewrites": rewrites.describe(program)[0],
    }
    optional = {"prepare": built.prepare, "parts": built.parts or None, "memory": built.memory}
    document |= {key: value for key, value in optional.items() if value is not None}
    if (branches := lora.describe(program)[0]) is not None:
        document["lora"] = branches
    if (schedule := program.facts.get(reuse.REUSE)) is not None:
        document["reuse"] = _reuse(schedule, program, built)
    if options.threads is not None:
        document["threads"] = options.threads
    if options.tune:
        document["tiles"] = {node: list(tile) for node, tile in sorted(built.facts["tiles"].items())}
    if predicted is not None:
        document["plan"]["latency"] = predicted
    return document


def files(
    denoiser: Denoiser, lowering: Packed, built: Built, options: Options, target: targets.Target
) -> dict[str, Any]:
    """The artifact's files by name, but for the manifest and the stored tensors."""
    program = lowering.program
    kernels = kernel_schedule.describe(program, built.facts.get("schedule", ()))
    decided = encode_json(provenance.document(program, kernel_schedule.by_layer(kernels)), indent=None)
    runtime = tvm_wheels.files(target, options.wheels) if options.standalone else {}
    found: dict[str, Any] = {**built.files, **runtime}
    found |= {bundle.IR: printer.text(program).encode(), bundle.DECISIONS: decided}
    if kernels:
        found[bundle.SCHEDULE] = encode_json(kernels)
    for file, tensors in ((bundle.LORA, lora.describe(program)[1]), (bundle.REWRITES, rewrites.describe(program)[1])):
        if tensors:
            found[file] = functools.partial(_save, tensors)
    if denoiser.text is not None:
        found[text_encoder.FILE] = denoiser.text.save
    if (constants := denoiser.constants) is not None:
        found[call_tree.CONSTANTS] = functools.partial(_save, constants)
    return found


def _save(tensors: Mapping[str, np.ndarray], path: Path) -> None:
    with path.open("wb") as stream:
        tensorfile.save(stream, tensors)


def _origin(
    denoiser: Denoiser, program: Program, planned: Program, built: Built, options: Options, passes: Sequence[Pass]
) -> dict[str, Any]:
    """The manifest's entries on the model, the passes, the plan and the calibration."""
    allocation, assumptions = program.facts.get(ALLOCATION, {}), program.facts.get(ASSUMPTIONS, ())
    bops, float_bops = costs.bops(planned)
    return {
        "name": denoiser.name,
        "model": {
            "class": str(denoiser.config.get("_class_name", type(denoiser.module.model).__name__)),
            "config": {k: v for k, v in denoiser.config.items() if not k.startswith("_")},
            "parameters": program.facts[PARAMETERS],
            "signature": list(inspect.signature(denoiser.module.model.forward).parameters),
            "call": asdict(denoiser.module.convention),
            **({"calls": _calls(denoiser, built)} if denoiser.form else {}),
            "below": {name: s.below for name, s in denoiser.input_specs.items() if s.below is not None},
            **({"source": dict(denoiser.source)} if denoiser.source else {}),
        },
        "recipe": {"name": str(Path(options.recipe).stem) if options.pipeline is None else "custom"},
        "pipeline": parser.to_text(passes, built.stages),
        "plan": {
            "layers": layer_rows(planned),
            "boundaries": program.facts[TIME_GROUPS].tolist(),
            "stored_bytes": costs.stored_bytes(planned),
            "bops": bops,
            "float_bops": float_bops,
            "fallbacks": dict(sorted(program.fallbacks.items())),
            **({"loss": allocation["objective"]} if allocation else {}),
            **({"numerics": program.facts[ATTENTION_NUMERICS]} if program.facts.get(ATTENTION_NUMERICS) else {}),
        },
        "sampling": denoiser.sampling(),
        "assumptions": list(assumptions),
        "calibration": _calibration(denoiser, planned, options, passes),
        "versions": {name: version(name) for name in ("mpq-compiler", "torch", "diffusers", "apache-tvm", "numpy")},
    }


def _reuse(schedule: Schedule, program: Program, built: Built) -> Reuse:
    """The manifest's entry on what steps reuse, with the functions of steps that keep and that reuse a node's value."""
    stated = schedule.to_json()
    if schedule.node == OUTPUT:
        return Reuse(node=stated["node"], timesteps=stated["timesteps"], sources=stated["sources"])
    names = [str(function["name"]) for function in built.functions]
    keeping, reusing = ([name for name in names if name.endswith(f"_{k}")] for k in (reuse.KEEPING, reuse.REUSING))
    return Reuse(**stated, shape=list(reuse.kept_shape(program)), keeping=keeping, reusing=reusing)


def _calls(denoiser: Denoiser, built: Built) -> list[Calls]:
    """The manifest's entries on the kinds of calls: in words, their form, and the functions that take them."""
    forms = [kind.form.to_json() for kind in (denoiser, *denoiser.kinds) if kind.form]
    names = [str(function["name"]) for function in built.functions]
    further = [[name for name in names if name.endswith(f"_{kind_name(k)}")] for k in range(1, len(forms))]
    functions = [[name for name in names if not any(name in each for each in further)], *further]
    three = zip(denoiser.kind_texts, forms, functions, strict=True)
    return [Calls(text=text, form=form, functions=each) for text, form, each in three]


def _calibration(denoiser: Denoiser, planned: Program, options: Options, passes: Sequence[Pass]) -> dict[str, Any]:
    """The manifest's entry on the calibration inputs: where they came from, how many there are, and what they span."""
    calibration = planned.facts[CALIBRATION]
    ranges = {name: Ends(low=_decimal(low), high=_decimal(high)) for name, (low, high) in calibration.ranges().items()}
    found: dict[str, Any] = {"seed": options.seed, "inputs": len(calibration.timesteps), "ranges": ranges}
    found |= {} if options.device == device.CPU else {"device": options.device}
    if options.calibration is not None:
        return found | calibration_file.stated(options.calibration)
    calibrate = next(step.options() for step in passes if step.role is Role.CALIBRATES)
    guidance = denoiser.conditioning.usual_guidance() if denoiser.guidance is None else denoiser.guidance
    sampled = {"scheduler": denoiser.scheduler.solver, "guidance": guidance}
    conditions = {} if options.conditions is None else {"conditions": sha256(options.conditions)}
    return found | calibrate | sampled | conditions


def _decimal(value: float) -> float:
    """The number of the fewest digits that is this one in float32."""
    return float(str(np.float32(value)))


def describe_target(target: targets.Target) -> dict[str, Any]:
    """The manifest's entry on the target."""
    described: dict[str, Any] = {
        "name": target.name,
        "arch": target.arch,
        "backend": target.backend,
        "features": list(target.features),
    }
    if target.backend == "tvm":
        described |= {"isa": target.isa, "tvm": dict(target.tvm)}
    if target.is_cuda:
        described["cuda"] = target.cuda
    return described


def layer_rows(planned: Program) -> list[dict[str, Any]]:
    """The name, weight format, activation, bytes, loss and fallback of every layer of a planned program."""
    groups = len(planned.facts[TIME_GROUPS]) + 1
    table = planned.facts.get(SENSITIVITY, NO_LOSSES)
    rows: list[dict[str, Any]] = []
    layers = {str(costs.weight_path(n)): n for n in reversed(planned.quantizable)}  # shared weights are stored once
    for path, node in reversed(layers.items()):
        plan = planned.weights[path]
        weight = str(node.args[1].target)  # type: ignore[union-attr]
        quantized = formats.get(plan.format).integer or planned.reads_floats(node)
        read = planned.activations.get(input_edge(node).name) if quantized else None
        activation = "float" if read is None else read.label(groups)
        rows.append(
            {
                "name": path,
                "weight": plan.format,
                "activation": activation,
                "bytes": costs.weight_bytes(planned, weight, plan.format),
                "loss": table["weights"].get(path, {}).get(plan.format),
                "fallback": planned.fallbacks.get(node.name),
            }
        )
    others = {n: reason for n, reason in planned.fallbacks.items() if n not in {q.name for q in planned.quantizable}}
    left = {"weight": "float", "activation": "float", "bytes": 0, "loss": 0.0}
    return rows + [{"name": name, **left, "fallback": reason} for name, reason in others.items()]
