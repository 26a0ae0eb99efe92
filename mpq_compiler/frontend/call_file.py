"""Files of recorded calls: calibration files of denoisers that are taken by their calls.

Such a file has the inputs of the calls, a row for each sample, the tensors that are the same in every call, named with
a prefix, and the form of the calls among its metadata. Where there are several kinds of calls, it has a list of forms,
and the tensors of the second and further ones have its index as a prefix (``1:sample``, ``1:constant:ids``).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mpq_compiler.frontend.call_module import form_of, kinds_of
from mpq_compiler.sampling import call_tree
from mpq_compiler.sampling.call_tree import TIME, Arguments, CallForm
from mpq_compiler.support import files, tensorfile
from mpq_compiler.support.errors import UserError
from mpq_compiler.support.files import decode_json

CONSTANT = "constant:"
"""The prefix of the names of tensors that are the same in every call."""
FORM = "call"
"""The entry of the metadata with the form of the calls."""


def has_call(path: str | Path | None) -> bool:
    """Whether a calibration file holds the form of its calls."""
    return path is not None and FORM in tensorfile.metadata(path)


@dataclass(frozen=True)
class Recording:
    """The recorded calls of one kind."""

    form: CallForm
    constants: dict[str, Tensor]
    """The tensors that are the same in every call, by path."""
    inputs: dict[str, Tensor]
    """The inputs [N, ...] by name."""


def read(path: str | Path, latent: str | None = None, time: str | None = None) -> list[Recording]:
    """Reads the recorded calls, those of the first kind first.

    Args:
        path: the file.
        latent: the path of the latents; None takes those of the recording.
        time: the path of the time; None takes that of the recording.

    Raises:
        UserError: the file is damaged, or the calls have no such latents or time.
    """
    try:
        stated = decode_json(tensorfile.metadata(path)[FORM])
        forms = [CallForm.from_json(form) for form in (stated if isinstance(stated, list) else [stated])]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"'{path}' holds calls in a form that is not known here: record them again") from error
    found = {name: torch.from_numpy(np.array(array)) for name, array in tensorfile.load(path).items()}
    recordings = []
    for index, recorded in enumerate(forms):
        form, prefix = recorded.saying(latent, time), call_tree.prefix(index)
        inputs = {
            now.input: found[prefix + then.input] for now, then in zip(form.arguments, recorded.arguments, strict=True)
        }
        constants = {name: found[f"{prefix}{CONSTANT}{name}"] for name in form.constants}
        recordings.append(Recording(form, constants, {TIME: torch.zeros(len(inputs[form.latent])), **inputs}))
    return recordings


def write(
    path: str | Path,
    model: torch.nn.Module,
    calls: Sequence[Arguments],
    metadata: Mapping[str, str] | None = None,
    latent: str | None = None,
    time: str | None = None,
) -> None:
    """Writes calls of a model, by name (`call_module.arguments_of`); those of the most frequent kind are the first.

    UserError: calls of a kind have no common form.
    """
    forms, tensors = [], {}
    for index, alike in enumerate(kinds_of(model, calls, latent, time)):
        form, constants, inputs = form_of(model, alike, latent, time)
        forms.append(form.to_json())
        prefix = call_tree.prefix(index)
        for name in inputs[0]:
            tensors[prefix + name] = torch.cat([call[name] for call in inputs]).contiguous().numpy()
        for name, value in constants.items():
            tensors[f"{prefix}{CONSTANT}{name}"] = value.contiguous().resolve_conj().numpy()
    about = {**(metadata or {}), FORM: json.dumps(forms, separators=(",", ":"))}
    try:
        files.write_whole(Path(path), lambda stream: tensorfile.save(stream, tensors, about))
    except OSError as error:
        raise UserError(f"cannot write '{path}': {error.strerror}") from error
