"""Which models take fractions of a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from mpq_compiler.frontend import call_file, denoiser
from mpq_compiler.frontend.call_module import variations
from tests.harness import tiny


class Timed(nn.Module):
    """A denoiser that embeds its time in one of several ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.table, self.mix = way, nn.Embedding(1000, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        match self.way:
            case "table":
                seen = self.table(t)
            case "rounded":
                seen = self.table(t.long())
            case "scaled":
                seen = (t[:, None] / 1000).sin().expand(-1, 4)
            case _:
                seen = t.expand(len(x))[:, None].float() * torch.arange(4)
        return self.mix(x + seen.sin())


@pytest.mark.parametrize(("way", "floats"), [("table", False), ("rounded", False), ("scaled", True), ("waves", True)])
def test_a_time_is_whole_only_where_a_table_embeds_it(way: str, floats: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Timed(way).eval()
    calls = variations(model, {"x": torch.randn(2, 4), "t": torch.tensor([3, 900])}, 4, seed=0)
    call_file.write(tmp_path / "calls.safetensors", model, calls)
    wrapped = denoiser.wrap_calls(model, tmp_path / "calls.safetensors")
    assert wrapped.input_specs["timestep"].dtype == (torch.float32 if floats else torch.int64)


@pytest.mark.parametrize("kind", ["positional", "fourier", "learned"])
def test_time_embeddings_of_diffusers(kind: str) -> None:
    model = tiny.model("unet2d", time_embedding_type=kind, num_train_timesteps=1000)
    floats = denoiser.wrap(model).input_specs["timestep"].dtype.is_floating_point
    assert floats == (kind != "learned")
