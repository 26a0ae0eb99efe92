"""Calls of several kinds, of other shapes, Python values and inputs: one artifact that shares the weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

import mpq_compiler
from mpq_compiler.frontend import call_file
from mpq_compiler.frontend.call_module import kinds_of
from mpq_compiler.frontend.denoiser import wrap_calls
from mpq_compiler.support import tensorfile
from mpq_compiler.support.errors import UserError
from tests.harness import tiny

QUICK = {"recipe": "w8a8", "target": "reference"}


class Versatile(nn.Module):
    """A denoiser of images [B, C, H, W] that may read a text with a mask, may run a second block, and repeats steps."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Conv2d(4, 16, 3, padding=1), nn.Conv2d(16, 4, 3, padding=1)
        self.norm, self.words, self.hint = nn.LayerNorm(16), nn.Linear(8, 16), nn.Linear(5, 16)
        self.to_q, self.to_k, self.to_v, self.out = (nn.Linear(16, 16) for _ in range(4))
        self.second, self.down = nn.Linear(16, 16), nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, sample, timestep, words, mask=None, hint=None, second: bool = True, steps: int = 1):
        y = self.enter(sample) + timestep[:, None, None, None]
        shape = y.shape
        y = y.flatten(2).transpose(1, 2)
        if hint is not None:
            y = y + self.hint(hint)[:, None]
        context = self.words(words)
        rows = self.to_q(self.norm(y)), self.to_k(context), self.to_v(context)
        q, k, v = (x.unflatten(2, (2, 8)).transpose(1, 2) for x in rows)
        bias = None if mask is None else ((1 - mask) * -1e4)[:, None, None]
        seen = functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        y = y + self.out(seen.transpose(1, 2).flatten(2))
        for _ in range(steps):
            if second:
                y = y + self.second(functional.silu(y))
        y = functional.silu(self.down(y.transpose(1, 2).reshape(shape)))
        return self.leave(y)


def versatile() -> Versatile:
    torch.manual_seed(0)
    return Versatile().eval()


def call(size: int = 8, tokens: int = 7, batch: int = 2, seed: int = 0, **more: object) -> dict:
    generator = torch.Generator().manual_seed(seed)
    return {
        "sample": torch.randn(batch, 4, size, size, generator=generator),
        "timestep": torch.rand(batch, generator=generator),
        "words": torch.randn(batch, tokens, 8, generator=generator),
        **more,
    }


def mask(batch: int = 2, tokens: int = 7) -> torch.Tensor:
    return (torch.arange(tokens) < tokens - 3).float().expand(batch, tokens).contiguous()


def hint(batch: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, 5, generator=torch.Generator().manual_seed(seed))


def decibels(expected: torch.Tensor, found: torch.Tensor) -> float:
    return float(10 * torch.log10(expected.square().sum() / (expected - found).square().sum()))


OTHERS = {
    "a latent size": (20, lambda **more: call(size=12, **more)),
    "a token count": (20, lambda **more: call(tokens=11, **more)),
    "a flag": (20, lambda **more: call(second=False, **more)),
    "a number": (12, lambda **more: call(steps=3, **more)),  # beyond the range that was calibrated
    "a mask": (15, lambda **more: call(mask=mask(more.get("batch", 2)), **more)),  # of a text that matters more
}
"""Least SQNR in dB, and calls of the other kind; compiled alone they have 19 to 25 dB."""


@pytest.mark.parametrize("other", OTHERS)
def test_kinds_share_the_weights(tmp_path: Path, other: str) -> None:
    """The first kind has the bits of an artifact of its own; the other adds tables of shapes alone."""
    model, (least, made) = versatile(), OTHERS[other]
    both = mpq_compiler.compile(model, tmp_path / "both.mpq", example=[call(), made()], **QUICK)
    alone = mpq_compiler.compile(model, tmp_path / "alone.mpq", example=call(), **QUICK)
    assert alone.weights["bytes"] <= both.weights["bytes"] <= alone.weights["bytes"] + 64
    compiled, single = mpq_compiler.load(tmp_path / "both.mpq"), mpq_compiler.load(tmp_path / "alone.mpq")
    assert torch.equal(compiled(**call(seed=9)), single(**call(seed=9)))
    for batch in (1, 3):
        given = made(batch=batch, seed=5)
        with torch.no_grad():
            expected = model(**given)
        assert decibels(expected, compiled(**given)) > least
    assert [entry["text"] for entry in both.calls] == [c["text"] for c in compiled.manifest["model"]["calls"]]
    assert both.calls[1]["sqnr_db"] > least
    assert any("record more of these" in note for note in both.notes) == (other == "a number")


def test_rewrites_and_widths_are_shared_on_this_cpu(tmp_path: Path) -> None:
    """With equalized and rotated channels, residual branches and time groups, in the kernels of this machine."""
    model, kinds = versatile(), [call(hint=hint()), call(size=12, tokens=11, second=False)]
    report = mpq_compiler.compile(model, tmp_path / "x.mpq", example=kinds, weights=6)
    assert not [note for note in report.notes if "something else" in note]
    compiled = mpq_compiler.load(tmp_path / "x.mpq")
    assert len({f for c in compiled.manifest["model"]["calls"] for f in c["functions"]}) == 4
    for given in (call(hint=hint(3, 5), batch=3, seed=5), call(size=12, tokens=11, second=False, batch=3, seed=5)):
        with torch.no_grad():
            expected = model(**given)
        assert decibels(expected, compiled(**given)) > 15


