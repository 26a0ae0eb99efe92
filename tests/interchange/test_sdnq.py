"""Forms of SDNQ against what its own loader makes of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mpq_compiler import formats
from mpq_compiler.interchange.container import Grid, Layer
from mpq_compiler.interchange.sdnq import PACKED, pack, stored, write
from mpq_compiler.support.decibels import sqnr
from tests.harness.sdnq import sdnq

LINEAR, CONVOLUTION = (32, 128), (16, 64, 3, 3)


class One(torch.nn.Module):
    """A model of one layer, as SDNQ makes it of a config."""

    def __init__(self, shape: list[int]) -> None:
        super().__init__()
        rows, columns, *taps = shape
        self.layer = torch.nn.Conv2d(columns, rows, taps) if taps else torch.nn.Linear(columns, rows)


def weight(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def quantized(name: str, shape: tuple[int, ...]) -> Layer:
    """A weight in one of our formats."""
    chosen = formats.get(name)
    fit = chosen.fit(weight(shape).movedim(1, -1).contiguous())
    value = fit.dequantize().reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1).contiguous().numpy()
    if isinstance(fit, formats.Float8Weight):
        grid = Grid(fit.scale.float()[:, None].numpy(), (shape[1],), exponent=fit.exponent)
    else:
        offset = None if fit.offset is None else fit.offset.float().numpy()
        grid = Grid(fit.scale.float().numpy(), fit.segments or (shape[1],), offset)
    bits = 4 if name == "ec3" else chosen.index_bits
    return Layer("layer.weight", value, name, bits, grid, 0)


def loaded(layer: Layer, folder: Path) -> tuple[torch.nn.Module, np.ndarray]:
    """The layer that SDNQ loads, and its weight."""
    bias = Layer("layer.bias", np.zeros(len(layer.value), np.float32), None, None, None, 0)
    write(folder, {"layer.weight": layer, "layer.bias": bias}, {"shape": list(layer.value.shape)})
    made = sdnq().load_sdnq_model(str(folder), One).layer
    parts = {name: getattr(made, name, None) for name in ("weight", "scale", "zero_point", "svd_up", "svd_down")}
    return made, made.sdnq_dequantizer(**parts).numpy()


@pytest.mark.parametrize("bits", PACKED)
def test_codes_are_packed_as_they_are_unpacked(bits):
    sdnq()
    from sdnq.packed_int import unpack_int

    codes = torch.randint(1 << bits, (24, 16), generator=torch.Generator().manual_seed(bits), dtype=torch.uint8)
    packed = torch.from_numpy(pack(codes.numpy(), bits))
    assert packed.numel() * 8 == codes.numel() * bits
    assert torch.equal(unpack_int(packed, f"uint{bits}", codes.shape), codes)


@pytest.mark.parametrize(
    ("name", "shape", "type_", "group"),
    [
        ("int8", LINEAR, "int8", -1),
        ("int8", CONVOLUTION, "int8", -1),
        ("int4", LINEAR, "uint4", -1),
        ("int4", CONVOLUTION, "uint4", -1),
        ("int4", (9, 11), "uint8", -1),  # an odd number of codes cannot be packed
        ("int3", LINEAR, "uint3", -1),
        ("int2", LINEAR, "uint2", -1),
        ("int4g64", LINEAR, "int4", 64),
        ("int4g32", CONVOLUTION, "int4", 32),
        ("int4g48", LINEAR, "int4", 16),  # the last group has 32 channels
        ("int2g64", LINEAR, "uint2", 64),  # odd levels, two apart
        ("int2+b", LINEAR, "uint4", -1),
        ("km2", LINEAR, "uint2", -1),
        ("km2", CONVOLUTION, "uint2", -1),
        ("nf4", (32, 512), "uint4", -1),
        ("nf4", (32, 64), "int8", -1),  # codebooks of short rows are larger than codes of 8 bits
        ("ec3", LINEAR, "int4", -1),
        ("fp8e2", LINEAR, "float8_e2m5fn", -1),
        ("fp8e3", CONVOLUTION, "float8_e3m4fn", -1),
        ("fp8e4", LINEAR, "float8_e4m3fn_sdnq", -1),
        ("fp8e5", LINEAR, "float8_e5m2fn", -1),
    ],
)
def test_values_of_every_format_stay_what_they_are(tmp_path, name, shape, type_, group):
    layer = quantized(name, shape)
    module, value = loaded(layer, tmp_path / "out")
    assert (module.sdnq_dequantizer.weights_dtype, module.sdnq_dequantizer.group_size) == (type_, group)
    assert np.array_equal(value, layer.value)


@pytest.mark.parametrize(
    ("bits", "shape", "type_", "least"),
    [
        (8, LINEAR, "int8", 40),
        (4, LINEAR, "uint4", 20),
        (4, CONVOLUTION, "uint4", 20),
        (3, LINEAR, "uint3", 13),
        (2, (32, 100), "uint2", 5),
        (4, (9, 11), "int8", 40),
    ],
)
def test_values_on_no_grid_are_rounded_to_as_many_bits(tmp_path, bits, shape, type_, least):
    layer = Layer("layer.weight", weight(shape).numpy(), "int4", bits, None, 0)
    module, value = loaded(layer, tmp_path / "out")
    assert module.sdnq_dequantizer.weights_dtype == type_
    assert sqnr(layer.value, value) > least
    assert sqnr(stored(layer).value.reshape(shape), value) > 120  # what is said of the loss is what is lost


@pytest.mark.parametrize("shape", [LINEAR, CONVOLUTION])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_constant_weight_is_kept(tmp_path, shape, bits):
    for value in (0.0, 0.25):
        layer = Layer("layer.weight", np.full(shape, value, np.float32), "int4", bits, None, 0)
        _, found = loaded(layer, tmp_path / str(value))
        assert np.abs(found - layer.value).max() < 1e-3
