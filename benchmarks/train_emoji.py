"""Trains the bundled pipeline: emoji of 32 x 32 pixels from their names, with a text encoder, a UNet and a decoder.

    npm pack emoji-datasource-google emoji-datasource-twitter      # and unpack each into DATA/google, DATA/twitter
    python -m benchmarks.train_emoji DATA FOLDER --hours 8

Pictures are those of Noto Emoji (Apache-2.0) and Twemoji (CC BY 4.0) with the names and categories that the packages
give them. The parts are those of a Stable Diffusion pipeline: a byte-pair tokenizer and a text encoder of CLIP's kind,
an AutoencoderKL, and a UNet with cross-attention, which is trained together with the text encoder. A classifier of
categories, trained on the pictures themselves, judges what is drawn. Training goes on where it was stopped: each stage
keeps its state in FOLDER/state, and the pipeline is written to FOLDER/pipeline, as diffusers saves one.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

SETS = {"google": "noto", "twitter": "twemoji"}
"""The packages' names of the sets, and what prompts call their styles."""
SIZE, TOKENS = 32, 24
BATCH = 128
EMPTY = 0.1
"""The share of prompts that are left empty in training, for guidance."""
SKINS = {"1F3FB": "light", "1F3FC": "medium light", "1F3FD": "medium", "1F3FE": "medium dark", "1F3FF": "dark"}


@dataclass(frozen=True)
class Pictures:
    """The data: pictures f32 [N, 3, 32, 32] in [-1, 1] on white, with what they show."""

    pixels: Tensor
    names: list[str]
    styles: list[str]
    categories: list[str]

    def prompt(self, index: int) -> str:
        """What a picture is asked for with: ``red heart, noto``."""
        return f"{self.names[index]}, {self.styles[index]}"


def read(data: Path) -> Pictures:
    """Reads both sets; variations of skin are pictures of their own."""
    pixels, names, styles, categories = [], [], [], []
    for package, style in SETS.items():
        root = data / package / "package"
        for entry in json.loads((root / "emoji.json").read_text()):
            name = entry["name"].lower().replace("flag", "flag of").split(" flag of")
            said = f"flag of {name[0]}" if len(name) > 1 else name[0]
            shown = [(entry, said)]
            for tone, variation in entry.get("skin_variations", {}).items():
                if tone in SKINS:
                    shown.append((variation, f"{said}, {SKINS[tone]} skin"))
            for what, text in shown:
                file = root / "img" / package / "64" / what["image"]
                if not what.get(f"has_img_{package}") or entry["category"] == "Component" or not file.exists():
                    continue
                picture = Image.open(file).convert("RGBA")
                white = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
                array = np.asarray(white.resize((SIZE, SIZE), Image.Resampling.LANCZOS), np.float32)
                pixels.append(torch.from_numpy(array).permute(2, 0, 1) / 127.5 - 1)
                names.append(text)
                styles.append(style)
                categories.append(entry["category"])
    return Pictures(torch.stack(pixels), names, styles, categories)


