"""Drawing images with a float model or an artifact, and judging one by the other.

An artifact draws from its manifest alone: nothing here imports torch unless a float model is loaded.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mpq_compiler.evaluation import features as evaluation_features
from mpq_compiler.evaluation import metrics
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
    """All metrics of ``painter`` against ``reference`` on the same noise (docs/metrics.md).

    `sqnr_db` is teacher-forced: the painter is asked for every call of the reference's trajectories.
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
    extractor, reason = evaluation_features.features_for(features, pictures.shape[1:])
    return {
        "sqnr_db": metrics.sqnr_db(np.concatenate(expected), np.concatenate(got)),
        "trajectory_sqnr_db": metrics.trajectory_sqnr_db(drawn_reference, drawn),
        **metrics.compare_images(pictures_reference, pictures, extractor, reason, conditions.labels),
        "steps": steps,
        "seed": seed,
        "guidance": reference.conditioning.usual_guidance() if guidance is None else guidance,
    }
