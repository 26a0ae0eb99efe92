"""Calibration files: recorded inputs that ``--calibration`` reads, checked, described, and split for judgement.

A file is a safetensors with every input of the denoiser by name, N rows each: calls of sampling trajectories, with as
many time steps as possible. Its metadata say how they were sampled, as far as that is known: `steps`, `guidance` and
`scheduler` (its configuration as JSON). docs/calibration.md has an example.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpq_compiler.frontend import call_file
from mpq_compiler.frontend.denoiser import Denoiser
from mpq_compiler.sampling import schedulers
from mpq_compiler.sampling.conditioning import TEXT
from mpq_compiler.sampling.schedulers import FlowMatchEuler
from mpq_compiler.support import tensorfile
from mpq_compiler.support.errors import UserError, named, nearest
from mpq_compiler.support.files import decode_json, sha256

HELD_OUT_EVERY = 4
"""One latent in so many is held out from calibration, to judge the compiled program by."""
FEWEST_TRAJECTORIES = 4
"""The fewest trajectories of a recording of which some are held out whole."""
LEAST_TO_SPLIT = 8
"""The fewest latents that are split; fewer serve calibration and judgement both."""


def require(denoiser: Denoiser, path: str | Path | None) -> None:
    """Raises a UserError where inputs can neither be sampled nor come from a file; it says what the file must hold."""
    if path is not None:
        return
    if (conditioning := denoiser.conditioning).possible:
        conditioning.arguments(conditioning.varied(1), 1, denoiser.guidance)  # refuses a guidance that cannot be
        return
    inputs = ", ".join(f"{name} {str(spec).replace('[B', '[N')}" for name, spec in denoiser.input_specs.items())
    give = f"give recorded inputs with --calibration FILE, a safetensors of {inputs}"
    how = "mpq_compiler.record_inputs(pipeline, FILE) records one (docs/calibration.md)"
    if not denoiser.whole:
        raise UserError(
            f"'{denoiser.name}' gives fewer channels than its latents have, so that it cannot be sampled alone: "
            f"{give}; {how}"
        )
    needed = ", ".join(conditioning.needed)
    raise UserError(
        f"'{denoiser.name}' is conditioned on {needed}, which cannot be sampled without its encoders: {give}, or "
        f"the conditions alone with --conditions FILE; {how}"
    )


def load(denoiser: Denoiser, path: str | Path) -> dict[str, Tensor]:
    """Reads the inputs [N, ...] of a calibration file by name, largest timestep first.

    Latents of another height or width are cropped, or tiled, to the denoiser's, which keeps the distribution of their
    values; `notes` says so.

    Raises:
        UserError: not a safetensors file; an input is missing, unknown, of another shape or type, not finite, or a
            label out of range.
    """
    if (form := denoiser.form) is None or not call_file.has_call(path):
        found = {name: torch.from_numpy(np.array(value)) for name, value in tensorfile.load(path).items()}
    else:
        recording, *_ = call_file.read(path, form.latents.path, form.time)
        found = {name: value for name, value in recording.inputs.items() if name in denoiser.input_specs}
    specs = denoiser.input_specs
    for name in specs:
        if name not in found:
            unknown = sorted(found.keys() - specs.keys())
            hint = f"; it holds {named(unknown)}, which it does not take" if unknown else ""
            raise UserError(f"the calibration file '{path}' lacks the input '{name}' of {denoiser.name}{hint}")
    for name, value in found.items():
        if name not in specs:
            raise UserError(
                f"the calibration file '{path}' holds '{name}', and {denoiser.name} has no such input: "
                f"{nearest(name, specs)}"
            )
        if name == denoiser.latent and _resizable(tuple(value.shape), specs[name].sample):
            found[name] = value = _resized(value, *specs[name].sample[1:])
        if value.ndim == 0 or tuple(value.shape[1:]) != specs[name].sample:
            raise UserError(
                f"'{name}' in the calibration file '{path}' is {list(value.shape)}, "
                f"where {denoiser.name} takes {specs[name]}"
            )
    counts = {len(value) for value in found.values()}
    if len(counts) != 1 or 0 in counts:
        (few, fewest), *_, (many, most) = sorted(((n, len(v)) for n, v in found.items()), key=lambda item: item[1])
        raise UserError(
            f"the calibration file '{path}' must hold equally many rows of every input, and holds {fewest} of '{few}' "
            f"and {most} of '{many}'"
        )
    values = {name: _converted(name, found[name], spec.dtype, path) for name, spec in specs.items()}
    for name, spec in specs.items():
        if spec.below is not None and not bool(((values[name] >= 0) & (values[name] < spec.below)).all()):
            low, high = int(values[name].min()), int(values[name].max())
            raise UserError(
                f"'{name}' in the calibration file '{path}' goes from {low} to {high}, "
                f"where {denoiser.name} takes 0 to {spec.below - 1}"
            )
    order = torch.argsort(values["timestep"], descending=True, stable=True)
    return {name: value[order] for name, value in values.items()}


def tokens(path: str | Path | None) -> int | None:
    """The tokens of the texts in a calibration file; None: it has none."""
    shape: list[int] = [] if path is None else tensorfile.read_header(path)[0].get(TEXT, {}).get("shape", [])
    return int(shape[1]) if len(shape) == 3 else None


def _resizable(shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether latents [N, C, h, w] have the wanted channels and another height or width."""
    return len(shape) == 4 and shape[1] == wanted[0] and 0 not in shape and shape[1:] != wanted


