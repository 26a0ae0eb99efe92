"""Whole pictures of the bundled pipeline at 8, 4 and 3 bits: one budget over all parts against equal bits for each.

    python -m benchmarks.pipeline_bits
    python -m benchmarks.pipeline_bits --bits 4 --images 16

Each artifact is made by `mpqc compile emoji --weights BITS`, which spends one budget over text encoder, denoiser and
decoder where pictures lose least; and once more with the same bytes in all, in equal bits for each part, or in the
least that a part takes where that is more. `mpqc eval` draws prompts that nothing was calibrated on, in twenty guided
steps, with both the artifact and the float pipeline from the same noise; some of them are in docs/emoji.png.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks import cells, documents
from benchmarks.machine import provenance
from mpq_compiler.driver import pipeline as pipelines
from mpq_compiler.frontend import checkpoint, pipeline_parts
from mpq_compiler.runtime.pipeline import load_pipeline
from mpq_compiler.sampling import loop

NAME, STEPS, GUIDANCE, SHOWN = "emoji", 20, 3.0, 12
RESULTS = cells.RESULTS / "pipeline_bits.json"
DOCS, PICTURE = cells.ROOT / "docs" / "pipelines.md", cells.ROOT / "docs" / "emoji.png"
ROLES = {"text_encoder": "text", "unet": "denoiser", "vae": "decoder"}
ONE, EQUAL = "one budget", "equal bits"


def command(name: str, *arguments: str) -> dict[str, Any]:
    """The result of a command of ours."""
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "result.json"
        asked = [sys.executable, "-m", "mpq_compiler", name, *arguments, "--json", str(file)]
        subprocess.run(asked, check=True, stdout=subprocess.DEVNULL)
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return found


def equal(report: dict[str, Any]) -> str:
    """The budget of each part at equal bits and the same bytes in all: a part that takes more at least has that."""
    shares, total = report["shares"], sum(share["bytes"] for share in report["shares"].values())
    least = {name: share["least_bytes"] for name, share in shares.items()}
    sizes = {name: report["parts"][name]["weights"]["float_bytes"] for name in shares}
    low, high = 0.0, 1.0
    for _ in range(60):
        share = (low + high) / 2
        spent = sum(max(least[name], share * sizes[name]) for name in shares)
        low, high = (low, share) if spent > total else (share, high)
    found = {name: int(max(least[name], low * sizes[name])) for name in shares}
    return ",".join(f"{ROLES[name]}={size}B" for name, size in found.items())


def measure(bits: float, images: int, folder: Path) -> list[dict[str, Any]]:
    """The cells of one budget: spent where it is worth most, and in equal bits."""
    found, budget = [], str(bits)
    for kind in (ONE, EQUAL):
        out = folder / f"{kind.split()[0]}-{bits:g}.mpq"
        report = command(
            "compile", NAME, "-o", str(out), "--weights", budget, "--guidance", str(GUIDANCE), "--overwrite"
        )
        asked = ("--against", NAME, "--images", str(images), "--eval-steps", str(STEPS))
        judged = command("eval", str(out), *asked)
        parts = {name: part["weights"]["average_bits"] for name, part in report["parts"].items()}
        sizes = {name: part["weights"]["bytes"] for name, part in report["parts"].items()}
        found.append(
            {"pipeline": NAME, "bits": bits, "kind": kind, "parameters": 0, "parts": parts, "bytes": sizes,
             "psnr_db": judged["psnr_db"], "ssim": judged["ssim"], "images": images, "steps": STEPS, **provenance()}
        )  # fmt: skip
        print({key: found[-1][key] for key in ("bits", "kind", "parts", "bytes", "psnr_db")}, flush=True)
        if kind == ONE:
            budget = equal(report)
    return found


def table(found: Sequence[dict[str, Any]]) -> str:
    """The table of all cells."""
    lines = []
    for cell in found:
        psnr = cell["psnr_db"]
        interval = f"{psnr['value']:.1f} dB ({psnr['low']:.1f} to {psnr['high']:.1f})"
        parts = [f"{cell['parts'][name]:.2f}, {cell['bytes'][name] / 1e3:.0f} kB" for name in ROLES]
        total = f"{sum(cell['bytes'].values()) / 1e6:.2f} MB"
        lines.append([f"{cell['bits']:g}", cell["kind"], *parts, total, interval, f"{cell['ssim']['value']:.3f}"])
    headers = ("bits", "spent", *(f"{role}: bits" for role in ROLES.values()), "all", "PSNR of pictures", "SSIM")
    return documents.table(headers, lines)


def draw(folder: Path, bits: Sequence[float]) -> None:
    """Writes the picture: prompts that nothing was calibrated on, in float and at each number of bits."""
    prompts = pipeline_parts.prompts(unseen=True, folder=checkpoint.place_of(NAME))[:SHOWN]
    source = pipelines.load(NAME)
    denoiser = pipelines.require_parts(source, pipelines.ROLES)
    pipes = [load_pipeline(folder / f"one-{each:g}.mpq") for each in bits]
    shape = pipes[0].part(pipes[0].denoiser).manifest["sampling"]["shape"]
    noise = loop.gaussian(len(prompts), tuple(shape), 0)
    rows: list[list[np.ndarray]] = [[] for _ in range(1 + len(bits))]
    for prompt, one in zip(prompts, noise, strict=True):
        float_ = pipeline_parts.drawn(source, denoiser, prompt, one[None], STEPS, GUIDANCE, pipes[0].size)
        rows[0].append(float_[0].transpose(1, 2, 0))
        for row, pipe in zip(rows[1:], pipes, strict=True):
            row.append(pipe.decode(pipe.latents([prompt], steps=STEPS, guidance=GUIDANCE, noise=one[None]))[0])
    sheet = np.concatenate([np.concatenate(row, axis=1) for row in rows])
    image = Image.fromarray((sheet * 255).round().astype(np.uint8))
    image.resize((2 * image.width, 2 * image.height), Image.Resampling.BICUBIC).save(PICTURE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", nargs="+", type=float, default=[8, 4, 3])
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--folder", type=Path, help="for the artifacts; they are kept there")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.folder or Path(scratch)
        folder.mkdir(exist_ok=True)
        for bits in args.bits:
            for cell in measure(bits, args.images, folder):
                cells.keep(RESULTS, cell, ("bits", "kind"), {"bits": (8, 4, 3), "kind": (ONE, EQUAL)})
        draw(folder, [bits for bits in args.bits if bits < 8])
    documents.insert(DOCS, "pipeline-bits", table(cells.read(RESULTS)))


if __name__ == "__main__":
    main()
