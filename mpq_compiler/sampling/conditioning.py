"""Conditions of a denoiser: what it is asked to draw, by class, by prompt, from a file, or unconditionally.

The float model and every artifact of it share this module, so both get the same conditions. Nothing here imports torch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mpq_compiler.sampling.text_encoder import TextEncoder
from mpq_compiler.support import tensorfile
from mpq_compiler.support.errors import UserError, nearest

Array = np.ndarray
Spec = tuple[tuple[int, ...], str]
"""The shape of an input without the batch, and the name of its type."""

LABELS, TEXT = "class_labels", "encoder_hidden_states"
EMBEDDED = {"guidance": 3.5, "timestep_cond": 8.5}
"""Inputs that carry the guidance of guidance-distilled models, and the default that diffusers' pipelines use.

Such models (Flux, latent consistency models) take the guidance as an input in place of a second, unconditional call.
"""
NULL = "null."
"""Prefix of the names of unconditional inputs in a file."""


@dataclass(frozen=True)
class Conditions:
    """The inputs besides latents and timestep, by name, N rows each."""

    values: Mapping[str, Array]
    null: Mapping[str, Array] | None = None
    """The unconditional values of these inputs; None where the model has no unconditional case."""
    labels: Array | None = None
    """The classes that are asked for, int64 [N], where images can be judged by them; else None."""
    asked: Sequence[str | int] | None = None
    """The prompts or the classes that are asked for, N of them; None where conditions come from no such thing."""

    def take(self, rows: Array) -> Conditions:
        """The conditions of these rows, by index."""
        return Conditions(
            {name: value[rows] for name, value in self.values.items()},
            None if self.null is None else {name: value[rows] for name, value in self.null.items()},
            None if self.labels is None else self.labels[rows],
            None if self.asked is None else [self.asked[row] for row in rows],
        )


@dataclass(frozen=True)
class Conditioning:
    """How a denoiser is conditioned: its inputs, and what this package can make for them."""

    name: str
    """The model's name, for error messages."""
    inputs: Mapping[str, Spec]
    """Every input besides latents and timestep."""
    fixed: Mapping[str, Sequence[float]] = field(default_factory=dict)
    """Values of inputs that need not be given, such as the size of the image."""
    classes: int | None = None
    """The number of classes, without the null class; None where there are no classes."""
    null_class: int | None = None
    text: TextEncoder | None = None
    given: Conditions | None = None
    """Conditions from a file, in place of varied classes or prompts."""
    whole: bool = True
    """Whether all channels of the latents are drawn; else some come from elsewhere, such as an image to be changed."""

    @classmethod
    def of_artifact(cls, manifest: Mapping[str, Any], text: TextEncoder | None = None) -> Conditioning:
        """How an artifact's denoiser is conditioned, by its manifest, which says how it is sampled."""
        about = manifest["sampling"]
        inputs = {
            value["name"]: (tuple(value["shape"][1:]), value["dtype"])
            for value in manifest["functions"][0]["inputs"]
            if value["name"] not in (about["latent"], "timestep")
        }
        fixed, classes, null_class = about.get("fixed", {}), about["classes"], about["null_class"]
        return cls(manifest["name"], inputs, fixed, classes, null_class, text)

    @property
    def needed(self) -> tuple[str, ...]:
        """The inputs that have no fixed value."""
        return tuple(name for name in self.inputs if name not in self.fixed.keys() | EMBEDDED.keys())

    @property
    def encoder(self) -> TextEncoder | None:
        """The text encoder, where a prompt is all that the model needs; else None."""
        return self.text if self.needed == (TEXT,) else None

    @property
    def by_class(self) -> bool:
        """Whether a class is all that the model needs."""
        return self.needed == (LABELS,) and bool(self.classes)

    @property
    def possible(self) -> bool:
        """Whether conditions are at hand or can be made here; else they must come from a file."""
        return self.whole and (
            self.given is not None or not self.needed or self.by_class or self.encoder is not None
        )

    def of(self, wanted: Sequence[int] | Sequence[str] | Array) -> Conditions:
        """The conditions for class labels (the null class is one) or for prompts.

        Raises:
            UserError: a label or a word that the model does not know, or a model that takes neither.
        """
        text = isinstance(wanted, Sequence) and any(isinstance(item, str) for item in wanted)
        if text and (encoder := self.encoder):
            prompts = [str(item) for item in wanted]
            values, null = (
                self._complete({TEXT: encoder.encode(p)}, len(prompts)) for p in (prompts, [""] * len(prompts))
            )
            return Conditions(values, null, encoder.labels(prompts), prompts)
        if not text and self.by_class:
            labels = self._known_labels(np.asarray(wanted, np.int64))
            values = self._complete({LABELS: labels}, len(labels))
            if self.null_class is None:
                return Conditions(values, None, labels, labels.tolist())
            empty = np.full_like(labels, self.null_class)
            return Conditions(values, self._complete({LABELS: empty}, len(labels)), labels, labels.tolist())
        raise self._refusal(text)

    def _known_labels(self, labels: Array) -> Array:
        for label in labels:
            if label != self.null_class and not 0 <= label < (self.classes or 0):
                raise UserError(f"'{self.name}' has {self._range}, and {label} is none of them")
        return labels

    @property
    def _range(self) -> str:
        """The labels, in words."""
        null = "" if self.null_class is None else f" ({self.null_class}: no class)"
        return f"the classes 0 to {(self.classes or 0) - 1}{null}"

    def _refusal(self, text: bool) -> UserError:
        """The error that says how this model is conditioned instead."""
        if not self.needed:
            return UserError(f"'{self.name}' has no {'prompts' if text else 'classes'}: it is unconditional")
        if self.by_class:
            return UserError(f"'{self.name}' has no prompts, but {self._range}")
        if self.encoder:
            return UserError(f"'{self.name}' has no classes, but prompts such as '{self.encoder.example}'")
        return UserError(
            f"'{self.name}' is conditioned on {', '.join(self.needed)}, which cannot be made without its encoders: "
            "give recorded ones in a file with --conditions, or put the artifact into its diffusers pipeline"
        )

    def varied(self, count: int) -> Conditions:
        """Conditions for ``count`` varied images: the classes, the prompts or the rows of the file in turn."""
        if self.given is not None:
            return self.given.take(np.arange(count) % len(next(iter(self.given.values.values()))))
        if not self.needed:
            return Conditions(self._complete({}, count))
        if self.encoder:
            return self.of([*itertools.islice(itertools.cycle(self.encoder.all_prompts), count)])
        return self.of(np.arange(count) % (self.classes or 1))

    def mixed(self, count: int, seed: int) -> Conditions:
        """`varied` conditions in random order, with the null class or the empty prompt among them."""
        order = np.random.Generator(np.random.PCG64(seed))
        if self.given is not None:
            rows = len(next(iter(self.given.values.values())))
            return self.given.take(order.permutation(max(count, rows))[:count] % rows)
        if self.encoder:
            # As often as classes have their null class: one in each turn of the last slot.
            turn = len(list(self.encoder.slots.values())[-1]) + 1
            prompts = itertools.cycle(self.encoder.all_prompts)
            mixed = ["" if i % turn == turn - 1 else next(prompts) for i in range(count)]
            return self.of([mixed[i] for i in order.permutation(count)])
        if self.by_class:
            known = [*range(self.classes or 0), *([] if self.null_class is None else [self.null_class])]
            return self.of(order.permutation(np.resize(known, count)))
        return self.varied(count)

    def chosen(self, count: int, label: int | None, prompt: str | None) -> Conditions:
        """The conditions that a command asks for: one class, one prompt, or `varied`.

        Raises:
            UserError: both are given, or the model does not take what is given.
        """
        if label is not None and prompt is not None:
            raise UserError("give --class or --prompt, not both")
        if label is not None:
            return self.of([label] * count)
        return self.varied(count) if prompt is None else self.of([prompt] * count)

    def usual_guidance(self) -> float:
        """The guidance where none is asked for: the pipelines' default of a guidance-distilled model, else 1."""
        return next((value for name, value in EMBEDDED.items() if name in self.inputs), 1.0)

    def arguments(self, conditions: Conditions, count: int, guidance: float | None) -> dict[str, Any]:
        """The keyword arguments of `loop.sample` that depend on conditions and guidance.

        Args:
            conditions: N rows of every input.
            count: N.
            guidance: the scale of classifier-free guidance; None takes `usual_guidance`.

        Raises:
            UserError: guidance is asked for, and the model has no unconditional case.
        """
        require_guidance(guidance)
        guidance = self.usual_guidance() if guidance is None else guidance
        embedded = {
            name: np.array([self._embedded(name, guidance)] * count, np.float32)
            for name in self.inputs
            if name in EMBEDDED
        }
        if embedded:
            return {"conditions": {**conditions.values, **embedded}}
        if guidance == 1.0:
            return {"conditions": conditions.values}
        if conditions.null is None:
            raise UserError(
                f"guidance leads away from what a model draws without conditions, and '{self.name}' "
                + (
                    "is unconditional: leave --guidance out"
                    if not self.needed
                    else f"has no inputs for that: leave --guidance out, or add '{NULL}{self.needed[0]}' to the file"
                )
            )
        return {"conditions": conditions.values, "null_conditions": conditions.null, "guidance": guidance}

    def _complete(self, values: Mapping[str, Array], count: int) -> dict[str, Array]:
        """Adds the fixed inputs to the values, ``count`` rows each, in the order of the inputs."""
        fixed = {
            name: np.array([value] * count, self.inputs[name][1]).reshape(count, *self.inputs[name][0])
            for name, value in self.fixed.items()
        }
        return {name: {**fixed, **values}[name] for name in self.inputs if name not in EMBEDDED}

    def _embedded(self, name: str, guidance: float) -> Any:
        """Encodes the guidance as the model takes it: a number, or sines and cosines (arXiv 2310.04378, diffusers')."""
        if not (shape := self.inputs[name][0]):
            return guidance
        (width,) = shape
        angles = 1000.0 * (guidance - 1) * np.exp(-np.log(10000.0) / (width // 2 - 1) * np.arange(width // 2))
        return np.concatenate([np.sin(angles), np.cos(angles), np.zeros(width % 2)])

    def load(self, path: str | Path) -> Conditions:
        """Reads conditions from a safetensors file; names, shapes and errors are those of `from_arrays`."""
        return self.from_arrays(tensorfile.load(path), f"the file of conditions '{path}'")

    def from_arrays(self, found: Mapping[str, Any], where: str) -> Conditions:
        """Checks arrays and makes conditions of them.

        Args:
            found: every needed input by name, N rows each; for guidance also the unconditional ones as `null.<name>`,
                1 or N rows each.
            where: what holds the arrays, as an error calls it.

        Raises:
            UserError: an input is missing, unknown, or of another shape or type.
        """
        arrays = {name: np.asanyarray(value) for name, value in found.items()}
        count = max((len(v) for n, v in arrays.items() if v.ndim and not n.startswith(NULL)), default=0)
        if missing := [name for name in self.needed if name not in arrays]:
            raise UserError(f"{where} must hold '{missing[0]}', a condition of '{self.name}'")
        values: dict[str, Array] = {}
        null: dict[str, Array] = {}
        for name, value in arrays.items():
            plain = name.removeprefix(NULL)
            if plain not in self.inputs or plain in EMBEDDED:
                raise UserError(f"{where} must not hold '{plain}', no condition of '{self.name}': {self._known(plain)}")
            rows = (1, count) if plain != name else (count,)
            shape = self.inputs[plain][0]
            if not count or value.shape[1:] != shape or len(value) not in rows:
                wanted = [str(n) for n in (count or "N", *shape)]
                raise UserError(f"'{name}' of {where} is {list(value.shape)}, and must be [{', '.join(wanted)}]")
            converted = _converted(value, self.inputs[plain][1], f"'{name}' of {where}")
            (null if plain != name else values)[plain] = np.broadcast_to(converted, (count, *shape)).copy()
        for labels in (part[LABELS] for part in (values, null) if LABELS in part):
            self._known_labels(labels)
        complete = self._complete(values, count)
        asked = values[LABELS].tolist() if LABELS in values else None
        return Conditions(complete, {**complete, **null} if null else None, values.get(LABELS), asked)

    def _known(self, name: str) -> str:
        return nearest(name, self.inputs.keys() - EMBEDDED.keys()) if self.inputs else "there is none"


def require_guidance(guidance: float | None) -> None:
    """Raises a UserError unless the guidance is None or a finite number of 0 or more."""
    if guidance is not None and not 0 <= guidance < math.inf:
        raise UserError(f"--guidance {guidance:g} must be 0 or more, and finite: 1 is without, 7.5 is usual")


def _converted(value: Array, kind: str, where: str) -> Array:
    converted = value.astype(kind)
    if np.dtype(kind).kind in "iu" and not np.array_equal(converted, value):
        raise UserError(f"{where} must hold whole numbers")
    if not np.isfinite(converted).all():
        raise UserError(f"{where} holds NaN or infinity")
    return converted
