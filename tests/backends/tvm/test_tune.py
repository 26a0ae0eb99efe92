"""The search over tiles: what is measured, what is chosen of it, and that no bit of a result depends on it."""

from __future__ import annotations

import numpy as np
import pytest

from mpq_compiler.artifact import bundle
from mpq_compiler.backends.tvm import build as building
from mpq_compiler.backends.tvm import templates
from mpq_compiler.backends.tvm.compile import tune
from mpq_compiler.backends.tvm.kernels.cpu import weight_layout
from mpq_compiler.backends.tvm.kernels.cpu.isa import ISAS
from mpq_compiler.backends.tvm.kernels.problems.quant_matmul import QuantMatmul
from mpq_compiler.backends.tvm.lowering import lower
from mpq_compiler.backends.tvm.plan.calls import Kernel, record
from mpq_compiler.runtime import compiled_denoiser
from mpq_compiler.support.errors import UserError
from mpq_compiler.targets import table as targets
from tests.harness import packed
from tests.harness.integer_kernels import Kernels, assert_same_bits, needs
from tests.harness.shapes import make_case, reference

PROGRAM = ("dit", "int8")
TARGET = "x86-64-avx2"


@pytest.mark.parametrize("name", ["x86-64-avx512vnni", TARGET])
def test_every_tile_gives_the_same_bits(name):
    isa, found = needs(name), []
    for p in (
        QuantMatmul.linear((16,), 40, 192, bits=3),
        QuantMatmul(5, 6, 16, 63, (3, 3), padding=(1, 1, 1, 1), bits=4),
        QuantMatmul.linear((9,), 64, 48, bits=4, segments=(16,) * 4, dynamic=True),
    ):
        found += [QuantMatmul(**(vars(p) | {"tile": tile})) for tile in weight_layout.tiles(p, isa)]
    assert len({p.tile for p in found}) > 2
    cases = [make_case(p, 2, 0) for p in found]
    for case, got in zip(cases, Kernels(isa, found).run(list(enumerate(cases))), strict=True):
        assert_same_bits(got, reference(case), case.problem)


def test_the_default_comes_first_and_few_others_behind_it():
    for isa in ISAS.values():
        for rows, outputs in ((1, 512), (16, 512), (64, 256), (1024, 128), (1024, 4)):
            p = QuantMatmul.linear((rows,), 64, outputs)
            tiles = weight_layout.tiles(p, isa)
            layout = weight_layout.WeightLayout(p, isa)
            default = layout.isa.fitted(layout.tile, rows)
            assert tiles[0] == (default.vectors, default.rows)
            assert len(tiles) == len(set(tiles)) <= 12


def test_a_tile_is_chosen_where_it_gains_and_kernels_that_share_weights_agree():
    assert tune.choose([{(4, 6): 1.0, (4, 5): 0.99, (2, 10): 0.98}]) == [(4, 6)]
    assert tune.choose([{(4, 6): 1.0, (4, 5): 0.9, (2, 10): 0.8}]) == [(2, 10)]
    together = [{(4, 6): 1.0, (4, 5): 0.95, (2, 10): 0.8}, {(4, 6): 1.0, (2, 10): 1.3}]
    assert tune.choose(together) == [(4, 6), (4, 6)]
    together[1][3, 8] = 0.1  # the first has not been measured with that
    assert tune.choose(together) == [(4, 6), (4, 6)]


def test_measuring():
    kernel = Kernel("gemm", record("problem.QuantMatmul", height=10, width=4, channels=64, outputs=64, groups=2))
    needs(TARGET)
    found = tune.measure(kernel, targets.resolve(TARGET))
    tiles = weight_layout.tiles(templates.resolve(kernel.problem), ISAS[TARGET])
    assert [(registers, rows) for registers, rows, _ in found] == tiles and len(tiles) > 1
    assert all(ratio > 0 for *_, ratio in found)


def test_an_artifact_with_other_tiles_gives_the_same_bits(tmp_path):
    """With the times in the cache, nothing is measured: the same tiles, the same bytes."""
    needs(TARGET)
    case, target = packed.program(*PROGRAM), targets.resolve(TARGET)
    lowered = lower(case.program, (1,))
    asked = []

    def last_is_fastest(request, kernel, _):
        asked.append((request, kernel))
        tiles = weight_layout.tiles(templates.resolve(kernel.problem), ISAS[TARGET])
        return [(*tile, 1.0 - i / 100 * 9) for i, tile in enumerate(tiles)]

    tuned, tiles = tune.tuned(lowered, target, last_is_fastest, building.sources(), packed.kernel_cache())
    assert tiles and {request for request, _ in asked} == {"tune"}
    assert {k for k in tuned.kernels() if k.template == "prepare"} - {*lowered.kernels()}, "weights lie otherwise"
    outputs, libraries = [], []
    for i, chosen in enumerate((False, True, True)):
        built = building.build(case.program, target, (1,), cache=packed.kernel_cache(), tune=chosen)
        assert built.facts["tiles"] == (tiles if chosen else None)
        path = packed.write(tmp_path / f"{i}.mpq", case.program, target, built)
        libraries.append(built.files[bundle.KERNELS])
        inputs = {name: value[:1].numpy() for name, value in case.inputs.items()}
        outputs.append(compiled_denoiser.load(path, threads=1).run(inputs))
    assert len(asked) == len({kernel for _, kernel in asked}), "a kernel is measured once"
    np.testing.assert_array_equal(outputs[0], outputs[1])
    assert libraries[0] != libraries[1] and libraries[1] == libraries[2]


def test_a_target_that_does_not_run_here_is_refused():
    target = targets.resolve("aarch64-dotprod")
    if not targets.missing_features(target):
        pytest.skip("this machine runs AArch64")
    with pytest.raises(UserError, match=r"tune measures kernels here.*aarch64-dotprod"):
        tune.tuned(lower(packed.program(*PROGRAM).program, (1,)), target, lambda *_: [], "")
