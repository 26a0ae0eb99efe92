"""Pictures of a float model and an artifact from the same noise, and their difference, for pages."""

from __future__ import annotations

import base64
import tempfile
from pathlib import Path

import numpy as np

from mpq_compiler.evaluation import image_grid
from mpq_compiler.evaluation.metrics import psnr_db
from mpq_compiler.evaluation.painter import float_model, from_artifact, from_denoiser, sampled_like

IMAGES, STEPS, COLUMNS = 16, 10, 4


def pictures(artifact: Path, model: str) -> dict[str, str]:
    """Draws with both: ``float``, ``compiled`` and ``difference`` as data of a PNG, and what is ``told`` of them.

    UserError: one of them cannot draw, or they do not draw the same.
    """
    ours = from_artifact(artifact)
    theirs = sampled_like(from_denoiser(float_model(model, ours)), ours)
    conditions = ours.conditioning.varied(IMAGES)
    drawn = [each.decode(each.draw(conditions, IMAGES, STEPS, ours.unseen)) for each in (theirs, ours)]
    apart = np.abs(drawn[1] - drawn[0])
    largest = float(apart.max()) or 1.0
    made = dict(zip(("float", "compiled", "difference"), (*drawn, 2 * apart / largest - 1), strict=True))
    told = (
        f"{IMAGES} images in {STEPS} steps, seed {ours.unseen}: PSNR {psnr_db(*drawn):.1f} dB; "
        f"white is a difference of {100 * largest / 2:.1f} % of the range"
    )
    with tempfile.TemporaryDirectory() as folder:
        return {
            "told": told,
            **{
                kind: "data:image/png;base64,"
                + base64.b64encode(image_grid.grid(images, Path(folder) / "grid.png", COLUMNS).read_bytes()).decode()
                for kind, images in made.items()
            },
        }
