"""What is looked at in the values of a call, for nothing shows in what comes out: NaN, ranges, tokens, labels."""

from __future__ import annotations

import numpy as np

from mpq_compiler.artifact.manifest import Assumption
from mpq_compiler.support.errors import UserError

ASSUMED_TO = 0.02
"""Largest allowed mean deviation of a token that was compiled in as a constant, relative to its mean magnitude."""

LARGEST = 1e18
"""The greatest magnitude of an input: squares of more, which norms take, overflow float32."""


def extremes(name: str, array: np.ndarray) -> tuple[float, float]:
    """The least and the greatest value of an input. UserError: one is NaN, infinite, or beyond `LARGEST`."""
    # Quantizers turn NaN into a code, and cut off what is beyond their range: nothing shows in what comes out.
    with np.errstate(invalid="ignore"):
        low, high = float(array.min()), float(array.max())  # NaN where a value is
    if not np.isfinite((low, high)).all():
        bad = ~np.isfinite(array.reshape(len(array), -1)).all(axis=1)
        raise UserError(f"input '{name}' holds NaN or infinity in sample {int(bad.argmax())}; check what made it")
    if max(high, -low) > LARGEST and not is_mask(name):
        at = np.unravel_index(int(np.abs(array).argmax()), array.shape)
        raise UserError(
            f"input '{name}' holds {array[at]:.3g} in sample {at[0]}, and at most {LARGEST:.0e} can be computed "
            "with: squares of more overflow; check what made it"
        )
    return low, high


def is_mask(name: str) -> bool:
    """Whether an input is a mask, by its name."""
    # The least value of a mask stands for minus infinity.
    return "mask" in name


def require_range(name: str, array: np.ndarray, below: int) -> None:
    """Raises a UserError where the input `name` has whole numbers beyond 0 to ``below`` - 1."""
    # A table that is read beyond its end gives something, and nothing shows in what comes out.
    bad = (array < 0) | (array >= below)
    if bad.any():
        at = int(bad.argmax())
        sample = at // (array.size // len(array))
        raise UserError(f"input '{name}' is {array.flat[at]} in sample {sample}; it goes from 0 to {below - 1}")


def require_token(assumed: Assumption, array: np.ndarray) -> None:
    """Raises a UserError where a sample's first token is not the constant that pass bos-split folded.

    Text encoders of another precision or on another machine give the same token within some thousandths, for which
    `ASSUMED_TO` leaves room. Another token, or the zeros that some pipelines guide with, are far beyond.
    """
    expected = np.asarray(assumed["values"], np.float32)
    difference = np.abs(array[:, assumed["token"]] - expected).mean(axis=1)
    if (difference > ASSUMED_TO * np.abs(expected).mean()).any():
        raise UserError(
            f"token {assumed['token']} of '{assumed['input']}' in sample {int(difference.argmax())} is not the one "
            "with which every prompt began when this artifact was compiled; its keys and values are constants since: "
            "encode texts as they were for calibration, or compile without the pass 'bos-split'"
        )


def require_room(out: object, shape: tuple[int, ...]) -> None:
    """Raises a UserError where a result of this shape cannot be written to ``out``."""
    if not isinstance(out, np.ndarray) or (out.shape, out.dtype) != (shape, np.float32) or not out.flags.writeable:
        kind = f"{out.dtype}{list(out.shape)}" if isinstance(out, np.ndarray) else type(out).__name__
        raise UserError(f"the result does not fit into `out`, {kind}: give a writeable array float32{list(shape)}")


def require_finite(name: str, result: np.ndarray) -> None:
    """Raises a UserError where the output `name` holds NaN or infinity."""
    if _is_finite(result):
        return
    bad = ~np.isfinite(result)
    sample = int(np.argmax(bad.reshape(len(bad), -1).any(axis=1)))
    raise UserError(
        f"output '{name}' holds NaN or infinity in {int(bad.sum())} of {bad.size} values, first in "
        f"sample {sample}; inputs far outside the calibrated range do that, and so may too few bits"
    )


def _is_finite(array: np.ndarray) -> bool:
    # A sum is finite only if every term is; it may overflow where all are, hence the second look. It allocates nothing.
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(np.isfinite(array.sum())) or bool(np.isfinite(array).all())
