"""Trains a class-conditional or prompted denoiser: the bundled ones of clothes, and those of emoji that judge recipes.

    python -m benchmarks.train_denoisers unet fashion-mnist.npz OUT --steps 15000
    python -m benchmarks.train_denoisers text fashion-mnist.npz OUT --steps 5500 --learning-rate 1.5e-3
    python -m benchmarks.train_denoisers dit fashion-mnist.npz OUT --steps 6500 --learning-rate 1e-3 --ema 0.999
    python -m benchmarks.train_denoisers emoji-unet emoji.npz OUT --device cuda      # of benchmarks/emoji_classes.py
    python -m benchmarks.train_denoisers emoji-dit emoji.npz OUT --device cuda --learning-rate 1e-3

unet: a class-conditional UNet; text: one with cross-attention to short prompts ("dark plain boot"), whose tone and
texture are measured on the images; dit: a class-conditional diffusion transformer; emoji-unet and emoji-dit: others of
both kinds, in colour, which no recipe was developed on. All work on pixel-unshuffled images and predict velocity. The
data are an npz with x_train, x_test (uint8 [N, 28, 28], or [N, 32, 32, 3] of emoji) and y_train, y_test (the classes'
integers [N]). About 0.3 s a step of 64 images of clothes on one core. The run is resumable: the same command continues
from OUT/checkpoint.pt, and ends with the same weights as a run that was never interrupted, since all randomness is a
function of (seed, step). OUT has the layout of diffusers: unet/ or transformer/ (the moving average of the weights,
half precision), scheduler/, harness.json, and for prompts text/table.safetensors.

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
CATEGORIES = (
    "Activities", "Animals & Nature", "Flags", "Food & Drink", "Objects", "People & Body", "Smileys & Emotion",
    "Symbols", "Travel & Places",
)  # fmt: skip
"""The classes of clothes and of emoji; the number of classes is the null class."""
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
    "num_class_embeds": len(CLASSES) + 1,
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
EMOJI_UNET = {
    "sample_size": 16,
    "in_channels": 12,
    "out_channels": 12,
    "layers_per_block": 1,
    "block_out_channels": (48, 96, 128),
    "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "norm_num_groups": 16,
    "attention_head_dim": 32,
    "resnet_time_scale_shift": "scale_shift",
    "num_class_embeds": len(CATEGORIES) + 1,
}
EMOJI_DIT = {
    "sample_size": 16,
    "in_channels": 12,
    "out_channels": 12,
    "num_layers": 7,
    "num_attention_heads": 5,
    "attention_head_dim": 32,
    "patch_size": 2,
    "num_embeds_ada_norm": len(CATEGORIES),
}
EMOJI_FEATURES = "emoji-classifier.safetensors"


@dataclass(frozen=True)
class Kind:
    """What is trained: a model of diffusers, where it lies in a pipeline, and what it draws."""

    class_name: str
    config: dict[str, Any]
    part: str
    classes: tuple[str, ...] = CLASSES
    image: tuple[int, ...] = (28, 28)
    """The shape of an image as the data have it."""
    features: str = "fashion-classifier.safetensors"
    """The feature extractor for what it draws, which lies beside OUT (benchmarks/train_features.py)."""


MODELS = {
    "unet": Kind("UNet2DModel", UNET, "unet"),
    "text": Kind("UNet2DConditionModel", TEXT_UNET, "unet"),
    "dit": Kind("DiTTransformer2DModel", DIT, "transformer"),
    "emoji-unet": Kind("UNet2DModel", EMOJI_UNET, "unet", CATEGORIES, (32, 32, 3), EMOJI_FEATURES),
    "emoji-dit": Kind("DiTTransformer2DModel", EMOJI_DIT, "transformer", CATEGORIES, (32, 32, 3), EMOJI_FEATURES),
}
SLOTS = {
    "tone": ("dark", "gray", "bright"),
    "texture": ("plain", "patterned"),
    "class": ("tshirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot"),
}
"""What a prompt consists of; the classes are those of the labels."""
CHECKPOINT = "checkpoint.pt"
SHOWN = 20
"""Steps between two losses that are shown."""
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
    """The training set: latents float32 [N, C, h, w] in [-1, 1], labels int64 [N]."""

    latents: torch.Tensor
    labels: torch.Tensor

    @classmethod
    def load(cls, path: Path, model: str = "unet") -> Data:
        """Reads what a model is trained on. SystemExit: it is no such file."""
        kind = MODELS[model]
        try:
            with np.load(path) as file:
                images, labels = file["x_train"], file["y_train"]
        except (OSError, KeyError, ValueError) as error:
            raise SystemExit(f"'{path}' is not an npz with x_train and y_train: {error}") from error
        if images.dtype != np.uint8 or images.shape[1:] != kind.image or labels.shape != images.shape[:1]:
            shape = ", ".join(map(str, ("N", *kind.image)))
            raise SystemExit(f"x_train of '{path}' must be uint8 [{shape}] and y_train integers [N] for {model}")
        if len(labels) and not 0 <= labels.min() <= labels.max() < len(kind.classes):
            raise SystemExit(f"y_train of '{path}' must be classes 0 to {len(kind.classes) - 1} for {model}")
        pixels = torch.from_numpy(images)
        pixels = (pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)).float() / 127.5 - 1
        return cls(F.pixel_unshuffle(pixels, 2), torch.from_numpy(labels.astype(np.int64)))

    def prompts(self) -> torch.Tensor:
        """The prompts that fit the images, as rows of `prompt_table`: int64 [N]."""
        return prompt_rows(F.pixel_shuffle(self.latents, 2), self.labels)


class Trainer:
    """The model, its moving average and the optimizer; `step` is the number of steps done."""

    def __init__(self, settings: Settings, data: Data, device: str = "cpu") -> None:
        if len(data.labels) < settings.batch:
            raise SystemExit(f"{len(data.labels)} training images are fewer than a batch of {settings.batch}")
        self.settings, self.step = settings, 0
        self.kind, self.device = MODELS[settings.model], device
        self.latents, self.labels = data.latents.to(device), data.labels.to(device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            model: Any = getattr(diffusers, self.kind.class_name)(**self.kind.config)
        # No layer but DiT's label dropout differs in training mode; labels are dropped here, for all models alike.
        self.model: torch.nn.Module = model.eval().to(device)
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
        self.alphas = torch.from_numpy(SCHEDULER.alphas_cumprod).float().to(device)
        if settings.model == "text":
            self.encoder = text_encoder()
            self.table, self.prompts = prompt_table(self.encoder).to(device), data.prompts().to(device)

    def generator(self, *keys: int) -> torch.Generator:
        """Randomness that is a function of the seed and `keys` only."""
        state = np.random.SeedSequence([self.settings.seed, *keys]).generate_state(1, np.uint64)
        return torch.Generator().manual_seed(int(state[0]))

    def rows(self) -> torch.Tensor:
        """The samples of this step's batch: every epoch is a permutation of the data."""
        per_epoch = len(self.labels) // self.settings.batch
        epoch, position = divmod(self.step, per_epoch)
        order = torch.randperm(len(self.labels), generator=self.generator(0, epoch))
        return order[position * self.settings.batch : (position + 1) * self.settings.batch]

    def conditions(self, rows: torch.Tensor, dropped: torch.Tensor) -> dict[str, torch.Tensor]:
        """The classes or prompts of samples `rows`, the null class or the empty prompt where they are `dropped`."""
        if self.settings.model == "text":
            prompts = torch.where(dropped, NULL_PROMPT, self.prompts[rows])
            return {"encoder_hidden_states": self.table[prompts]}
        return {"class_labels": torch.where(dropped, len(self.kind.classes), self.labels[rows])}

    def loss(self) -> torch.Tensor:
        """The mean squared error of the predicted velocity on this step's batch."""
        generator, batch = self.generator(1, self.step), self.settings.batch
        rows = self.rows().to(self.device)
        latents = self.latents[rows]
        noise = torch.randn(latents.shape, generator=generator).to(self.device)
        # One timestep from each of `batch` equal parts of the range: less variance than independent ones.
        count = len(self.alphas)
        timesteps = ((torch.arange(batch) + torch.rand(1, generator=generator)) * count / batch).long()
        timesteps = timesteps.clamp(max=count - 1).to(self.device)
        dropped = (torch.rand(batch, generator=generator) < self.settings.label_dropout).to(self.device)
        signal = self.alphas[timesteps].sqrt()[:, None, None, None]
        sigma = (1 - self.alphas[timesteps]).sqrt()[:, None, None, None]
        velocity = self.model(
            signal * latents + sigma * noise,
            timestep=timesteps,
            **self.conditions(rows, dropped),
        ).sample
        return F.mse_loss(velocity, signal * noise - sigma * latents)

    def advance(self) -> torch.Tensor:
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
            torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), 1 - decay)
        self.step += 1
        return loss.detach()

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
        state = torch.load(path, map_location=self.device, weights_only=True)
        if state["settings"] != asdict(self.settings):
            changed = sorted(k for k, v in asdict(self.settings).items() if state["settings"].get(k) != v)
            raise SystemExit(f"'{path}' is of a run with another {', '.join(changed)}; name another folder")
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]

    def export(self, folder: Path) -> None:
        """Writes the averaged model in diffusers' layout, in half precision."""
        copy.deepcopy(self.average).half().save_pretrained(folder / self.kind.part, variant="fp16")
        (folder / "scheduler").mkdir(exist_ok=True)
        harness: dict[str, Any] = {"codec": "pixel_unshuffle2", "training": asdict(self.settings)}
        if self.settings.model == "text":
            tables = folder / "text" / "table.safetensors"
            tables.parent.mkdir(exist_ok=True)
            self.encoder.save(tables)
            harness |= {"tokens": TOKENS, "text": {"tables": "text/table.safetensors", **self.encoder.to_json()}}
        else:
            harness |= {"null_class": len(self.kind.classes), "class_names": list(self.kind.classes)}
        if (folder.resolve().parent / self.kind.features).exists():
            harness["features"] = f"../{self.kind.features}"
        for path, value in (
            (folder / "scheduler" / "scheduler_config.json", SCHEDULER.to_config()),
            (folder / "harness.json", harness),
        ):
            path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def train(
    settings: Settings, data: Data, folder: Path, save_every: int = 500, until: int | None = None, device: str = "cpu"
) -> Trainer:
    """Trains to `settings.steps` (or pauses at step `until`), resuming what `folder` holds, and exports."""
    return run(Trainer(settings, data, device), folder, save_every, until)


def run(trainer: Trainer, folder: Path, save_every: int = 500, until: int | None = None) -> Trainer:
    """Runs a trainer as `train` does."""
    folder.mkdir(parents=True, exist_ok=True)
    settings, checkpoint = trainer.settings, folder / CHECKPOINT
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
            if trainer.step % SHOWN == 0:  # a GPU need not be waited for in every step
                mean = loss.item() if math.isnan(mean) else 0.8 * mean + 0.2 * loss.item()
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
    parser.add_argument("--device", default="cpu", help="of torch, which computes (default: %(default)s)")
    options = vars(parser.parse_args())
    torch.set_num_threads(options.pop("threads"))
    if options["device"] != "cpu":
        torch.set_float32_matmul_precision("high")
    data, out, save_every, device = (options.pop(name) for name in ("data", "out", "save_every", "device"))
    train(Settings(**options), Data.load(data, options["model"]), out, save_every, device=device)
    print(f"the model is in {out}")


if __name__ == "__main__":
    main()
