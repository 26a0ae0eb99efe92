"""Glue: every operator is torch's, bit for bit; plain data and back; what is missing or unknown is refused."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mpq_compiler.frontend.watch_pipeline import Recorder
from mpq_compiler.sampling.glue import OPERATORS, Glue, Ref, Step
from mpq_compiler.support.errors import UserError

X = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
Y = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1))
WRITTEN: dict[str, Any] = {
    "add": lambda x, y: x + y + 0.1,
    "array": lambda x, y: x * torch.tensor([[0.3], [0.7], [1.1]]),
    "cast": lambda x, y: (x * 3).to(torch.int64),
    "cat": lambda x, y: torch.cat([x, y], -1),
    "clamp": lambda x, y: x.clamp(-0.3, 0.7),
    "constant_pad_nd": lambda x, y: torch.nn.functional.pad(x, (0, 2, 1, 0)),
    "div": lambda x, y: x / 0.18215 / y,
    "expand": lambda x, y: x[:, :1].expand(-1, 5, -1),
    "getitem": lambda x, y: x.chunk(2, -1)[1],
    "mul": lambda x, y: x * 0.1 * y,
    "neg": lambda x, y: -x,
    "ones_like": lambda x, y: torch.ones_like(x),
    "permute": lambda x, y: x.permute(2, 0, 1),
    "repeat": lambda x, y: x.repeat(1, 2, 1),
    "rsub": lambda x, y: torch.rsub(x, 1.0),
    "scatter": lambda x, y: torch.zeros_like(x).scatter_(-1, torch.tensor([2, 0, 3, 1]).expand_as(x), x),
    "select": lambda x, y: x[:, -1],
    "slice": lambda x, y: x[:, 1:, ::2],
    "split": lambda x, y: x.split([1, 3], -1)[1] + x.split(2, -1)[0][..., :1],
    "squeeze": lambda x, y: x[:, :1].squeeze(1),
    "stack": lambda x, y: torch.stack([x, y], 1),
    "sub": lambda x, y: x - y - 0.3,
    "t": lambda x, y: x[0].t(),
    "transpose": lambda x, y: x.transpose(1, 2),
    "unbind": lambda x, y: x.unbind(1)[2],
    "unsqueeze": lambda x, y: x.unsqueeze(-1),
    "view": lambda x, y: x.view(2, -1).reshape(3, 8),
    "zeros_like": lambda x, y: torch.zeros_like(x),
}


def recorded(made: Any) -> tuple[Glue, Tensor]:
    recorder = Recorder()
    recorder.source("x", X)
    recorder.source("y", Y)
    with recorder:
        result = made(X, Y)
    return recorder.glue({"result": result}, "a test"), result


def test_every_operator_has_a_case() -> None:
    assert WRITTEN.keys() == OPERATORS.keys()


@pytest.mark.parametrize("name", WRITTEN)
def test_an_operator_is_that_of_torch(name: str) -> None:
    glue, expected = recorded(WRITTEN[name])
    assert name in {step.op for step in glue.steps}
    again = Glue.from_json(json.loads(json.dumps(glue.to_json())))
    assert again == glue
    found = again(**{source: {"x": X, "y": Y}[source].numpy() for source in again.sources})["result"]
    assert found.dtype == expected.numpy().dtype
    np.testing.assert_array_equal(found, expected.numpy())


def test_only_what_is_needed_is_kept() -> None:
    def made(x: Tensor, y: Tensor) -> Tensor:
        (x * 7).sum()  # is not known, and nothing comes of it
        return y + 1

    glue, _ = recorded(made)
    assert glue.sources == ("y",) and glue.steps == (Step("add", (Ref(0), 1)),)


def test_what_changes_in_place_and_what_changes_nothing() -> None:
    def made(x: Tensor, y: Tensor) -> Tensor:
        found = x.clone().contiguous().detach()
        found *= 3
        return found.add_(y)

    x = X.clone()
    glue, expected = recorded(made)
    assert [step.op for step in glue.steps] == ["mul", "add"] and torch.equal(x, X)
    np.testing.assert_array_equal(glue(x=X.numpy(), y=Y.numpy())["result"], expected.numpy())


def test_what_is_not_known_is_refused_by_its_name() -> None:
    with pytest.raises(UserError, match=r"'result' of a test by 'sin'.*parts denoiser"):
        recorded(lambda x, y: x.sin() * 2)
    with pytest.raises(UserError, match="does not make 'result' of a test"):
        recorded(lambda x, y: torch.ones(3))
    with pytest.raises(UserError, match="'warp'"):
        Glue.from_json({"sources": ["x"], "steps": [["warp", {"of": 0}]], "results": {"y": 1}})


def test_a_source_that_is_missing_is_named() -> None:
    glue, _ = recorded(WRITTEN["add"])
    with pytest.raises(UserError, match="'y' is missing, of which result is made"):
        glue(x=X.numpy())


def test_a_place_that_is_taken_twice_is_refused() -> None:
    glue, _ = recorded(lambda x, y: torch.zeros_like(x).scatter_(-1, torch.tensor([2, 0, 2, 1]).expand_as(x), x))
    with pytest.raises(UserError, match="places values between its parts in a way that is not known"):
        glue(x=X.numpy())


def test_what_repeats_itself_is_kept_once() -> None:
    glue, expected = recorded(lambda x, y: x + torch.arange(4.0).expand(100, 2, 3, 4)[0] * torch.ones(2, 3, 4))
    arrays = [step.args[0] for step in glue.steps if step.op == "array"]
    assert np.size(arrays[0]) == 4
    np.testing.assert_array_equal(glue(x=X.numpy())["result"], expected.numpy())
