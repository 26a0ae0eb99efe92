"""The target `reference`: an artifact that gives the bits of the packed program it was made from."""

from __future__ import annotations

import json

import pytest
import torch

from mpq_compiler.backends import reference
from mpq_compiler.backends.reference.build import build
from mpq_compiler.ir import costs
from mpq_compiler.ir.interpreter import run
from mpq_compiler.runtime import compiled_denoiser
from mpq_compiler.support.errors import UserError
from mpq_compiler.targets import table as targets
from tests.harness import packed

CASES = [("unet2d", "int8"), ("unet2d-class", "int3"), ("sd15", "int2+b"), ("pixart", "int4,dynamic=true,attention=8")]


@pytest.mark.parametrize(("name", "weights"), CASES)
def test_same_bits_as_the_program(name, weights, tmp_path):
    case = packed.program(name, weights)
    target = targets.resolve("reference")
    built = build(case.program)
    assert built.payload_bytes == costs.stored_bytes(case.planned)
    compiled = compiled_denoiser.load(packed.write(tmp_path / "a.mpq", case.program, target, built), threads=1)
    inputs = packed.take(case.inputs, slice(5))
    result = compiled.run({key: value.numpy() for key, value in inputs.items()})
    assert torch.equal(torch.from_numpy(result), run(case.program, inputs))


def test_graph_round_trip():
    program = packed.program("pixart", "int4").program
    text = reference.dumps({"denoise": program})
    again = reference.loads(text, dict(program.tensors))
    assert reference.dumps(again) == text
    assert [n.name for n in again["denoise"].graph.nodes] == [n.name for n in program.graph.nodes]


def _change(document, **changes):
    return json.dumps(document | changes)


def test_graphs_that_are_refused():
    program = packed.program("pixart", "int4").program
    document = json.loads(reference.dumps({"denoise": program}))
    foreign = json.loads(reference.dumps({"denoise": program}))
    graph = foreign["functions"]["denoise"]["graph"]
    call = next(n for n in graph if n["op"] == "call_function")
    for target in ("os.system.default", "aten.__class__.mro", "prims.add.default", "nothing"):
        call["target"] = target
        with pytest.raises(UserError, match=r"graph\.json holds no graph"):
            reference.loads(json.dumps(foreign), {})
    graph[0]["op"] = "call_method"
    for text in ("", "[]", _change(document, version=1), json.dumps(foreign)):
        with pytest.raises(UserError, match=r"graph\.json holds no graph"):
            reference.loads(text, {})


@pytest.mark.parametrize("value", [None, True, 3, -1.5, float("inf"), "x", [1, (2, [3])], torch.float32])
def test_argument_round_trip(value):
    assert reference._decode(json.loads(json.dumps(reference._encode(value))), {}) == value


def test_foreign_arguments_are_refused():
    with pytest.raises(UserError, match="has no form"):
        reference._encode(torch.ones(1))
