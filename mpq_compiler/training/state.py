"""The state of a training run, saved to disk so that another process can resume it."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mpq_compiler.ir import ops
from mpq_compiler.ir.program import PLANNED, TIME_GROUPS, Program
from mpq_compiler.pipeline.session import Session
from mpq_compiler.quantization import kept_files
from mpq_compiler.quantization.statistics import arithmetic
from mpq_compiler.support import cache
from mpq_compiler.training.data import BATCH, Data
from mpq_compiler.training.relation_loss import Term
from mpq_compiler.training.variables import Kind, Variable

RATES: Mapping[Kind, float] = {
    Kind.LATENT: 1.5e-3,
    Kind.SCALE: 7.5e-4,
    Kind.OFFSET: 7.5e-4,
    Kind.RANGE: 7.5e-4,
    Kind.ZERO: 1.5e-3,
    Kind.FLOAT: 7.5e-4,
}
"""The initial learning rates, in units of theta (`student`); they fall to zero along a cosine."""

CHECKS = 16
"""How often in a stage the held-out error is measured and the state saved, unless the stage says otherwise."""


@dataclass(frozen=True)
class Stage:
    """A stage of training: which variables are trained, how, and for how many steps."""

    name: str
    latent: bool
    """Whether latent weights are trained, and with them the codes; else the codes are frozen."""
    steps: int
    rates: Mapping[Kind, float] = field(default_factory=lambda: dict(RATES))
    """The learning rate of each kind of variable."""
    relation: Term | None = None
    """A term of the loss on features, beside the loss on the output (`relation_loss`)."""
    adapters: int = 0
    """The rank of the adapters that move latent weights (`variables.Adapted`); 0 moves each weight by itself."""
    svd: bool = False
    """Whether adapters start along the error of the codes, rather than at zero."""
    range_network: bool = False
    """Whether networks produce the scales of activations (`variables.Timed`); else each moves by itself."""
    batch: int = BATCH
    """Calls in a step."""
    widest: int | None = None
    """The most numbers of a weight that is trained itself; a wider one is moved by adapters of rank `RANK`. None trains
    all themselves."""
    checks: int = CHECKS
    """How often the held-out error is measured and the state saved."""


@dataclass
class State:
    """The state of a stage: thetas, the moments of Adam, and the best thetas so far."""

    thetas: dict[str, Tensor]
    first: dict[str, Tensor]
    """Adam's first moments."""
    second: dict[str, Tensor]
    """Adam's second moments."""
    best: dict[str, Tensor]
    """The thetas of least held-out error so far."""
    memory: dict[str, Tensor] = field(default_factory=dict)
    """The parts of a `relation_loss.Memory`, where there is one."""
    step: int = 0
    usual: float = 0.0
    """A running mean of the gradient's norm."""
    before: float = math.inf
    """The held-out error at the start."""
    least: float = math.inf
    """The held-out error of `best`."""
    best_step: int = 0
    diverged: int | None = None
    """The step at which training gave up; None where it did not."""

    @classmethod
    def start(cls, trained: Mapping[str, Variable]) -> State:
        """The state before the first step."""
        zeros = {name: variable.zeros() for name, variable in trained.items()}
        return cls(dict(zeros), dict(zeros), dict(zeros), zeros)


def key(
    program: Program, trained: Mapping[str, Variable], stage: Stage, seed: int, *calls: Data | str
) -> str:
    """The cache key of a stage: a digest of everything that its outcome depends on.

    Args:
        program: the program to train.
        trained: its variables by store name.
        stage: the stage.
        seed: of the run.
        calls: those to train on and to judge by, or digests of what they follow from.
    """
    read = {str(n.target) for n in program.graph.nodes if n.op == "get_attr"}
    text = "\n".join(f"{n.name} {ops.name_of(n.target)} {n.args} {n.kwargs}" for n in program.graph.nodes)
    latents = {name: v.start for name, v in trained.items() if v.kind == Kind.LATENT}
    times = program.facts[TIME_GROUPS] if stage.relation else ""  # by which it keeps what other steps had
    kinds = [(name, type(v).__name__, v.kind, v.dtype, v.most, v.together) for name, v in trained.items()]
    versions = f"4 {seed} {stage}{times} {kinds} {arithmetic()}"
    if stage.relation is not None:  # whose teacher is the float program
        read |= {str(n.target) for n in program.facts[PLANNED].graph.nodes if n.op == "get_attr"}
    tensors = program.tensors.content(read)
    return cache.digest(
        versions,
        text,
        tensors,
        latents,
        *(c if isinstance(c, str) else c.tensors() for c in calls),
    )


class Kept:
    """The saved state of one stage, a file of the cache."""

    PARTS = ("thetas", "first", "second", "best", "memory")
    FACTS = ("step", "usual", "before", "least", "best_step", "diverged")

    def __init__(self, key: str, session: Session) -> None:
        self.path = cache.folder(session.cache) / "training" / key

    def load(self) -> State | None:
        """The saved state; None where there is none that can be read."""
        try:
            tensors, text = kept_files.tensors_of(self.path)
        except FileNotFoundError:
            return None
        found: dict[str, dict[str, Tensor]] = {part: {} for part in self.PARTS}
        for name, tensor in tensors.items():
            part, _, of = name.partition("/")
            found[part][of] = tensor
        parts = (found["thetas"], found["first"], found["second"], found["best"], found["memory"])
        return State(*parts, **json.loads(text))

    def save(self, state: State) -> None:
        """Writes the state, whole or not at all."""
        tensors = {f"{part}/{name}": t for part in self.PARTS for name, t in getattr(state, part).items()}
        copies = {n: t.clone(memory_format=torch.contiguous_format) for n, t in tensors.items()}  # none is there twice
        kept_files.write(self.path, copies, json.dumps({name: getattr(state, name) for name in self.FACTS}))
