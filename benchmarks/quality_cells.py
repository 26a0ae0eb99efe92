"""Cells of `benchmarks.quality`: a recipe at a setting on a model, what it costs at most, and where its result lies."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from mpq_compiler.driver import lower
from mpq_compiler.driver import options as driver_options
from mpq_compiler.frontend import denoiser
from mpq_compiler.ir import costs
from mpq_compiler.ir.program import Program
from mpq_compiler.passes.bit_allocation import BitAllocation
from mpq_compiler.passes.distill import Distill
from mpq_compiler.pipeline import recipes

RESULTS = Path(__file__).parent / "results" / "quality"
COSTS = RESULTS / "step_costs.json"
"""Of `benchmarks.step_costs`."""
JUDGES = Path(__file__).parent / "results" / "judges"
"""The models on which no recipe was developed, and what is said of them."""
SETTINGS = {
    "W8A8": (8, 8), "W6A6": (6, 6), "W4A8": (4, 8), "W3A8": (3, 8), "W2A8": (2, 8),
    "W4A4": (4, 4), "W3A6": (3, 6), "W3A4": (3, 4), "W2A6": (2, 6), "W2A4": (2, 4),
}  # fmt: skip
"""Bits of the uniform weights whose bytes are the budget, and of activations."""
SHORT = ("W4A8", "W2A8", "W4A4")
"""The settings of judges other than the first."""
JUDGED = {"emoji-unet": tuple(name for name in SETTINGS if name != "W3A8"), "emoji-dit": SHORT}
"""The models on which no recipe was developed, with their settings: claims are about them."""
MODELS = dict.fromkeys(("fashion-unet", "fashion-dit", "fashion-text"), ("W2A8", "W4A4"))
"""Those on which recipes were, which judge nothing."""
SAMPLERS = {
    "DDIM 4": ("DDIMScheduler", 4),
    "DDIM 20": ("DDIMScheduler", 20),
    "DDIM 50": ("DDIMScheduler", 50),
    "Euler 10": ("EulerDiscreteScheduler", 10),
}
"""Solvers and steps that judge what was calibrated on others."""
CLAIM = {"seeds": 3, "images": 1000}
"""What a cell of a claim is judged by, beside its recipe; at settings other than `CLAIMED` by one seed."""
CLAIMED = ("W2A8", "W4A4")
RIVALS = 2
"""Recipes beside `default` that are trained as long as `--effort best` at those settings."""
BEST_MINUTES = Distill.efforts["best"]["minutes"]
"""Of training, which stand for that effort."""
SHOWN = "W2A8"
"""The setting of the first judge of which images stand side by side."""
UNIFORM = (
    "trace,layout,calibrate,time-groups{{bits={a}}},bit-allocation{{uniform=int{w},activations={a},ends=8}},numerics,"
    "insert-fake-quant,residual-branch,round-weights{{method={method}}},fold-fake-quant,fuse-epilogues"
)
WIDTHS = (2, 3, 4, 8)
"""Bits in which there are uniform weights."""
BASELINES = {"nearest": "nearest", "gptq": "gptq"}
"""Uniform bits but for the ends', by the rounding: what a recipe is to be better than."""
COMPARED = (*BASELINES, *(name for name in recipes.names() if name != "w8a8"))
OURS = ("default", "packed")
"""Recipes of no publication: a claim is about the first of them beside those that are of one."""
MINUTES, IMAGES = 4.0, 250
"""Of training in each cell, and to judge it by."""


loaded = functools.cache(recipes.load)
"""The recipe of a name, read once: keys of cells, which are asked for often, follow from it."""


class Budget(NamedTuple):
    """What a cell may cost."""

    bytes: int
    activations: float
    """The average bits of activations, where a recipe has several widths of them."""


