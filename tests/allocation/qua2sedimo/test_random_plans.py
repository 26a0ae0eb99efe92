"""Random configurations and their labels."""

from __future__ import annotations

import statistics

import pytest
import torch

from mpq_compiler import formats
from mpq_compiler.allocation.qua2sedimo.random_plans import Fits, drawn, method
from mpq_compiler.analysis.noise_power import noise_power
from mpq_compiler.ir.interpreter import run
from mpq_compiler.pipeline.session import Session
from mpq_compiler.quantization.statistics import CALIBRATION
from tests.harness import programs

FORMATS = ("int4", "km4", "km4t", "int3", "km3", "km3t")


@pytest.mark.invariant("qua2sedimo-3")
def test_bits_of_random_configurations_are_spread_evenly():
    """Invariant: every weight has 3 or 4 bits, and the averages of 500 configurations spread evenly around 3.5."""
    paths = [f"layers.{i}.weight" for i in range(60)]
    found = drawn(paths, FORMATS, 500, seed=0)
    bits = [[formats.get(c[path]).bits for path in paths] for c in found]
    assert {width for one in bits for width in one} == {3, 4}
    averages = [statistics.mean(one) for one in bits]
    assert statistics.mean(averages) == pytest.approx(3.5, abs=0.05)
    for low, high in ((3.0, 3.25), (3.25, 3.5), (3.5, 3.75), (3.75, 4.01)):
        assert 0.18 < sum(low <= average < high for average in averages) / 500 < 0.32
    used = [name for c in found for name in c.values()]
    assert all(used.count(name) / len(used) == pytest.approx(1 / 6, abs=0.02) for name in FORMATS)


def test_the_first_configurations_are_the_same_however_many_are_drawn():
    """More of them go on where fewer ended: labels in the cache stay of use."""
    paths = ["a", "b", "c"]
    assert drawn(paths, FORMATS, 50, 3)[:20] == drawn(paths, FORMATS, 20, 3) != drawn(paths, FORMATS, 20, 4)


def test_methods_are_names_without_widths():
    assert [method(name) for name in FORMATS] == ["int", "km", "kmt"] * 2


def test_labels_are_the_noise_of_the_weights_as_they_are_stored():
    """The same as that of the program whose weights are rounded so, activations in float."""
    front = f"{programs.FRONT},bit-allocation{{uniform=int3}}"
    program = programs.after("unet2d", "time-groups", front)
    fits = Fits(program, ("int3",), Session())
    inputs = program.facts[CALIBRATION].select(6)
    reference = run(program, inputs)
    found = fits.noise(dict.fromkeys(fits.calls, "int3"), inputs, reference)
    rounded = programs.after("unet2d", "round-weights", f"{front},insert-fake-quant,round-weights")
    weights = rounded.fork()
    for node in list(weights.graph.nodes):
        if node.op == "call_function" and "fake_quantize" in str(node.target.__name__):
            node.replace_all_uses_with(node.args[0])
    assert found == pytest.approx(noise_power(run(weights, inputs), reference), rel=0.02)  # leftovers are in f16
    assert torch.isfinite(torch.tensor(found)) and 0 < found < 1


@pytest.mark.invariant("qua2sedimo-2")
def test_errors_fall_with_the_bits():
    """Invariant: of each method 4 bits err no more than 3, in the output of every layer."""
    program = programs.after("unet2d", "time-groups", programs.SCORED)
    fits = Fits(program, FORMATS, Session())
    for path in fits.calls:
        errors = {name: fits.error(path, name) for name in FORMATS}
        assert all(
            errors[f"{kind}4{rest}"] <= errors[f"{kind}3{rest}"]
            for kind, rest in (("int", ""), ("km", ""), ("km", "t"))
        )
