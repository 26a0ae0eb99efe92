"""Facts: typed keys, copies that share nothing mutable, and the names that stood in place of keys."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from torch import fx

from mpq_compiler.ir.facts import Fact, Facts
from mpq_compiler.ir.program import NOTES, PARAMETERS, Program, Stage, TensorStore

SIZES = Fact[tuple[int, ...]]("sizes")


def test_a_fact_is_found_by_its_key_and_by_an_equal_one() -> None:
    facts = Facts({PARAMETERS: 12})
    facts[SIZES] = (1, 2)
    assert facts[Fact[tuple[int, ...]]("sizes")] == (1, 2) and facts[PARAMETERS] == 12
    assert SIZES in facts and NOTES not in facts and {*facts} == {SIZES, PARAMETERS} and len(facts) == 2
    assert facts.get(NOTES) is None and facts.get(NOTES, ()) == () and facts.get(SIZES, ()) == (1, 2)
    assert facts.setdefault(SIZES, ()) == (1, 2) and facts.pop(SIZES, None) == (1, 2) and facts.pop(SIZES, None) is None
    with pytest.raises(KeyError, match="sizes"):
        facts[SIZES]
    assert pickle.loads(pickle.dumps(facts))[PARAMETERS] == 12


def test_what_a_fork_adds_is_its_own() -> None:
    program = Program(fx.Graph(), TensorStore(), (), Stage.FLOAT, facts=Facts({PARAMETERS: 12}))
    fork = program.fork()
    fork.note("one")
    fork.facts[PARAMETERS] = 13
    fork.facts |= {SIZES: (3,)}
    assert {*program.facts} == {PARAMETERS} and program.facts[PARAMETERS] == 12
    assert fork.facts[NOTES] == ("one",) and fork.facts[SIZES] == (3,)


def test_names_go_on_working_with_a_warning() -> None:
    with pytest.warns(DeprecationWarning, match="typed keys .* such as 'parameters'") as warned:
        program = Program(fx.Graph(), TensorStore(), (), Stage.FLOAT, facts={"parameters": 12})  # type: ignore[arg-type]
        facts = program.facts
        assert "parameters" in facts and facts["parameters"] == 12  # type: ignore[comparison-overlap, index]
        facts["mine"] = [1]  # type: ignore[index]
        assert facts.get("mine") == [1] and facts.get("other", 3) == 3  # type: ignore[call-overload]
    assert facts[PARAMETERS] == 12 and facts[Fact[list[int]]("mine")] == [1]
    assert {Path(w.filename).name for w in warned} >= {Path(__file__).name}