def test_a_lora_changes_calls_of_every_kind(tmp_path: Path) -> None:
    kinds, model = [call(), call(size=12, tokens=11)], versatile()
    mpq_compiler.compile(model, tmp_path / "x.mpq", example=kinds, lora_rank=2, **QUICK)
    generator = torch.Generator().manual_seed(3)
    up, down = torch.randn(16, 2, generator=generator), torch.randn(2, 16, generator=generator)
    factors = {"to_v.lora_A.weight": down, "to_v.lora_B.weight": up}
    save_file({f"transformer.{name}": tensor for name, tensor in factors.items()}, tmp_path / "x.safetensors")
    compiled = mpq_compiler.load(tmp_path / "x.mpq")
    before = [compiled(**given) for given in kinds]
    compiled.load_lora(tmp_path / "x.safetensors", 0.2)
    with torch.no_grad():
        model.to_v.weight += 0.2 * up @ down
    for given, plain in zip(kinds, before, strict=True):
        expected = model(**given)
        assert decibels(expected, compiled(**given)) > 15 > decibels(expected, plain)
    compiled.unload_lora()
    assert all(torch.equal(compiled(**given), plain) for given, plain in zip(kinds, before, strict=True))


def test_recorded_calls_are_grouped_and_the_most_frequent_kind_comes_first(tmp_path: Path) -> None:
    """Kinds differ in shapes and not in batches; a file of one kind that was written before is read as it was."""
    model, file = versatile(), tmp_path / "calls.safetensors"
    with mpq_compiler.record_inputs(model, file), torch.no_grad():
        model(**call(tokens=11))
        for seed in range(4):
            model(**call(batch=1 + seed % 2, seed=seed))
    first, second = call_file.read(file)
    assert first.inputs["words"].shape == (6, 7, 8) and second.inputs["words"].shape == (2, 11, 8)
    stated = tensorfile.metadata(file)
    (form, _), arrays = json.loads(stated[call_file.FORM]), tensorfile.load(file)
    with (tmp_path / "before.safetensors").open("wb") as stream:
        of_first = {name: value for name, value in arrays.items() if ":" not in name}
        tensorfile.save(stream, of_first, {**stated, call_file.FORM: json.dumps(form)})
    (before,) = call_file.read(tmp_path / "before.safetensors")
    assert before.form == first.form and torch.equal(before.inputs["words"], first.inputs["words"])


def test_a_call_of_no_kind_is_told_the_nearest_and_all(tmp_path: Path) -> None:
    mpq_compiler.compile(versatile(), tmp_path / "x.mpq", example=[call(), call(size=12, steps=2)], **QUICK)
    compiled = mpq_compiler.load(tmp_path / "x.mpq")
    kinds = (
        r"; this denoiser was compiled for 2 kinds of calls: sample \[B, 4, 8, 8\] without steps; "
        r"sample \[B, 4, 12, 12\] with steps = 2$"
    )
    for given, said in (
        (call(tokens=9), r"input 'words' has shape \[2, 9, 8\]; this artifact takes \[B, 7, 8\]"),
        (call(size=12), r"input 'sample' has shape \[2, 4, 12, 12\]; this artifact takes \[B, 4, 8, 8\]"),
        (call(steps=3), "'steps' was not given when it was compiled|'steps' is 3, and was 2 when it was compiled"),
        (call(hint=hint()), "'hint' was not given when it was compiled"),
    ):
        with pytest.raises(UserError, match=f"({said}).*{kinds}"):
            compiled(**given)
    with pytest.raises(UserError, match="there is no kind 2 of calls: this artifact has 2"):
        compiled.run({}, kind=2)


def test_a_layer_that_was_not_calibrated_is_named(tmp_path: Path) -> None:
    said = (
        r"one artifact cannot hold calls of sample \[B, 4, 8, 8\] without hint and of .* with hint \[B, 5\]: the layer "
        "'hint' is computed in the latter alone and has no scales: record more of these"
    )
    with pytest.raises(UserError, match=said):
        mpq_compiler.compile(versatile(), tmp_path / "x.mpq", example=[call(), call(hint=hint())], **QUICK)
    mpq_compiler.compile(versatile(), tmp_path / "x.mpq", example=[call(hint=hint()), call()], **QUICK)


def test_a_number_that_changes_with_every_call_is_named() -> None:
    model = versatile()
    with pytest.raises(UserError, match=r"are of 9 kinds, and an artifact holds 8: 'steps' is 3, .*must be a tensor"):
        kinds_of(model, [call(steps=2 + n) for n in range(9)])


def test_images_of_two_sizes_are_recorded_of_a_known_model(tmp_path: Path) -> None:
    """Its inputs are known, and a file of one size needs no form."""
    model, file = tiny.model("unet2d"), tmp_path / "calls.safetensors"
    sizes = [tiny.inputs("unet2d", sample_size=size) for size in (16, 8)]
    for calls in (sizes[:1], sizes):
        with mpq_compiler.record_inputs(model, file), torch.no_grad():
            for given in calls:
                expected = model(**given).sample
        assert call_file.has_call(file) == (len(calls) > 1)
    (other,) = wrap_calls(model, file).kinds
    assert torch.allclose(other(**sizes[1]), expected, atol=1e-5)
