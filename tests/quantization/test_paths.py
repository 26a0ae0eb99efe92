"""GPTQ along several paths: against all paths, against one, and the two levels that a path goes on to."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from torch import Tensor

from mpq_compiler import formats
from mpq_compiler.formats import contract
from mpq_compiler.formats.base import QuantizedWeight, output_error
from mpq_compiler.ir.graph import weight_of
from mpq_compiler.passes.round_weights import RoundWeights
from mpq_compiler.quantization import gptq as module
from mpq_compiler.quantization.fitting import SEARCHED, FitCache, Layer, Rounding, fit_formats, fit_rows
from mpq_compiler.quantization.gptq import gptq, gptq_of_formats, roots
from mpq_compiler.quantization.paths import Walk, best_entries
from mpq_compiler.support.errors import UserError
from tests.harness.programs import after
from tests.quantization.test_gptq import FORMATS, errors, gram, nearest, weight

SEVERAL = 8


def levels_of(start: QuantizedWeight, row: int) -> Tensor:
    """The levels of a row, f64."""
    classes = contract.row_classes(start.row_class, len(start.codes))
    table = torch.arange(-127, 128)
    if start.lut is not None:
        table = start.lut[classes[row]]
        table = table[table != contract.NO_LEVEL]
    offset = 0.0 if start.offset is None else float(start.offset[row])
    return float(start.scale[row, 0]) * table.double().unique() + offset


def least_error(w: Tensor, start: QuantizedWeight, g: Tensor) -> Tensor:
    """The least damped error of each row over all paths, each of which goes on to the two levels nearest a column."""
    ((order, root),) = roots(g, True, module.DAMPING)
    carried, cost = root / root.diagonal(), root.diagonal().square()
    found = []
    for row, values in enumerate(w.double()[:, order]):
        levels, best = levels_of(start, row), torch.inf
        for path in itertools.product((0, 1), repeat=len(values)):
            at, spent = values.clone(), 0.0
            for i, which in enumerate(path):
                level = levels[(at[i] - levels).abs().argsort(stable=True)[which]]
                spent += float(cost[i] * (at[i] - level) ** 2)
                at[i + 1 :] += carried[i, i + 1 :] * (values[i] - level)
            best = min(best, spent)
        found.append(best)
    return torch.tensor(found)


@pytest.mark.parametrize("name", ["int2", "int3m", "km3", "fp4", "int8"])
def test_all_paths_have_the_least_error(name):
    """Ten columns, of which more than `paths.NEAR` are carried at once."""
    w, g = weight(4, 10), gram(10)
    start = nearest(name, w, g)
    damped = g + module.DAMPING * g.diagonal().mean() * torch.eye(10)
    found = gptq(w, start, g, paths=2**10)
    error = output_error(found.dequantize() - w, damped)
    least = least_error(w, start, g).float()
    kept = (found.codes == start.codes).all(1)  # rows whose nearest codes have the least error without the damping
    assert not kept.all()
    torch.testing.assert_close(error[~kept], least[~kept], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("columns", [40, 300])
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.invariant("compiler-9")
def test_several_paths_are_better_than_one(name, columns):
    """All rows together; each is at least as good as with the nearest codes."""
    w, g = weight(columns=columns), gram(columns, samples=3 * columns)
    start = nearest(name, w, g)
    before, one, several = errors(w, g, start, gptq(w, start, g), gptq(w, start, g, paths=SEVERAL))
    assert (several <= before).all()
    assert several.sum() < 0.97 * one.sum()


@pytest.mark.parametrize("name", FORMATS)
def test_one_path_is_gptq(name):
    w, g = weight(), gram()
    start = nearest(name, w, g)
    (update,), quantizer = module._updates(g, True, module.DAMPING), module._Columns([start])
    columns = w[:, update.order].T.contiguous()
    scales = quantizer.scales(update.order)
    walk = Walk(columns, columns, scales, quantizer.offset, update.carried, update.cost)
    codes = torch.empty_like(start.codes)
    module._block(w, update.order, update, quantizer, codes, 1)
    expected = dataclasses.replace(start, codes=codes).dequantize()[:, update.order]
    apart = expected != walk.levels(best_entries(walk, quantizer.nearest_two, 1), scales).T
    assert apart.float().mean() < 0.005  # products in another order may differ in the last bit


def test_formats_in_one_walk_have_the_codes_of_their_own(monkeypatch):
    """Those without tables among them, tables of other lengths, and rows that are worked on apart."""
    w, g = weight(rows=17), gram()
    starts = [nearest(name, w, g) for name in ("int8", *FORMATS, "int8")]
    alone = [gptq(w, start, g, paths=SEVERAL) for start in starts]
    monkeypatch.setattr("mpq_compiler.quantization.paths.TOGETHER", SEVERAL * 24)
    together = gptq_of_formats(w, starts, g, paths=SEVERAL)
    for one, other in zip(alone, together, strict=True):
        assert one.codes.dtype == other.codes.dtype
        before, after = errors(w, g, one, other)
        assert torch.allclose(before.sum(), after.sum(), rtol=1e-3)


@pytest.mark.parametrize("name", ["int2", "int3", "int3m", "km4", "nf4", "fp4", "int2+b"])
def test_second_levels_are_the_second_nearest(name):
    start = nearest(name, weight(64), None)
    assert start.lut is not None
    seconds = contract.second_levels_at_places(start.lut)
    values = torch.linspace(-140, 140, 4001)
    for table, second in zip(start.lut, seconds, strict=True):
        levels = table[table != contract.NO_LEVEL].float().unique()
        away = (values[:, None] - levels).abs().sort(1).values[:, 1]
        found = (values - second[contract.places(values).long()]).abs()
        torch.testing.assert_close(found, away)


def test_a_table_of_one_level_has_no_second():
    lut = torch.tensor([[5, contract.NO_LEVEL]], dtype=torch.int8)
    assert contract.second_levels_at_places(lut).isinf().all()


@pytest.mark.parametrize("name", ["int2", "km3", "int3+b", "ec2.24", "ec1.25"])
def test_a_fit_along_paths_is_better(name):
    """In as many bytes, as those of entropy-coded integers are checked by their format."""
    w, g = weight(64, 96), gram(96, samples=400)
    plain, several = (fit_rows(w, name, g, way) for way in (Rounding.GPTQ_SCALES, Rounding.GPTQ_PATHS))
    before, after = (float(output_error(fit.dequantize() - w, g).sum()) for fit in (plain, several))
    assert after < 0.97 * before
    chosen = formats.get(name)
    if isinstance(chosen, formats.EntropyFormat):
        assert chosen.bytes_of(several.codes) <= chosen.coded_bytes(w.numel())


def test_fits_of_several_formats_are_those_of_each():
    w, g = weight(32, 48), gram(48)
    names = ["int3", "km3", "ec2.24"]
    for name, fit in fit_formats(w, names, g, Rounding.GPTQ_PATHS).items():
        alone = fit_rows(w, name, g, Rounding.GPTQ_PATHS)
        before, after = (float(output_error(x.dequantize() - w, g).sum()) for x in (alone, fit))
        assert after == pytest.approx(before, rel=0.02)


def test_large_weights_have_one_path_and_losses_too(monkeypatch):
    assert Rounding.GPTQ_PATHS.of_size(SEARCHED) == Rounding.GPTQ_PATHS
    assert Rounding.GPTQ_PATHS.of_size(SEARCHED + 1) == Rounding.GPTQ_GAINS
    assert Rounding.GPTQ_PATHS.quick == Rounding.GPTQ_SCALES
    layer = Layer(weight(), gram(), None)
    several = layer.fit("int3", Rounding.GPTQ_PATHS).dequantize()
    monkeypatch.setattr("mpq_compiler.quantization.fitting.SEARCHED", layer.weight.numel() - 1)
    one, plain = (layer.fit("int3", way).dequantize() for way in (Rounding.GPTQ_PATHS, Rounding.GPTQ_GAINS))
    assert torch.equal(one, plain) and not torch.equal(one, several)


def test_a_fit_is_known_under_every_rounding_that_is_one_for_its_size(monkeypatch):
    """So that what a plan was measured by is not fitted again to be stored."""
    program = after("dit", "time-groups")
    call = program.quantizable[0]
    name, fits = str(weight_of(call)), FitCache()
    monkeypatch.setattr("mpq_compiler.quantization.fitting.SEARCHED", 0)
    made = fits.fitted(program, call, name, "int3", Rounding.GPTQ_SCALES)
    assert fits.fitted(program, call, name, "int3", Rounding.GPTQ_PATHS) is made
    assert fits.known(program, name, "int3", Rounding.GPTQ) is None


def test_it_is_asked_for_with_scales():
    asked = RoundWeights(method="gptq", scales=True, paths=True).requests()
    assert asked.rounding == Rounding.GPTQ_PATHS and (asked | RoundWeights().requests()).rounding == Rounding.GPTQ_PATHS
    with pytest.raises(UserError, match="add scales=true"):
        RoundWeights(method="gptq", paths=True)
