"""Models that nobody has seen: taken by a call, compiled, and called as they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import mpq_compiler
from mpq_compiler.frontend import call_file
from mpq_compiler.frontend.call_module import variations
from mpq_compiler.support.errors import UserError
from tests.harness import tiny

QUICK = {"recipe": "w8a8", "target": "reference"}


class Strange(nn.Module):
    """A denoiser of sounds [B, C, T] that is called by nested arguments, counts by complex numbers, and returns two."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Conv1d(4, 16, 3, padding=1)
        self.context = nn.Linear(6, 16)
        self.time = nn.Linear(16, 16)
        self.mix = nn.Linear(16, 16)
        self.leave = nn.Conv1d(16, 4, 1)
        self.score = nn.Linear(16, 3)

    def forward(self, x, sigma, *, context, ids, loud: bool = False, gain=None):
        angles = ids[:, None] / 10 ** (torch.arange(8) / 8)
        turns = torch.polar(torch.ones_like(angles), angles)
        y = self.enter(x).transpose(1, 2).contiguous()
        pairs = torch.view_as_complex(y.reshape(*y.shape[:-1], 8, 2))
        y = torch.view_as_real(pairs * turns).flatten(-2)
        waves = torch.cat([(sigma[:, None] * torch.arange(1, 9)).sin(), (sigma[:, None] * torch.arange(1, 9)).cos()], 1)
        seen = self.context(context["tokens"]).mean(1) + self.time(waves)
        start = torch.zeros(x.shape[0], 1, 16)
        y = torch.cat([start, nn.functional.silu(self.mix(y + seen[:, None]))], 1)
        y = y[:, 1:] * 2 if loud else y[:, 1:]
        y = y if gain is None else y * gain[0][:, None, None]
        return {"noise": self.leave(y.transpose(1, 2)), "scores": [self.score(y.mean(1))]}


def strange() -> Strange:
    torch.manual_seed(0)
    return Strange().eval()


def call(batch: int = 2, seed: int = 0) -> dict:
    generator = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn(batch, 4, 12, generator=generator),
        "sigma": torch.rand(batch, generator=generator),
        "context": {"tokens": torch.randn(batch, 5, 6, generator=generator)},
        "ids": torch.arange(12.0),
    }


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> mpq_compiler.CompiledDenoiser:
    output = tmp_path_factory.mktemp("calls") / "strange.mpq"
    report = mpq_compiler.compile(strange(), output, example=call(), **QUICK)
    assert report.quality["sqnr_db"] > 25
    return mpq_compiler.load(output)


