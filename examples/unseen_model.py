"""Compiles a denoiser that no library has: a module of one's own, by its recorded calls.

    python examples/unseen_model.py [OUTPUT] [--target TARGET]

It predicts the noise in sounds [B, C, T], and is called with a nested dictionary, as its author liked it. The artifact
is called in the same way, and answers in the same structure.
"""

from __future__ import annotations

import argparse

import torch
from torch import nn

import mpq_compiler


class Sounds(nn.Module):
    """A small denoiser of sounds: convolutions over time, attention between moments, a text beside."""

    def __init__(self, channels: int = 4, width: int = 64, words: int = 16) -> None:
        super().__init__()
        self.enter = nn.Conv1d(channels, width, 3, padding=1)
        self.level = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.norm = nn.RMSNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.words = nn.Linear(words, width)
        self.leave = nn.Conv1d(width, channels, 3, padding=1)

    def forward(self, sound, noise_level, context):
        y = self.enter(sound).transpose(1, 2)
        waves = noise_level[:, None] * torch.arange(1, 33, device=sound.device)
        y = self.norm(y + self.level(torch.cat([waves.sin(), waves.cos()], 1))[:, None])
        seen = torch.cat([y, self.words(context["tokens"])], 1)
        y = y + nn.functional.scaled_dot_product_attention(self.query(y), self.key(seen), self.value(seen))
        return {"noise": self.leave(y.transpose(1, 2))}


def call(seed: int) -> dict:
    generator = torch.Generator().manual_seed(seed)
    return {
        "sound": torch.randn(2, 4, 32, generator=generator),
        "noise_level": torch.rand(2, generator=generator),
        "context": {"tokens": torch.randn(2, 7, 16, generator=generator)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", nargs="?", default="sounds.mpq")
    parser.add_argument("--target", default="native")
    options = parser.parse_args()
    torch.manual_seed(0)
    model = Sounds().eval()

    # its calls as they come: here of noise, else while one's own program draws
    with mpq_compiler.record_inputs(model, "sounds.safetensors", latent="sound", time="noise_level"), torch.no_grad():
        for seed in range(16):
            model(**call(seed))
    report = mpq_compiler.compile(
        model, options.output, calibration="sounds.safetensors", recipe="w8a8", target=options.target, overwrite=True
    )
    print(f"{report.weights['average_bits']:.2f} bits a weight")

    compiled = mpq_compiler.load(options.output)
    with torch.no_grad():
        expected = model(**call(99))["noise"]
    ratio = expected.square().sum() / (compiled(**call(99))["noise"] - expected).square().sum()
    print(f"SQNR on a call that it has not seen: {10 * torch.log10(ratio):.1f} dB")


if __name__ == "__main__":
    main()
