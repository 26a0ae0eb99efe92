"""Distills the bundled prompted denoiser into one that draws in a few steps, for which MixDQ was made.

    python -m benchmarks.train_student fashion-mnist.npz OUT --steps 1200

Progressive distillation: a student in N steps learns to arrive in one where its teacher arrives in several, from noised
images of the data: first from the bundled model, then from the student in twice as many steps. OUT/8, OUT/4, OUT/2 and
OUT/1 are the students in so many steps, each a model as `benchmarks.train_denoisers` writes it, resumable as there;
they are sampled with DDIM in their number of steps. About 0.6 s an update of the first student on one core, and 0.4 s
of the others.

Source: Salimans and Ho, "Progressive Distillation for Fast Sampling of Diffusion Models" (arXiv 2202.00512), algorithm
2, with the loss of the velocity, which weighs the image by SNR + 1 (section 4).
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch.nn import functional as F

from benchmarks.train_denoisers import CHECKPOINT, MODELS, Data, Settings, Trainer, run
from mpq_compiler.frontend import checkpoint

MODEL, TEACHER = "text", "fashion-text"
STAGES = ((8, 5), (4, 2), (2, 2), (1, 2))
"""The steps of each student, and in how many its teacher goes the way of one."""


@dataclass
class Step:
    """A step of DDIM from a timestep to an earlier one, of samples that are at different ones."""

    signal: torch.Tensor
    noise: torch.Tensor
    next_signal: torch.Tensor
    next_noise: torch.Tensor

    @classmethod
    def between(cls, alphas: torch.Tensor, timesteps: torch.Tensor, earlier: torch.Tensor) -> Step:
        """The step between timesteps int64 [B]; the earlier one is -1 where it ends in the image."""
        bars = torch.cat([alphas, alphas.new_ones(1)])  # the last one, at -1, has no noise
        found = (bars[timesteps], bars[earlier])
        parts = [part[:, None, None, None].sqrt() for bar in found for part in (bar, 1 - bar)]
        return cls(*parts)

    def taken(self, x: torch.Tensor, velocity: torch.Tensor) -> torch.Tensor:
        """Where the sampler arrives from latents by a predicted velocity; it clips the image to [-1, 1]."""
        image = (self.signal * x - self.noise * velocity).clamp(-1, 1)
        return self.next_signal * image + self.next_noise * (self.signal * velocity + self.noise * x)

    def leading_to(self, arrived: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The velocity by which a step without clipping arrives there."""
        ratio = self.next_noise / self.noise
        image = (arrived - ratio * x) / (self.next_signal - ratio * self.signal)
        return (self.signal * x - image) / self.noise


class Distiller(Trainer):
    """The student in so many steps, which begins as its teacher."""

    def __init__(self, settings: Settings, data: Data, teacher: torch.nn.Module, steps: int, apart: int) -> None:
        super().__init__(settings, data)
        self.steps, self.apart = steps, apart
        self.teacher: Any = copy.deepcopy(teacher).eval().requires_grad_(False)
        for model in (self.model, self.average):
            model.load_state_dict(teacher.state_dict())

    def loss(self) -> torch.Tensor:
        """The mean squared error of the predicted velocity to that which arrives where the teacher does."""
        generator, batch = self.generator(1, self.step), self.settings.batch
        rows = self.rows()
        latents, count = self.latents[rows], len(self.alphas)
        length = count // self.steps
        noise = torch.randn(latents.shape, generator=generator)
        order = torch.randperm(batch, generator=generator)
        begin = count - 1 - length * (torch.arange(batch) % self.steps)[order]
        dropped = torch.rand(batch, generator=generator) < self.settings.label_dropout
        conditions = self.conditions(rows, dropped)
        bar = self.alphas[begin][:, None, None, None]
        x = bar.sqrt() * latents + (1 - bar).sqrt() * noise
        with torch.no_grad():
            arrived, at = x, begin
            for _ in range(self.apart):
                part = Step.between(self.alphas, at, at - length // self.apart)
                arrived = part.taken(arrived, self.teacher(arrived, timestep=at, **conditions).sample)
                at = at - length // self.apart
            target = Step.between(self.alphas, begin, begin - length).leading_to(arrived, x)
        return F.mse_loss(self.model(x, timestep=begin, **conditions).sample, target)


def teacher() -> torch.nn.Module:
    """The bundled model."""
    kind = MODELS[MODEL]
    source, model = checkpoint.bundled()[TEACHER] / kind.part, getattr(diffusers, kind.class_name)
    made: torch.nn.Module = model.from_pretrained(source, variant="fp16", torch_dtype=torch.float32)
    return made


def distill(settings: Settings, data: Data, folder: Path, save_every: int = 500) -> None:
    """Distills all students, resuming what the folder holds."""
    model = teacher()
    for steps, apart in STAGES:
        model = run(Distiller(settings, data, model, steps, apart), folder / str(steps), save_every).average


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("data", type=Path, help="npz with x_train, y_train")
    parser.add_argument("out", type=Path, help=f"folder of the students, each with its {CHECKPOINT}")
    parser.add_argument("--steps", type=int, default=1200, help="updates of each student (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=5e-4, help="default: %(default)s")
    parser.add_argument("--save-every", type=int, default=200, help="updates between checkpoints")
    options = parser.parse_args()
    torch.set_num_threads(1)
    settings = Settings(MODEL, options.steps, learning_rate=options.learning_rate, ema=0.995)
    distill(settings, Data.load(options.data, MODEL), options.out, options.save_every)
    print(f"the students are in {options.out}")


if __name__ == "__main__":
    main()