def decibels(expected: torch.Tensor, found: torch.Tensor) -> float:
    return float(10 * torch.log10(expected.square().sum() / (expected - found).square().sum()))


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_it_is_called_as_its_model_is(compiled: mpq_compiler.CompiledDenoiser, batch: int) -> None:
    """By position and name, nested as it was, at other batches than the example's; both results come back in place."""
    given = call(batch, seed=7)
    with torch.no_grad():
        expected = strange()(**given)
    found = compiled(given.pop("x"), given.pop("sigma"), **given)
    assert found.keys() == expected.keys() and isinstance(found["scores"], list)
    assert found["noise"].shape == expected["noise"].shape and decibels(expected["noise"], found["noise"]) > 20
    # three numbers of the mean of a sample, a hundredth of the output's power
    assert found["scores"][0].shape == (batch, 3) and decibels(expected["scores"][0], found["scores"][0]) > 15


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"ids": torch.arange(12.0) + 1}, "'ids' was the same in every call .* has other values now"),
        ({"ids": torch.arange(13.0)}, r"'ids' was the same in every call .*, \[12\], and is \[13\]"),
        ({"loud": True}, "'loud' was not given when it was compiled"),
        ({"gain": [torch.ones(2)]}, "'gain' was not given when it was compiled"),
        ({"context": {"token": torch.ones(2, 5, 6)}}, "'context.token' was not given .*did you mean 'tokens'"),
        ({"context": torch.ones(2, 5, 6)}, "'context' is a tensor, and was a dict of tokens"),
        ({"context": None}, "'context' is missing"),
        ({"x": torch.ones(2, 4, 13)}, r"input 'x' has shape \[2, 4, 13\]; this artifact takes \[B, 4, 12\]"),
    ],
)
def test_nothing_that_is_given_is_ignored(compiled: mpq_compiler.CompiledDenoiser, change: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        compiled(**{**call(), **change})


def test_the_default_of_a_value_may_be_given(compiled: mpq_compiler.CompiledDenoiser) -> None:
    assert torch.equal(compiled(**call(), loud=False, gain=None)["noise"], compiled(**call())["noise"])


def test_recorded_calls_make_the_same_artifact_as_the_calls_themselves(tmp_path: Path) -> None:
    model = strange()
    calls = variations(model, call(), 6, seed=0)
    with mpq_compiler.record_inputs(model, tmp_path / "recorded.safetensors"), torch.no_grad():
        for one in calls:
            model(**one)
    call_file.write(tmp_path / "written.safetensors", model, calls)
    for name in ("recorded", "written"):
        file = tmp_path / f"{name}.safetensors"
        mpq_compiler.compile(strange(), tmp_path / f"{name}.mpq", calibration=file, **QUICK)
    first, second = (mpq_compiler.load(tmp_path / f"{name}.mpq")(**call()) for name in ("recorded", "written"))
    assert torch.equal(first["noise"], second["noise"])


class Renamed(Strange):
    def forward(self, sound, level, words, ids):
        return super().forward(sound, level, context={"tokens": words}, ids=ids)["noise"]


def renamed() -> tuple[Renamed, dict]:
    """A model whose arguments no name tells, and a call of it."""
    torch.manual_seed(0)
    given = call()
    named = {"sound": given["x"], "level": given["sigma"], "words": given["context"]["tokens"], "ids": given["ids"]}
    return Renamed().eval(), named


def test_what_is_the_latent_can_be_said_where_it_is_compiled(tmp_path: Path) -> None:
    model, named = renamed()
    mpq_compiler.compile(model, tmp_path / "x.mpq", example=named, latent="sound", time="level", **QUICK)
    compiled = mpq_compiler.load(tmp_path / "x.mpq")
    assert compiled.manifest["sampling"]["latent"] == "sound" and "timestep" in compiled.input_names
    with torch.no_grad():
        assert decibels(model(**named), compiled(**named)) > 20
    level = 0.25
    named["level"] = torch.full((2,), level)
    assert torch.equal(compiled(**named), compiled(**{**named, "level": level}))


def test_what_a_file_took_for_the_latent_can_be_corrected(tmp_path: Path) -> None:
    """The words vary, too, and nothing says that they are no latents; the file's rows get other names."""
    model, named = renamed()
    file = tmp_path / "calls.safetensors"
    words_first = {"words": named.pop("words"), **named}
    with mpq_compiler.record_inputs(model, file, latent="words", time="sound"), torch.no_grad():
        for seed in range(6):
            noise = torch.Generator().manual_seed(seed)
            words_first |= {"words": torch.randn(2, 5, 6, generator=noise), "level": torch.full((2,), seed / 6)}
            model(**{**words_first, "sound": torch.randn(2, 4, 12, generator=noise)})
    said = {"latent": "sound", "time": "level"}
    mpq_compiler.compile(model, tmp_path / "x.mpq", calibration=file, **said, **QUICK)
    compiled = mpq_compiler.load(tmp_path / "x.mpq")
    assert compiled.manifest["sampling"]["latent"] == "sound"
    with torch.no_grad():
        assert decibels(model(**words_first), compiled(**words_first)) > 20
    for wrong, sentence in (
        ({"latent": "noise"}, "the calls have no tensor 'noise': they have sound, level, words, ids"),
        ({"latent": "ids"}, "recorded with 'words' as latents, .* record them again with latent='ids'"),
        ({"time": "ids"}, "'ids' was the same in every call, and is no time"),
    ):
        with pytest.raises(UserError, match=sentence):
            mpq_compiler.compile(model, tmp_path / "y.mpq", calibration=file, **wrong, **QUICK)


def test_a_latent_without_recorded_calls_is_refused(tmp_path: Path) -> None:
    model, named = renamed()
    for wrong in ({"latent": "noise", "time": "level"}, {"latent": "sound", "time": "noise"}):
        with pytest.raises(UserError, match="the calls have no tensor 'noise': they have sound, level, words, ids"):
            mpq_compiler.compile(model, tmp_path / "x.mpq", example=named, **wrong, **QUICK)
    for option in ("latent", "time"):
        with pytest.raises(UserError, match=f"^{option} says what an argument of recorded calls is: give a file"):
            mpq_compiler.compile("fashion-unet", tmp_path / "x.mpq", **{option: "sample"}, **QUICK)


def test_a_text_of_recorded_length_needs_no_option(tmp_path: Path) -> None:
    """The configuration says nothing of 12 tokens, and the file does."""
    folder, model = tiny.save("sd15", tmp_path / "model"), tiny.model("sd15")
    words = torch.randn(8, 12, model.config.cross_attention_dim, generator=torch.Generator().manual_seed(0))
    given = tiny.inputs("sd15", batch=8) | {"encoder_hidden_states": words}
    with mpq_compiler.record_inputs(model, tmp_path / "calls.safetensors"), torch.no_grad():
        expected = model(**given).sample
    assert not call_file.has_call(tmp_path / "calls.safetensors")
    mpq_compiler.compile(folder, tmp_path / "x.mpq", calibration=tmp_path / "calls.safetensors", **QUICK)
    assert decibels(expected, mpq_compiler.load(tmp_path / "x.mpq")(**given).sample) > 20


def test_arguments_are_found_by_name_or_named(tmp_path: Path) -> None:
    model, named = renamed()
    file = tmp_path / "calls.safetensors"
    with pytest.raises(UserError, match="Renamed is no denoiser, for its call has no noisy latents"):
        mpq_compiler.compile(model, tmp_path / "x.mpq", example=named, **QUICK)
    with mpq_compiler.record_inputs(model, file, latent="sound", time="level"), torch.no_grad():
        for seed in range(6):
            noise = torch.randn(2, 4, 12, generator=torch.Generator().manual_seed(seed))
            model(**{**named, "sound": noise, "level": torch.full((2,), seed / 6)})
    mpq_compiler.compile(model, tmp_path / "x.mpq", calibration=file, **QUICK)
    with torch.no_grad():
        assert decibels(model(**named), mpq_compiler.load(tmp_path / "x.mpq")(**named)) > 20


def test_what_a_call_lacks_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Strange is compiled by its calls: give one with `example`, or a file"):
        mpq_compiler.compile(strange(), tmp_path / "x.mpq", **QUICK)
    with pytest.raises(UserError, match="an example is of a module in memory"):
        mpq_compiler.compile("fashion-unet", tmp_path / "x.mpq", example=call(), **QUICK)
    file = tmp_path / "calls.safetensors"
    call_file.write(file, strange(), [call()])
    sentence = r"Linear cannot be called with one sample of the calls in '.*calls\.safetensors': .*; if samples share"
    with pytest.raises(UserError, match=sentence):
        mpq_compiler.compile(nn.Linear(3, 3), tmp_path / "x.mpq", calibration=file, **QUICK)
    assert not (tmp_path / "x.mpq").exists()


class Crowd(nn.Module):
    """A denoiser of tokens that adds images to samples by their number, or the mean of all samples."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(6, 6)

    def forward(self, hidden_states, timestep, images=None):
        y = hidden_states + timestep[:, None, None] / 1000
        if images is None:
            return self.mix(y + y.mean(0, keepdim=True))
        added = torch.stack([y[i] + images[i] if i in images else y[i] for i in range(len(y))])
        return self.mix(added)


def test_samples_that_are_something_else_alone_are_refused(tmp_path: Path) -> None:
    """An artifact computes every sample by itself: of these it would make something else, and no one would know."""
    torch.manual_seed(0)
    model, latents = Crowd().eval(), torch.randn(2, 5, 6)
    seen = {"hidden_states": latents, "timestep": torch.tensor([3.0, 800.0])}
    with pytest.raises(UserError, match="Crowd makes something else of sample 0 of a call than of it alone: they see"):
        mpq_compiler.compile(model, tmp_path / "x.mpq", example=seen, **QUICK)
    numbered = seen | {"images": {0: 2.0}}
    with pytest.raises(UserError, match="something else of sample 1 of a call than of it alone: 'images' may name"):
        mpq_compiler.compile(model, tmp_path / "x.mpq", example=numbered, **QUICK)
    one = {k: v[:1] if isinstance(v, torch.Tensor) else v for k, v in numbered.items()}
    mpq_compiler.compile(model, tmp_path / "x.mpq", example=one, **QUICK)
    with torch.no_grad():
        assert decibels(model(**one), mpq_compiler.load(tmp_path / "x.mpq")(**one)) > 25


def test_arrays_come_back_as_arrays(compiled: mpq_compiler.CompiledDenoiser) -> None:
    arrays = {k: {"tokens": v["tokens"].numpy()} if k == "context" else v.numpy() for k, v in call().items()}
    found = compiled(**arrays)
    assert isinstance(found["noise"], np.ndarray)
    assert np.array_equal(found["noise"], compiled(**call())["noise"].numpy())


class Listed(nn.Module):
    """A denoiser that loops over samples: it takes and returns lists with a tensor for each, and cuts texts."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(6, 32), nn.Linear(32, 6)
        self.words = nn.Linear(8, 32)
        self.register_buffer("turns", torch.randn(40, 32), persistent=False)

    def forward(self, x, t, words, mask, turns=None, return_dict: bool = True):
        turns = self.turns if turns is None else turns
        found = []
        for i, image in enumerate(x):
            tokens = torch.cat([self.enter(image), self.words(words[i, : int(mask[i].sum())])])
            tokens = tokens * torch.ones(1).data.mul_(2) + turns[: len(tokens)] * t[i]
            tokens = nn.functional.silu(nn.functional.scaled_dot_product_attention(*[tokens[None]] * 3)[0])
            found.append(self.leave(tokens[: len(image)]))
        return {"noise": found}


def listed() -> Listed:
    torch.manual_seed(3)
    return Listed().eval()


def list_call(batch: int = 2, seed: int = 0) -> dict:
    generator = torch.Generator().manual_seed(seed)
    return {
        "x": [torch.randn(12, 6, generator=generator) for _ in range(batch)],
        "t": torch.rand(batch, generator=generator),
        "words": torch.randn(batch, 7, 8, generator=generator),
        "mask": torch.tensor([[1, 1, 1, 1, 1, 0, 0]] * batch),
        "turns": torch.randn(40, 32, generator=torch.Generator().manual_seed(9)),
    }


def test_lists_of_samples_and_masks_that_decide(tmp_path: Path) -> None:
    """Its code loops over samples and reads lengths, so that no batch can be traced; a table has 20 rows a sample."""
    report = mpq_compiler.compile(listed(), tmp_path / "x.mpq", example=list_call(), **QUICK)
    (note,) = (note for note in report.notes if "decide" in note)
    assert "the values of 'mask' decide what Listed computes" in note
    compiled = mpq_compiler.load(tmp_path / "x.mpq")
    for batch in (1, 2, 3):
        given = list_call(batch, seed=5)
        with torch.no_grad():
            expected = listed()(**given)["noise"]
        found = compiled(**given)["noise"]
        assert isinstance(found, list) and len(found) == batch
        assert decibels(torch.stack(expected), torch.stack(found)) > 20
    with pytest.raises(UserError, match=r"'mask' was the same in every call .* has other values now"):
        compiled(**{**list_call(), "mask": torch.ones(2, 7, dtype=torch.int64)})
    with pytest.raises(UserError, match="'x' is a tensor, and was a list with a tensor for each sample"):
        compiled(**{**list_call(), "x": torch.ones(2, 12, 6)})


def test_lengths_that_differ_between_samples_are_refused_where_they_decide(tmp_path: Path) -> None:
    """Numbers that code reads at once, by `tolist`, decide like those that it reads one by one."""

    class AtOnce(Listed):
        def forward(self, x, t, words, mask, turns=None, return_dict: bool = True):
            lengths = mask.sum(1).tolist()
            cut = torch.stack([torch.arange(7) < length for length in lengths])
            return super().forward(x, t, words, cut, turns)

    model = AtOnce().eval()
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0, 0]])
    said = r"control flow depends on the values of 'mask', which differ between the samples .* padded to one length"
    with pytest.raises(UserError, match=said):
        mpq_compiler.compile(model, tmp_path / "x.mpq", example=list_call() | {"mask": mask}, **QUICK)
    mpq_compiler.compile(model, tmp_path / "x.mpq", example=list_call(), **QUICK)


