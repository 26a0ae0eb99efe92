"""Trains a bundled denoiser anew, on a CPU: pixel-unshuffled gray images, velocity prediction.

    python benchmarks/train_fashion.py unet fashion-mnist.npz OUT --steps 15000
    python benchmarks/train_fashion.py text fashion-mnist.npz OUT --steps 5500 --learning-rate 1.5e-3
    python benchmarks/train_fashion.py dit fashion-mnist.npz OUT --steps 6500 --learning-rate 1e-3 --ema 0.999

unet: a class-conditional UNet; text: one with cross-attention to short prompts ("dark plain boot"), whose tone and
texture are measured on the images; dit: a class-conditional diffusion transformer. The data are an npz with x_train,
x_test (uint8 [N, 28, 28]) and y_train, y_test (integers 0 to 9 [N]). About 0.3 s a step of 64 images on one core. The
run is resumable: the same command continues from OUT/checkpoint.pt, and ends with the same weights as a run that was
never interrupted, since all randomness is a function of (seed, step). OUT has the layout of diffusers: unet/ or
transformer/ (the moving average of the weights, half precision), scheduler/, harness.json, and for prompts
text/table.safetensors.

Velocity prediction: Salimans and Ho, "Progressive Distillation for Fast Sampling of Diffusion Models"
(arXiv 2202.00512), appendix D. Cosine schedule: Nichol and Dhariwal (arXiv 2102.09672). DiT: Peebles and Xie
(arXiv 2212.09748).
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.nn import functional as F

from mpq_compiler.sampling.schedulers import DDIM
from mpq_compiler.sampling.text_encoder import BOS, EOS, PAD, TextEncoder

CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
NULL_CLASS = len(CLASSES)
SCHEDULER = DDIM(
    beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", timestep_spacing="trailing"
)
UNET = {
    "sample_size": 14,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 1,
    "block_out_channels": (48, 96),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 8,
    "attention_head_dim": 24,
    "num_class_embeds": NULL_CLASS + 1,
}
TEXT_UNET = {
    "sample_size": 14,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 1,
    "block_out_channels": (48, 96),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "norm_num_groups": 8,
    "attention_head_dim": 4,
    "cross_attention_dim": 64,
    "transformer_layers_per_block": 1,
}
DIT = {
    "sample_size": 14,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 6,
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "patch_size": 2,
    "num_embeds_ada_norm": len(CLASSES),  # its table has one row more, the null class
}
MODELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "unet": ("UNet2DModel", UNET, "unet"),
    "text": ("UNet2DConditionModel", TEXT_UNET, "unet"),
    "dit": ("DiTTransformer2DModel", DIT, "transformer"),
}
"""Name -> class of diffusers, configuration, folder in the layout of a pipeline."""
SLOTS = {
    "tone": ("dark", "gray", "bright"),
    "texture": ("plain", "patterned"),
    "class": ("tshirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot"),
}
"""What a prompt consists of; the classes are those of the labels."""
TOKENS, WIDTH = 8, 64
NULL_PROMPT = 60
"""The row of the empty prompt in `prompt_table`."""


def text_encoder() -> TextEncoder:
    """The frozen encoder: random words and positions, and a first token as that of CLIP.

    Two channels of `<bos>` are 20 and -18 where everything else is below 5, and the token is the same for every prompt.
    This is made after MixDQ's description of CLIP's text encoder (arXiv 2405.17873); it did not emerge.
    """
    vocabulary = (BOS, EOS, PAD, *(word for slot in SLOTS.values() for word in slot))
    generator = torch.Generator().manual_seed(0)
    words = torch.randn(len(vocabulary), WIDTH, generator=generator)
    positions = 0.3 * torch.randn(TOKENS, WIDTH, generator=generator)
    words[0] *= 0.5
    words[0, 7], words[0, 41] = 20.0, -18.0
    return TextEncoder(vocabulary, SLOTS, words.numpy(), positions.numpy())


def prompt_table(encoder: TextEncoder) -> torch.Tensor:
    """The embeddings of every prompt, in the order of `prompt_rows`, and of the empty one: float32 [61, 8, 64]."""
    prompts = [" ".join(words) for words in itertools.product(*SLOTS.values())]
    return torch.from_numpy(encoder.encode([*prompts, ""]))


def attributes(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(brightness, roughness) of images [N, 1, 28, 28] in [-1, 1]: the mean over what is not background, and the mean
    size of the Laplacian in its interior; float32 [N]."""
    light = (pixels + 1) / 2
    shape = (light > 0.1).float()
    tone = (light * shape).sum((1, 2, 3)) / shape.sum((1, 2, 3)).clamp(min=1)
    interior = -F.max_pool2d(-shape, 3, 1, 1)
    kernel = torch.tensor([[0.0, -1.0, 0.0], [-1.0, 4.0, -1.0], [0.0, -1.0, 0.0]])[None, None]
    rough = F.conv2d(light, kernel, padding=1).abs() * interior
    return tone, rough.sum((1, 2, 3)) / interior.sum((1, 2, 3)).clamp(min=1)


