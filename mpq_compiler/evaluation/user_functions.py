"""Functions of the user's that judge images, such as Inception or a CLIP score. Their code runs in this process.

One of features takes images, f32 [N, C, H, W] from 0 to 1 as a tensor on the CPU, and gives [N, D]. One of a score also
takes what was asked for, a list of N prompts, class labels or None, and gives [N]. Both give tensors or arrays.
"""

from __future__ import annotations

import functools
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np

from mpq_compiler.evaluation import distances
from mpq_compiler.evaluation.distances import Distances, Figure
from mpq_compiler.evaluation.metrics import interval
from mpq_compiler.support import plugins
from mpq_compiler.support.errors import Notice, UserError

Array = np.ndarray
Function = Callable[..., object]
Asked = Sequence[str | int | None]
"""What was asked for, of each image."""
TOGETHER = 16
"""The most images in a call of a function."""


@dataclass(frozen=True)
class UserFunction:
    """A function of the user's, and the option that it was given by."""

    name: str
    option: str
    function: Function

    @classmethod
    def of(cls, given: str | Function | UserFunction, option: str) -> UserFunction:
        """Imports ``MODULE:FUNCTION``, in the current folder first, or takes a function as it is.

        UserError: it cannot be imported, or is no function.
        """
        if isinstance(given, UserFunction):
            return given
        if isinstance(given, str):
            return cls(given, option, _imported(given, option))
        if not callable(given):
            raise UserError(f"{option} '{given}' is no function: give one, or its name as MODULE:FUNCTION")
        place = given if hasattr(given, "__qualname__") else type(given)
        return cls(f"{place.__module__}:{place.__qualname__}", option, given)

    @property
    def scores(self) -> bool:
        """Whether it gives a number for each image and what was asked for; else features."""
        return self.option == "--score"

    def __call__(self, images: Array, asked: Asked) -> Array:
        """Computes f64 [N, D], or [N] of a score, of images f32 [N, C, H, W] from 0 to 1.

        UserError: the function fails, or gives another shape or what is no number.
        """
        found: list[Array] = []
        for rows in np.array_split(np.arange(len(images)), -(-len(images) // TOGETHER)):
            values = self._called(images[rows], [asked[row] for row in rows])
            if values.shape[1:] != (found[0] if found else values).shape[1:]:
                raise self._wrong(f"gave {values.shape[1]} features here and {found[0].shape[1]} there")
            found.append(values)
        return np.concatenate(found)

    def _called(self, images: Array, asked: list[str | int | None]) -> Array:
        import torch

        count = len(images)
        try:
            with torch.no_grad():
                given = self.function(torch.from_numpy(images), *([asked] if self.scores else []))
                values = torch.as_tensor(given).detach().cpu().double().numpy()
        except Exception as error:
            raise self._wrong(f"fails on images {list(images.shape)}: {type(error).__name__}: {error}") from error
        if values.ndim != (1 if self.scores else 2) or len(values) != count or not values.size:
            wanted = f"[{count}]" if self.scores else f"[{count}, D]"
            raise self._wrong(f"gave {list(values.shape)} for {count} images: it has to give {wanted}")
        if not np.isfinite(values).all():
            raise self._wrong("gave NaN or infinity")
        return values

    def _wrong(self, what: str) -> UserError:
        return UserError(f"{self.option} '{self.name}' {what}")


def _imported(name: str, option: str) -> Function:
    module, _, path = name.partition(":")
    if not (module and path):
        raise UserError(f"{option} '{name}' names no function: write MODULE:FUNCTION, as judges:clip_score")
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Function = functools.reduce(getattr, path.split("."), plugins.module(module))
    except (Exception, SystemExit) as error:
        raise UserError(f"{option} '{name}' cannot be imported: {type(error).__name__}: {error}") from error
    if not callable(found):
        raise UserError(f"{option} '{name}' is a {type(found).__name__}, and no function")
    return found


Given = str | Function | UserFunction
Several = Given | Sequence[Given]
"""A function or several, or their names."""


def functions(features: Several = (), score: Several = ()) -> list[UserFunction]:
    """The functions that images are to be judged by. UserError: one cannot be imported."""
    return [
        UserFunction.of(given, option)
        for option, several in (("--features", features), ("--score", score))
        for given in ([several] if isinstance(several, str) or not isinstance(several, Sequence) else several)
    ]


def probe(functions: Sequence[UserFunction], shape: Sequence[int], asked: Asked) -> None:
    """Calls each once on two images of noise, so that what is wrong is known before any is drawn."""
    noise = np.random.Generator(np.random.PCG64(0)).random((2, *shape), dtype=np.float32)
    for function in functions:
        function(noise, (list(asked) * 2)[:2])


Score = TypedDict(  # noqa: UP013 - a key has the name of its type
    "Score", {"value": float, "low": float, "high": float, "float": float, "difference": Figure}
)
"""A mean and its interval, the float model's mean, and the mean of the paired differences."""


class Judged(TypedDict, total=False):
    """The judgements, by the names of the functions; a kind without functions is absent."""

    features: dict[str, Distances]
    scores: dict[str, Score]


def compare(functions: Sequence[UserFunction], reference: Array, images: Array, asked: Asked) -> Judged:
    """Judges images and those of the float model by each function.

    Args:
        functions: of either kind.
        reference: the float model's images, [N, C, H, W] in [-1, 1].
        images: images from the same noise.
        asked: what was asked for.
    """
    found: Judged = {}
    both = [np.ascontiguousarray((np.clip(each, -1, 1) + 1) / 2, np.float32) for each in (reference, images)]
    for function in functions:
        theirs, ours = (function(each, asked) for each in both)
        if function.scores:
            low, high = interval(ours)
            found.setdefault("scores", {})[function.name] = {
                "value": float(ours.mean()), "low": low, "high": high,
                "float": float(theirs.mean()), "difference": _mean(ours - theirs),
            }  # fmt: skip
            continue
        found.setdefault("features", {})[function.name] = distances.compare(theirs, ours)
        count, dimensions = ours.shape
        if count <= dimensions:
            warnings.warn(
                f"the FID of {count} images by the {dimensions} features of '{function.name}' compares covariances of "
                f"rank {count - 1}: hold it against figures of as many images only; KID is unbiased (docs/metrics.md)",
                Notice,
                stacklevel=2,
            )
    return found


def _mean(values: Array) -> Figure:
    low, high = interval(values)
    return {"value": float(values.mean()), "low": low, "high": high}
