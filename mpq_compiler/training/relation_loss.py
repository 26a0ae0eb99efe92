"""Relations between pixels of features, across time: what quantization should keep beside the features themselves.

Memory-based temporal relation distillation (MPQ-DMv2, arXiv 2507.04290, after CIRKD, arXiv 2204.06986, section 3.3): a
queue holds the teacher's pixels of earlier steps, by time group; a pixel's similarities to them, as a distribution,
should be the same for teacher and student. Its predecessor (MPQ-DM, arXiv 2412.11549, section 3.3) compares a pixel to
those of its own image, features being a mean over a window of steps. MPQ-DM's own code detaches the student, which
leaves no gradient, and its temperature of 1 makes the distributions nearly uniform: here the student is live (of a
window in the last step) and the temperature 0.1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mpq_compiler.ir.blocks import cut
from mpq_compiler.ir.interpreter import run
from mpq_compiler.ir.program import Program

ENTRIES = 20_000
"""Pixels in the queue, of all time groups together."""
CONTRASTED = 4096
"""Of them drawn for a step, of every group alike."""
ANCHORS = 1024
"""Pixels of a batch whose relations are compared."""
PUSHED = 16
"""Pixels of an image that enter the queue."""
TEMPERATURE = 0.1


@dataclass(frozen=True)
class Term:
    """The loss beside the output's: ``weight`` times that of the features at ``node``."""

    node: str
    weight: float
    window: int = 0
    """Steps whose mean features relate to themselves; 0: features of a step relate to the queue."""


@dataclass
class Memory:
    """Rings of unit vectors by time group; mutable, and deterministic."""

    entries: Tensor
    """f32 [G, M, C]"""
    filled: Tensor
    """i64 [G]: how many of the M are there."""
    place: Tensor
    """i64 [G]: where the next goes."""

    @classmethod
    def empty(cls, groups: int, channels: int) -> Memory:
        rings = torch.zeros(groups, max(1, ENTRIES // groups), channels)
        return cls(rings, torch.zeros(groups, dtype=torch.long), torch.zeros(groups, dtype=torch.long))

    def push(self, pixels: Tensor, group: int) -> None:
        """Adds pixels [N, C] of a time group, the oldest going first."""
        size = self.entries.shape[1]
        kept = F.normalize(pixels.detach(), dim=1)[-size:]
        at = (self.place[group] + torch.arange(len(kept))) % size
        self.entries[group, at] = kept
        self.place[group] = (self.place[group] + len(kept)) % size
        self.filled[group] = min(size, int(self.filled[group]) + len(kept))

    def draw(self, generator: torch.Generator) -> Tensor:
        """Entries [K, C], as many of every group that has any; none where the queue is empty."""
        there = [g for g in range(len(self.filled)) if self.filled[g]]
        share = CONTRASTED // max(1, len(there))
        drawn = [
            self.entries[g, torch.randperm(int(self.filled[g]), generator=generator)[:share].sort().values]
            for g in there
        ]
        return torch.cat(drawn) if drawn else self.entries[:0, 0]


@dataclass
class Relations:
    """The loss of one training: what it compares in a step, and the queue that it keeps."""

    term: Term
    teacher: Program
    """The float program, its output the features."""
    memory: Memory
    places: int
    """Pixels of an image."""

    @classmethod
    def start(cls, term: Term, program: Program, inputs: Mapping[str, Tensor]) -> Relations:
        """program: fake-quantized. inputs: of any call."""
        teacher = cut(program.facts["planned"], term.node)
        features = run(teacher, {name: value[:1] for name, value in inputs.items()})
        groups = len(program.facts["time-groups"]) + 1
        memory = Memory.empty(groups, features.shape[-1])
        return cls(term, teacher, memory, features[0].numel() // features.shape[-1])

    def step(self, images: int, generator: torch.Generator, before: Sequence[Mapping[str, Tensor]] = ()) -> Step:
        """What a step with so many images compares; ``before``: inputs of the steps before, of a window."""
        count = min(self.places, max(1, ANCHORS // images))
        at = torch.stack([torch.randperm(self.places, generator=generator)[:count] for _ in range(images)])
        return Step(self, self.memory.draw(generator), at, before)


@dataclass
class Step:
    """Entries of the queue [K, C], and positions of pixels [B, N]: drawn once for all parts of a batch."""

    relations: Relations
    contrasted: Tensor
    at: Tensor
    before: Sequence[Mapping[str, Tensor]] = ()
    """Of a window: the inputs of the steps before."""

    def loss(
        self,
        features: Tensor,
        inputs: Mapping[str, Tensor],
        rows: slice,
        student: Callable[[dict[str, Tensor]], Tensor],
    ) -> tuple[Tensor, Tensor]:
        """(the weighted loss of the images in ``rows`` of the batch, teacher's pixels of theirs for the queue).

        student: its features for other inputs, of which a window holds the mean; gradients reach ``features`` alone.
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
        """Adds pixels [B, N, C] of calls of these time groups [B] to the queue."""
        for image, group in zip(pixels, groups.tolist(), strict=True):
            self.relations.memory.push(image, group)


def loss(student: Tensor, teacher: Tensor, contrasted: Tensor) -> Tensor:
    """KL divergence of the student's similarities to ``contrasted`` [K, C] from the teacher's, a mean over pixels.

    student, teacher: features [N, C] of the same pixels; their norms do not matter. Zero where K is 0.
    """
    if not len(contrasted):
        return student.sum() * 0
    return _divergence(*(F.normalize(x, dim=1) @ contrasted.T for x in (student, teacher)))


def own_loss(student: Tensor, teacher: Tensor, at: Tensor) -> Tensor:
    """The same of the similarities of the pixels at positions [B, N] to all pixels of their own image.

    student, teacher: features [B, ..., C]
    """
    found = []
    for features in (student, teacher):
        pixels = F.normalize(features.flatten(1, -2), dim=2)
        found.append((pick(pixels, at) @ pixels.mT).flatten(0, 1))
    return _divergence(*found)


def _divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL divergence between softmaxes of similarities [N, K], a mean over rows."""
    ours, theirs = (F.log_softmax(x / TEMPERATURE, 1) for x in (student, teacher))
    return F.kl_div(ours, theirs, reduction="batchmean", log_target=True)


def pick(features: Tensor, at: Tensor) -> Tensor:
    """The pixels [B, N, C] of features [B, ..., C] at positions [B, N]."""
    flat = features.reshape(len(features), -1, features.shape[-1])
    return flat.gather(1, at[..., None].expand(-1, -1, flat.shape[-1]))
