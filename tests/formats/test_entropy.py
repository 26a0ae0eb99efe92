"""Entropy-coded integers: never more bytes than stated, nearly as many, and nearer to the weight than tables."""

from __future__ import annotations

import pytest
import torch

from mpq_compiler import formats
from mpq_compiler.formats.base import output_error
from mpq_compiler.formats.entropy import integers
from mpq_compiler.ir import costs, stored_tensors
from mpq_compiler.quantization.fitting import Rounding, fit_formats, fit_rows
from mpq_compiler.support import rans
from mpq_compiler.support.errors import UserError
from tests.harness import packed

RATES = ("ec1", "ec1.25", "ec1.7", "ec2", "ec2.5", "ec3", "ec4", "ec5.5")


@pytest.fixture(scope="module")
def layer() -> tuple[torch.Tensor, torch.Tensor]:
    """A weight whose rows differ in power, and second moments of inputs that vary together."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(96, 180, generator=generator) * torch.randn(96, 1, generator=generator).mul(0.4).exp()
    x = torch.randn(900, 180, generator=generator)
    x = x * torch.randn(180, generator=generator).mul(0.6).exp() + x.roll(1, 1)
    return weight, x.T @ x / len(x)


@pytest.mark.parametrize("name", RATES)
@pytest.mark.parametrize("rounding", [Rounding.NEAREST, Rounding.GPTQ])
@pytest.mark.invariant("compiler-1")
def test_a_fit_keeps_to_its_bytes(layer, name, rounding):
    weight, gram = layer
    fit, chosen = fit_rows(weight, name, gram, rounding), formats.get(name)
    most = chosen.coded_bytes(weight.numel())
    taken = len(rans.encode(integers(fit.codes)))
    assert 0.97 * most < taken <= most
    four = chosen.rate <= 1.5
    assert chosen.stored_bytes(*weight.shape) == most + 2 + 16 * four
    assert (fit.lut is None) != four and fit.offset is None and len(fit.scale.unique()) == 1


def test_more_bits_are_nearer_and_tables_are_not(layer):
    weight, gram = layer

    def error(name: str) -> float:
        return float(output_error(fit_rows(weight, name, gram, Rounding.GPTQ).dequantize() - weight, gram).sum())

    errors = [error(name) for name in RATES]
    assert errors == sorted(errors, reverse=True)
    for table in ("int2", "km2", "int3"):
        rate = 8 * formats.get(table).stored_bytes(*weight.shape) / weight.numel()
        assert error(f"ec{rate:.2f}") < 0.8 * error(table)


@pytest.mark.parametrize("loud", [1.0, 30.0], ids=["alike", "one loud row"])
@pytest.mark.parametrize("rounding", [Rounding.NEAREST, Rounding.GPTQ])
def test_some_rows_stand_for_all(layer, loud, rounding):
    """At the step of the whole weight, which a row that is not among them may decide."""
    weight, gram = layer
    weight = weight.clone()
    weight[1] *= loud
    some = torch.arange(0, len(weight), 3)
    found = fit_formats(weight[some], ["int3", *RATES], gram, rounding, within=weight)
    for name in RATES:
        whole = fit_rows(weight, name, gram, rounding).dequantize()[some]
        errors = [float(output_error(q - weight[some], gram).sum()) for q in (found[name].dequantize(), whole)]
        assert 0.85 < errors[0] / errors[1] < 1.15, name


@pytest.mark.parametrize(
    "weight",
    [torch.zeros(5, 7), torch.ones(1, 1), torch.eye(40) * 1e-9, torch.arange(-7.0, 8.0).reshape(3, 5) * 1e3],
    ids=["zeros", "one", "tiny", "large"],
)
def test_weights_that_are_little_to_code(weight):
    for name in ("ec1", "ec2.5"):
        fit = formats.get(name).fit(weight)
        assert len(rans.encode(integers(fit.codes), formats.get(name).coded_bytes(weight.numel()))) > 0
        assert torch.isfinite(fit.dequantize()).all()


@pytest.mark.parametrize("name", ["ec0.5", "ec8", "ec2.125", "ec0", "ec"])
def test_rates_that_there_are_not(name):
    if name == "ec0.5":
        assert formats.get(name).rate == 0.5
        return
    with pytest.raises(UserError, match=f"unknown weight format '{name}'"):
        formats.get(name)


def test_the_file_has_the_bytes_of_the_plan_and_comes_back():
    case = packed.program(packed.BUNDLED, "ec1.7")
    stored = stored_tensors.stored(case.program)
    arrays = {name: tensor.array for name, tensor in stored.items()}
    assert sum(array.nbytes for array in arrays.values()) == costs.stored_bytes(case.planned)
    coded = 0
    for name, tensor in stored.items():
        found = stored_tensors.restored({**tensor.entry(name)}, arrays)
        assert torch.equal(found.to(case.program.tensors[name].dtype), case.program.tensors[name]), name
        coded += tensor.coding == stored_tensors.RANS
    assert coded > 40
    plain = stored_tensors.stored(case.program, coded=False)
    more = sum(tensor.array.nbytes for tensor in plain.values()) - costs.stored_bytes(case.planned)
    assert more == stored_tensors.expanded_bytes(case.program) > 0


def test_codes_that_do_not_fit_are_refused(monkeypatch):
    program = packed.program(packed.BUNDLED, "ec1.7").program
    monkeypatch.setattr(formats.EntropyFormat, "coded_bytes", lambda self, count: 100 + count // 8)
    with pytest.raises(UserError, match=r"codes of .* do not fit the bytes of ec1\.7"):
        stored_tensors.stored(program)
