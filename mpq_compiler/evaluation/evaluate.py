"""Evaluates one painter by another, such as an artifact by its float model, on images from the same noise.

An artifact draws from its manifest alone, so nothing here imports torch unless a float model is loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mpq_compiler.evaluation import metrics
from mpq_compiler.evaluation.features import features_for
from mpq_compiler.evaluation.painter import Array, Painter, require_same_task
from mpq_compiler.sampling.loop import Call


def evaluate(
    painter: Painter,
    reference: Painter,
    images: int,
    steps: int,
    seed: int,
    features: Path | None = None,
    guidance: float | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Computes all metrics of a painter against a reference on the same noise (docs/metrics.md).

    `sqnr_db` is teacher-forced: the painter predicts at every call of the reference's trajectories.

    Args:
        painter: what is judged.
        reference: what it is judged by.
        images: the number of images.
        steps: sampling steps.
        seed: of the noise.
        features: the file of the feature extractor for Fréchet distances and class accuracy, or None.
        guidance: classifier-free guidance; None takes the model's usual one.
        progress: is called with (done, total) after every call of the reference.

    Returns:
        The metrics as JSON, with their intervals, and the settings.
    """
    require_same_task(painter, reference)
    expected: list[Array] = []
    got: list[Array] = []

    def teacher_force(call: Call) -> None:
        expected.append(call.output)
        got.append(np.asarray(painter.call(**call.inputs), dtype=np.float32))

    conditions = reference.conditioning.varied(images)
    drawn_reference = reference.draw(conditions, images, steps, seed, guidance, teacher_force, progress)
    drawn = painter.draw(conditions, images, steps, seed, guidance)
    pictures_reference, pictures = reference.decode(drawn_reference), painter.decode(drawn)
    extractor, reason = features_for(features, pictures.shape[1:])
    return {
        "sqnr_db": metrics.sqnr_db(np.concatenate(expected), np.concatenate(got)),
        "calls": sum(map(len, expected)),
        "trajectory_sqnr_db": metrics.trajectory_sqnr_db(drawn_reference, drawn),
        **metrics.compare_images(pictures_reference, pictures, extractor, reason, conditions.labels),
        "steps": steps,
        "seed": seed,
        "guidance": reference.conditioning.usual_guidance() if guidance is None else guidance,
    }
