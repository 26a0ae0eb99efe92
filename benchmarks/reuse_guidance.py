"""What guidance may leave out: both calls of a step, or the unconditional one alone, of the float model.

    python -m benchmarks.reuse_guidance

Classifier-free guidance calls the model twice in a step. Where both calls reuse, half of the steps that reuse save as
many calls as where the unconditional one alone does, whose output is then a sum of its own earlier ones, or the
conditional output of this step less a sum of earlier differences of both (the CFG-cache of FasterCache, arXiv
2410.19355). Each kind has its own best steps: the losses of steps in a row, by themselves, decide by a shortest path,
as `step-reuse` does; weights are those that come nearest to what would be computed.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import documents
from benchmarks.cells import RESULTS
from benchmarks.machine import provenance
from mpq_compiler.allocation.reuse_choice import ladder_of
from mpq_compiler.analysis.reuse_losses import (
    fit_weights,
    of_all_gaps,
    relative_error,
    schedule_of,
    schedule_of_one,
    some_gaps,
)
from mpq_compiler.frontend import denoiser
from mpq_compiler.ir.reuse import Cut
from mpq_compiler.sampling import loop
from mpq_compiler.sampling.reuse import OUTPUT, Schedule
from mpq_compiler.support import terminal
from mpq_compiler.support.files import encode_json

RESULT = RESULTS / "reuse_guidance.json"
DOCUMENT = Path(__file__).parents[1] / "docs" / "reuse.md"
MODELS = "fashion-unet", "fashion-text"
BOTH, VALUE, DIFFERENCE = "both calls", "the unconditional output", "its difference"
STEPS, GUIDANCE, IMAGES, PLACES, SEED = 20, 2.0, 16, 8, 5
SAVED = 8, 12, 16
"""The calls that are left out, of two in each step."""
CUT = Cut(OUTPUT, frozenset(), 1.0)


@dataclass
class Guided:
    """Images of a float model under guidance."""

    name: str

    def __post_init__(self) -> None:
        self.model = denoiser.load(self.name)
        conditions = self.model.conditioning.mixed(IMAGES, SEED)
        self.arguments = self.model.conditioning.arguments(conditions, IMAGES, GUIDANCE)
        self.timesteps = tuple(float(t) for t in self.model.scheduler.timesteps(STEPS))
        self._calls: list[np.ndarray] = []

        def recorded(**inputs: np.ndarray) -> np.ndarray:
            self._calls.append(self.model(**inputs).numpy())
            return self._calls[-1]

        self.whole = self._drawn(recorded)

    def _drawn(self, call: loop.Model) -> np.ndarray:
        noise = loop.gaussian(IMAGES, self.model.latent_shape, SEED)
        return loop.sample(call, self.model.scheduler, noise, steps=STEPS, latent=self.model.latent, **self.arguments)

    def loss(self, schedule: Schedule, kind: str) -> float:
        """The relative noise power of images in which calls reuse by a schedule."""
        kept: tuple[dict[int, np.ndarray], ...] = {}, {}
        numbers, first = itertools.count(), next(step for step, sources in enumerate(schedule.sources) if sources)
        conditional = np.zeros(())

        def call(**inputs: np.ndarray) -> np.ndarray:
            nonlocal conditional
            step, second = divmod(number := next(numbers), 2)
            output = self._calls[number] if step < first else self.model(**inputs).numpy()
            base = conditional if second and kind == DIFFERENCE else np.float32(0)
            sources = schedule.sources[step] if second or kind == BOTH else ()
            if sources:
                values = [kept[second][of] for of, _ in sources]
                weights = fit_weights(values, output - base, [weight for _, weight in sources])
                output = base + sum(np.float32(weight) * value for weight, value in zip(weights, values, strict=True))
            else:
                kept[second][step] = output - base
            conditional = conditional if second else output
            return output

        return relative_error(self._drawn(call), self.whole)

    def best(self, kind: str) -> list[dict[str, Any]]:
        """The SQNR of images for each number of calls that are left out, in dB."""
        gaps = some_gaps(STEPS, PLACES)
        with terminal.progress(f"{self.name}, {kind}", len(gaps)) as advance:
            losses = {}
            for gap in gaps:
                losses[gap] = self.loss(schedule_of_one(CUT, self.timesteps, gap), kind)
                advance(1)
        ladder = ladder_of(of_all_gaps(losses, STEPS), STEPS)
        rows = []
        for saved in SAVED:
            count = saved // 2 if kind == BOTH else saved
            loss = self.loss(schedule_of(CUT, self.timesteps, ladder[count][1]), kind) if count in ladder else np.nan
            rows.append({"model": self.name, "kind": kind, "saved": saved, "sqnr_db": round(-10 * np.log10(loss), 2)})
        return rows


def table() -> str:
    """The results in Markdown."""
    rows = json.loads(RESULT.read_text(encoding="utf-8"))["rows"]
    found = {(row["model"], row["kind"], row["saved"]): row["sqnr_db"] for row in rows}
    titles = [f"{saved} of {2 * STEPS} calls left out" for saved in SAVED]
    lines = [
        [model, kind, *(f"{found[model, kind, saved]:.1f} dB" for saved in SAVED)]
        for model in MODELS
        for kind in (BOTH, VALUE, DIFFERENCE)
    ]
    return documents.table(["model", "what is reused", *titles], lines)


def main() -> None:
    rows = []
    for name in MODELS:
        guided = Guided(name)
        for kind in (BOTH, VALUE, DIFFERENCE):
            rows += guided.best(kind)
    about = {"steps": STEPS, "guidance": GUIDANCE, "images": IMAGES, "rows": rows, **provenance()}
    RESULT.write_bytes(encode_json(about))
    print(table())
    documents.insert(DOCUMENT, "reuse-guidance", table())


if __name__ == "__main__":
    main()