def byte_pairs(texts: list[str], size: int) -> str:
    """A byte-pair encoding of CLIP's kind of the words of texts, as the library writes it."""
    made = Tokenizer(models.BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>"))
    made.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        end_of_word_suffix="</w>",
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(texts, trainer)
    written: str = made.to_str()
    return written


def words_and_merges(written: str) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The vocabulary and the merges of what `byte_pairs` gives."""
    model = json.loads(written)["model"]
    merges = [tuple(pair.split()) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
    return model["vocab"], merges


def tokenizer_of(texts: list[str], folder: Path) -> CLIPTokenizer:
    """The tokenizer of a training, which its folder keeps: the trainer makes another one in every process."""
    file = folder / "state" / "tokenizer.json"
    if not file.exists():
        file.write_text(byte_pairs(texts, 1600))
    vocabulary, merges = words_and_merges(file.read_text())
    return CLIPTokenizer(
        vocab=vocabulary, merges=merges, model_max_length=TOKENS, pad_token="<|endoftext|>"
    )


def autoencoder() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 48, 64), layers_per_block=1, latent_channels=4, norm_num_groups=16, sample_size=SIZE,
    )  # fmt: skip


def text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=128, intermediate_size=512, num_hidden_layers=4,
            num_attention_heads=4, max_position_embeddings=TOKENS, bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )
    )  # fmt: skip


def unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=SIZE // 4, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(64, 112),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=128, attention_head_dim=4,
        norm_num_groups=16,
    )  # fmt: skip


def scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1, prediction_type="v_prediction", timestep_spacing="trailing", rescale_betas_zero_snr=False,
    )  # fmt: skip


class Classifier(nn.Module):
    """Categories [N, classes] of pictures [N, 3, 32, 32]."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        widths = (3, 48, 96, 160)
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            for taken in (before, after):
                layers += [nn.Conv2d(taken, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
            layers.append(nn.MaxPool2d(2))
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.3))
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.body(x))
        return found


class Stage:
    """A stage of training: its modules, their averages, and the minutes that it has had."""

    def __init__(self, folder: Path, name: str, modules: dict[str, nn.Module], rate: float, minutes: float) -> None:
        self.path, self.name, self.modules, self.minutes = folder / "state" / f"{name}.pt", name, modules, minutes
        self.parameters = [p for module in modules.values() for p in module.parameters()]
        self.optimizer = torch.optim.AdamW(self.parameters, rate, betas=(0.9, 0.99), weight_decay=0.01)
        self.rate, self.updates, self.spent = rate, 0, 0.0
        self.averages = {n: {k: v.clone() for k, v in m.state_dict().items()} for n, m in modules.items()}
        if self.path.exists():
            state = torch.load(self.path, weights_only=True)
            for key, module in modules.items():
                module.load_state_dict(state["modules"][key])
            self.optimizer.load_state_dict(state["optimizer"])
            self.averages, self.updates, self.spent = state["averages"], state["updates"], state["spent"]

    def __iter__(self) -> Iterator[int]:
        """The numbers of the updates, until the minutes are spent; the state is kept every minute.

        Minutes are those of the processor, by thread, so that another job beside takes none of them.
        """
        last, begun = time.monotonic(), time.process_time()
        before = self.spent
        while self.spent < self.minutes * 60:
            share = min(1.0, self.spent / (self.minutes * 60))
            warm = min(1.0, (self.updates + 1) / 200)
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * share)))
            yield self.updates
            self.updates += 1
            self.spent = before + (time.process_time() - begun) / torch.get_num_threads()
            if time.monotonic() - last > 60:
                self.save()
                last = time.monotonic()
        self.save()

    def step(self, loss: Tensor) -> None:
        """One update, and the averages behind it."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        decay = min(0.999, (1 + self.updates) / (10 + self.updates))
        with torch.no_grad():
            for name, module in self.modules.items():
                for key, value in module.state_dict().items():
                    average = self.averages[name][key]
                    if value.is_floating_point():
                        average.lerp_(value, 1 - decay)
                    else:
                        average.copy_(value)

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        state = {
            "modules": {name: module.state_dict() for name, module in self.modules.items()},
            "optimizer": self.optimizer.state_dict(),
            "averages": self.averages,
            "updates": self.updates,
            "spent": self.spent,
        }
        torch.save(state, self.path.with_suffix(".new"))
        self.path.with_suffix(".new").replace(self.path)

    def take_averages(self) -> None:
        """The averages become the weights."""
        for name, module in self.modules.items():
            module.load_state_dict(self.averages[name])
            module.eval().requires_grad_(False)


def train_classifier(stage: Stage, pictures: Pictures, labels: Tensor, held: Tensor, seed: Tensor) -> None:
    model, rows = stage.modules["classifier"], (~held).nonzero().flatten()
    for _ in stage:
        model.train()
        chosen = rows[torch.randint(len(rows), (BATCH,))]
        x = shifted(pictures.pixels[chosen])
        stage.step(F.cross_entropy(model(x), labels[chosen], label_smoothing=0.1))
    stage.take_averages()


def shifted(x: Tensor) -> Tensor:
    """Pictures moved by up to two pixels, and mirrored half of the time."""
    dx, dy = (int(v) for v in torch.randint(-2, 3, (2,)))
    x = torch.roll(x, (dx, dy), (2, 3))
    return x.flip(3) if torch.rand(()) < 0.5 else x


def train_autoencoder(stage: Stage, pictures: Pictures) -> None:
    vae = stage.modules["vae"]
    assert isinstance(vae, AutoencoderKL)
    for update in stage:
        x = pictures.pixels[torch.randint(len(pictures.pixels), (32,))].contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(x).latent_dist
        made = vae.decode(posterior.sample()).sample
        edges = sum((made.diff(dim=axis) - x.diff(dim=axis)).abs().mean() for axis in (2, 3))
        loss = (made - x).abs().mean() + (made - x).square().mean() + 0.5 * edges + 1e-5 * posterior.kl().mean()
        stage.step(loss)
        if update % 200 == 0:
            print(f"autoencoder {update}: {-10 * math.log10(float((made - x).square().mean()) / 4):.2f} dB", flush=True)
    stage.take_averages()


@torch.no_grad()
def latents_of(vae: AutoencoderKL, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Means and deviations of the latents of pictures."""
    found = [vae.encode(part).latent_dist for part in pixels.split(256)]
    return torch.cat([each.mean for each in found]), torch.cat([each.std for each in found])


