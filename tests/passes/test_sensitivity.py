from __future__ import annotations

import dataclasses
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch

from mpq_compiler.allocation import costs, mixdq_groups
from mpq_compiler.allocation.sensitivity_table import CONTENT, QUALITY
from mpq_compiler.analysis import noise_power as noise_powers
from mpq_compiler.analysis.content_loss import ssim
from mpq_compiler.analysis.noise_power import noise_power
from mpq_compiler.analysis.perturbation import Ablation
from mpq_compiler.analysis.single_changes import PROBABILITIES, STATIC, WEIGHT
from mpq_compiler.ir import diff, ops, printer
from mpq_compiler.ir.costs import stored_bytes, weight_path
from mpq_compiler.ir.edges import input_edge
from mpq_compiler.ir.findings import ALLOCATION, SENSITIVITY
from mpq_compiler.ir.graph import weight_of
from mpq_compiler.ir.interpreter import Interpreter, run
from mpq_compiler.ir.program import PARAMETERS, TIME_GROUPS, Program, TensorStore
from mpq_compiler.passes.bit_allocation import BitAllocation
from mpq_compiler.passes.sensitivity import Sensitivity
from mpq_compiler.pipeline.session import Session
from mpq_compiler.quantization.fitting import activation_parameters, bias_of, corrected_bias, fitted
from mpq_compiler.quantization.requests import Requests
from mpq_compiler.quantization.statistics import CALIBRATION
from mpq_compiler.support import cache
from mpq_compiler.support.errors import UserError
from tests.harness import programs
from tests.harness.tree import ROOT

MODEL = "pixart"
PASS = Sensitivity(inputs=3, formats=("int2", "int8"), activations=(4, 8), method="ablation")


def measured(program: Program, folder: Path, jobs: int = 1) -> dict:
    return PASS.run(program, Session(cache=folder, jobs=jobs)).facts[SENSITIVITY]


@pytest.fixture
def evaluations(monkeypatch):
    """The number of measurements made, as a list of one."""
    count = [0]
    measure = Sensitivity.measure

    def counting(self, *arguments):
        count[0] += 1
        return measure(self, *arguments)

    monkeypatch.setattr(Sensitivity, "measure", counting)
    return count


def test_its_dump_has_the_losses(tmp_path):
    """The text says at each layer and edge what was measured, until a plan stands there."""
    before = programs.after(MODEL, "time-groups")
    after = PASS.run(before, Session(cache=tmp_path))
    table, text = after.facts[SENSITIVITY], printer.text(after)
    changed = diff.diff(printer.text(before), text)
    lines = {line.split(" = ")[0].strip(): line for line in text.splitlines() if " = " in line}
    node = after.quantizable[-1]
    losses = table["weights"][weight_path(node)]
    assert f"// loss w int2 {losses['int2']:.1e}, int8 {losses['int8']:.1e}" in lines[f"%{node.name}"]
    edge = input_edge(node).name
    said = ", ".join(f"{bits} {loss:.1e}" for bits, loss in table["activations"][edge].items())
    assert f"a {said}" in lines[f"%{edge}"]
    assert sum(line.startswith("+") for line in changed.splitlines()) >= len(table["weights"])
    assert "loss" not in printer.text(before)


def test_fewer_bits_cost_more(tmp_path):
    table = measured(programs.after(MODEL, "time-groups"), tmp_path)
    layers = programs.after(MODEL, "time-groups").quantizable
    assert len(table["weights"]) == len(layers)
    assert all(losses["int2"] > losses["int8"] > 0 for losses in table["weights"].values())
    assert all(losses["4"] > losses["8"] > 0 for losses in table["activations"].values())


@pytest.mark.invariant("compiler-12")
def test_jobs_change_nothing(tmp_path):
    program = programs.after(MODEL, "time-groups")
    assert measured(program, tmp_path / "1", jobs=1) == measured(program, tmp_path / "2", jobs=2)


def test_a_second_run_measures_nothing(tmp_path, evaluations):
    program = programs.after(MODEL, "time-groups")
    first, count = measured(program, tmp_path), evaluations[0]
    assert measured(program, tmp_path) == first and evaluations[0] == count > 0


