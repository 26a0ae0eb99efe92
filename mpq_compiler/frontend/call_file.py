"""Files of recorded calls: calibration files of denoisers that are taken by their calls.

Such a file has the inputs of the calls, a row for each sample, the tensors that are the same in every call, named with
a prefix, and the form of the calls among its metadata.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mpq_compiler.frontend.call_module import form_of
from mpq_compiler.sampling.call_tree import TIME, Arguments, CallForm
from mpq_compiler.support import files, tensorfile
from mpq_compiler.support.errors import UserError

CONSTANT = "constant:"
"""The prefix of the names of tensors that are the same in every call."""
FORM = "call"
"""The entry of the metadata with the form of the calls."""


def has_call(path: str | Path | None) -> bool:
    """Whether a calibration file holds the form of its calls."""
    return path is not None and FORM in tensorfile.metadata(path)


def read(
    path: str | Path, latent: str | None = None, time: str | None = None
) -> tuple[CallForm, dict[str, Tensor], dict[str, Tensor]]:
    """Reads the form of the calls, the constants by path, and the inputs by name, [N, ...] each.

    Args:
        path: the file.
        latent: the path of the latents; None takes those of the recording.
        time: the path of the time; None takes that of the recording.

    Raises:
        UserError: the file is damaged, or the calls have no such latents or time.
    """
    try:
        recorded = CallForm.from_json(json.loads(tensorfile.metadata(path)[FORM]))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"'{path}' holds calls in a form that is not known here: record them again") from error
    form = recorded.saying(latent, time)
    constants, found = {}, {}
    for name, array in tensorfile.load(path).items():
        value = torch.from_numpy(np.array(array))
        if name.startswith(CONSTANT):
            constants[name.removeprefix(CONSTANT)] = value
        else:
            found[name] = value
    inputs = {now.input: found[then.input] for now, then in zip(form.arguments, recorded.arguments, strict=True)}
    return form, constants, {TIME: torch.zeros(len(inputs[form.latent])), **inputs}


def write(
    path: str | Path,
    model: torch.nn.Module,
    calls: Sequence[Arguments],
    metadata: Mapping[str, str] | None = None,
    latent: str | None = None,
    time: str | None = None,
) -> None:
    """Writes calls of a model, by name (`call_module.arguments_of`). UserError: they have no common form."""
    form, constants, inputs = form_of(model, list(calls), latent, time)
    tensors = {name: torch.cat([call[name] for call in inputs]).contiguous().numpy() for name in inputs[0]}
    tensors |= {CONSTANT + name: value.contiguous().numpy() for name, value in constants.items()}
    about = {**(metadata or {}), FORM: json.dumps(form.to_json(), separators=(",", ":"))}
    try:
        files.write_whole(Path(path), lambda stream: tensorfile.save(stream, tensors, about))
    except OSError as error:
        raise UserError(f"cannot write '{path}': {error.strerror}") from error
