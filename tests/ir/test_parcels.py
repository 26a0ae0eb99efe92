"""Programs and tensors as bytes: what is unpacked is what was packed."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from mpq_compiler.ir import parcels, printer
from mpq_compiler.ir.graph import operand
from mpq_compiler.ir.interpreter import run
from mpq_compiler.ir.program import PARAMETERS, TIME_GROUPS
from mpq_compiler.quantization.fitting import FitCache
from mpq_compiler.quantization.statistics import CALIBRATION
from tests.harness import programs
from tests.harness.post import sent


@pytest.mark.parametrize("name", ["unet2d", "pixart"])
@pytest.mark.parametrize("last", ["time-groups", "round-weights", "fuse-epilogues"])
def test_a_program_arrives_as_it_is(name: str, last: str) -> None:
    program, inputs = programs.after(name, last, programs.RESIDUAL), programs.inputs(name, 2)
    found = sent(program)
    assert printer.text(found) == printer.text(program)
    assert [str(node) for node in found.graph.nodes] == [str(node) for node in program.graph.nodes]
    assert torch.equal(run(found, inputs), run(program, inputs))


def test_nodes_and_tensors_that_are_one_stay_one() -> None:
    program = programs.after("pixart", "time-groups")
    layer = program.quantizable[0]
    found, node, weight = sent((program, layer, operand(layer, 1)))
    assert node is found.node(layer.name) and weight is operand(node, 1)
    grams = program.facts[CALIBRATION].grams
    arrived = found.facts[CALIBRATION].grams
    alike = [(a, b) for a in grams for b in grams if a < b and grams[a] is grams[b]]
    assert alike and all(arrived[a] is arrived[b] for a, b in alike)


BIG = torch.arange(2 * parcels.LARGE, dtype=torch.float32)
TENSORS = {
    "small": torch.arange(6.0).reshape(2, 3),
    "empty": torch.zeros(0, 3),
    "scalar": torch.tensor(3.5, dtype=torch.float64),
    "transposed": torch.arange(6).reshape(2, 3).T,
    "expanded": torch.tensor([[1.0], [2.0]]).expand(2, 5),
    "bf16": torch.arange(6.0).bfloat16(),
    "big": BIG,
    "big, bf16": BIG.bfloat16().reshape(2, -1),
    "big, channels last": BIG.reshape(2, 64, 32, 32).to(memory_format=torch.channels_last),
    "a thin slice of something big": BIG.reshape(-1, 8)[:, 3],
    "truth values": BIG > 7,
}


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("copy", [False, True])
def test_tensors_keep_their_bits_types_and_layouts(name: str, copy: bool) -> None:
    tensor = TENSORS[name]
    found = sent(tensor, copy)
    assert found.dtype == tensor.dtype and torch.equal(found, tensor)
    assert found.stride() == tensor.stride() or "thin" in name


def test_large_tensors_are_read_in_place() -> None:
    stream, large = parcels.pack({"a": BIG, "b": BIG})
    assert len(large) == 1 and len(stream) < parcels.LARGE
    memory = parcels.memory(large[0])
    found = parcels.unpack(stream, [memory])
    assert found["a"] is found["b"] and found["a"].data_ptr() == memory.ctypes.data
    shifted = torch.empty(memory.nbytes + 4, dtype=torch.uint8)[4:].numpy()  # at an address torch would not give
    shifted[:] = memory
    assert parcels.unpack(stream, [shifted])["a"].data_ptr() % parcels.ALIGNED == 0


def test_a_parameter_stays_one() -> None:
    found = sent(torch.nn.Linear(3, 2))
    assert isinstance(found.weight, torch.nn.Parameter) and found.weight.requires_grad


def test_a_lean_program_runs_and_has_nothing_else() -> None:
    program = programs.after("pixart", "sensitivity", programs.MIXED)
    found, inputs = parcels.lean(program, TIME_GROUPS.name), programs.inputs("pixart", 2)
    assert found.graph is program.graph
    assert [fact.name for fact in found.facts] == [TIME_GROUPS.name] and PARAMETERS in program.facts
    assert torch.equal(run(found, inputs), run(program, inputs))
    assert len(parcels.pack(found)[0]) < len(parcels.pack(program)[0])
    more = dataclasses.replace(program, tensors=type(program.tensors)(dict(program.tensors) | {"unread": BIG}))
    assert "unread" not in parcels.lean(more).tensors


def test_caches_stay_at_home() -> None:
    program = programs.after("pixart", "time-groups", programs.FRONT)
    fits, layer = FitCache(), program.quantizable[0]
    fits.fitted(program, layer, str(operand(layer, 1).target), "int4")
    assert fits.weights and not sent(fits).weights