def train_denoiser(
    stage: Stage, pictures: Pictures, tokens: Tensor, empty: Tensor, latents: tuple[Tensor, Tensor], scale: float
) -> None:
    model, encoder, noise_schedule = stage.modules["unet"], stage.modules["text_encoder"], scheduler()
    mean, deviation = latents
    sums = 0.0
    for update in stage:
        rows = torch.randint(len(mean), (BATCH,))
        x = (mean[rows] + deviation[rows] * torch.randn_like(mean[rows])) * scale
        noise, times = torch.randn_like(x), torch.randint(1000, (BATCH,))
        noisy = noise_schedule.add_noise(x, noise, times)
        target = noise_schedule.get_velocity(x, noise, times)
        given = torch.where(torch.rand(BATCH, 1) < EMPTY, empty, tokens[rows])
        found = model(noisy, times, encoder(given)[0], return_dict=False)[0]
        loss = (found - target).square().mean()
        stage.step(loss)
        sums += float(loss)
        if update % 200 == 199:
            print(f"denoiser {update + 1}: {sums / 200:.4f}, {stage.spent / 60:.1f} minutes", flush=True)
            sums = 0.0
    stage.take_averages()


@torch.no_grad()
def judged(pipeline: StableDiffusionPipeline, pictures: Pictures, labels: Tensor, classifier: nn.Module,
           rows: Tensor, guidance: float) -> tuple[float, float, Tensor]:  # fmt: skip
    """The classifier's accuracy on pictures, on what is drawn of their prompts, and what was drawn."""
    drawn = []
    for part in rows.split(64):
        prompts = [pictures.prompt(int(i)) for i in part]
        generator = torch.Generator().manual_seed(int(part[0]))
        found = pipeline(
            prompts, num_inference_steps=20, guidance_scale=guidance, output_type="pt", generator=generator
        )
        drawn.append(found.images * 2 - 1)
    made = torch.cat(drawn)
    right = [(classifier(x).argmax(1) == labels[rows]).float().mean().item() for x in (pictures.pixels[rows], made)]
    return right[0], right[1], made


