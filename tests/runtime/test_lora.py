"""LoRA files and what they come to in an artifact: names, scales, cuts, and everything that is refused."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from torch import nn

import mpq_compiler
from mpq_compiler.runtime import lora, lora_file
from mpq_compiler.runtime.lora_file import Factors
from mpq_compiler.support.errors import UserError

RANK = 3
PIPELINE = (
    "trace,layout,split-shortcut{{channels=4}},equalize{{rule=smoothquant,rows=64}},rotate{{rule=everywhere,rows=8}},"
    "calibrate,time-groups,bit-allocation{{uniform={0}}},insert-fake-quant,round-weights,fold-fake-quant,"
    "fuse-epilogues"
)
"""Every rewrite of channels that layers read."""


class Small(nn.Module):
    """A denoiser of a convolution, a shortcut that reads a concatenation, an attention's output and a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(4, 16, 3, padding=1)
        self.proj_in = nn.Conv2d(16, 16, 1)
        self.norm = nn.LayerNorm(16)
        self.attn = nn.ModuleDict({n: nn.Linear(16, 16) for n in ("to_q", "to_k", "to_v")})
        self.attn["to_out"] = nn.ModuleList([nn.Linear(16, 16)])
        self.shortcut = nn.Linear(32, 16)
        self.time = nn.Linear(8, 16)
        self.conv_out = nn.Conv2d(16, 4, 3, padding=1)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        angles = timestep[:, None] / 10 ** torch.arange(4)
        image = self.conv_in(sample) + self.time(torch.cat([angles.sin(), angles.cos()], 1))[..., None, None]
        tokens = self.proj_in(torch.relu(image)).flatten(2).transpose(1, 2)
        x = self.norm(tokens)
        q, k, v = (self.attn[name](x) for name in ("to_q", "to_k", "to_v"))
        seen = nn.functional.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        seen = self.attn["to_out"][0](seen)
        mixed = self.shortcut(torch.cat([tokens, seen], -1))
        return self.conv_out(mixed.transpose(1, 2).unflatten(2, image.shape[2:]))


LINEAR = ("attn.to_k", "attn.to_out.0", "attn.to_q", "attn.to_v", "proj_in", "shortcut", "time")
CONVOLUTIONS = ("conv_in", "conv_out")


def small() -> Small:
    torch.manual_seed(0)
    return Small().eval()


def call(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"sample": torch.randn(2, 4, 8, 8, generator=generator), "timestep": torch.tensor([3.0, 700.0])}


def compiled(path: Path, target: str = "reference", weights: str = "int8", **options) -> mpq_compiler.CompiledDenoiser:
    how = {"pipeline": PIPELINE.format(weights), "target": target, "shapes": "2x4x8x8"}
    mpq_compiler.compile(small(), path, example=call(), **how, **options)
    return mpq_compiler.load(path)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> mpq_compiler.CompiledDenoiser:
    """With branches beside all layers, on activations in float, so that no range of theirs hides an error."""
    path = tmp_path_factory.mktemp("lora") / "small.mpq"
    return compiled(path, weights="int8,activations=16", lora_rank=RANK, lora_layers="*")


def factors(rank: int = RANK, layers: tuple[str, ...] = (*LINEAR, *CONVOLUTIONS)) -> dict[str, dict[str, np.ndarray]]:
    """Random factors of each layer, that change its weight by a fifth of its norm; exact in half precision."""
    rng, made = np.random.default_rng(5), {}
    state = small().state_dict()
    for name in sorted(layers):
        shape = state[f"{name}.weight"].shape
        down, up = rng.standard_normal((rank, *shape[1:])), rng.standard_normal((shape[0], rank))
        size = np.linalg.norm(up @ down.reshape(rank, -1)) / float(state[f"{name}.weight"].norm())
        up = (up / size / 5).reshape(*up.shape, *[1] * (len(shape) - 2))
        made[name] = {"down": down.astype(np.float16), "up": up.astype(np.float16)}
    return made


def spelled(given: dict[str, dict[str, np.ndarray]], names: str = "peft", alpha: float | None = None):
    """The tensors of a file with these factors."""
    found: dict[str, np.ndarray] = {}
    for name, parts in given.items():
        if names == "kohya":
            name = f"lora_unet_{name.replace('.', '_')}"
        begin = {"peft": f"unet.{name}.lora_{{}}", "bare": f"{name}.lora_{{}}", "kohya": f"{name}.lora_{{}}"}[names]
        of_down, of_up = ("down", "up") if names == "kohya" else ("A", "B")
        found[f"{begin.format(of_down)}.weight"] = parts["down"]
        found[f"{begin.format(of_up)}.weight"] = parts["up"]
        if alpha is not None:
            found[f"{name}.alpha"] = np.array(alpha, np.float32)
    return found


