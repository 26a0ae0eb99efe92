"""Parameters that stay in half precision in their checkpoint's file."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mpq_compiler.frontend import widened
from mpq_compiler.frontend.finite import require_finite
from mpq_compiler.frontend.widened import Widened, held, stored, untouched


class Model(nn.Module):
    """Reads its parameters in every way that models do: by modules, by functions, by views, tied ones twice."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.conv, self.norm = nn.Linear(16, 16), nn.Conv2d(3, 4, 3), nn.LayerNorm(16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.table = nn.Embedding(5, 16)
        self.head = nn.Linear(16, 5, bias=False)
        self.head.weight = self.table.weight
        self.positions = nn.Parameter(torch.randn(1, 7, 16))

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = self.norm(self.linear(x) + self.table(labels)[:, None] + self.positions[:, : x.shape[1]])
        y = y @ self.linear.weight.T + self.attention(y, y, y)[0]
        return self.head(y), self.conv(x[:, None].expand(-1, 3, -1, -1))


@pytest.fixture
def twins(monkeypatch: pytest.MonkeyPatch) -> tuple[Model, Model]:
    """A model with all its parameters held in half precision, and the same in float32."""
    monkeypatch.setattr(widened, "LEAST", 1)
    torch.manual_seed(0)
    halves = Model().bfloat16().state_dict()
    models = Model().eval().requires_grad_(False), Model().eval().requires_grad_(False)
    models[0].load_state_dict({name: held(tensor) for name, tensor in halves.items()}, assign=True)
    models[0].requires_grad_(False)
    models[1].load_state_dict({name: tensor.float() for name, tensor in halves.items()}, assign=True)
    for model in models:
        model.head.weight = model.table.weight
    return models


def test_a_model_computes_the_same_bits_as_with_float32_parameters(twins):
    x, labels = torch.randn(2, 5, 16), torch.tensor([1, 4])
    with torch.no_grad():
        ours, theirs = (model(x, labels) for model in twins)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert all(isinstance(p, Widened) and p.dtype == torch.float32 for p in twins[0].parameters())
    assert all(stored(p).dtype == torch.bfloat16 for p in twins[0].parameters())


def test_small_and_whole_tensors_are_held_as_they_were():
    small, large = torch.zeros(8, dtype=torch.float16), torch.zeros(1 << 20, dtype=torch.float16)
    assert type(held(small)) is torch.Tensor and held(small).dtype == torch.float32
    assert stored(held(large)) is large
    whole, count = torch.zeros(1 << 20), torch.zeros(1 << 20, dtype=torch.int64)
    assert held(whole) is whole and held(count) is count


def test_float_leaves_them_where_they_are(twins):
    before = [stored(p).data_ptr() for p in twins[0].parameters()]
    twins[0].float().eval().requires_grad_(False)
    assert [stored(p).data_ptr() for p in twins[0].parameters()] == before


def test_untouched_memory_stands_in_while_a_model_is_traced(twins):
    model, x, labels = twins[0], torch.randn(2, 5, 16), torch.tensor([1, 4])
    with torch.no_grad():
        expected = torch.export.export(twins[1], (x, labels), strict=False).module()(x, labels)
        with untouched(model) as restore:
            assert not any(isinstance(p, Widened) for p in model.parameters())
            assert model.head.weight is model.table.weight
            traced = torch.export.export(model, (x, labels), strict=False).module()
            restore(traced)
        assert all(isinstance(p, Widened) for p in model.parameters())
        assert all(torch.equal(a, b) for a, b in zip(traced(x, labels), expected, strict=True))


def test_a_value_that_is_not_finite_is_found_where_it_lies(twins, tmp_path):
    model, call = twins[0], lambda: twins[0](torch.randn(2, 5, 16), torch.tensor([1, 4]))
    require_finite(model, [call], tmp_path)
    stored(model.linear.weight)[3, 3] = torch.nan
    with pytest.raises(Exception, match=r"'linear\.weight' in .* holds NaN"):
        require_finite(model, [call], tmp_path)