def save(pipeline: StableDiffusionPipeline, folder: Path) -> None:
    """Writes the pipeline in half precision, its text encoder under names that every release of its library reads."""
    pipeline.to(torch.float16).save_pretrained(folder, safe_serialization=True)
    file = folder / "text_encoder" / "model.safetensors"
    weights = {f"text_model.{name.removeprefix('text_model.')}": value for name, value in load_file(file).items()}
    save_file(weights, file, {"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--hours", type=float, default=8.0, help="of training in all")
    parser.add_argument("--autoencoder", type=float, default=60.0, help="minutes of it for the autoencoder")
    parser.add_argument("--classifier", type=float, default=8.0, help="minutes of it for the classifier")
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--images", type=int, default=512, help="pictures that are judged")
    args = parser.parse_args()
    torch.manual_seed(0)
    pictures = read(args.data)
    kinds = sorted(set(pictures.categories))
    labels = torch.tensor([kinds.index(name) for name in pictures.categories])
    print(f"{len(pictures.names)} pictures of {len(kinds)} categories", flush=True)

    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))
    held = torch.zeros(len(labels), dtype=torch.bool)
    held[order[: len(labels) // 10]] = True
    stage = Stage(args.folder, "classifier", {"classifier": Classifier(len(kinds))}, 2e-3, args.classifier)
    train_classifier(stage, pictures, labels, held, order)
    classifier = stage.modules["classifier"]
    with torch.no_grad():
        unseen = (classifier(pictures.pixels[held]).argmax(1) == labels[held]).float().mean()
    print(f"classifier: {float(unseen):.3f} of pictures that it has not seen", flush=True)

    vae = autoencoder()
    stage = Stage(args.folder, "autoencoder", {"vae": vae}, 1.5e-3, args.autoencoder)
    train_autoencoder(stage, pictures)
    latents = latents_of(vae, pictures.pixels)
    scale = 1 / float(latents[0].std())
    vae.register_to_config(scaling_factor=round(scale, 5))
    with torch.no_grad():
        again = torch.cat([vae.decode(part).sample for part in latents[0].split(256)])
    error = float((again - pictures.pixels).square().mean()) / 4
    print(f"autoencoder: {-10 * math.log10(error):.2f} dB, scale {scale:.4f}", flush=True)

    prompts = [pictures.prompt(i) for i in range(len(labels))]
    tokenizer = tokenizer_of(prompts, args.folder)
    tokens = tokenizer(prompts, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")
    empty = tokenizer([""], padding="max_length", max_length=TOKENS, return_tensors="pt")
    modules: dict[str, Any] = {"unet": unet(), "text_encoder": text_encoder(tokenizer)}
    sizes = {name: sum(p.numel() for p in m.parameters()) for name, m in (*modules.items(), ("vae", vae))}
    print(", ".join(f"{name} {size / 1e6:.2f} M" for name, size in sizes.items()), flush=True)
    minutes = 60 * args.hours - args.autoencoder - args.classifier
    stage = Stage(args.folder, "denoiser", modules, 1e-3, minutes)
    train_denoiser(stage, pictures, tokens.input_ids, empty.input_ids, latents, vae.config.scaling_factor)

    pipeline = StableDiffusionPipeline(
        vae.eval(), modules["text_encoder"], tokenizer, modules["unet"], scheduler(), None, None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    rows = order[: args.images]
    real, drawn, made = judged(pipeline, pictures, labels, classifier, rows, args.guidance)
    print(f"classifier: {real:.3f} of {len(rows)} pictures, {drawn:.3f} of what is drawn of their prompts", flush=True)
    save(pipeline, args.folder / "pipeline")
    sheet = torch.cat([pictures.pixels[rows[:32]], made[:32]]).reshape(2, 2, 16, 3, SIZE, SIZE)
    sheet = sheet.permute(1, 0, 4, 2, 5, 3).reshape(4 * SIZE, 16 * SIZE, 3)
    Image.fromarray(((sheet.clamp(-1, 1) + 1) * 127.5).byte().numpy()).save(args.folder / "sheet.png")


if __name__ == "__main__":
    main()