def fused(given: dict[str, dict[str, np.ndarray]], scale: float = 1.0) -> Small:
    """The model with the factors in its weights."""
    model = small()
    with torch.no_grad():
        for name, parts in given.items():
            up, down = (torch.from_numpy(parts[part].astype(np.float32)) for part in ("up", "down"))
            weight = model.get_submodule(name).weight
            weight += scale * (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
    return model


def decibels(expected: torch.Tensor, found: torch.Tensor) -> float:
    return float(10 * torch.log10(expected.square().sum() / (expected - found).square().sum()))


def saved(path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> Path:
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, path, metadata)
    return path


@torch.no_grad()
@pytest.mark.parametrize("scale", [1.0, -0.5])
def test_a_lora_does_what_it_does_in_the_weights(artifact, tmp_path, scale) -> None:
    """Linear layers and convolutions whose channels were scaled, rotated and split; what is left is rounding."""
    given, x = factors(), call(3)
    loaded = artifact.load_lora(saved(tmp_path / "x.safetensors", spelled(given)), scale)
    assert loaded.layers == len(given) and loaded.rank == RANK and loaded.loss < 1e-6 and artifact.lora == loaded
    expected, without = fused(given, scale)(**x), small()(**x)
    assert decibels(expected, without) < 15
    assert decibels(expected, artifact(**x)) > 35


@torch.no_grad()
def test_unloading_leaves_no_trace_and_loading_is_no_addition(artifact, tmp_path) -> None:
    x = call(3)
    artifact.unload_lora()
    before = artifact(**x)
    first = saved(tmp_path / "first.safetensors", spelled(factors()))
    second = saved(tmp_path / "second.safetensors", spelled(factors(2, ("attn.to_q", "conv_out"))))
    artifact.load_lora(second)
    alone = artifact(**x)
    artifact.load_lora(first)
    artifact.load_lora(second)
    assert torch.equal(artifact(**x), alone) and not torch.equal(alone, before)
    artifact.unload_lora()
    assert torch.equal(artifact(**x), before) and artifact.lora is None
    artifact.load_lora(first, 0.0)
    assert torch.equal(artifact(**x), before)


@torch.no_grad()
def test_kernels_give_the_bits_of_no_branches(tmp_path) -> None:
    """Until a LoRA is loaded, and again after it; with it they are as near to the model as without it."""
    plain = compiled(tmp_path / "plain.mpq", "native", "int4")
    branched = compiled(tmp_path / "branched.mpq", "native", "int4", lora_rank=RANK, lora_layers="*")
    given, x = factors(), call(3)
    bits = plain(**x)
    assert torch.equal(branched(**x), bits)
    stored = plain.manifest["weights"]["payload_bytes"], branched.manifest["weights"]["payload_bytes"]
    shapes = [m.weight.flatten(1).shape for m in small().modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    halves = 2 * RANK * (sum(o + k for o, k in shapes) + 16)  # the shortcut's two parts have 16 outputs each
    assert stored[1] - stored[0] == halves
    branched.load_lora(saved(tmp_path / "x.safetensors", spelled(given)), 0.3)
    assert decibels(fused(given, 0.3)(**x), bits) < 20
    assert decibels(fused(given, 0.3)(**x), branched(**x)) > decibels(small()(**x), bits) - 1
    branched.unload_lora()
    assert torch.equal(branched(**x), bits)
    with pytest.raises(UserError, match=r"plain.mpq has no branches that a LoRA could be loaded into: compile it with"):
        plain.load_lora(tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="has no branches"):
        plain.unload_lora()


# --- names and scales ---------------------------------------------------------------------------------------


@torch.no_grad()
def test_every_spelling_is_the_same_lora(artifact, tmp_path) -> None:
    given, x = factors(2, LINEAR), call(3)
    results = []
    for names in ("peft", "bare", "kohya"):
        artifact.load_lora(saved(tmp_path / f"{names}.safetensors", spelled(given, names)))
        results.append(artifact(**x))
    named = {
        k.replace("lora_A", "lora_A.default").replace("lora_B", "lora_B.default"): v for k, v in spelled(given).items()
    }
    artifact.load_lora(saved(tmp_path / "adapter.safetensors", named))
    results.append(artifact(**x))
    assert all(torch.equal(result, results[0]) for result in results)


def test_names_of_processors_and_of_the_original_code() -> None:
    paths = [
        *("conv_in", "mid_block.attentions.0.proj_in", "mid_block.resnets.1.conv2"),
        *("down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0", "down_blocks.0.downsamplers.0.conv"),
        *("up_blocks.1.resnets.2.conv_shortcut", "up_blocks.0.upsamplers.0.conv", "time_embedding.linear_2"),
    ]
    names = lora_file.spellings(paths, 2)
    original = {
        **{"input_blocks_0_0": paths[0], "middle_block_1_proj_in": paths[1], "middle_block_2_out_layers_3": paths[2]},
        **{"input_blocks_4_1_transformer_blocks_0_attn1_to_out_0": paths[3], "input_blocks_3_0_op": paths[4]},
        **{"output_blocks_5_0_skip_connection": paths[5], "output_blocks_2_2_conv": paths[6], "time_embed_2": paths[7]},
    }
    processor = {"down_blocks.1.attentions.0.transformer_blocks.0.attn1.processor.to_out": paths[3]}
    assert {name: names.get(name) for name in original | processor} == original | processor
    assert {names[path.replace(".", "_")] for path in paths} == {*paths}
    assert not any("input_blocks" in name for name in lora_file.spellings(paths))


def scales(tmp_path: Path, tensors: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> dict[str, float]:
    """What each layer's product is multiplied with, of factors of ones and rank 4."""
    file = saved(tmp_path / "scales.safetensors", tensors, metadata)
    found, _ = lora_file.read(file, lora_file.spellings(["a.to_q", "b.to_q"]))
    return {name: float(each.up[0, 0]) for name, each in found.items()}


def ones(layer: str, **more: np.ndarray) -> dict[str, np.ndarray]:
    return {
        f"{layer}.lora_A.weight": np.ones((4, 5), np.float32),
        f"{layer}.lora_B.weight": np.ones((3, 4), np.float32),
    }


def test_alpha_is_taken_from_where_the_file_has_it(tmp_path) -> None:
    two = {**ones("unet.a.to_q"), **ones("unet.b.to_q")}
    assert scales(tmp_path, two) == {"a.to_q": 1, "b.to_q": 1}
    assert scales(tmp_path, {**two, "unet.a.to_q.alpha": np.array(8.0)}) == {"a.to_q": 2, "b.to_q": 1}
    settings = {"unet.lora_alpha": 2, "unet.r": 4, "unet.alpha_pattern": {"b.to_q": 12}}
    assert scales(tmp_path, two, {lora_file.METADATA: json.dumps(settings)}) == {"a.to_q": 0.5, "b.to_q": 3}
    settings = {"transformer.lora_alpha": 6, "transformer.use_rslora": True}
    assert scales(tmp_path, two, {lora_file.METADATA: json.dumps(settings)}) == {"a.to_q": 3, "b.to_q": 3}
    peft = ones("base_model.model.a.to_q")
    with pytest.raises(UserError, match=r"is of PEFT, which keeps its scale in adapter_config\.json: put that file"):
        scales(tmp_path, peft)
    (tmp_path / lora_file.ADAPTER).write_text(json.dumps({"lora_alpha": 16, "r": 4}))
    assert scales(tmp_path, peft) == {"a.to_q": 4}


# --- cuts ---------------------------------------------------------------------------------------------------


def test_a_cut_is_the_best_of_its_rank() -> None:
    rng = np.random.default_rng(0)
    up, down = rng.standard_normal((12, 6)).astype(np.float32), rng.standard_normal((6, 2, 2, 5)).astype(np.float32)
    product = up.astype(np.float64) @ down.reshape(6, -1)
    singular = np.linalg.svd(product, compute_uv=False)
    for rank in (1, 4, 6, 9):
        found, (part, whole) = lora.cut(Factors(up, down), rank)
        error = np.linalg.norm(found.up @ found.down.reshape(len(found.down), -1) - product)
        assert found.rank == min(rank, 6) and found.down.shape[1:] == down.shape[1:]
        assert np.isclose(error**2, (singular[rank:] ** 2).sum(), atol=1e-9)
        assert np.isclose(part, error**2, atol=1e-9) and np.isclose(whole, (singular**2).sum())


@torch.no_grad()
def test_a_lora_of_higher_rank_is_cut_and_says_what_it_loses(artifact, tmp_path) -> None:
    given, x = factors(9, ("attn.to_q", "attn.to_v", "conv_in")), call(3)
    with pytest.warns(
        UserWarning, match=r"has rank 9 and the artifact branches of rank 3: cut to those it loses \d+ %"
    ):
        loaded = artifact.load_lora(saved(tmp_path / "x.safetensors", spelled(given)))
    best, lost, all_of_it = {}, [], []
    for name, parts in given.items():
        matrix = parts["up"].reshape(16, 9).astype(np.float64) @ parts["down"].reshape(9, -1).astype(np.float64)
        u, s, v = np.linalg.svd(matrix, full_matrices=False)
        best[name] = {"up": u[:, :RANK] * s[:RANK], "down": v[:RANK]}
        lost.append((s[RANK:] ** 2).sum())
        all_of_it.append((s**2).sum())
    assert loaded.loss == pytest.approx(np.sqrt(sum(lost) / sum(all_of_it)))
    worst = int(np.argmax(np.array(lost) / np.array(all_of_it)))
    assert loaded.worst == (list(given)[worst], pytest.approx(np.sqrt(lost[worst] / all_of_it[worst])))
    assert f"most in '{loaded.worst[0]}'" in loaded.notes[0]
    assert decibels(fused(best)(**x), artifact(**x)) > 35
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is lost, and nothing said
        twice = {k: np.concatenate([v, v], int("B" in k)) for k, v in spelled(factors(2, LINEAR)).items()}
        assert artifact.load_lora(saved(tmp_path / "y.safetensors", twice)).loss < 1e-6


# --- bad input ----------------------------------------------------------------------------------------------


def changed(**changes: np.ndarray | None) -> dict[str, np.ndarray]:
    """The tensors of a LoRA of two layers; "q_A" is attn.to_q's first factor, and None removes one."""
    tensors = spelled(factors(2, ("attn.to_q", "conv_in")))
    for key, value in changes.items():
        layer, part = key.split("__")
        name = f"unet.{ {'q': 'attn.to_q', 'c': 'conv_in', 'x': 'attn.to_x'}[layer] }.{part.replace('_W', '.weight')}"
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value
    return tensors


HALF = np.ones((2, 16), np.float16)
REFUSED = {
    "another layer": ({"x__lora_A_W": HALF, "x__lora_B_W": HALF.T}, r"changes 'attn.to_x', for which .* no branch"),
    "no up": ({"q__lora_B_W": None}, r"is damaged: it lacks the factor up of 'unet\.attn\.to_q'"),
    "no down": ({"c__lora_A_W": None}, r"lacks the factor down of 'unet\.conv_in'"),
    "only alpha": ({"q__lora_A_W": None, "q__lora_B_W": None, "q__alpha": np.array(1.0)}, "lacks the factor down"),
    "other ranks": ({"q__lora_A_W": np.ones((3, 16), np.float16)}, "have different ranks"),
    "other inputs": ({"q__lora_A_W": np.ones((2, 17), np.float16)}, r"changes 'attn\.to_q' by \[16, 17\], and its"),
    "other outputs": ({"q__lora_B_W": np.ones((8, 2), np.float16)}, r"changes 'attn\.to_q' by \[8, 16\]"),
    "other window": (
        {"c__lora_A_W": np.ones((2, 4, 1, 1), np.float16)},
        r"'conv_in' by \[16, 4, 1, 1\].*another model",
    ),
    "nothing": ({"q__lora_A_W": HALF[:0], "q__lora_B_W": HALF[:0].T}, "are no factors of a weight"),
    "no outputs": ({"q__lora_B_W": np.ones((0, 2), np.float16)}, r"up \[0, 2\] and down \[2, 16\] are no factors"),
    "no alpha": ({"q__alpha": np.ones(0)}, r"alpha \[0\] is no number of 'unet\.attn\.to_q'"),
    "alphas": ({"q__alpha": np.ones(2)}, r"alpha \[2\] is no number"),
    "an alpha too large": ({"q__alpha": np.array(3e38), "q__lora_B_W": HALF.T * 9}, "alpha makes infinity of up"),
    "beyond float32": ({"q__lora_A_W": HALF.astype(np.float64) * 1e300}, "NaN or infinity in down"),
    "a window above": ({"c__lora_B_W": np.ones((16, 2, 3, 3), np.float16)}, "are no factors of a weight"),
    "NaN": ({"q__lora_A_W": HALF * np.float16("nan")}, "is damaged: NaN or infinity in down"),
    "integers": ({"q__lora_A_W": HALF.astype(np.int32)}, "down is int32"),
    "too large": (
        {"q__lora_A_W": HALF.astype(np.float32) * 1e12},
        r"changes 'attn\.to_q' by more than the f16 factors",
    ),
    "DoRA": ({"q__dora_scale": np.ones(16)}, r"holds 'unet\.attn\.to_q\.dora_scale', which is no factor of a plain"),
    "LoHa": ({"q__hada_w1_a": HALF}, "is no factor of a plain LoRA"),
    "a bias": ({"q__lora_B.bias": np.ones(16)}, "is no factor of a plain LoRA"),
}


@torch.no_grad()
@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_and_changes_nothing(artifact, tmp_path, name) -> None:
    changes, said = REFUSED[name]
    x = call(3)
    before = artifact(**x)
    with pytest.raises(UserError, match=said):
        artifact.load_lora(saved(tmp_path / "x.safetensors", changed(**changes)))
    assert torch.equal(artifact(**x), before)


def test_a_damaged_file_is_refused(artifact, tmp_path) -> None:
    good = saved(tmp_path / "x.safetensors", changed())
    (tmp_path / "short.safetensors").write_bytes(good.read_bytes()[:-9])
    for path, said in (
        ("short.safetensors", "not a sound safetensors file"),
        ("none", "cannot read"),
        (".", "cannot read"),
    ):
        with pytest.raises(UserError, match=said):
            artifact.load_lora(tmp_path / path)
    for scale in (float("nan"), float("inf"), "1"):
        with pytest.raises(UserError, match="a LoRA is scaled by a finite number"):
            artifact.load_lora(good, scale)
    twice = {**changed(), **spelled(factors(2, ("attn.to_q",)), "kohya")}
    with pytest.raises(UserError, match=r"'lora_unet_attn_to_q' and 'unet\.attn\.to_q' are one layer"):
        artifact.load_lora(saved(tmp_path / "twice.safetensors", twice))
    dora = {lora_file.METADATA: json.dumps({"unet.use_dora": True})}
    with pytest.raises(UserError, match="is a DoRA"):
        artifact.load_lora(saved(tmp_path / "dora.safetensors", changed(), dora))


SETTINGS = {
    "[1": "is not JSON",
    "[1]": "is no object",
    '{"unet.lora_alpha": "8"}': "'lora_alpha' must be number",
    '{"lora_alpha": 1e30}': "'lora_alpha' must be at most",
    '{"alpha_pattern": ["to_q"]}': "'alpha_pattern' must be object",
    '{"alpha_pattern": {"to_q": true}}': "'alpha_pattern.to_q' must be number",
    '{"alpha_pattern": {"to_(q": 8}}': r"alpha_pattern 'to_\(q' that is no regular expression",
    '{"alpha_pattern": {"(.*)*q": 8}}': r"alpha_pattern '\(\.\*\)\*q' that is too involved",
    '{"alpha_pattern": {".*a.*b.*c.*d": 8}}': "that is too involved: name the layers",
    '{"alpha_pattern": {"(?i)q": 8}}': "that is no regular expression",
    '{"alpha_pattern": {"q{99999999999}": 8}}': "that is no regular expression",
    '{"alpha_pattern": {"%s": 8}}' % ("(" * 10_000): "that is too involved",
    '{"use_dora": 1}': "'use_dora' must be boolean",
}


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("text", SETTINGS)
def test_damaged_settings_are_refused(artifact, tmp_path, text, beside) -> None:
    tensors, metadata = changed(), {lora_file.METADATA: text}
    if beside:
        tensors = {name.replace("unet.", "base_model.model."): tensor for name, tensor in tensors.items()}
        metadata = None
        (tmp_path / lora_file.ADAPTER).write_text(text.replace("unet.", ""))
    with pytest.raises(UserError, match=rf"settings of .* damaged: the document .*{SETTINGS[text]}.*get the file"):
        artifact.load_lora(saved(tmp_path / "odd.safetensors", tensors, metadata))


def test_an_alpha_that_is_no_number_is_refused(artifact, tmp_path) -> None:
    text = {lora_file.METADATA: '{"lora_alpha": NaN}'}
    with pytest.raises(UserError, match=r"alpha makes infinity of up of 'unet\.attn\.to_q'"):
        artifact.load_lora(saved(tmp_path / "odd.safetensors", changed(), text))


def test_what_is_of_a_text_encoder_is_left_out_by_a_word(artifact, tmp_path) -> None:
    text = ones("text_encoder.layers.0.q_proj")
    with pytest.warns(UserWarning, match="2 tensors of .* are of a text encoder, .*: left out"):
        assert artifact.load_lora(saved(tmp_path / "x.safetensors", {**changed(), **text})).layers == 2
    with pytest.raises(UserError, match="holds no LoRA of a denoiser, only of a text encoder"):
        artifact.load_lora(saved(tmp_path / "y.safetensors", text))
