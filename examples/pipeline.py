"""Compiles the denoiser of a diffusers pipeline, and draws with the pipeline before and after.

    python examples/pipeline.py out.mpq                        # for this machine's CPU
    python examples/pipeline.py out.mpq --target reference     # interpreted, slowly, anywhere

The pipeline is a tiny one with random weights, so that nothing has to be downloaded. With a trained one, replace
`tiny_pipeline()` by `diffusers.DiffusionPipeline.from_pretrained(folder)`; the rest stays as it is.
"""

from __future__ import annotations

import argparse

import diffusers
import numpy as np
import torch

import mpq_compiler


def tiny_pipeline() -> diffusers.DDIMPipeline:
    """An unconditional pipeline of 16 x 16 pixels."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=16,
        in_channels=3,
        out_channels=3,
        layers_per_block=1,
        block_out_channels=(32, 64),
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=16,
    ).eval()
    # Random weights amplify every difference; a trained denoiser does not. A small output stands in for training.
    with torch.no_grad():
        unet.conv_out.weight.mul_(0.2)
    pipeline = diffusers.DDIMPipeline(unet=unet, scheduler=diffusers.DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline: diffusers.DDIMPipeline) -> np.ndarray:
    """Two images [2, 16, 16, 3] in 0..1, always from the same noise."""
    generator = torch.Generator().manual_seed(1)
    return pipeline(batch_size=2, generator=generator, num_inference_steps=4, output_type="np").images


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", help="where the artifact goes")
    parser.add_argument("--target", default="native", help="mpqc targets lists them (default: this machine)")
    args = parser.parse_args()

    pipeline = tiny_pipeline()
    before = draw(pipeline)

    # The same pipeline comes back, with the artifact in the place of its denoiser. Without `calls` an unconditional
    # denoiser is sampled for calibration; a pipeline with prompts takes calls=["a red fox in the snow", ...].
    pipeline = mpq_compiler.compile(pipeline, args.output, target=args.target, recipe="w8a8", samples=16, steps=4)
    after = draw(pipeline)

    error = float(np.mean((before - after) ** 2))
    report = pipeline.unet.report
    print(f"{report.weights['average_bits']:.2f} bits a weight, {report.weights['bytes']} bytes")
    print(f"PSNR against the float pipeline: {-10 * np.log10(error):.1f} dB")


if __name__ == "__main__":
    main()
