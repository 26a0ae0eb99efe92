"""The temporal relation loss: similarities between pixels of features, which quantization should preserve.

In memory-based temporal relation distillation (MPQ-DMv2, arXiv 2507.04290, after CIRKD, arXiv 2204.06986, section 3.3)
a queue holds the teacher's pixels of earlier steps, by time group. A pixel's similarities to them, as a distribution,
should be the same for teacher and student. The predecessor (MPQ-DM, arXiv 2412.11549, section 3.3) compares a pixel to
the pixels of its own image, in features averaged over a window of steps.

MPQ-DM's own code detaches the student, which leaves no gradient, and its temperature of 1 makes the distributions
nearly uniform. Here gradients reach the student (of a window, in the last step), and the temperature is 0.1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mpq_compiler.ir.blocks import cut
from mpq_compiler.ir.interpreter import run
from mpq_compiler.ir.program import PLANNED, TIME_GROUPS, Program

ENTRIES = 20_000
"""The number of pixels in the queue, over all time groups."""
CONTRASTED = 4096
"""The number of pixels drawn from the queue for a step, equally many from every group."""
ANCHORS = 1024
"""The number of pixels of a batch whose relations are compared."""
PUSHED = 16
"""The number of pixels of an image that enter the queue."""
TEMPERATURE = 0.1
"""The temperature of the softmax over similarities."""


@dataclass(frozen=True)
class Term:
    """A term of the training loss: ``weight`` times the relation loss of the features at ``node``."""

    node: str
    weight: float
    window: int = 0
    """The number of steps whose mean features are compared within an image; 0 compares features to the queue."""


@dataclass
class Memory:
    """The queue: a ring of unit vectors for each time group. Mutable, and deterministic."""

    entries: Tensor
    """The rings, f32 [G, M, C]."""
    filled: Tensor
    """The number of entries in each ring, i64 [G]."""
    place: Tensor
    """The place of the next entry in each ring, i64 [G]."""

    @classmethod
    def empty(cls, groups: int, channels: int) -> Memory:
        """An empty queue for G groups of pixels of C channels."""
        rings = torch.zeros(groups, max(1, ENTRIES // groups), channels)
        return cls(rings, torch.zeros(groups, dtype=torch.long), torch.zeros(groups, dtype=torch.long))

    def push(self, pixels: Tensor, group: int) -> None:
        """Adds pixels [N, C] of a time group; the oldest are evicted first."""
        size = self.entries.shape[1]
        kept = F.normalize(pixels.detach(), dim=1)[-size:]
        at = (self.place[group] + torch.arange(len(kept))) % size
        self.entries[group, at] = kept
        self.place[group] = (self.place[group] + len(kept)) % size
        self.filled[group] = min(size, int(self.filled[group]) + len(kept))

    def draw(self, generator: torch.Generator) -> Tensor:
        """Draws entries [K, C], equally many from every group that has any; K is 0 where the queue is empty."""
        there = [g for g in range(len(self.filled)) if self.filled[g]]
        share = CONTRASTED // max(1, len(there))
        drawn = [
            self.entries[g, torch.randperm(int(self.filled[g]), generator=generator)[:share].sort().values]
            for g in there
        ]
        return torch.cat(drawn) if drawn else self.entries[:0, 0]


@dataclass
class Relations:
    """The relation loss of one training run, with its queue."""

    term: Term
    teacher: Program
    """The float program, cut so that its output is the features."""
    memory: Memory
    places: int
    """The number of pixels of an image."""

    @classmethod
    def start(cls, term: Term, program: Program, inputs: Mapping[str, Tensor]) -> Relations:
        """Starts with an empty queue.

        Args:
            term: the term of the loss.
            program: the fake-quantized program.
            inputs: of any call, to learn the features' shape.
        """
        teacher = cut(program.facts[PLANNED], term.node)
        features = run(teacher, {name: value[:1] for name, value in inputs.items()})
        groups = len(program.facts[TIME_GROUPS]) + 1
        memory = Memory.empty(groups, features.shape[-1])
        return cls(term, teacher, memory, features[0].numel() // features.shape[-1])

    def step(self, images: int, generator: torch.Generator, before: Sequence[Mapping[str, Tensor]] = ()) -> Step:
        """Draws what one step compares.

        Args:
            images: the number of images in the batch.
            generator: source of the randomness.
            before: the inputs of the steps before, for a window.
        """
        count = min(self.places, max(1, ANCHORS // images))
        at = torch.stack([torch.randperm(self.places, generator=generator)[:count] for _ in range(images)])
        return Step(self, self.memory.draw(generator), at, before)


@dataclass
class Step:
    """The comparisons of one step, drawn once for all parts of a batch."""

    relations: Relations
    contrasted: Tensor
    """Entries of the queue, [K, C]."""
    at: Tensor
    """The positions of N pixels of each image, [B, N]."""
    before: Sequence[Mapping[str, Tensor]] = ()
    """The inputs of the steps before, for a window."""

    def loss(
        self,
        features: Tensor,
        inputs: Mapping[str, Tensor],
        rows: slice,
        student: Callable[[dict[str, Tensor]], Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Computes the weighted loss of a part of the batch.

        Args:
            features: the student's, [B, ..., C]; gradients reach them alone.
            inputs: of the part.
            rows: the part's images in the batch.
            student: computes its features for other inputs, over which a window averages.

        Returns:
            The loss, and the teacher's pixels of these images for the queue.
        """
        at = self.at[rows]
        whole = run(self.relations.teacher, inputs)
        if self.relations.term.window:
            for earlier in ({name: value[rows] for name, value in each.items()} for each in self.before):
                with torch.no_grad():
                    old = student(earlier)
                features, whole = features + old, whole + run(self.relations.teacher, earlier)
            return self.relations.term.weight * own_loss(features, whole, at), pick(whole, at)[:, :0]
        theirs = pick(whole, at)
        found = loss(pick(features, at).flatten(0, 1), theirs.flatten(0, 1), self.contrasted)
        return self.relations.term.weight * found, theirs[:, :PUSHED]

    def push(self, pixels: Tensor, groups: Tensor) -> None:
        """Adds pixels [B, N, C] of calls in these time groups [B] to the queue."""
        for image, group in zip(pixels, groups.tolist(), strict=True):
            self.relations.memory.push(image, group)


