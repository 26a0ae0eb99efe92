"""Every rule of plans has a plan that it alone rejects, and sound plans break none."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import pytest

from mpq_compiler.backends.tvm.compile import signatures
from mpq_compiler.backends.tvm.lowering import lower
from mpq_compiler.backends.tvm.plan import verifier
from mpq_compiler.backends.tvm.plan.calls import Call, Function, Lowered
from mpq_compiler.ir.verifier import VerificationError
from mpq_compiler.targets import table as targets
from tests.harness import packed

TARGET = "x86-64-avx2"


def plan() -> Lowered:
    """Joint attention: parts, and concatenations that are written in place."""
    return lower(packed.program("flux", "int8").program, (1, 2))


def changed(found: Lowered, change: Callable[[Function], Function]) -> Lowered:
    (function,) = found.functions
    return replace(found, functions=(change(function),))


def with_call(found: Lowered, chosen: Callable[[Call], bool], change: Callable[[Call], Call]) -> Lowered:
    """The plan with the first of the chosen calls changed."""
    (function,) = found.functions
    first = next(call for call in function.own if chosen(call))
    return changed(found, lambda f: replace(f, own=tuple(change(c) if c is first else c for c in f.own)))


def moved(call: Call) -> Call:
    size, offset, row = call.kernel.problem.get("into")
    problem = call.kernel.problem.replace(into=(size, offset + 1 if offset else row, row))
    return replace(call, kernel=replace(call.kernel, problem=problem))


def latents_in_a_part(found: Lowered) -> Lowered:
    (function,) = found.functions
    first, *rest = function.parts
    first = replace(first, inputs=(*first.inputs, function.inputs[0]))
    return changed(found, lambda f: replace(f, parts=(first, *rest)))


MUTANTS: dict[str, Callable[[Lowered], Lowered]] = {
    "order": lambda p: changed(p, lambda f: replace(f, own=(*f.own[1:], f.own[0]))),
    "single-assignment": lambda p: changed(p, lambda f: replace(f, own=(*f.own, f.own[0]))),
    "values": lambda p: changed(p, lambda f: replace(f, made=f.made[:-1])),
    "arguments": lambda p: with_call(p, lambda c: True, lambda c: replace(c, operands=(*c.operands, c.operands[0]))),
    "output": lambda p: changed(p, lambda f: replace(f, output=replace(f.output, dtype="float16"))),
    "prepared": lambda p: replace(p, prepared=p.prepared[::-1]),
    "parts": latents_in_a_part,
    "in-place": lambda p: with_call(p, lambda c: bool(c.into), moved),
    "specializations": lambda p: changed(p, lambda f: replace(f, batches=(0,))),
}


def test_every_rule_has_a_mutant():
    assert MUTANTS.keys() == verifier.RULES.keys()


@pytest.mark.parametrize("rule", MUTANTS)
def test_the_rule_alone_rejects_its_mutant(rule):
    sound = plan()
    assert not verifier.check(sound)
    mutant = MUTANTS[rule](sound)
    assert {violation.rule for violation in verifier.check(mutant)} == {rule}
    with pytest.raises(VerificationError, match=f"rule '{rule}' .* after stage 'fuse-rotations'"):
        verifier.verify(mutant, "fuse-rotations")


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda call: replace(call, operands=call.operands[1:]), "takes x, .* is given"),
        (lambda call: replace(call, results=(("other", call.results[0][1]),)), "other are asked for"),
    ],
)
def test_calls_give_kernels_what_they_take(change, what):
    sound, target = plan(), targets.resolve(TARGET)
    assert not signatures.check(sound, target)
    mutant = with_call(sound, lambda call: call.kernel.template == "gemm" and not call.into, change)
    (finding,) = {what for _, what in signatures.check(mutant, target)}
    assert re.search(what, finding)


def test_values_have_the_size_and_type_that_kernels_take():
    sound, target = plan(), targets.resolve(TARGET)
    (function,) = sound.functions
    call = next(call for call in function.own if call.kernel.template == "gemm" and not call.into)
    name = dict(call.operands)["x"]

    def made(**change):
        return tuple(replace(value, **change) if value.name == name else value for value in function.made)

    for change, said in (({"dtype": "float32"}, "is float32, where gemm has"), ({"shape": ("B", 3)}, "is no 'x'")):
        mutant = changed(sound, lambda f, change=change: replace(f, made=made(**change)))
        assert any(said in what for _, what in signatures.check(mutant, target))