def test_a_constant_may_be_complex(tmp_path: Path) -> None:
    """Rotary positions [N, C / 2] as complex numbers, which a call must repeat."""

    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.leave = nn.Linear(6, 32), nn.Linear(32, 6)

        def forward(self, x, t, turns):
            y = torch.view_as_complex(self.enter(x).unflatten(2, (16, 2))) * turns
            return self.leave(nn.functional.silu(torch.view_as_real(y).flatten(2) + t[:, None, None]))

    turns = torch.polar(torch.ones(12, 16), torch.rand(12, 16))
    call = {"x": torch.randn(2, 12, 6), "t": torch.rand(2), "turns": turns}
    mpq_compiler.compile(model := Turned().eval(), tmp_path / "x.mpq", example=call, **QUICK)
    compiled = mpq_compiler.load(tmp_path / "x.mpq")
    with torch.no_grad():
        assert decibels(model(**call), compiled(**call)) > 20
    with pytest.raises(UserError, match=r"'turns' was the same in every call .* has other values now"):
        compiled(**{**call, "turns": turns.conj()})


class Film(nn.Module):
    """A denoiser of films [B, C, T, H, W] that computes every frame alone, and then over time."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.down = nn.Conv2d(4, 16, 3, padding=1), nn.Conv2d(16, 16, 3, stride=2, padding=1)
        self.norm, self.over = nn.GroupNorm(4, 16), nn.GroupNorm(4, 16)
        self.to_q, self.to_k, self.to_v = (nn.Linear(16, 16) for _ in range(3))
        self.time, self.leave = nn.Conv3d(16, 16, (3, 1, 1), padding=(1, 0, 0)), nn.Conv2d(16, 4, 3, padding=1)
        self.sound, self.back = nn.Conv1d(16, 16, 2, stride=2), nn.ConvTranspose1d(16, 16, 4, stride=2, padding=1)

    def forward(self, sample, timestep):
        batch, _, frames, height, width = sample.shape
        y = sample.permute(0, 2, 1, 3, 4).reshape(-1, 4, height, width)
        y = y + timestep.repeat_interleave(frames)[:, None, None, None]
        y = self.down(nn.functional.mish(self.norm(self.enter(y))))
        tokens = y.flatten(2).transpose(1, 2)
        q, k, v = (f(tokens).unflatten(2, (2, 8)).transpose(1, 2) for f in (self.to_q, self.to_k, self.to_v))
        tokens = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        y = y + tokens.transpose(1, 2).reshape(y.shape)
        film = y.unflatten(0, (batch, frames)).transpose(1, 2)
        film = film + self.time(self.over(film))
        line = film.mean((3, 4))
        film = film + self.back(self.sound(line))[..., None, None]
        y = nn.functional.interpolate(film.transpose(1, 2).flatten(0, 1), scale_factor=2.0)
        return self.leave(y).unflatten(0, (batch, frames)).transpose(1, 2)


def test_frames_and_time_on_this_cpu(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Film().eval()
    given = {"sample": torch.randn(2, 4, 6, 8, 8), "timestep": torch.rand(2)}
    report = mpq_compiler.compile(model, tmp_path / "x.mpq", example=given, recipe="w8a8")
    assert abs(report.quality["agreement_db"]) < 0.1
    unseen = {"sample": torch.randn(3, 4, 6, 8, 8), "timestep": torch.rand(3)}
    with torch.no_grad():
        assert decibels(model(**unseen), mpq_compiler.load(tmp_path / "x.mpq")(**unseen)) > 25


class Layered(nn.Module):
    """A denoiser of tokens that is given the layers of a text [L, B, T, C], places, and Python values by number."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave, self.words = nn.Linear(6, 32), nn.Linear(32, 6), nn.Linear(8, 32)
        self.over = nn.Conv1d(32, 32, 3)
        self.kinds = nn.Embedding(2, 32)
        self.project = nn.Parameter(torch.randn(32, 32) / 6)
        self.waves = nn.Parameter(torch.randn(16, 1))

    def forward(self, x, t, layers, mask, drop, places, sizes):
        angles = t[:, None] @ self.waves.T
        y = self.enter(x) + torch.cat([angles.sin(), angles.cos()], -1)[:, None]
        y = self.over(nn.functional.pad(y.transpose(1, 2), (2, 0), mode="replicate")).transpose(1, 2)
        y = y + self.kinds((places[..., 0] == 1).long())
        turns = (
            torch.arange(1.0, 9)[None, None, :, None].expand(2, len(x), -1, 1)
            @ places.float().permute(2, 0, 1)[:, :, None]
        )
        turns = turns.transpose(2, 3)
        own = turns[0].clone()
        own[..., torch.arange(1, 8, 3)] = turns[1][..., torch.arange(1, 8, 3)]
        y = y * own.cos().repeat(1, 1, 4)
        words = self.words(layers[0] + layers[1] * layers[2].tanh())
        words[drop] *= 0.0
        mean = (words * mask[..., None]).sum(1) / mask.sum(1).clamp(min=1)[:, None]
        tokens = torch.cat([y, words], 1)
        seen = torch.cat([mask.new_ones(len(x), y.shape[1]), mask], 1)[:, None, None]
        q = tokens[:, None]
        tokens = nn.functional.scaled_dot_product_attention(q, q, q, torch.where(seen, 0.0, -1e4))[:, 0]
        y = (tokens[:, : y.shape[1]] + mean[:, None]) @ self.project
        return self.leave(y * sizes[0][1])