def loss(student: Tensor, teacher: Tensor, contrasted: Tensor) -> Tensor:
    """The KL divergence of the student's similarities from the teacher's, a mean over pixels; zero where K is 0.

    Args:
        student: features of N pixels [N, C]; their norms do not matter.
        teacher: features of the same pixels [N, C].
        contrasted: the unit vectors to which similarities are taken, [K, C].
    """
    if not len(contrasted):
        return student.sum() * 0
    return _divergence(*(F.normalize(x, dim=1) @ contrasted.T for x in (student, teacher)))


def own_loss(student: Tensor, teacher: Tensor, at: Tensor) -> Tensor:
    """The KL divergence between similarities of pixels to all pixels of their own image, a mean over pixels.

    Args:
        student: features [B, ..., C].
        teacher: features [B, ..., C].
        at: the positions of the pixels [B, N].
    """
    found = []
    for features in (student, teacher):
        pixels = F.normalize(features.flatten(1, -2), dim=2)
        found.append((pick(pixels, at) @ pixels.mT).flatten(0, 1))
    return _divergence(*found)


def _divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """The KL divergence between softmaxes of similarities [N, K], a mean over rows."""
    ours, theirs = (F.log_softmax(x / TEMPERATURE, 1) for x in (student, teacher))
    return F.kl_div(ours, theirs, reduction="batchmean", log_target=True)


def pick(features: Tensor, at: Tensor) -> Tensor:
    """Picks the pixels [B, N, C] of features [B, ..., C] at positions [B, N]."""
    flat = features.reshape(len(features), -1, features.shape[-1])
    return flat.gather(1, at[..., None].expand(-1, -1, flat.shape[-1]))
