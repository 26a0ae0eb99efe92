"""Evaluates one painter by another, such as an artifact by its float model, on images from the same noise.

An artifact draws from its manifest alone, so nothing here imports torch unless a float model is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mpq_compiler.evaluation import metrics, user_functions
from mpq_compiler.evaluation.conditional_difference import Observer
from mpq_compiler.evaluation.features import features_for
from mpq_compiler.evaluation.painter import Array, Painter, require_same_task
from mpq_compiler.evaluation.user_functions import Several, UserFunction
from mpq_compiler.sampling.loop import Call
from mpq_compiler.support.errors import UserError


def evaluate(
    painter: Painter,
    reference: Painter,
    images: int,
    steps: int,
    seed: int,
    classifier: Path | None = None,
    guidance: float | None = None,
    progress: Callable[[int, int], None] | None = None,
    *,
    features: Several = (),
    score: Several = (),
) -> dict[str, Any]:
    """Computes all metrics of a painter against a reference on the same noise (docs/metrics.md).

    `sqnr_db` is teacher-forced: the painter predicts at every call of the reference's trajectories.

    Args:
        painter: what is judged.
        reference: what it is judged by.
        images: the number of images.
        steps: sampling steps.
        seed: of the noise.
        classifier: the file of the feature extractor for Fréchet distances and class accuracy, or None.
        guidance: classifier-free guidance; None takes the model's usual one.
        progress: is called with (done, total) after every call of the reference.
        features: a function from images to features, or several, for FID, KID, precision and recall; each by itself or
            as ``"MODULE:FUNCTION"`` (`user_functions`).
        score: a function from images and what was asked for to a number each, or several.

    Returns:
        The metrics as JSON, with their intervals, and the settings.

    Raises:
        UserError: painters of different tasks, or a function that fails, which is tried before anything is drawn.
    """
    require_same_task(painter, reference)
    judges = user_functions.functions(features, score)
    probe(judges, reference)
    expected: list[Array] = []
    got: list[Array] = []

    conditions = reference.conditioning.varied(images)
    difference = None if conditions.null is None else Observer(conditions.null)

    def teacher_force(call: Call) -> None:
        expected.append(call.output)
        got.append(np.asarray(painter.call(**call.inputs), dtype=np.float32))
        if difference is not None:
            difference.observe(call, got[-1])

    drawn_reference = reference.draw(conditions, images, steps, seed, guidance, teacher_force, progress)
    drawn = painter.draw(conditions, images, steps, seed, guidance)
    pictures_reference, pictures = reference.decode(drawn_reference), painter.decode(drawn)
    extractor, reason = features_for(classifier, pictures.shape[1:])
    return {
        "sqnr_db": metrics.sqnr_db(np.concatenate(expected), np.concatenate(got)),
        "calls": sum(map(len, expected)),
        "trajectory_sqnr_db": metrics.trajectory_sqnr_db(drawn_reference, drawn),
        **metrics.compare_images(pictures_reference, pictures, extractor, reason, conditions.labels),
        **user_functions.compare(judges, pictures_reference, pictures, conditions.asked or [None] * images),
        **({} if difference is None else {"conditional_difference": difference.to_json(reference.call, painter.call)}),
        **({} if painter.cost is None else {"cost": painter.cost}),
        "steps": steps,
        "seed": seed,
        "guidance": reference.conditioning.usual_guidance() if guidance is None else guidance,
    }


def probe(functions: Sequence[UserFunction], painter: Painter) -> None:
    """Tries functions on images of a painter's shape. UserError: one fails, or the painter draws no images."""
    if functions and painter.undecoded:
        raise UserError(f"{functions[0].option} is of images, and {painter.undecoded}")
    shape = painter.decode(np.zeros((1, *painter.shape), np.float32)).shape[1:]
    user_functions.probe(functions, shape, painter.conditioning.varied(2).asked or [None])
