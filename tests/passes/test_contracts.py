"""The declared contract of every pass of the registry, on the bundled model and on three tiny families."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx

from mpq_compiler.analysis.noise_power import noise_power
from mpq_compiler.ir import ops, stored_tensors
from mpq_compiler.ir.costs import stored_dtype
from mpq_compiler.ir.exact_interpreter import run_exact
from mpq_compiler.ir.findings import ATTENTION_NUMERICS
from mpq_compiler.ir.interpreter import Interpreter, run
from mpq_compiler.ir.program import Program
from mpq_compiler.pipeline import registry
from mpq_compiler.pipeline.passes import Contract, Pass
from mpq_compiler.pipeline.registry import BUILT_IN as PASSES
from tests.harness import programs
from tests.harness.programs import Step

OPEN = (ops.fake_quantize, ops.dynamic_fake_quantize, ops.fake_quantize_float, ops.fake_quantize_weight)
"""Quantizers of float values."""


class FormatsOff(Interpreter):
    """A simulated program with every quantizer replaced by identity: activations as they come, weights as planned."""

    def __init__(self, program: Program, planned: Program) -> None:
        super().__init__(program)
        read = [str(n.target) for n in planned.graph.nodes if n.op == "get_attr"]
        self.planned = {name.split(":")[0]: name for name in read}

    def attribute(self, name: str) -> Any:
        path, _, part = name.partition(":")
        if part.startswith(("corrected", "f16", "trained")):  # before the mean error moved into it, before training
            return self._stored(path)
        if part == "rest":  # the weight before a low-rank branch took its part
            return self._weight(path)
        if part == "up":  # the branch itself
            return torch.zeros_like(super().attribute(name))
        return super().attribute(name)

    def call(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        if node.target in OPEN:
            return args[0]
        if node.target is ops.attention:
            return ops.attention(*args)
        if node.target is ops.fake_quantize_attention:
            q, k, v, _, _, _, *rest, _ = args
            return ops.attention(q, k, v, *rest)
        if node.target is ops.dequantize_weight:
            return self._weight(str(node.args[0].target).split(":")[0])
        if node.target is ops.binary_branch:
            return torch.zeros(args[3])
        return super().call(node, args, kwargs)

    def _weight(self, path: str) -> Tensor:
        """In floats, in the layout of the graph."""
        return self.program.tensors[self.planned[path]]

    def _stored(self, path: str) -> Tensor:
        tensor = self._weight(path)
        return tensor.to(stored_dtype(path, tensor)).float()


class RoundedLeftovers(Interpreter):
    """A float program that reads everything but the planned weights in its stored type."""

    def attribute(self, name: str) -> Any:
        tensor = self.program.tensors[name]
        planned = name.split(":")[0] in self.program.weights
        return tensor if planned or not tensor.is_floating_point() else tensor.to(stored_dtype(name, tensor)).float()


def identical(step: Step, x: dict[str, Tensor]) -> None:
    before = programs.denoiser(step.after.model)(**x) if not step.before.inputs else run(step.before, x)
    assert torch.equal(run(step.after, x), before)


def rewrite(step: Step, x: dict[str, Tensor]) -> None:
    before, after = run(step.before, x), run(step.after, x)
    assert float((after - before).abs().max()) <= 1e-5 * float(before.abs().max())


def simulation(step: Step, x: dict[str, Tensor]) -> None:
    planned = step.planned
    assert planned is not None
    with torch.no_grad():
        off = FormatsOff(step.after, planned).run(x)
        assert torch.equal(off, RoundedLeftovers(planned).run(x))
    levels: dict[str, int] = {}

    def watch(node: fx.Node, value: Any) -> None:
        bits = None
        if node.target is ops.fake_quantize:
            bits = node.args[4]
        elif node.target in (ops.fake_quantize_weight, ops.dequantize_weight):
            table = node.args[3]
            bits = 8 if table is None else int(step.after.tensors[str(table.target)].shape[1]).bit_length() - 1
        elif node.target is ops.dynamic_fake_quantize:
            bits, value = node.args[1], value.flatten(0, -2)
        elif node.target is ops.fake_quantize_float:
            bits = node.args[4]
        if bits is not None:
            rows = value.reshape(len(value), -1)
            levels[node.name] = max(len(row.unique()) for row in rows)
            assert levels[node.name] <= 2**bits, node.name

    error = noise_power(run(step.after, x, watch), RoundedLeftovers(planned).run(x))
    assert levels and 0 < error < 1


def exact(step: Step, x: dict[str, Tensor]) -> None:
    assert torch.equal(run_exact(step.before, x), run(step.after, x))


CHECKS = {
    Contract.IDENTICAL: identical,
    Contract.REWRITE: rewrite,
    Contract.SIMULATION: simulation,
    Contract.EXACT: exact,
}


def check(step: Step, x: dict[str, Tensor]) -> None:
    contract = getattr(type(step.step), "contract", None)
    assert contract in CHECKS, f"pass '{step.step.name()}' declares no contract"
    CHECKS[contract](step, x)


@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("model", programs.MODELS)
@pytest.mark.invariant("compiler-1", "compiler-2", "compiler-8", "lsq-5")
def test_contract(model, name):
    check(programs.step(model, name), dict(programs.inputs(model, 3)))


@pytest.mark.parametrize("pipeline", [programs.REWRITES, programs.ROTATED], ids=["rewritten", "rotated"])
@pytest.mark.parametrize("model", programs.MODELS)
@pytest.mark.invariant("compiler-8")
def test_contracts_behind_the_rewrites(model, pipeline):
    """Parts of layers, layers without their first token, scaled and rotated channels are quantized as any others."""
    x = dict(programs.inputs(model, 3))
    for step in programs.steps(model, pipeline):
        check(step, x)


@pytest.mark.invariant("compiler-3")
def test_methods_that_are_off_leave_uniform_rounding():
    """The passes of methods, each told to change nothing: the bits, and the bytes, of a pipeline without them."""
    passes = f"{programs.FRONT},bit-allocation{{uniform=int4}},insert-fake-quant,round-weights,fold-fake-quant"
    search = "gain=100,rows=64,samples=1,steps=2"
    front = f"layout,bos-split,split-shortcut{{channels=4096}},equalize{{{search}}},rotate{{{search}}},"
    methods = passes.replace("layout,", front)
    methods = methods.replace("insert", "numerics{mode=portable},insert")
    methods = methods.replace("round-weights", "residual-branch,low-rank,round-weights,distill{updates=0}")
    plain, off = (programs.after("unet2d", "fold-fake-quant", pipeline) for pipeline in (passes, methods))
    x = programs.inputs("unet2d", 3)
    assert torch.equal(run(plain, x), run(off, x))
    stored = [{name: s.array.tobytes() for name, s in stored_tensors.stored(p).items()} for p in (plain, off)]
    assert stored[0] == stored[1]


@pytest.mark.parametrize("model", ["unet2d", "pixart"])
def test_contracts_of_fast_attentions(model):
    """Attentions in other numerics, with and without a mask: simulated noise, and as exact as any others."""
    steps = programs.steps(model, programs.FAST)
    assert steps[-1].after.facts[ATTENTION_NUMERICS]
    for step in steps[-len(programs.BACK.split(",")) :]:
        check(step, dict(programs.inputs(model, 3)))


@pytest.mark.parametrize("model", ["unet2d", "pixart"])
def test_contracts_of_small_floats(model):
    for step in programs.steps(model, programs.SMALL_FLOATS):
        check(step, dict(programs.inputs(model, 3)))


@pytest.mark.parametrize("model", programs.MODELS)
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_traces_bit_for_bit_at_any_batch(model, batch):
    x = dict(programs.inputs(model, batch))
    assert torch.equal(run(programs.after(model, "trace"), x), programs.denoiser(model)(**x))


def test_every_pass_declares_a_contract():
    for name in PASSES:
        assert registry.find(name).contract in CHECKS


def test_a_pass_without_a_contract_fails():
    class Nothing(Pass):
        def run(self, program, session):
            return program

    program = programs.after("pixart", "layout")
    with pytest.raises(AssertionError, match="declares no contract"):
        check(Step(Nothing(), program, program), {})


@pytest.mark.parametrize("contract", [Contract.IDENTICAL, Contract.REWRITE, Contract.EXACT])
def test_a_broken_contract_is_seen(contract):
    class Twice(Pass):
        """Doubles the output."""

        def run(self, program, session):
            return program

    Twice.contract = contract
    before = programs.after("pixart", "fold-fake-quant" if contract == Contract.EXACT else "layout")
    program: Program = before.fork()
    output = program.graph.output_node()
    with program.graph.inserting_before(output):
        twice = program.graph.call_function(torch.ops.aten.mul.Tensor, (output.args[0], 1.0001))
    output.args = (twice,)
    with pytest.raises(AssertionError):
        check(Step(Twice(), before, program), dict(programs.inputs("pixart", 2)))