@pytest.mark.parametrize("what", ["weight", "bias", "inputs"])
def test_a_change_in_place_misses_the_cache(tmp_path, evaluations, what):
    """The key is made of bytes: the store's tensors are changed in place, name and address stay."""
    shared = programs.after(MODEL, "time-groups")
    program = shared.fork(tensors=TensorStore({n: t.clone() for n, t in shared.tensors.items()}))
    calibration = program.facts[CALIBRATION]
    inputs = {n: t.clone() for n, t in calibration.inputs.items()}
    program.facts[CALIBRATION] = type(calibration)(inputs, calibration.edges, calibration.grams, calibration.means)
    measured(program, tmp_path)
    count = evaluations[0]
    changed = {
        "weight": program.tensors["proj_out.weight"],
        "bias": program.tensors["proj_out.bias"],
        "inputs": inputs["hidden_states"],
    }[what]
    changed.view(-1)[0] += 1.0
    measured(program, tmp_path)
    assert evaluations[0] == 2 * count


RUN = """
import sys, time
from pathlib import Path
import torch
from tests.harness import programs
from tests.passes.test_sensitivity import MODEL, PASS, measured
from mpq_compiler.passes.sensitivity import Sensitivity
measure = Sensitivity.measure
def slow(self, *arguments):
    time.sleep(0.05)
    return measure(self, *arguments)
Sensitivity.measure = slow
program = programs.after(MODEL, "time-groups", programs.FRONT)
print("ready", flush=True)
measured(program, Path(sys.argv[1]))
"""


