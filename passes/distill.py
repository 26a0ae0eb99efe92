"""Training against the float model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import ClassVar, Literal, NamedTuple

from mpq_compiler import formats
from mpq_compiler.analysis import trajectory_error
from mpq_compiler.analysis.trajectory_error import TrajectoryError
from mpq_compiler.ir import provenance
from mpq_compiler.ir.blocks import Block
from mpq_compiler.ir.blocks import blocks as blocks_of
from mpq_compiler.ir.program import TIME_GROUPS, Program
from mpq_compiler.pipeline.demand import Asked, Demand
from mpq_compiler.pipeline.passes import Contract, Pass, Role
from mpq_compiler.pipeline.session import Session
from mpq_compiler.training import by_parts, objective, outputs, trainer
from mpq_compiler.training import data as training_data
from mpq_compiler.training import images as whole_images
from mpq_compiler.training.data import Data, affordable, calls, macs_of, part_updates, trajectories
from mpq_compiler.training.relation_loss import Term
from mpq_compiler.training.state import RATES, Stage
from mpq_compiler.training.trainer import TRAINING, Outcome
from mpq_compiler.training.variables import Kind

GIB = 1 << 30
ROWS = 64
"""Calls that a model is trained on part by part, where none are given."""
BATCH, PART = 8, 4
"""Calls in a step of training part by part, and those that a thread runs at a time."""
CHECKS = 4
"""How often the held-out error of a part is measured in a stage."""
IMAGE_CHECKS = 8
"""How often held-out images are drawn in a stage that trains on images."""
LEAST = 16
"""Updates of each part of a model that is too large for as many of the whole."""
FASTER = 3.0
"""The factor of learning rates of frozen codes where updates are few, in parts and by images: the bundled UNet gains
twice as much by it in 16 updates of its parts, and at W4A4 1.3 dB rather than 0.6 in 60 by its images."""


class Shares(NamedTuple):
    """The updates of each phase."""

    weights: int
    """Of the weights themselves."""
    scales: int
    """Of frozen codes, by single calls."""
    images: int
    """Steps by whole images, which take as long as their share of the updates."""
    groups: int
    """Of images that are drawn for these."""


@dataclass(frozen=True)
class Distill(Pass):
    """Trains what is stored against the float model's outputs, on calls that the float model makes when it samples.

    For ``latent`` of the updates that is the weights themselves: float weights behind the quantizer, with
    straight-through gradients (LSQ, arXiv 1902.08153, for any table of levels); not in a program of entropy-coded
    weights, whose codes stay where GPTQ put them. Then the codes are frozen, and scales, offsets, ranges of
    activations, biases, norms and embeddings go on: codes that move to the end leave them mismatched. Errors count by
    what they do to images, which is measured for each time: early ones a hundred times as much as late ones. With
    ``unroll`` a last stage learns whole images, through all steps of the sampler. Of each stage the state with the
    least error on held-out calls, or images, is kept, and only if held-out images are no worse for it.

        %conv_in_w_base = mpq::dequantize_weight(.weight:{base.codes,scale,offset,base.lut}, shape=[32,3,3,3])
        %conv_in        = mpq::conv2d(%permute_default_q, %conv_in_w, .bias:corrected, ...)
      =>
        %conv_in_w_base = mpq::dequantize_weight(.weight:{base.codes,scale. ...,base.lut}, shape=[32,3,3,3])
        %conv_in        = mpq::conv2d(%permute_default_q, %conv_in_w, .bias:corrected. ...)
    """

    contract: ClassVar[Contract] = Contract.SIMULATION
    role: ClassVar[Role | None] = Role.TRAINS
    settings: ClassVar[Mapping[str, str]] = {"minutes": "minutes"}
    capped: ClassVar[frozenset[str]] = frozenset({"steps"})
    efforts: ClassVar[Mapping[str, Mapping[str, object]]] = {
        "none": {"minutes": 0.0},
        "fast": {"minutes": 0.4, "latent": 0.0, "samples": 16, "least": LEAST},
        "balanced": {"minutes": 8.0, "latent": 0.7, "epochs": 12, "least": LEAST},
        "best": {"minutes": 30.0, "latent": 0.7, "epochs": 12, "least": LEAST},
    }
    requires: ClassVar[frozenset[str]] = frozenset({"codes"})
    provides: ClassVar[frozenset[str]] = frozenset({"trained"})

    minutes: float = 2.0
    """Minutes of training on two cores of a server, about: the number of updates follows from the model's size
    alone."""
    updates: int | None = None
    """Updates of the variables, whatever the minutes."""
    latent: float = 0.7
    """Share of the updates in which the weights themselves are trained, where none is entropy-coded."""
    unroll: float = 0.0
    """Share of the updates that go to errors of whole images, behind all others, where they are enough for some: the
    steps of the sampler are unrolled (`training.images`), since errors that add up from step to step cost more than
    those that cancel. An update by 16 images of 10 steps takes as long as seven by calls. ``latent`` is a share of the
    other updates."""
    least: int = 0
    """Updates of a model that is too large for as many in the minutes: it is trained part by part then."""
    memory: float = 2.0
    """GiB that training may take; a model whose variables take more is trained part by part."""
    blocks: bool = False
    """Trains the weights block by block, each against its own output in the float program while those before it are
    quantized already (DilateQuant, arXiv 2409.14307, section 3.4), rather than all against the output."""
    relation: float = 0.0
    """Weight of a loss beside the output's: how pixels of the last block relate to the teacher's pixels of other times
    (MPQ-DMv2, arXiv 2507.04290, which has 0.1)."""
    window: int = 0
    """Steps over which ``relation`` averages features; the last of them is trained, and pixels relate to those of
    their own image (MPQ-DM, arXiv 2412.11549, which has 2). 0: to those of other times. Given calls have no known
    steps: 1 there."""
    adapters: int = 0
    """Rank of the adapters that move the weights, merged into what is quantized (QALoRA of EfficientDM, arXiv
    2310.03270, which has 32). 0: each weight moves by itself."""
    adapters_start: Literal["zero", "svd"] = "zero"
    """Where adapters start, without a change of any code: one factor at zero, so that the other learns nothing at
    first, or both along the leading singular vectors of what the codes err by (MPQ-DMv2's low-rank initialization)."""
    range_network: bool = False
    """Makes scales of activations by small networks of the time, one for each tensor, rather than by tables that learn
    number by number (TDQ, arXiv 2306.02316); the tables of their outputs are stored."""
    rate: float = 1.0
    """Learning rate as a factor of the usual one."""
    samples: int = 64
    """Least number of trajectories to train on, where no calls are given."""
    epochs: int = 32
    """Most times that a call is seen: there are more trajectories where the updates are many. From calls that came
    back a hundred times weights learned what does not hold for others."""
    steps: int = 20
    """Steps of a trajectory."""
    images: int = 32
    """Held-out images that no stage may make worse, by the geometric mean of their errors; 0 draws none."""

    def __post_init__(self) -> None:
        for option in ("minutes", "rate", "relation", "memory"):
            self.require(option, 0)
        self.require("latent", 0, 1)
        self.require("unroll", 0, 1)
        for option in ("samples", "steps", "epochs"):
            self.require(option, 1)
        for option in ("updates", "images", "window", "adapters", "least"):
            self.require(option, 0)

    def demand(self, asked: Asked) -> Demand:
        """The minutes, on two cores, or the updates where so many are asked for, as the least of each part are.

        In memory the variables, or twice the bound where it trains part by part.
        """
        if not (self.minutes if self.updates is None else self.updates):
            return Demand()
        sizes, bound = asked.sizes, self.memory * GIB
        variables = sizes.numbers * (by_parts.LATENT if self.latent and not asked.coded else by_parts.FROZEN)
        shared = min(variables + objective.VALUES * BATCH * sizes.value_bytes, 2 * bound)
        parted, updates = self._parted(sizes.products, variables), self.updates
        if parted and updates is None and part_updates(sizes.products, self.minutes, BATCH, ROWS) < self.least:
            updates = self.least
        if updates is None:
            return Demand(seconds=2 * 60 * self.minutes, shared=shared)
        batch, part = (BATCH, PART) if parted else (training_data.BATCH, trajectory_error.PART)
        return replace(asked.running(3 * batch * updates, part), shared=shared)

    def _parted(self, macs: int, variables: int) -> bool:
        """Whether a program of so many multiply-accumulates, and bytes of variables, is trained part by part."""
        if self.blocks:
            return False
        updates = affordable(macs, self.minutes) if self.updates is None else self.updates
        enough = self.updates is not None or updates >= max(self.least, 1)
        return bool(updates or self.least) and not (variables <= self.memory * GIB and enough)

    def run(self, program: Program, session: Session) -> Program:
        program = program.fork()
        if not (self.minutes if self.updates is None else self.updates):
            return program
        if self.latent and _coded(program):
            return replace(self, latent=0.0).run(program, session)
        macs = macs_of(program)
        if self._parted(macs, by_parts.held(program, self.latent > 0)):
            return self._by_parts(program, session)
        updates = affordable(macs, self.minutes) if self.updates is None else self.updates
        if not updates:
            program.note(f"distill: {self.minutes:g} minutes are not enough for one update of a model of this size")
            return program
        image_error = TrajectoryError.drawn(session, self.images)
        shares = self._shares(updates, session, image_error)
        for note in self._without_effect(program, session, shares, image_error):
            program.note(f"distill: {note}")
        samples = max(self.samples, trajectories(updates, self.epochs, self.steps))
        data, held_out = calls(session, samples, self.steps)

        def judged(trained: Program) -> float | None:
            return image_error.typical_noise(trained) if image_error else None

        images = judged(program)
        if image_error:
            gains = image_error.gains(program)
            data, held_out = data.weighted(gains), held_out.weighted(gains)
        told = []
        for title, phase in self._phases(program, session, shares, image_error):
            trained, outcomes = phase(program, data, held_out)
            found = judged(trained)
            kept = images is None or found is None or found <= images
            stages = [asdict(outcome) for outcome in outcomes]
            told.append(
                {"phase": title, "stages": stages, "images_before": images, "images_after": found, "kept": kept}
            )
            if kept:
                program, images = trained, found
            else:
                program.note(f"distill: training {title} made the held-out images worse and was undone")
            _note_ends(program, outcomes)
        program.facts[TRAINING] = told
        provenance.note(program, provenance.PROGRAM, self.name(), phases=told)
        return program

    def _by_parts(self, program: Program, session: Session) -> Program:
        """Trains a large program part by part, on few calls, and keeps the result if held-out outputs are better."""
        assert session.denoiser is not None
        given = session.calibration is not None
        samples = 1 if given else max(1, ROWS // (self.steps * session.denoiser.calls_per_step))
        data, held_out = (replace(rows, part=PART) for rows in calls(session, samples, self.steps, 1, taught=False))
        updates = self.updates
        if updates is None:
            updates = max(self.least, part_updates(macs_of(program), self.minutes, BATCH, len(data) + len(held_out)))
        latent, memory = round(updates * self.latent), int(self.memory * GIB)
        last = by_parts.cuts(program, latent > 0, BATCH, memory)
        faster = self._rates(FASTER)
        stage = partial(self._stage(program), batch=BATCH, widest=by_parts.widest(memory), checks=CHECKS)

        def stages(number: int, part: Program) -> list[Stage]:
            title = f"part {number + 1} of {len(last)}"
            weights = [stage(title, True, latent)] if latent else []
            scales = [stage(title, False, updates - latent, rates=faster)] if updates > latent else []
            return weights + scales

        if self.relation:
            program.note("distill: relation had no effect: parts learn their own outputs")
        before = outputs.noise(program, {}, {}, held_out, session)
        trained, outcomes = by_parts.train_parts(program, last, stages, data, held_out, session, session.seed)
        _note_ends(trained, outcomes)
        after = outputs.noise(trained, {}, {}, held_out, session)
        told = {"phase": "parts", "stages": [asdict(outcome) for outcome in outcomes], "images_before": None,
                "images_after": None, "kept": after <= before}  # fmt: skip
        if after > before:
            program.note("distill: training part by part made the held-out outputs worse and was undone")
        else:
            program = trained
        program.facts[TRAINING] = [told]
        provenance.note(program, provenance.PROGRAM, self.name(), phases=[told])
        return program

    def _related(self, program: Program, session: Session) -> Block | None:
        """The block whose features the relation loss compares: the last repeated one; None where no block repeats."""
        assert session.denoiser is not None
        found = [b for b in blocks_of(session.denoiser.module.model, program) if b.repeated]
        return found[-1] if found else None

    def _without_effect(
        self, program: Program, session: Session, shares: Shares, images: TrajectoryError | None
    ) -> Iterator[str]:
        """Sentences on options that have no effect."""
        if self.unroll and session.calibration is not None:
            yield "unroll had no effect: it would draw images, and training is on the calls that were given"
        elif self.unroll and images is None:
            yield "unroll had no effect: no images are held out (images), or their conditions cannot be made here"
        for option in ("adapters", "blocks"):
            if getattr(self, option) and not shares.weights:
                why = "entropy-coded weights keep their codes" if _coded(program) else "latent"
                yield f"{option} had no effect: no update is of the weights themselves ({why})"
        if self.adapters_start != "zero" and not self.adapters:
            yield "adapters_start had no effect: each weight moves by itself (adapters)"
        if self.window and not self.relation:
            yield "window had no effect: no relation is learned, of whose features it is the mean (relation)"
        if self.relation and self._related(program, session) is None:
            yield "relation had no effect: no block is one of several of a kind, whose last one's features it compares"
        elif self.relation and self.blocks and not (shares.scales or shares.images):
            yield "relation had no effect: blocks learn their own outputs, and nothing is trained after them (latent)"
        if self.range_network and all(plan.scale is None for plan in program.activations.values()):
            yield "range_network had no effect: no activation has a stored scale"
        elif self.range_network and not len(program.facts[TIME_GROUPS]):
            yield "range_network had no effect: of one time group each network would make one number"

    def _rates(self, factor: float = 1.0) -> dict[Kind, float]:
        return {kind: rate * self.rate * factor for kind, rate in RATES.items()}

    def _stage(self, program: Program) -> Callable[..., Stage]:
        """Makes stages of a name, of weights or not, and of a number of updates, with the options of this pass."""
        network = self.range_network and len(program.facts[TIME_GROUPS]) > 0
        svd = self.adapters_start == "svd"
        return partial(Stage, rates=self._rates(), adapters=self.adapters, svd=svd, range_network=network)

    def _shares(self, updates: int, session: Session, images: TrajectoryError | None) -> Shares:
        """Shares out the updates."""
        unrolled, steps, groups = round(updates * self.unroll), 0, 0
        if images is not None and session.calibration is None:
            assert session.denoiser is not None
            calls = images.steps * session.denoiser.calls_per_step
            steps, groups = whole_images.affordable(unrolled, calls, (IMAGE_CHECKS + 1) * images.count)
        left = updates - (unrolled if steps else 0)
        weights = round(left * self.latent)
        return Shares(weights, left - weights, steps, groups)

    def _phases(
        self,
        program: Program,
        session: Session,
        shares: Shares,
        images: TrajectoryError | None,
    ) -> Iterator[tuple[str, Phase]]:
        """The phases of training in order; a phase is kept or undone as a whole."""
        related = self._related(program, session) if self.relation else None
        term = None if related is None else Term(related.output, self.relation, self.window)
        stage = self._stage(program)

        def blocks(program: Program, data: Data, held_out: Data) -> tuple[Program, list[Outcome]]:
            assert session.denoiser is not None
            found = blocks_of(session.denoiser.module.model, program)
            if self.updates is None:  # the minutes are to be those of the whole program
                minutes = self.minutes * self.latent * (1 - self.unroll)
                rows = len(data) + len(held_out)
                share, more = part_updates(macs_of(program), minutes, training_data.BATCH, rows), 0
            else:
                share, more = divmod(shares.weights, len(found))

            def stages(number: int, part: Program) -> list[Stage]:
                return [stage(found[number].name, True, max(1, share + (number < more)))]

            last = [block.output for block in found]
            return by_parts.train_parts(program, last, stages, data, held_out, session, session.seed)

        def whole(stage: Stage) -> Phase:
            def phase(program: Program, data: Data, held_out: Data) -> tuple[Program, list[Outcome]]:
                trained, outcome = trainer.train(program, stage, data, held_out, session, session.seed)
                return trained, [outcome]

            return phase

        def by_images(program: Program, data: Data, held_out: Data) -> tuple[Program, list[Outcome]]:
            assert images is not None
            drawn = whole_images.drawn(session, shares.groups)
            taught = stage("images", False, shares.images, rates=self._rates(FASTER), checks=IMAGE_CHECKS)
            trained, outcome = trainer.train_images(program, taught, drawn, images, session)
            return trained, [outcome]

        if shares.weights and self.blocks:
            yield "blocks", blocks
        elif shares.weights:
            yield "weights", whole(stage("weights", True, shares.weights, relation=term))
        if shares.scales:
            yield "scales", whole(stage("scales", False, shares.scales, relation=term))
        if shares.images:
            yield "images", by_images


Phase = Callable[[Program, Data, Data], tuple[Program, list[Outcome]]]
"""Trains a program on calls, and judges it by others."""


def _coded(program: Program) -> bool:
    """Whether weights are entropy-coded."""
    return formats.any_coded(plan.format for plan in program.weights.values())


def _note_ends(program: Program, outcomes: Iterable[Outcome]) -> None:
    for outcome in outcomes:
        if outcome.diverged is not None:
            program.note(
                f"distill: training {outcome.stage} diverged in step {outcome.diverged} of {outcome.steps}; the "
                f"best state until then, that of step {outcome.best_step}, is kept"
            )