def _resized(latents: Tensor, height: int, width: int) -> Tensor:
    rows, columns = torch.arange(height) % latents.shape[2], torch.arange(width) % latents.shape[3]
    return latents[:, :, rows][:, :, :, columns]


def notes(
    denoiser: Denoiser,
    path: str | Path,
    steps: int | None = None,
    guidance: float | None = None,
    scheduler: str | Path | None = None,
) -> list[str]:
    """Lists what in a calibration file may not fit, a sentence for each.

    Args:
        denoiser: what is compiled.
        path: the file.
        steps: steps of sampling that are asked for; None where nothing is.
        guidance: guidance that is asked for; None where nothing is.
        scheduler: file of the scheduler that is asked for; None where nothing is.

    Returns:
        A sentence for each doubtful input, and for each difference between the file and what is asked for.
    """
    stated = tensorfile.metadata(path)
    header, wanted = tensorfile.read_header(path)[0], denoiser.latent_shape
    recorded = header[denoiser.latent]["shape"][1:] if denoiser.form is None else wanted
    pairs = [
        ("a resolution of", "x".join(map(str, recorded[1:])), "x".join(map(str, wanted[1:]))),
        ("a number of steps of", stated.get("steps"), None if steps is None else str(steps)),
        ("a guidance of", stated.get("guidance"), None if guidance is None else f"{guidance:g}"),
    ]
    if scheduler is not None and "scheduler" in stated:
        try:
            theirs = schedulers.from_config(decode_json(stated["scheduler"]))[0].to_config()
        except (ValueError, UserError):
            theirs = {"_class_name": "scheduler that is not known here"}
        ours = denoiser.scheduler.to_config()
        pairs += [(f"a {key.strip('_')} of", str(theirs[key]), str(ours[key])) for key in ours.keys() & theirs.keys()]
    said = [f"{about}: what is measured on it may not fit" for about in _doubts(denoiser, load(denoiser, path))]
    for what, was, wanted_of in sorted(pairs, key=lambda pair: pair[0]):
        if wanted_of is not None and was is None:
            said.append(f"does not say that it was recorded with {what} {wanted_of}, as is asked for: check it")
        elif wanted_of is not None and was != wanted_of:
            said.append(
                f"was recorded with {what} {was}, and {wanted_of} is asked for: what is measured on it may not fit"
            )
    if scheduler is not None and "scheduler" not in stated:
        said.append("does not say with which scheduler it was recorded: check that it was the one asked for")
    return [f"the calibration file '{path}' {clause}" for clause in said]


