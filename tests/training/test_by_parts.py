"""Training part by part: streams, what crosses cuts, and which part a variable belongs to."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from mpq_compiler.frontend import trajectories
from mpq_compiler.ir import parts as parts_module
from mpq_compiler.ir import scratch
from mpq_compiler.ir.interpreter import run, shapes
from mpq_compiler.ir.parts import extract, joined, parts
from mpq_compiler.ir.program import PLANNED
from mpq_compiler.pipeline.session import Session
from mpq_compiler.training import by_parts
from mpq_compiler.training.data import Data
from mpq_compiler.training.state import Stage
from mpq_compiler.training.streams import Streams
from mpq_compiler.training.student import RANK, variables
from mpq_compiler.training.variables import Adapted, Kind, settled
from tests.harness import programs

MEMORY = 1 << 20
"""Bytes that cut the small models into a dozen parts."""


def start(model="unet2d"):
    return programs.after(model, "round-weights", programs.RESIDUAL)


@pytest.fixture(scope="module")
def data():
    denoiser = programs.denoiser("unet2d")
    return tuple(Data(*trajectories.record_teacher(denoiser, 2, 3, seed), part=4) for seed in (1, 2))


def session(tmp_path, **more):
    return Session(programs.denoiser("unet2d"), None, cache=tmp_path, **more)


@pytest.mark.parametrize("model", ["unet2d", "pixart"])
def test_parts_one_after_the_other_are_the_program(model):
    """Of both programs, from what crosses the cuts alone."""
    program = start(model)
    planned = program.facts[PLANNED]
    found = parts((planned, program), by_parts.cuts(program, True, 2, MEMORY))
    assert len(found) > 5
    inputs = dict(programs.inputs(model, 2))
    sizes = shapes(planned, 2)
    for whole in (planned, program):
        known = dict(inputs)
        for part in found:
            piece = extract(whole, part.inputs, part.outputs, sizes)
            assert [s.name for s in piece.inputs] == [*part.inputs]
            known |= dict(zip(part.outputs, run(piece, {name: known[name] for name in part.inputs}), strict=True))
        assert torch.equal(known[found[-1].outputs[0]], run(whole, inputs))


def test_skip_connections_cross_the_cuts_between():
    program = start()
    found = parts((program.facts[PLANNED], program), by_parts.cuts(program, True, 2, MEMORY))
    made = {name: number for number, part in enumerate(found) for name in part.outputs}
    far = [name for number, part in enumerate(found) for name in part.inputs if made.get(name, number) < number - 1]
    assert far
    for number, part in enumerate(found[1:], 1):
        assert set(part.inputs) - made.keys() <= {s.name for s in program.inputs}
        assert all(made.get(name, -1) < number for name in part.inputs)


def test_every_variable_is_trained_by_the_first_part_that_reads_it(data, tmp_path, monkeypatch):
    """Once, though a quantizer that several parts read is in the program of each."""
    trained, collect = [], by_parts.variables

    def collecting(*arguments):
        found = collect(*arguments)
        trained.append({n.name for n in arguments[0].graph.nodes if n.target in found})
        return found

    monkeypatch.setattr(by_parts, "variables", collecting)
    program = start()
    last = by_parts.cuts(program, True, 4, MEMORY)
    result, outcomes = by_parts.train_parts(
        program, last, lambda n, p: [Stage("x", False, 1)], *data, session(tmp_path), 0
    )
    assert len(outcomes) == len([found for found in trained if found]) > 5
    assert sum(map(len, trained)) == len(set.union(*trained))
    assert set.union(*trained) == {
        n.name for n in program.graph.nodes if n.target in variables(program, False)
    }
    assert {w.codes for w in settled(result)} == {w.codes for w in settled(program)}


def test_a_part_is_given_what_the_trained_parts_before_it_make(data, tmp_path):
    """A planted fault: a stream that is not computed anew behind a trained part is found out."""
    program = start()
    planned = program.facts[PLANNED]
    last = by_parts.cuts(program, True, 4, MEMORY)
    found = parts((planned, program), last)
    seen = []

    def stages(number, part):
        seen.append(number)
        return [Stage("x", True, 2)] if number < 2 else []

    trained, _ = by_parts.train_parts(program, last, stages, *data, session(tmp_path), 0)
    assert seen == [*range(len(found))]
    fresh, stale = (Streams(planned, *data, session(tmp_path)) for _ in range(2))
    for part in found[:2]:
        fresh.go_on(trained, part)
        stale.go_on(program, part)
    name = found[1].outputs[0]
    whole = run(extract(trained, [s.name for s in trained.inputs], [name], fresh.sizes), data[0].inputs)[0]
    assert torch.allclose(fresh.simulated[name][: len(data[0])], whole, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(stale.simulated[name][: len(data[0])], whole, rtol=1e-4, atol=1e-5)


def test_streams_in_files_are_those_in_memory(data, tmp_path, monkeypatch):
    program = start()
    planned = program.facts[PLANNED]
    part = parts((planned, program), by_parts.cuts(program, True, 4, MEMORY))[0]
    kept = []
    for size in (1 << 30, 1):
        monkeypatch.setattr(scratch, "LEAST", size)
        both = Streams(planned, *data, session(tmp_path, jobs=2))
        both.targets(part)
        both.go_on(program, part)
        kept.append(both)
    for name in part.outputs:
        assert torch.equal(kept[0].float[name], kept[1].float[name])
        assert torch.equal(kept[0].simulated[name], kept[1].simulated[name])
    kept[0].forget(part.outputs)
    assert not {*part.outputs} & kept[0].float.keys()


def test_outputs_count_alike_whatever_their_power(data, tmp_path):
    program = start()
    planned = program.facts[PLANNED]
    found = parts((planned, program), by_parts.cuts(program, True, 4, MEMORY))
    number = next(number for number, part in enumerate(found) if len(part.outputs) > 1)
    both = Streams(planned, *data, session(tmp_path))
    for part in found[: number + 1]:
        both.targets(part)
        both.go_on(planned, part)
    factors = both.factors(part)
    given, judged = both.data(part, factors)
    assert len(given) == len(data[0]) and len(judged) == len(data[1])
    widths = [both.float[name][0].numel() for name in part.outputs]
    powers = [piece.square().sum(1).mean() for piece in judged.targets.split(widths, 1)]
    assert powers == [pytest.approx(1, rel=1e-4)] * len(widths)
    piece = joined(extract(planned, part.inputs, part.outputs, both.sizes), factors)
    batch = given.select(torch.tensor([1, 0]))
    assert torch.allclose(run(piece, batch.inputs), batch.targets, rtol=1e-5, atol=1e-6)


def test_values_without_a_row_for_each_sample_cross_no_cut():
    two, three = torch.empty(2, 4), torch.empty(3, 4)
    assert parts_module._has_rows(two, three)
    assert not parts_module._has_rows(torch.empty(4, 2), torch.empty(4, 3))
    assert not parts_module._has_rows(torch.empty(2, 2), torch.empty(3, 3))
    assert not parts_module._has_rows(2, 3)


def test_wide_weights_have_adapters():
    """By bytes alone: those of one and the same model below the bound move by themselves."""
    program = start()
    sizes = {w.codes: program.tensors[w.codes].numel() for w in settled(program)}
    bound = sorted(sizes.values())[len(sizes) // 2]
    found = variables(program, True, 0, None, 0, bound)
    for codes, size in sizes.items():
        assert isinstance(found[codes], Adapted) == (size > bound)
        assert size <= bound or found[codes].down.shape[1] == RANK
    plain = variables(program, True, 0, None, 0, max(sizes.values()))
    assert all(type(v) is not Adapted for v in plain.values() if v.kind == Kind.LATENT)


def test_parts_keep_the_memory_and_grow_with_it():
    program = start()
    counts = [len(by_parts.cuts(program, True, 4, memory)) for memory in (MEMORY // 4, MEMORY, 1 << 40)]
    assert counts[0] > counts[1] > counts[2] == 1
    assert all(a >= b for a, b in pairwise(counts))
