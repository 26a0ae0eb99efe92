from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mpq_compiler.frontend import checkpoint, fp8
from mpq_compiler.support.errors import UserError

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
WEIGHTS = "diffusion_pytorch_model.safetensors"
ALL_BYTES = torch.arange(256, dtype=torch.uint8)


def small(*shape: int, dtype: torch.dtype = E4M3) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 50).to(dtype)


def read(folder: Path, config: str = "{}", **tensors: torch.Tensor) -> dict[str, torch.Tensor]:
    """What is read of a checkpoint; names are written with `__` for a point."""
    (folder / "config.json").write_text(config)
    save_file({name.replace("__", "."): tensor for name, tensor in tensors.items()}, folder / WEIGHTS)
    return checkpoint.read_weights(folder)


def refused(folder: Path, *parts: str, **tensors: torch.Tensor) -> None:
    with pytest.raises(UserError) as caught:
        read(folder, **tensors)
    message = str(caught.value)
    assert "\n" not in message and all(part in message for part in parts), message


def by_hand(values: torch.Tensor, scale: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """Weights one by one, in float64, rounded once."""
    wide, factor = values.double(), scale.double()
    made = torch.empty(values.shape, dtype=torch.float64)
    for i, k in itertools.product(*map(range, values.shape)):
        made[i, k] = wide[i, k] * factor[i // block[0], k // block[1]]
    return made.float()


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_bfloat16_holds_every_8_bit_float(dtype: torch.dtype) -> None:
    values = ALL_BYTES.view(dtype)
    made = fp8.widened(values, None, fp8.BLOCK)
    assert made.dtype == torch.bfloat16
    assert torch.equal(made.float().nan_to_num(1e9), values.float().nan_to_num(1e9))


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("name", ["weight_scale", "scale_weight", "weight_scale_inv"])
@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_a_scale_multiplies_whatever_its_name(
    tmp_path: Path, dtype: torch.dtype, name: str, shape: tuple[int, ...]
) -> None:
    values, scale = small(6, 5, dtype=dtype), torch.tensor(0.0123).reshape(shape)
    weights = read(tmp_path, a__weight=values, a__bias=torch.ones(6), **{f"a__{name}": scale})
    assert weights.keys() == {"a.weight", "a.bias"}
    assert weights["a.weight"].dtype == torch.float32
    assert torch.equal(weights["a.weight"], by_hand(values, scale.reshape(1, 1), (6, 5)))


@pytest.mark.parametrize("shape", [(6,), (6, 1)])
def test_a_scale_for_each_row(tmp_path: Path, shape: tuple[int, ...]) -> None:
    values, scale = small(6, 5), torch.rand(6) + 0.1
    weights = read(tmp_path, a__weight=values, a__weight_scale=scale.reshape(shape))
    assert torch.equal(weights["a.weight"], by_hand(values, scale.reshape(6, 1), (1, 5)))


def test_a_scale_for_each_output_channel_of_a_convolution(tmp_path: Path) -> None:
    values, scale = small(4, 3, 3, 3), torch.rand(4) + 0.1
    weights = read(tmp_path, a__weight=values, a__weight_scale=scale)
    assert torch.equal(weights["a.weight"].flatten(1), by_hand(values.flatten(1), scale.reshape(4, 1), (1, 27)))


@pytest.mark.parametrize(
    ("shape", "blocks"), [((256, 256), (2, 2)), ((130, 300), (2, 3)), ((128, 5), (1, 1)), ((129, 128), (2, 1))]
)
def test_a_scale_for_each_block(tmp_path: Path, shape: tuple[int, int], blocks: tuple[int, int]) -> None:
    values, scale = small(*shape), torch.rand(blocks) + 0.1
    weights = read(tmp_path, a__weight=values, a__weight_scale_inv=scale)
    assert torch.equal(weights["a.weight"], by_hand(values, scale, (128, 128)))


def test_the_size_of_blocks_is_what_the_configuration_says(tmp_path: Path) -> None:
    values, scale = small(9, 10), torch.rand(3, 2) + 0.1
    config = '{"quantization_config": {"quant_method": "fp8", "weight_block_size": [4, 8]}}'
    weights = read(tmp_path, config, a__weight=values, a__weight_scale_inv=scale)
    assert torch.equal(weights["a.weight"], by_hand(values, scale, (4, 8)))


def test_weights_that_bfloat16_holds_take_half_the_memory(tmp_path: Path) -> None:
    values = small(6, 5)
    for scale in (torch.tensor(0.25), torch.tensor(0.25).to(torch.float8_e8m0fnu), torch.tensor(3.0)):
        made = read(tmp_path, a__weight=values, a__weight_scale=scale)["a.weight"]
        assert made.dtype == torch.bfloat16
        assert torch.equal(made.float(), values.float() * scale.float())


@pytest.mark.parametrize("marker", [torch.zeros(0), torch.zeros(2)])
def test_a_marker_has_no_values_of_its_own(tmp_path: Path, marker: torch.Tensor) -> None:
    weights = read(tmp_path, scaled_fp8=marker.to(E4M3), a__weight=small(6, 5), a__scale_weight=torch.tensor(2.0))
    assert weights.keys() == {"a.weight"}


def test_scales_of_activations_are_left_aside(tmp_path: Path) -> None:
    given = {f"{name}__weight_scale": torch.tensor(2.0) for name in "abc"}
    given |= {"a__input_scale": torch.tensor(1.0), "b__scale_input": torch.tensor(1.0)}
    given |= {f"{name}__weight": small(6, 5) for name in "abc"}
    given["c__comfy_quant"] = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
    assert read(tmp_path, **given).keys() == {"a.weight", "b.weight", "c.weight"}
    assert checkpoint.headers(tmp_path).scales.activations == ("a.input_scale", "b.scale_input")


def test_names_of_scales_mean_nothing_beside_other_weights(tmp_path: Path) -> None:
    given = {"a__weight": torch.ones(6, 5), "a__weight_scale": torch.ones(6), "a__input_scale": torch.ones(())}
    assert read(tmp_path, **given).keys() == {"a.weight", "a.weight_scale", "a.input_scale"}


def test_biases_in_8_bit_floats_need_no_scale(tmp_path: Path) -> None:
    weights = read(tmp_path, a__weight=small(6, 5), a__weight_scale=torch.tensor(2.0), a__bias=small(6))
    assert torch.equal(weights["a.bias"].float(), small(6).float())


# Planted faults


def test_a_missing_scale(tmp_path: Path) -> None:
    scaled = {"a__weight": small(6, 5), "a__weight_scale": torch.tensor(2.0)}
    names = "(none of 'b.weight_scale', 'b.weight_scale_inv', 'b.scale_weight'), where 'a.weight' has one"
    refused(tmp_path, "'b.weight'", f"without a scale {names}", **scaled, b__weight=small(6, 5))
    refused(tmp_path, "'b.weight'", "'scaled_fp8' says", scaled_fp8=torch.zeros(0).to(E4M3), b__weight=small(6, 5))


@pytest.mark.parametrize("shape", [(5,), (6, 5), (2,), (1, 5), (1, 2), (6, 1, 1), (0,)])
def test_a_scale_of_a_wrong_shape(tmp_path: Path, shape: tuple[int, ...]) -> None:
    tensors = {"a__weight": small(6, 5), "a__weight_scale": torch.ones(shape)}
    refused(tmp_path, "'a.weight_scale'", f"is {list(shape)}", "[6, 5]", "[6] for its rows", "[1, 1]", **tensors)


def test_two_scales_and_a_scale_that_is_no_float(tmp_path: Path) -> None:
    two = {"a__weight_scale": torch.tensor(2.0), "a__scale_weight": torch.tensor(2.0)}
    refused(tmp_path, "two scales", "'a.weight_scale' and 'a.scale_weight'", a__weight=small(6, 5), **two)
    codes = torch.zeros(6, 1, dtype=torch.uint8)  # exponents, as MX formats keep them
    refused(tmp_path, "'a.weight_scale'", "type U8", a__weight=small(6, 32), a__weight_scale=codes)