@pytest.mark.parametrize("batch", [1, 3])
def test_samples_behind_layers_and_what_models_write_out(tmp_path: Path, batch: int) -> None:
    """Reads and writes at places, sums of masks, products with a parameter, padding by edges; layers before samples."""

    def given(batch: int, seed: int) -> dict:
        generator = torch.Generator().manual_seed(seed)
        return {
            "x": torch.randn(batch, 12, 6, generator=generator),
            "t": torch.rand(batch, generator=generator),
            "layers": torch.randn(3, batch, 5, 8, generator=generator),
            "mask": torch.arange(5)[None] < torch.randint(2, 6, (batch, 1), generator=generator),
            "drop": torch.tensor([False]).repeat(batch),
            "places": torch.stack([torch.arange(12) % 3, torch.arange(12)], -1)[None].repeat(batch, 1, 1),
            "sizes": {0: (4, 2)},
        }

    torch.manual_seed(1)
    model, file = Layered().eval(), tmp_path / "calls.safetensors"
    with mpq_compiler.record_inputs(model, file), torch.no_grad():
        for seed in range(10, 10 + 24 // batch):
            model(**given(batch, seed))
    report = mpq_compiler.compile(model, tmp_path / "x.mpq", calibration=file, recipe="w8a8")
    assert abs(report.quality["agreement_db"]) < 0.1 and not any("mask" in note for note in report.notes)
    compiled = mpq_compiler.load(tmp_path / "x.mpq")
    for size in (1, 2, 3):
        unseen = given(size, seed=9)
        with torch.no_grad():
            assert decibels(model(**unseen), compiled(**unseen)) > 20
    with pytest.raises(UserError, match=r"'sizes.0.1' is 3, and was 2 when it was compiled"):
        compiled(**{**given(1, 9), "sizes": {0: (4, 3)}})


def test_a_model_that_takes_one_sample_at_a_time(tmp_path: Path) -> None:
    class Counted(Listed):
        def forward(self, x, t, sizes):
            rows = [self.turns[:size] for size in sizes]  # a number for each sample
            y = torch.stack([self.enter(x[i]) + rows[i] * t[i] for i in range(len(x))])
            return self.leave(nn.functional.silu(y))

    torch.manual_seed(0)
    model, given = Counted().eval(), {"x": torch.randn(1, 12, 6), "t": torch.rand(1), "sizes": [12]}
    mpq_compiler.compile(model, tmp_path / "x.mpq", example=given, **QUICK)
    latents, compiled = torch.randn(3, 12, 6), mpq_compiler.load(tmp_path / "x.mpq")
    with torch.no_grad():
        expected = torch.cat([model(latents[i : i + 1], given["t"], [12]) for i in range(3)])
    assert decibels(expected, compiled(latents, given["t"].repeat(3), [12])) > 20


def test_a_time_may_be_a_number(tmp_path: Path) -> None:
    class Timed(Listed):
        def forward(self, x, t):
            t = t if torch.is_tensor(t) else torch.tensor([float(t)])
            return self.leave(nn.functional.silu(self.enter(x) + self.turns[:12] * t.reshape(-1, 1, 1)))

    torch.manual_seed(0)
    model, latents = Timed().eval(), torch.randn(2, 12, 6)
    mpq_compiler.compile(model, tmp_path / "x.mpq", example={"x": latents, "t": 0.5}, **QUICK)
    with torch.no_grad():
        assert decibels(model(latents, 0.5), mpq_compiler.load(tmp_path / "x.mpq")(latents, 0.5)) > 20
