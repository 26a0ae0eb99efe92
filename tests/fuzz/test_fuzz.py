"""Two minutes of attacks with seeds that stay; `python -m tests.fuzz` goes on for hours (docs/trust.md)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz import campaign, soak
from tests.fuzz.attack import REFUSED
from tests.fuzz.attacks import ATTACKS, base_of

MUTANTS = 40


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bases")


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.invariant("trust-3")
def test_nothing_is_wrongly_taken_crashes_or_hangs(name: str, bases: Path) -> None:
    count = max(5, round(MUTANTS * ATTACKS[name].share))
    found = campaign.run(name, range(count), bases)
    assert not found.bad, found.bad
    assert sum(found.counts.values()) == count
    if name not in ("cache", "pipeline text", "recipe"):
        assert found.counts[REFUSED] >= count // 4, f"mutants are hardly any: {found.counts}"


def test_calls_from_four_threads_have_the_same_bits_in_constant_memory(bases: Path) -> None:
    wrong, memory = soak.soak(base_of("artifact, a folder", bases) / "a.mpq", 4000)
    assert not wrong and len(memory) >= 10
    assert memory[-1] - memory[1] < 4 << 20, memory
