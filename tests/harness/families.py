"""Every family of diffusers' denoisers, tiny: with its size, its texts and inputs to calibrate on."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from mpq_compiler.frontend import denoiser as denoisers
from mpq_compiler.frontend.denoiser import Denoiser
from tests.harness import tiny


def denoiser(name: str) -> Denoiser:
    return denoisers.wrap(tiny.model(name), name=name, size=tiny.SIZES.get(name), tokens=tiny.TOKENS)


def calibration(denoiser: Denoiser, path: Path, rows: int) -> Path:
    """A calibration file of random inputs, spread over all timesteps: these models have no encoders to sample with."""
    inputs = denoiser.random_inputs(rows, 5)
    inputs["timestep"] = torch.linspace(999, 1, rows).round().to(inputs["timestep"].dtype)
    save_file(inputs, path)
    return path


def shapes(denoiser: Denoiser, batch: int = 2) -> str:
    """What ``--shapes`` takes, for one batch size."""
    return "x".join(map(str, (batch, *denoiser.latent_shape)))