@dataclass(frozen=True)
class Cell:
    """What is compiled and judged."""

    model: str
    setting: str
    recipe: str
    minutes: float = MINUTES
    seed: int = 0
    images: int = IMAGES
    program: ClassVar[str] = "benchmarks.quality"

    @property
    def name(self) -> str:
        return f"{self.model} {self.setting} {self.recipe} seed {self.seed}"

    @property
    def key(self) -> str:
        """Of the file of its result: changes with all that the result depends on but the code."""
        text = "" if self.recipe in BASELINES else json.dumps(self.made, sort_keys=True)
        digest = hashlib.sha256(f"3 {sorted(asdict(self).items())} {text}".encode()).hexdigest()
        return f"{self.model}-{self.setting}-{self.recipe}-{self.seed}-{digest[:8]}"

    @property
    def file(self) -> Path:
        return RESULTS / f"{self.key}.json"

    @property
    def strip(self) -> Path | None:
        """Of the first images side by side, where they are shown."""
        usual = Cell(next(iter(JUDGED)), SHOWN, self.recipe)
        return self.file.with_suffix(".png") if self == usual else None

    @property
    def asked(self) -> list[str]:
        """Arguments that ask for this cell alone."""
        given = [f"--{name}={getattr(self, name)}" for name in ("model", "setting", "recipe")]
        for name, usual in (("minutes", MINUTES), ("seed", 0), ("images", IMAGES)):
            if getattr(self, name) != usual:
                given.append(f"--{name}={getattr(self, name):g}")
        return given

    @property
    def command(self) -> str:
        """What computes it, whichever process of whichever machine did."""
        return shlex.join(["python", "-m", self.program, "--all", *self.asked])

    @property
    def is_there(self) -> bool:
        return self.file.exists() and (self.strip is None or self.strip.exists() or self.result() is None)

    def result(self) -> dict[str, Any] | None:
        """The row, where there is one: nothing was computed, or the recipe cannot keep the budget."""
        row = read(self.file)
        return row if "errors" in row else None

    @property
    def used(self) -> recipes.Recipe:
        return loaded(self.recipe)

    @property
    def mixes(self) -> bool:
        """Whether activations have several widths, and a budget of average bits, where they have fewer than 8."""
        (step,) = (step for step in self.used.passes() if isinstance(step, BitAllocation))
        return not step.alike and SETTINGS[self.setting][1] < 8

    @property
    def made(self) -> list[Any]:
        """All of the recipe that a result depends on, as JSON has it."""
        return [self.used.pipeline, self.used.options, *(["activations as ends"] if self.mixes else [])]

    def options(self, budget: Budget) -> dict[str, Any]:
        """Of `compile.compile`, with that budget."""
        weights, activations = SETTINGS[self.setting]
        if self.recipe in BASELINES:
            pipeline = UNIFORM.format(w=weights, a=activations, method=BASELINES[self.recipe])
            return {"pipeline": pipeline, "seed": self.seed}
        asked = budget.activations if self.mixes else activations
        given = {"recipe": self.recipe, "weights": f"{budget.bytes}B", "activations": asked, "seed": self.seed}
        if "distill" not in self.used.pipeline:
            return given
        best = self.recipe == "default" and self.minutes == BEST_MINUTES
        return given | ({"effort": "best"} if best else {"minutes": self.minutes})


def cells_of(
    models: Iterable[str] = (*JUDGED, *MODELS),
    settings: Sequence[str] | None = None,
    chosen: Sequence[str] | None = None,
    minutes: float = MINUTES,
    seed: int = 0,
    images: int = IMAGES,
) -> list[Cell]:
    """Of every recipe, where none is chosen, at every setting of a model."""
    return [
        Cell(model, setting, recipe, minutes, seed, images)
        for model in models
        for setting in settings or (MODELS | JUDGED)[model]
        for recipe in chosen or COMPARED
        if recipe not in BASELINES or SETTINGS[setting][0] in WIDTHS
    ]


def source(model: str) -> str:
    """What a model is compiled from: a bundled one's name, a judge's folder."""
    return str(JUDGES / model) if model in JUDGED else model


def budget_of(model: str, setting: str) -> Budget:
    """What uniform widths in all layers but the ends, which have 8 bits, cost: of stored bytes one in forty more.

    Of bits in which there are no uniform weights bytes are those between the next fewer and more.
    """
    bits, activations = SETTINGS[setting]
    less, more = max(b for b in WIDTHS if b <= bits), min(b for b in WIDTHS if b >= bits)
    sizes = [_uniform(model, f"int{width}", width, 8, costs.stored_bytes) for width in (less, more)]
    size = sizes[0] + (sizes[1] - sizes[0]) * (bits - less) // max(1, more - less)
    average = _uniform(model, f"u{activations}", 8, activations, costs.activation_bits) if activations < 8 else 8.0
    return Budget(int(size * 41 // 40), math.floor(1000 * average) / 1000)


def _uniform(model: str, name: str, weights: int, activations: int, cost: Callable[[Program], float]) -> float:
    """What uniform widths cost, by the name under which that is kept."""
    file = RESULTS / "sizes.json"
    known = read(file)
    if (key := f"{model} {name}") not in known:
        pipeline = UNIFORM.format(w=weights, a=activations, method="nearest")
        lowered = lower.lower(denoiser.load(source(model)), driver_options.Options(pipeline=pipeline, samples=1))
        assert lowered.planned is not None
        known[key] = cost(lowered.planned)
        write(file, known)
    return float(known[key])


def float_strip(model: str) -> Path:
    """`Cell.strip` of the float model."""
    return RESULTS / f"{model}-float.png"


def read(path: Path) -> dict[str, Any]:
    """A result; nothing where there is none."""
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def write(file: Path, value: Any) -> None:
    """As JSON, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_suffix(".part")
    beside.write_text(json.dumps(value) + "\n")
    os.replace(beside, file)
