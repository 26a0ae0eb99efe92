"""Writes emoji as a data set of images and classes, of which `train_denoisers` and `train_features` make the judges.

    npm pack emoji-datasource-google emoji-datasource-twitter      # and unpack each into DATA/google, DATA/twitter
    python -m benchmarks.emoji_classes DATA emoji.npz

Pictures are those of Noto Emoji (Apache-2.0) and Twemoji (CC BY 4.0), 32 x 32 in colour on white, by the category that
the packages give them. Variations of skin are left out: they are nine tenths of the people, who would be half of all.
A tenth of the emoji is the test set, in both styles.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from benchmarks import train_emoji
from benchmarks.train_denoisers import CATEGORIES
from mpq_compiler.support import files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    pictures = train_emoji.read(options.data)
    kept = [i for i, name in enumerate(pictures.names) if not name.endswith(" skin")]
    names = sorted({pictures.names[i] for i in kept})
    held = set(np.random.default_rng(0).permutation(names)[: len(names) // 10])
    rows = {
        "train": [i for i in kept if pictures.names[i] not in held],
        "test": [i for i in kept if pictures.names[i] in held],
    }
    arrays: dict[str, np.ndarray] = {}
    for part, chosen in rows.items():
        pixels = ((pictures.pixels[chosen].permute(0, 2, 3, 1) + 1) * 127.5).round().byte()
        arrays[f"x_{part}"] = pixels.numpy()
        arrays[f"y_{part}"] = np.array([CATEGORIES.index(pictures.categories[i]) for i in chosen])
    files.write_whole(options.out, lambda stream: np.savez_compressed(stream, **arrays))  # type: ignore[arg-type]
    print(f"{options.out}: {len(rows['train'])} images and {len(rows['test'])} to test, of {len(CATEGORIES)} classes")


if __name__ == "__main__":
    main()
