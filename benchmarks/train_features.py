"""Trains the classifier of small images whose features judge what a denoiser draws (docs/metrics.md).

    python -m benchmarks.train_features emoji.npz emoji-classifier.safetensors

The network is the one that `mpq_compiler.evaluation.features` runs. The data are an npz with x_train, x_test (uint8
[N, H, W] or [N, H, W, 3], H = W a multiple of 4), y_train, y_test (classes [N]); the file has the weights, and mean and
covariance of the features over the test images, or with `--statistics all` over all images where tests are few.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

FEATURES = 64
MOVED = 2
"""Pixels by which an image is moved at most; half of them are mirrored too."""


class Classifier(nn.Module):
    """Scores [N, classes] of images [N, C, S, S] in [-1, 1], by features [N, 64]."""

    def __init__(self, channels: int, size: int, classes: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, 24, 3, 2, 1), nn.BatchNorm2d(24), nn.ReLU(),
            nn.Conv2d(24, 48, 3, 2, 1), nn.BatchNorm2d(48), nn.ReLU(),
            nn.Conv2d(48, 48, 3, 1, 1), nn.BatchNorm2d(48), nn.ReLU(),
            nn.Flatten(), nn.Linear(48 * (size // 4) ** 2, FEATURES), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(FEATURES, classes)

    def forward(self, images: torch.Tensor, dropout: float = 0.0) -> torch.Tensor:
        found: torch.Tensor = self.head(F.dropout(self.body(images), dropout))
        return found


def pixels(images: np.ndarray) -> torch.Tensor:
    """Images as the network takes them."""
    found = torch.from_numpy(images).float() / 127.5 - 1
    return found[:, None] if found.ndim == 3 else found.permute(0, 3, 1, 2).contiguous()


def varied(images: torch.Tensor) -> torch.Tensor:
    """Images moved by some pixels, each mirrored or not."""
    dx, dy = (int(v) for v in torch.randint(-MOVED, MOVED + 1, (2,)))
    mirrored = torch.rand(len(images), 1, 1, 1) < 0.5
    images = torch.roll(images, (dx, dy), (2, 3))
    return torch.where(mirrored.to(images.device), images.flip(3), images)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--dropout", type=float, default=0.3, help="of features in training (0.3)")
    parser.add_argument("--statistics", choices=("test", "all"), default="test", help="images of the statistics")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.manual_seed(0)
    with np.load(options.data) as file:
        x, tests = (pixels(file[name]).to(options.device) for name in ("x_train", "x_test"))
        y, labels = (torch.from_numpy(file[name].astype(np.int64)).to(options.device) for name in ("y_train", "y_test"))
    model = Classifier(x.shape[1], x.shape[2], int(y.max()) + 1).to(options.device)
    optimizer = torch.optim.AdamW(model.parameters(), options.learning_rate, weight_decay=0.05)
    for step in range(options.steps):
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * 0.5 * (1 + math.cos(math.pi * step / options.steps))
        rows = torch.randint(len(x), (options.batch,)).to(options.device)
        loss = F.cross_entropy(model(varied(x[rows]), options.dropout), y[rows], label_smoothing=0.1)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    model.eval()
    with torch.no_grad():
        right = [(model(a).argmax(1) == b).float().mean().item() for a, b in ((x, y), (tests, labels))]
        judged = torch.cat([x, tests]) if options.statistics == "all" else tests
        features = model.body(judged).double().cpu().numpy()
    print(f"{right[0]:.3f} of the images it was trained on, {right[1]:.3f} of others")
    statistics = {"stats.mu": features.mean(0), "stats.cov": np.cov(features, rowvar=False)}
    tensors = {name: value.cpu() for name, value in model.state_dict().items()}
    save_file({**tensors, **{name: torch.from_numpy(v).float() for name, v in statistics.items()}}, options.out)


if __name__ == "__main__":
    main()