def test_a_killed_run_goes_on_where_it_was(tmp_path, evaluations):
    program = programs.after(MODEL, "time-groups", programs.FRONT)
    whole = measured(program, tmp_path / "whole")
    total = evaluations[0]
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    child = subprocess.Popen(
        [sys.executable, "-c", RUN, tmp_path / "killed"], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout.readline() == "ready\n"
    deadline = time.monotonic() + 60
    while _lines(tmp_path / "killed") < total // 2 + 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert total // 2 < _lines(tmp_path / "killed") < total
    (file,) = (tmp_path / "killed").rglob("*.results")
    with file.open("a") as torn:
        torn.write('["w torn')  # what a kill in the middle of a line leaves
    evaluations[0] = 0
    assert measured(program, tmp_path / "killed") == whole
    assert 0 < evaluations[0] <= 0.55 * total


def _lines(folder: Path) -> int:
    return sum(file.read_bytes().count(b"\n") for file in folder.rglob("*.results"))


def test_a_given_table_is_used(evaluations):
    program = programs.after(MODEL, "time-groups")
    evaluations[0] = 0
    described = costs.describe(program)
    layers, elements, parameters = (described[name] for name in ("layers", "elements", "parameters"))
    weights = {layer["name"]: {"int8": 0.1} for layer in layers}
    table = {"weights": weights, "activations": {edge: {"8": 0.1} for edge in elements}, "parameters": parameters}
    assert PASS.run(program, Session(sensitivity=table)).facts[SENSITIVITY] is table
    assert evaluations[0] == 0
    weights.pop(layers[0]["name"])
    with pytest.raises(UserError, match="lacks"):
        PASS.run(program, Session(sensitivity=table))


@pytest.mark.invariant("mixdq-8")
def test_what_stays_as_it_is_makes_no_noise():
    program = programs.after(MODEL, "time-groups")
    ablation = Ablation(program, program.facts[CALIBRATION].select(3))
    for node in program.quantizable:
        weight, edge = node.args[1], node.args[0]
        same = ablation.output({weight: ablation.value(weight).clone()}, {node: ablation.value(edge).clone()})
        assert noise_power(same, ablation.reference) == 0


class Planned(Interpreter):
    """A float program with other weights and biases, whose layers read quantized activations."""

    def __init__(self, program: Program, tensors: dict[str, torch.Tensor], widths: dict[str, int]) -> None:
        super().__init__(program)
        self.other, self.widths, self.layers = tensors, widths, {*program.quantizable}

    def attribute(self, name):
        return self.other[name] if name in self.other else super().attribute(name)

    def call(self, node, args, kwargs):
        if node in self.layers:
            edge = input_edge(node).name
            tables = activation_parameters(self.program, edge, self.widths[edge])
            args = (ops.fake_quantize(args[0], *tables, self.group, self.widths[edge]), *args[1:])
        return super().call(node, args, kwargs)


@pytest.mark.invariant("allocator-11")
def test_noise_powers_of_single_changes_add_up_to_that_of_a_plan():
    """On the bundled denoiser, for random plans that cover the noise in which allocations lie."""
    pipeline = f"{programs.FRONT},sensitivity{{inputs=6,formats=int3/int4/int8,activations=4/8}}"
    program = programs.after(programs.BUNDLED, "sensitivity", pipeline)
    table, inputs = program.facts[SENSITIVITY], program.facts[CALIBRATION].select(6)
    reference, decibels = run(program, inputs), []
    for seed in range(20):
        draw, tensors, widths, total = random.Random(seed), {}, {}, 0.0
        coarse = draw.random() ** 2
        for node in program.quantizable:
            weight, edge = str(weight_of(node)), input_edge(node).name
            chosen = draw.choice(["int3", "int4"]) if draw.random() < coarse else "int8"
            fit = fitted(program, node, weight, chosen)
            tensors[weight] = fit.dequantize().reshape(program.tensors[weight].shape)
            if (bias := bias_of(node)) is not None:
                tensors[str(bias.target)] = corrected_bias(program, node, weight, fit)
            total += table["weights"][weight_path(node)][chosen]
            if edge not in widths:
                widths[edge] = 4 if draw.random() < coarse / 4 else 8
                total += table["activations"][edge][str(widths[edge])]
        planned = Planned(program, tensors, widths)
        planned.group = ops.time_group(inputs["timestep"], program.facts[TIME_GROUPS])
        decibels.append([10 * math.log10(x) for x in (total, noise_power(planned.run(inputs), reference))])
    expected, measured = np.array(decibels).T
    assert expected.min() < -25 and expected.max() > -18
    assert abs((measured - expected).mean()) <= 1 and (measured - expected).std() <= 1.5
    assert scipy.stats.spearmanr(expected, measured).statistic >= 0.85


def test_losses_are_rounded():
    table = programs.after(MODEL, "sensitivity").facts[SENSITIVITY]
    for losses in table["weights"].values():
        assert all(loss == float(f"{loss:.{noise_powers.DIGITS - 1}e}") for loss in losses.values())


def test_the_key_knows_machine_and_versions(monkeypatch):
    program = programs.after(MODEL, "time-groups")
    inputs = program.facts[CALIBRATION].select(2)
    key = PASS.key(program, inputs)
    assert key == PASS.key(program, inputs)
    monkeypatch.setattr(torch, "__version__", "0.0")
    assert PASS.key(program, inputs) != key
    assert len(cache.digest("a", "bc")) == 64 and cache.digest("a", "bc") != cache.digest("ab", "c")


def test_inputs_that_do_not_fit_in_memory_together_are_measured_in_parts(tmp_path, monkeypatch, evaluations):
    """The mean over the parts: close to the whole, and resumable part by part."""
    program = programs.after(MODEL, "time-groups")
    whole, count = measured(program, tmp_path), evaluations[0]
    monkeypatch.setattr(noise_powers, "HELD_BYTES", 1)
    parts = measured(program, tmp_path)
    assert evaluations[0] == count + PASS.inputs * count
    assert measured(program, tmp_path) == parts
    assert evaluations[0] == count + PASS.inputs * count
    for kind in ("weights", "activations"):
        for name, losses in whole[kind].items():
            assert all(0.3 < parts[kind][name][choice] / loss < 3 for choice, loss in losses.items())


def test_layers_with_many_inputs_keep_their_moments_in_blocks(monkeypatch):
    """The blocks are those of the whole; fits and GPTQ on them are mostly better than on the weight error."""
    from mpq_compiler.formats.base import output_error
    from mpq_compiler.ir import scratch
    from mpq_compiler.ir.graph import weight_of
    from mpq_compiler.quantization import statistics
    from mpq_compiler.quantization.fitting import Rounding, fit_rows, rows_of

    program = programs.after(MODEL, "time-groups")
    whole = program.facts[CALIBRATION]
    monkeypatch.setattr(statistics, "GRAM_COLUMNS", 8)
    monkeypatch.setattr(scratch, "LEAST", 256)
    wanted = frozenset({statistics.RANGE, statistics.GRAM})
    thin = statistics.collect(program, whole.inputs, wanted, Session())
    several, ratios = 0, []
    for node in program.quantizable:
        rows, gram = rows_of(program, str(weight_of(node))), whole.grams[node.name]
        blocks, size = thin.grams[node.name], rows.shape[1]
        if blocks.dim() == 2:
            torch.testing.assert_close(blocks, gram, rtol=1e-4, atol=1e-5)
            continue
        several += 1
        count = len(blocks)
        assert size == blocks.shape[0] * blocks.shape[1] and blocks.shape[1] <= 8
        parts = gram.reshape(count, size // count, count, size // count)
        torch.testing.assert_close(blocks, torch.stack([parts[j, :, j] for j in range(count)]), rtol=1e-4, atol=1e-5)
        for name, rounding in (("int2", Rounding.NEAREST), ("int2+b", Rounding.NEAREST), ("int3", Rounding.GPTQ)):
            fits = [fit_rows(rows, name, g, rounding) for g in (blocks, None)]
            errors = [float(output_error(fit.dequantize() - rows, gram).sum()) for fit in fits]
            ratios.append(errors[0] / errors[1])
    assert several > 5 and max(ratios) < 1.3 and sum(ratios) / len(ratios) < 0.95


def test_content_layers_have_a_metric_of_their_own(tmp_path):
    """Their losses are 1 - SSIM of clean images, those of quality layers stay noise, and budgets have to be apart."""
    program, session = programs.after(MODEL, "time-groups"), Session(programs.denoiser(MODEL), cache=tmp_path)
    noise, mixed = (
        dataclasses.replace(PASS, content=metric).run(program, session).facts[SENSITIVITY]
        for metric in ("noise", "ssim")
    )
    groups = mixdq_groups.groups(program)
    for path, losses in noise["weights"].items():
        assert (mixed["weights"][path] == losses) == (groups[path] == QUALITY)
        assert all(0 <= loss < 2 for loss in mixed["weights"][path].values())
    content = [path for path, group in groups.items() if group == CONTENT]
    order = [[table["weights"][path]["int2"] for path in content] for table in (noise, mixed)]
    assert content and scipy.stats.spearmanr(*order).statistic > 0.5
    assert mixed["content"] == "ssim" and "content" not in noise
    apart = program.fork()
    apart.facts[SENSITIVITY] = mixed
    with pytest.raises(UserError, match="budgets of their own"):
        BitAllocation(weights=6.0).run(apart, session)
    paper = {"ratios": (0.8, 1.0), "activation_ratios": (1.0, 1.1), "objective": "paper-db", "images": 2}
    planned = BitAllocation(weights=6.0, activations=6.0, **paper).run(apart, session)
    assert all(found["ratio"] and found["activation_ratio"] for found in planned.facts[ALLOCATION]["candidates"])
    assert stored_bytes(planned) <= 6.0 * program.facts[PARAMETERS] / 8
    with pytest.raises(UserError, match="add method=ablation"):
        Sensitivity(content="ssim")


def test_attentions_are_quality_whoever_reads_them():
    program, step = programs.after(MODEL, "time-groups"), dataclasses.replace(PASS, content="ssim")
    tasks = step.tasks(program, Requests(attention=True))
    found = step._with_content(program, tasks, Session(programs.denoiser(MODEL)))
    kinds = {task.kind: {other.content is not None for other in found if other.kind == task.kind} for task in found}
    assert kinds == {WEIGHT: {False, True}, STATIC: {False, True}, PROBABILITIES: {False}}


@pytest.mark.parametrize("channels", [1, 3])
def test_structural_similarity_of_whole_images(channels):
    """It is that of scikit-image's formula with one window, whatever range the images have."""
    x = torch.rand(2, channels, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = (x - x.amin((1, 2, 3), True)) / (x.amax((1, 2, 3), True) - x.amin((1, 2, 3), True))
    y = (x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)).clamp(0, 1)
    expected = []
    for a, b in zip(x.flatten(2).numpy(), y.flatten(2).numpy(), strict=True):
        each = []
        for p, q in zip(a, b, strict=True):
            (vp, c), (_, vq) = np.cov(p, q, ddof=0)
            top = (2 * p.mean() * q.mean() + 1e-4) * (2 * c + 9e-4)
            each.append(top / ((p.mean() ** 2 + q.mean() ** 2 + 1e-4) * (vp + vq + 9e-4)))
        expected.append(np.mean(each))
    np.testing.assert_allclose(ssim(x, y), expected, rtol=1e-9)
    np.testing.assert_allclose(ssim(5 * x - 3, 5 * y - 3), expected, rtol=1e-9)
    assert torch.equal(ssim(x, x), torch.ones(2, dtype=torch.float64))
