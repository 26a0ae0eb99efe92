"""Network orthogonality, and allocation by it."""

from __future__ import annotations

import json

import pytest
import torch

from mpq_compiler import schemas
from mpq_compiler.allocation.sensitivity_table import ORTHOGONALITY
from mpq_compiler.driver import resolve
from mpq_compiler.driver.instruments import observe
from mpq_compiler.driver.options import Options
from mpq_compiler.inspection import explain
from mpq_compiler.ir import costs, provenance
from mpq_compiler.ir.edges import input_edge
from mpq_compiler.ir.findings import ALLOCATION
from mpq_compiler.ir.interpreter import run
from mpq_compiler.ir.program import PARAMETERS, Program
from mpq_compiler.passes.bit_allocation import BitAllocation
from mpq_compiler.passes.orthogonality import Orthogonality, orm
from mpq_compiler.pipeline import manager
from mpq_compiler.pipeline.session import Session
from mpq_compiler.quantization.statistics import CALIBRATION
from mpq_compiler.support.errors import UserError
from mpq_compiler.support.files import encode_json
from tests.harness import programs

MODEL = "unet2d"
FORMATS = ("int2", "int3", "int2+b", "int4", "int8")


def measured(jobs: int = 1, **options) -> Program:
    options = {"formats": FORMATS, "activations": (4, 6, 8), "times": 3, "inputs": 4} | options
    return Orthogonality(**options).run(programs.after(MODEL, "time-groups"), Session(jobs=jobs))


def planned(program: Program | None = None, **options) -> Program:
    return BitAllocation(objective="orthogonality", **options).run(program or measured(), Session())


def outputs(count: int = 5, rows: int = 6) -> list[torch.Tensor]:
    """Of layers of several widths, f64 [rows, width]."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(rows, 3 + 4 * i, generator=generator, dtype=torch.float64) + i for i in range(count)]


def metric(features: list[torch.Tensor]) -> torch.Tensor:
    return orm(torch.stack([f @ f.T for f in features]))


@pytest.mark.invariant("mpq-diff-1")
def test_the_metric_is_that_of_the_paper():
    features = outputs()
    found = metric(features)
    for i, a in enumerate(features):
        for j, b in enumerate(features):
            expected = (b.T @ a).norm().square() / ((a.T @ a).norm() * (b.T @ b).norm())
            assert float(found[i, j]) == pytest.approx(float(expected), rel=1e-12)
    assert bool(((found >= 0) & (found <= 1)).all())
    torch.testing.assert_close(found, found.T, rtol=1e-14, atol=0)
    torch.testing.assert_close(found.diagonal(), torch.ones(len(features), dtype=torch.float64))
    apart = torch.eye(6, dtype=torch.float64)
    assert float(metric([apart[:, :2], apart[:, 2:]])[0, 1]) == 0


@pytest.mark.invariant("mpq-diff-2")
def test_rotations_and_factors_change_nothing():
    features = outputs()
    generator = torch.Generator().manual_seed(1)
    turned = [
        1e-3 * 10**i * f @ torch.linalg.qr(torch.randn(f.shape[1], f.shape[1], generator=generator, dtype=f.dtype))[0]
        for i, f in enumerate(features)
    ]
    torch.testing.assert_close(metric(turned), metric(features))
    assert float(metric([features[0], turned[0]])[0, 1]) == pytest.approx(1)


def test_a_layer_that_gives_nothing_counts_least():
    features = outputs()
    found = metric([*features, torch.zeros(6, 4, dtype=torch.float64)])
    assert bool((found[-1] == 1).all()) and bool((found[:, -1] == 1).all())
    torch.testing.assert_close(found[:-1, :-1], metric(features))


@pytest.mark.invariant("mpq-diff-3")
def test_importance_falls_with_what_layers_have_in_common():
    """gamma is the mean of the metric of the program's own outputs; losses are importances times missing bits."""
    program = measured(times=1, inputs=12)
    values: dict[str, torch.Tensor] = {}
    run(program, program.facts[CALIBRATION].inputs, lambda node, value: values.update({node.name: value}))
    calls = program.quantizable
    gamma = metric([values[call.name].reshape(12, -1).double() for call in calls]).mean(1)
    said = {path: passes["orthogonality"] for path, passes in program.facts[provenance.DECISIONS].items() if path}
    table, least = program.facts[ORTHOGONALITY], float(gamma.min())
    edges: dict[str, float] = {}
    for call, own in zip(calls, gamma.tolist(), strict=True):
        path, edge = str(costs.weight_path(call)), input_edge(call).name
        importance = float(torch.tensor(-10.0 * (own - least), dtype=torch.float64).exp())
        assert said[path]["gamma"] == pytest.approx(own, rel=1e-4)
        assert said[path]["importance"] == pytest.approx(importance, rel=1e-4)
        expected = {name: importance * bits for name, bits in zip(FORMATS, (6, 5, 5, 4, 0), strict=True)}
        assert table["weights"][path] == pytest.approx(expected, rel=1e-4)
        edges[edge] = edges.get(edge, 0.0) + importance
    for edge, importance in edges.items():
        assert table["activations"][edge] == pytest.approx(
            {"4": 4 * importance, "6": 2 * importance, "8": 0.0}, rel=1e-4
        )
    chosen = planned(program, weights=4.5).weights
    shapes: dict[tuple[int, ...], list[tuple[float, int]]] = {}
    for path, plan in chosen.items():
        size = tuple(program.tensors[str(next(c.args[1].target for c in calls if costs.weight_path(c) == path))].shape)
        bits = dict(zip(FORMATS, (2, 3, 3, 4, 8), strict=True))[plan.format]
        shapes.setdefault(size, []).append((said[path]["gamma"], bits))
    assert len({bits for same in shapes.values() for _, bits in same}) > 2
    for same in shapes.values():
        bits = [width for _, width in sorted(same)]
        assert bits == sorted(bits, reverse=True)


