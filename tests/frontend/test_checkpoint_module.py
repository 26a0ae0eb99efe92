from __future__ import annotations

import json
from pathlib import Path

import torch

from mpq_compiler.frontend import checkpoint, checkpoint_module
from tests.harness import tiny


def test_parameters_are_the_checkpoints_and_buffers_the_models_own(tmp_path: Path) -> None:
    model = tiny.model("pixart")  # with a table of positions that no checkpoint holds
    model.save_pretrained(tmp_path)
    found = checkpoint_module.read(checkpoint.locate(tmp_path))
    assert all(torch.equal(p, found.get_parameter(name)) for name, p in model.named_parameters())
    buffers = dict(model.named_buffers())
    assert buffers and all(torch.equal(b, found.get_buffer(name)) for name, b in buffers.items())


def test_nothing_is_drawn_for_parameters_that_a_checkpoint_holds(tmp_path: Path, monkeypatch) -> None:
    """Drawing 860 million numbers took longer than reading them, and as much memory again."""
    model = tiny.model("sd15")
    model.save_pretrained(tmp_path)
    drawn: list[torch.Tensor] = []
    own = torch.Tensor.uniform_

    def uniform_(self: torch.Tensor, *args: float, **kwargs: float) -> torch.Tensor:
        drawn.append(self)
        return own(self, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "uniform_", uniform_)
    type(model).from_config(json.loads((tmp_path / "config.json").read_text()))
    assert drawn
    drawn.clear()
    checkpoint_module.read(checkpoint.locate(tmp_path))
    assert not drawn