def prompt_rows(pixels: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The prompt that fits each image, as its row in `prompt_table`: int64 [N].

    Thirds of the brightness of all images are dark, gray and bright; the rougher half of every class is patterned.
    """
    parts = [attributes(part) for part in pixels.split(10_000)]
    tone, rough = (torch.cat(values) for values in zip(*parts, strict=True))
    tones = (tone[:, None] > tone.quantile(torch.tensor([1 / 3, 2 / 3]))).sum(1)
    middle = torch.stack([rough[labels == c].median() if (labels == c).any() else rough.median() for c in range(10)])
    return (tones * 2 + (rough > middle[labels])) * 10 + labels


@dataclass(frozen=True)
class Settings:
    """What a run is determined by, together with the data."""

    model: str = "unet"
    steps: int = 15_000
    batch: int = 64
    learning_rate: float = 2e-3
    warmup: int = 100
    ema: float = 0.9995
    label_dropout: float = 0.1
    """The share of samples trained with the null class, for classifier-free guidance."""
    weight_decay: float = 1e-2
    seed: int = 1


@dataclass(frozen=True)
class Data:
    """The training set: latents float32 [N, 4, 14, 14] in [-1, 1], labels and prompts (rows of the table) int64 [N]."""

    latents: torch.Tensor
    labels: torch.Tensor
    prompts: torch.Tensor

    @classmethod
    def load(cls, path: Path) -> Data:
        try:
            with np.load(path) as file:
                images, labels = file["x_train"], file["y_train"]
        except (OSError, KeyError, ValueError) as error:
            raise SystemExit(f"'{path}' is not an npz with x_train and y_train: {error}") from error
        if images.dtype != np.uint8 or images.shape[1:] != (28, 28) or labels.shape != images.shape[:1]:
            raise SystemExit(f"x_train of '{path}' must be uint8 [N, 28, 28] and y_train integers [N]")
        pixels = torch.from_numpy(images)[:, None].float() / 127.5 - 1
        classes = torch.from_numpy(labels.astype(np.int64))
        return cls(F.pixel_unshuffle(pixels, 2), classes, prompt_rows(pixels, classes))


class Trainer:
    """The model, its moving average and the optimizer; `step` is the number of steps done."""

    def __init__(self, settings: Settings, data: Data) -> None:
        if len(data.labels) < settings.batch:
            raise SystemExit(f"{len(data.labels)} training images are fewer than a batch of {settings.batch}")
        self.settings, self.data, self.step = settings, data, 0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            class_name, config, _ = MODELS[settings.model]
            model: Any = getattr(diffusers, class_name)(**config)
        # No layer but DiT's label dropout differs in training mode; labels are dropped here, for all models alike.
        self.model: torch.nn.Module = model.eval()
        self.average: Any = copy.deepcopy(self.model).eval().requires_grad_(False)
        parameters = list(self.model.parameters())
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in parameters if p.ndim > 1], "weight_decay": settings.weight_decay},
                {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
            ],
            lr=settings.learning_rate,
            betas=(0.9, 0.99),
        )
        self.alphas = torch.from_numpy(SCHEDULER.alphas_cumprod).float()
        self.encoder = text_encoder()
        self.table = prompt_table(self.encoder)

    def generator(self, *keys: int) -> torch.Generator:
        """Randomness that is a function of the seed and `keys` only."""
        state = np.random.SeedSequence([self.settings.seed, *keys]).generate_state(1, np.uint64)
        return torch.Generator().manual_seed(int(state[0]))

    def rows(self) -> torch.Tensor:
        """The samples of this step's batch: every epoch is a permutation of the data."""
        per_epoch = len(self.data.labels) // self.settings.batch
        epoch, position = divmod(self.step, per_epoch)
        order = torch.randperm(len(self.data.labels), generator=self.generator(0, epoch))
        return order[position * self.settings.batch : (position + 1) * self.settings.batch]

    def conditions(self, rows: torch.Tensor, dropped: torch.Tensor) -> dict[str, torch.Tensor]:
        """The classes or prompts of samples `rows`, the null class or the empty prompt where they are `dropped`."""
        if self.settings.model == "text":
            prompts = torch.where(dropped, NULL_PROMPT, self.data.prompts[rows])
            return {"encoder_hidden_states": self.table[prompts]}
        return {"class_labels": torch.where(dropped, NULL_CLASS, self.data.labels[rows])}

    def loss(self) -> torch.Tensor:
        """The mean squared error of the predicted velocity on this step's batch."""
        generator, batch = self.generator(1, self.step), self.settings.batch
        rows = self.rows()
        latents = self.data.latents[rows]
        noise = torch.randn(latents.shape, generator=generator)
        # One timestep from each of `batch` equal parts of the range: less variance than independent ones.
        count = len(self.alphas)
        timesteps = ((torch.arange(batch) + torch.rand(1, generator=generator)) * count / batch).long()
        timesteps = timesteps.clamp(max=count - 1)
        dropped = torch.rand(batch, generator=generator) < self.settings.label_dropout
        signal = self.alphas[timesteps].sqrt()[:, None, None, None]
        sigma = (1 - self.alphas[timesteps]).sqrt()[:, None, None, None]
        velocity = self.model(
            signal * latents + sigma * noise,
            timestep=timesteps,
            **self.conditions(rows, dropped),
        ).sample
        return F.mse_loss(velocity, signal * noise - sigma * latents)

    def advance(self) -> float:
        """One step of training; the loss."""
        settings = self.settings
        warm = min(1.0, (self.step + 1) / settings.warmup)
        cosine = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * self.step / settings.steps))
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate * warm * cosine
        loss = self.loss()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        decay = min(settings.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for mean, value in zip(self.average.parameters(), self.model.parameters(), strict=True):
                mean.lerp_(value, 1 - decay)
        self.step += 1
        return loss.item()

    def save_checkpoint(self, path: Path) -> None:
        """Writes everything that a resumed run needs, whole or not at all."""
        beside = path.with_suffix(".part")
        state = {
            "settings": asdict(self.settings),
            "step": self.step,
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        torch.save(state, beside)
        os.replace(beside, path)

    def resume(self, path: Path) -> None:
        """Continues from a checkpoint of the same settings."""
        state = torch.load(path, weights_only=True)
        if state["settings"] != asdict(self.settings):
            changed = sorted(k for k, v in asdict(self.settings).items() if state["settings"].get(k) != v)
            raise SystemExit(f"'{path}' is of a run with another {', '.join(changed)}; name another folder")
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]

    def export(self, folder: Path) -> None:
        """Writes the averaged model in diffusers' layout, in half precision."""
        part = MODELS[self.settings.model][2]
        copy.deepcopy(self.average).half().save_pretrained(folder / part, variant="fp16")
        (folder / "scheduler").mkdir(exist_ok=True)
        harness: dict[str, Any] = {"codec": "pixel_unshuffle2", "training": asdict(self.settings)}
        if self.settings.model == "text":
            tables = folder / "text" / "table.safetensors"
            tables.parent.mkdir(exist_ok=True)
            self.encoder.save(tables)
            harness |= {"tokens": TOKENS, "text": {"tables": "text/table.safetensors", **self.encoder.to_json()}}
        else:
            harness |= {"null_class": NULL_CLASS, "class_names": list(CLASSES)}
        for path, value in (
            (folder / "scheduler" / "scheduler_config.json", SCHEDULER.to_config()),
            (folder / "harness.json", harness),
        ):
            path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def train(
    settings: Settings, data: Data, folder: Path, save_every: int = 500, until: int | None = None
) -> Trainer:
    """Trains to `settings.steps` (or pauses at step `until`), resuming what `folder` holds, and exports."""
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / "checkpoint.pt"
    trainer = Trainer(settings, data)
    if checkpoint.exists():
        trainer.resume(checkpoint)
    last = min(settings.steps, until or settings.steps)
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
        TimeRemainingColumn(),
    )
    mean = math.nan
    with Progress(*columns) as progress:
        task = progress.add_task("training", total=settings.steps, completed=trainer.step, loss=mean)
        while trainer.step < last:
            loss = trainer.advance()
            mean = loss if math.isnan(mean) else 0.99 * mean + 0.01 * loss
            progress.update(task, completed=trainer.step, loss=mean)
            if trainer.step % save_every == 0:
                trainer.save_checkpoint(checkpoint)
    trainer.save_checkpoint(checkpoint)
    if trainer.step == settings.steps:
        trainer.export(folder)
    return trainer


def main() -> None:
    defaults = Settings()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", choices=MODELS, help="what to train")
    parser.add_argument("data", type=Path, help="npz with x_train, y_train")
    parser.add_argument("out", type=Path, help="folder of the trained model and its checkpoint")
    for name, value in asdict(defaults).items():
        if name == "model":
            continue
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=type(value), default=value, help="default: %(default)s"
        )
    parser.add_argument(
        "--save-every", type=int, default=500, help="steps between checkpoints (default: %(default)s)"
    )
    parser.add_argument("--threads", type=int, default=1, help="default: %(default)s")
    options = vars(parser.parse_args())
    torch.set_num_threads(options.pop("threads"))
    data, out, save_every = options.pop("data"), options.pop("out"), options.pop("save_every")
    train(Settings(**options), Data.load(data), out, save_every)
    print(f"the model is in {out}")


if __name__ == "__main__":
    main()