def _doubts(denoiser: Denoiser, inputs: Mapping[str, Tensor]) -> Iterator[str]:
    """Clauses on inputs that no sampling gives: timesteps that the scheduler does not have, latents without noise."""
    times, scheduler = inputs["timestep"], denoiser.scheduler
    last = scheduler.num_train_timesteps - (not isinstance(scheduler, FlowMatchEuler))
    if beyond := times[(times < 0) | (times > last)].tolist():
        yield f"has {len(beyond)} of {len(times)} rows at timesteps outside 0 to {last}, such as {beyond[0]:g}"
    if empty := int((inputs[denoiser.latent].flatten(1) == 0).all(1).sum()):
        yield f"has {empty} of {len(times)} rows in which '{denoiser.latent}' is all zeros"


def stated(path: str | Path) -> dict[str, Any]:
    """The manifest's entry on a calibration file: its hash, and how it was sampled, as far as it says."""
    metadata = tensorfile.metadata(path)
    return {"file": sha256(path)} | {key: metadata[key] for key in ("steps", "guidance") if key in metadata}


def _converted(name: str, value: Tensor, dtype: torch.dtype, path: str | Path) -> Tensor:
    # Masks of tokens, timesteps and sizes come as tokenizers and schedulers make them; latents and embeddings do not.
    counts = dtype.is_floating_point and value.ndim <= 2 and not value.is_complex()
    if not counts and value.dtype != dtype and (
        value.is_complex()
        or value.dtype == torch.bool
        or (dtype.is_floating_point and not value.is_floating_point())
    ):
        kind, wanted = (str(t).removeprefix("torch.") for t in (value.dtype, dtype))
        raise UserError(f"'{name}' in the calibration file '{path}' is {kind}, and must be {wanted}")
    if value.is_floating_point() and not bool(torch.isfinite(value).all()):
        raise UserError(f"'{name}' in the calibration file '{path}' holds NaN or infinity; check what recorded it")
    converted = value.to(dtype)
    if not dtype.is_floating_point and not torch.equal(converted.to(value.dtype), value):
        raise UserError(f"'{name}' in the calibration file '{path}' holds fractions, and must hold whole numbers")
    return converted


def split(inputs: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Splits inputs into rows to calibrate on and rows to judge by; both are all rows below `LEAST_TO_SPLIT` latents.

    Rows of one latent at one time, as classifier-free guidance makes them, stay together.
    """
    number = latent_numbers(inputs)
    if int(number.max()) + 1 < LEAST_TO_SPLIT:
        return dict(inputs), dict(inputs)
    held = held_out_rows(number, inputs["timestep"], HELD_OUT_EVERY)
    return {n: v[~held] for n, v in inputs.items()}, {n: v[held] for n, v in inputs.items()}


def held_out_rows(number: Tensor, timesteps: Tensor, every: int) -> Tensor:
    """Chooses the rows to hold out, one latent in ``every``: bool [N].

    Whole trajectories are held out where there are some, for a student knows a step by heart whose neighbours it was
    trained on. They are recognized by equally many latents at each time.

    Args:
        number: the latent of each row [N], from `latent_numbers`.
        timesteps: of each row [N].
        every: one in so many is held out.
    """
    first = torch.from_numpy(np.unique(number.numpy(), return_index=True)[1])
    _, time, counts = timesteps[first].unique(return_inverse=True, return_counts=True)
    if len(counts) > 1 and counts[0] >= FEWEST_TRAJECTORIES and bool((counts == counts[0]).all()):
        order = time.argsort(stable=True)
        within = torch.empty_like(order)
        within[order] = torch.arange(int(counts[0])).repeat(len(counts))
        number, every = within[number], min(every, int(counts[0]))
    return number % every == every // 2


def latent_numbers(inputs: Mapping[str, Tensor]) -> Tensor:
    """Numbers the distinct pairs of latent and timestep from 0, in order of appearance: i64 [N], one for each row."""
    latents = inputs[next((name for name in ("sample", "hidden_states") if name in inputs), next(iter(inputs)))]
    seen: dict[tuple[float, bytes], int] = {}
    keys = ((float(t), hashlib.sha256(x.numpy()).digest()) for t, x in zip(inputs["timestep"], latents, strict=True))
    return torch.tensor([seen.setdefault(key, len(seen)) for key in keys])
