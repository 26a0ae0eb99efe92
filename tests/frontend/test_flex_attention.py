from __future__ import annotations

import sys
import threading
import types

import pytest
import torch
from torch.nn.attention import flex_attention as torchs

import mpq_compiler
from mpq_compiler.frontend import flex_attention
from mpq_compiler.frontend.call_module import variations
from mpq_compiler.support.errors import UserError

OWN = torchs.flex_attention


def tokens(heads: int, length: int, seed: int) -> torch.Tensor:
    return torch.randn(2, heads, length, 16, generator=torch.Generator().manual_seed(seed))


def causal(sample, head, query, key):
    return query >= key


@pytest.mark.parametrize("case", ["plain", "scale", "causal", "heads", "score", "score+mask", "groups"])
def test_it_computes_what_torch_does(case):
    keys = 2 if case == "groups" else 4
    length = {"causal": (40, 40), "score+mask": (40, 40)}.get(case, (33, 57))
    q, k, v = tokens(4, length[0], 0), tokens(keys, length[1], 1), tokens(keys, length[1], 2)
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625])

    def alibi(score, sample, head, query, key):
        return score - slopes[head] * (query - key).abs() + sample

    options = {
        "plain": lambda: {},
        "scale": lambda: {"scale": 0.3},
        "causal": lambda: {"block_mask": torchs.create_block_mask(causal, None, None, 40, 40, "cpu")},
        "heads": lambda: {
            "block_mask": torchs.create_block_mask(lambda b, h, q, k: (k + h + b) % 4 > 0, 2, 4, 33, 57, "cpu")
        },
        "score": lambda: {"score_mod": alibi},
        "score+mask": lambda: {
            "score_mod": alibi,
            "block_mask": torchs.create_block_mask(causal, None, None, 40, 40, "cpu"),
        },
        "groups": lambda: {"enable_gqa": True, "score_mod": alibi},
    }[case]
    expected = OWN(q, k, v, **options())
    with flex_attention.dense():
        given = torchs.flex_attention(q, k, v, **options())
    torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-6)


def test_a_query_sees_the_blocks_that_are_listed():
    """Of two rows of three blocks of 64 one is seen in part and one whole; torch reads the lists on a GPU only."""
    numbers, indices = torch.tensor([[[1, 1]]]), torch.tensor([[[[0, 1, 2], [1, 0, 2]]]])
    whole, wholes = torch.tensor([[[0, 1]]]), torch.tensor([[[[2, 1, 0], [0, 1, 2]]]])
    mask = torchs.BlockMask.from_kv_blocks(
        numbers.int(), indices.int(), whole.int(), wholes.int(), 64, lambda b, h, q, k: (q + k) % 3 > 0
    )
    query, key = torch.arange(128)[:, None], torch.arange(192)
    part = ((query < 64) & (key < 64) | (query >= 64) & (key >= 64) & (key < 128)) & ((query + key) % 3 > 0)
    assert torch.equal(flex_attention.dense_mask(mask, 128, 192)[0, 0], part | ((query >= 64) & (key < 64)))


class Flexible(torch.nn.Module):
    """A denoiser of tokens with causal attention by torch's function."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.out = torch.nn.Linear(32, 96), torch.nn.Linear(32, 32)
        self.time = torch.nn.Linear(1, 32)

    def forward(self, hidden_states, timestep):
        x = hidden_states + self.time(timestep[:, None].float() / 1000)[:, None]
        q, k, v = (part.unflatten(-1, (2, 16)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        length = x.shape[1]
        mask = torchs.create_block_mask(causal, None, None, length, length, x.device)
        seen = torchs.flex_attention(q, k, v, block_mask=mask)
        return (self.out(seen.transpose(1, 2).flatten(2)),)


def test_a_model_with_it_compiles(tmp_path):
    model = Flexible().eval()
    call = {"hidden_states": torch.randn(2, 12, 32), "timestep": torch.tensor([10.0, 900.0])}
    mpq_compiler.compile(model, tmp_path / "x.mpq", example=call, recipe="w8a8", target="reference")
    artifact = mpq_compiler.load(tmp_path / "x.mpq")
    unseen = variations(model, call, 2, 9)[1]
    with torch.no_grad():
        expected, given = model(**unseen)[0], artifact(**unseen)[0]
    assert 20 * torch.log10(expected.norm() / (expected - given).norm()) > 30
    assert torchs.flex_attention is OWN


def test_it_is_replaced_while_any_thread_is_inside():
    entered, leave = threading.Event(), threading.Event()

    def inside():
        with flex_attention.dense():
            entered.set()
            leave.wait(60)

    thread = threading.Thread(target=inside)
    thread.start()
    entered.wait(60)
    with flex_attention.dense():
        pass
    assert torchs.flex_attention is flex_attention.attention
    leave.set()
    thread.join()
    assert torchs.flex_attention is OWN


def test_a_module_that_imported_the_function_has_it_replaced(monkeypatch):
    module = types.ModuleType("somebodys_model")
    module.flex_attention = OWN
    monkeypatch.setitem(sys.modules, "somebodys_model", module)
    with flex_attention.dense():
        assert module.flex_attention is flex_attention.attention
    assert module.flex_attention is OWN


def test_more_than_the_output_is_refused(tmp_path):
    class Sums(Flexible):
        def forward(self, hidden_states, timestep):
            x = hidden_states.unflatten(-1, (2, 16)).transpose(1, 2)
            out, sums = torchs.flex_attention(x, x, x, return_lse=True)
            return (out.transpose(1, 2).flatten(2) * sums.mean() * timestep[:, None, None],)

    call = {"hidden_states": torch.randn(2, 12, 32), "timestep": torch.tensor([10.0, 900.0])}
    with pytest.raises(UserError, match="for its output alone"):
        mpq_compiler.compile(Sums().eval(), tmp_path / "x.mpq", example=call, recipe="w8a8", target="reference")
    assert not (tmp_path / "x.mpq").exists()
