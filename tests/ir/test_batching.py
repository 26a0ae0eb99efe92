"""Graphs of a batch against the calls of one sample that they are made of."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from mpq_compiler.ir.batching import BATCH, with_batch

TABLE = torch.linspace(-1, 1, 5 * 6).reshape(5, 6)
ROWS = torch.tensor([2, 0, 3])
WEIGHT = torch.linspace(-1, 1, 3 * 6).reshape(3, 6)
KERNEL = torch.linspace(-1, 1, 4 * 5 * 3).reshape(4, 5, 3)


def kept(x: Tensor) -> Tensor:
    return x[None]


CASES: dict[str, Callable[[Tensor], Tensor]] = {
    # x is [1, 5, 6]
    "pointwise": lambda x: torch.where(x > 0, x * 2 + 1, TABLE).tanh(),
    "pointwise of two": lambda x: x + x[:, :1] * x.mean(-1, keepdim=True),
    "against more dimensions": lambda x: kept(x * torch.arange(4.0).reshape(4, 1, 1)),
    "without the sample's dimension": lambda x: kept((x[0] + TABLE).relu()),
    "views": lambda x: x.reshape(5, 6).reshape(1, 30).unflatten(1, (2, 15)).unsqueeze(0).squeeze(0),
    "the sample in the middle": lambda x: (x.reshape(5, 6).unsqueeze(1) * 2).permute(1, 2, 0),
    "permuted and back": lambda x: x.permute(2, 0, 1).transpose(0, 1) + 1,
    "transposed without a sample": lambda x: kept(x[0].t().contiguous()),
    "linear": lambda x: F.linear(x, WEIGHT),
    "linear of rows": lambda x: kept(F.linear(x.reshape(5, 6), WEIGHT)),
    "norms": lambda x: F.rms_norm(F.layer_norm(x, (5, 6)), (6,), TABLE[0]),
    "along dimensions": lambda x: x.softmax(-1) + x.cumsum(1) + x.amax((1, 2), keepdim=True),
    "without a dimension": lambda x: x.sum(1).unsqueeze(1) * x.mean(),
    "along the sample": lambda x: x.sum(0, keepdim=True) + x.flip(0) + x.softmax(0),
    "slices": lambda x: torch.cat([x[:, 1:], x[:, :1]], 1) + x[0:1],
    "selected": lambda x: torch.stack([x[:, 3], x[:, 1]], 1),
    "chunks": lambda x: torch.cat([*x.chunk(3, 2)][::-1], -1),
    "one from each": lambda x: torch.stack([*x.unbind(1)], 2),
    "the sample itself": lambda x: torch.stack([*x.unbind(0)], 0),
    "joined with a table": lambda x: torch.cat([x, TABLE[None]], 1),
    "joined without a sample": lambda x: kept(torch.cat([TABLE, x[0], TABLE], 0)),
    "stacked with a table": lambda x: kept(torch.stack([x[0], TABLE], 1)),
    "padded lists": lambda x: torch.nn.utils.rnn.pad_sequence([x[0]], batch_first=True),
    "expanded": lambda x: x[:, None].expand(1, 4, 5, 6) + x.reshape(5, 6).unsqueeze(1).expand(5, 4, 6).transpose(0, 1),
    "repeated": lambda x: x.repeat(1, 2, 1) + x[0].repeat(2, 1),
    "interleaved": lambda x: x.repeat_interleave(2, 1),
    "interleaved samples": lambda x: kept(x.reshape(1, 30)[:, 0].repeat_interleave(4)),
    "padded": lambda x: F.pad(F.pad(x, (1, 2)), (0, 0, 1, 0, 0, 0)),
    "padded by its edges": lambda x: F.pad(F.pad(x, (1, 2), "replicate"), (0, 1), "reflect"),
    "padded by the edges of many": lambda x: F.pad(x.reshape(5, 1, 6), (1, 2), "replicate").reshape(1, 5, 9),
    "put where a mask is": lambda x: x.index_put((x[..., 0] > 0,), torch.tensor(2.0)),
    "products": lambda x: x @ x.transpose(1, 2) @ TABLE,
    "products without a sample": lambda x: kept(x[0] @ TABLE.t() @ x[0]),
    "attention": lambda x: F.scaled_dot_product_attention(x[:, None], x[:, None], TABLE[None, None])[:, 0],
    "attention without a sample": lambda x: F.scaled_dot_product_attention(x, x, x.tanh()),
    "attention of many": lambda x: F.scaled_dot_product_attention(*[x.reshape(5, 1, 1, 6)] * 3).reshape(1, 5, 6),
    "convolution": lambda x: F.conv1d(x, KERNEL, padding=1),
    "convolution of many": lambda x: F.conv1d(x.reshape(6, 5, 1), KERNEL, padding=1).reshape(1, 6, 4),
    "group norm": lambda x: F.group_norm(x, 5),
    "read by index": lambda x: x[:, ROWS] + kept(x[0][ROWS]),
    "read from a table": lambda x: TABLE[(x.abs() * 2).long().clamp(max=4)].sum(2),
    "embedded": lambda x: F.embedding((x.abs() * 2).long().clamp(max=4), TABLE).mean(2),
    "outer": lambda x: torch.outer(x.reshape(-1), TABLE[0]).reshape(1, 30, 6),
    "other orders": lambda x: torch.einsum("nab->bna", x).permute(1, 0, 2),
    "products that sum nothing": lambda x: torch.einsum("...n,d->...nd", x[0], TABLE[0])[None],
    "diagonals": lambda x: torch.diag_embed(x) @ TABLE.t(),
    "put where others are read": lambda x: torch.ops.aten.index_put(x, [None, None, ROWS], x.exp()[..., ROWS]),
    "put where others are read, without a sample": lambda x: kept(
        torch.ops.aten.index_put(x[0], [None, ROWS], x[0].exp()[:, ROWS])
    ),
    "complex": lambda x: torch.view_as_real(torch.view_as_complex(x.reshape(1, 5, 3, 2)) * 1j).flatten(2),
    "of the type of another": lambda x: x + TABLE.double().type_as(x),
    "the same for all": lambda x: TABLE[None] * torch.ones_like(x)[:, :1],
}


@pytest.mark.parametrize("name", CASES)
def test_each_sample_is_computed_as_it_is_alone(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    batch = torch.randn(3, 5, 6, generator=generator)
    function = CASES[name]
    module = make_fx(function, pre_dispatch=True)(batch[:1])
    module.graph.eliminate_dead_code()
    graph = with_batch(module.graph)
    found = torch.fx.GraphModule(module, graph)(batch)
    expected = torch.cat([function(sample[None]) for sample in batch])
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    sizes = {tuple(node.meta["val"].shape) for node in graph.nodes if node.op == "placeholder"}
    assert sizes == {(BATCH, 5, 6)}


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: x.sort(1).values, "there is no rule for a batch of sort"),
        (lambda x: F.linear(TABLE[None], x[0]), "a weight of linear differs between samples"),
        (lambda x: TABLE[(x[0, :, 0] > 0).long(), (x[0, :, 1] > 0).long()][None], "reads at places that differ"),
    ],
)
def test_what_has_no_rule_is_named(function: Callable[[Tensor], Tensor], reason: str) -> None:
    module = make_fx(function, pre_dispatch=True)(torch.ones(1, 5, 6))
    with pytest.raises(ValueError, match=reason):
        with_batch(module.graph)