@pytest.mark.invariant("mpq-diff-4")
def test_budgets_of_weights_and_activations_are_met_and_bits_rise_with_them():
    program, left_out = measured(), []
    for weights, activations in ((3.5, 4.0), (4.0, 5.5), (5.0, 6.5), (8.5, 8.0)):
        found = planned(program, weights=weights, activations=activations)
        assert costs.average_bits(costs.stored_bytes(found), found.facts[PARAMETERS]) <= weights
        assert costs.activation_bits(found) <= activations
        left_out.append(found.facts[ALLOCATION]["objective"])
        assert "additivity" not in found.facts[ALLOCATION]
        if 4 < activations < 8:
            assert len({plan.bits for plan in found.activations.values()}) > 1
    assert left_out == sorted(left_out, reverse=True) and left_out[-1] == 0
    with pytest.raises(UserError, match="cannot be met: the least that the formats allow is"):
        planned(program, weights=1.0)


@pytest.mark.invariant("compiler-12")
def test_jobs_change_nothing():
    assert measured(jobs=2).facts[ORTHOGONALITY] == measured().facts[ORTHOGONALITY]


def test_a_small_calibration_has_fewer_times():
    program = measured(times=50, inputs=11)
    assert program.facts[ORTHOGONALITY]["inputs"] == 2 * 11
    assert measured(inputs=100).facts[ORTHOGONALITY]["inputs"] == 12


def test_a_layer_is_explained_by_its_importance():
    passes = [Orthogonality(formats=FORMATS, times=3), BitAllocation(objective="orthogonality", weights=4.5)]
    start = programs.after(MODEL, "time-groups")
    after, _ = manager.run_pipeline(passes, start, Session(), [observe], present={"calibration", "time-groups"})
    document = json.loads(encode_json(provenance.document(after)))
    assert schemas.check(document, "decisions") is None
    path = next(iter(after.weights))
    found = explain.why(document, path)
    text = " ".join(explain.sentences(found))
    assert "in common with those of all layers on average (network orthogonality)" in text
    assert f"bit-allocation took {after.weights[path].format}: a loss of" in text
    assert {row["format"] for row in found["choices"]} == {*FORMATS}


def test_what_cannot_be_is_said():
    with pytest.raises(UserError, match="needs 'orthogonality': put orthogonality before it"):
        planned(programs.after(MODEL, "sensitivity"))
    with pytest.raises(UserError, match="knows importances of layers alone: leave 'attention' out"):
        BitAllocation(objective="orthogonality", attention=8)
    with pytest.raises(UserError, match="knows importances of layers alone: leave 'uniform' out"):
        BitAllocation(objective="orthogonality", uniform="int4")
    with pytest.raises(UserError, match="'beta' of pass 'orthogonality' must be 0 to 100"):
        Orthogonality(beta=-1)
    with pytest.raises(UserError, match="must name a format to choose"):
        Orthogonality(formats=())


def test_a_budget_of_activations_gives_the_widths_to_choose_from():
    pipeline = f"{programs.FRONT},orthogonality,bit-allocation{{objective=orthogonality}},{programs.BACK}"
    passes = resolve.resolve(Options(pipeline=pipeline, activations=4.0, weights="4"))
    assert next(p for p in passes if p.name() == "orthogonality").options()["activations"] == tuple(range(2, 9))
