"""The cache: damage is found, said once and made good, in files and in lines; nothing whole is lost."""

from __future__ import annotations

import json
import multiprocessing
import random
import warnings
from pathlib import Path

import pytest

from mpq_compiler.support import cache
from mpq_compiler.support.errors import Notice, UserError
from tests.harness.damage import damaged

CONTENT = bytes(range(256)) * 8
KNOWN = {"a": 1.5, "b": [1, 2], "c": {"d": None}}


def test_what_is_written_is_read(tmp_path: Path) -> None:
    place = tmp_path / "fits" / "x"
    assert cache.read(place) is None
    for content in (CONTENT, b""):
        cache.write(place, content)
        assert cache.read(place) == content
    assert [path.name for path in place.parent.iterdir()] == ["x"]


@pytest.mark.invariant("trust-1")
def test_no_damage_to_a_file_is_believed(tmp_path: Path) -> None:
    """Two hundred damages, those to the seal among them: each is said and thrown away."""
    place = tmp_path / "x"
    cache.write(place, CONTENT)
    whole = place.read_bytes()
    for seed in range(200):
        bad = damaged(whole, random.Random(seed))
        place.write_bytes(bad)
        if bad == whole:
            continue
        with pytest.warns(Notice, match="was damaged") as said:
            assert cache.read(place) is None
        assert len(said) == 1 and str(place) in str(said[0].message)
        assert not place.exists() and cache.read(place) is None


def results(folder: Path) -> cache.Results:
    return cache.Results("sensitivity", "key", folder)


def values(found: cache.Results) -> dict[str, object]:
    return {name: found[name] for name in found}


@pytest.mark.invariant("trust-1")
def test_no_damage_to_a_line_is_believed(tmp_path: Path) -> None:
    """Results that are read are some of those that were written; the file is sound again, and takes others."""
    known = results(tmp_path)
    for name, value in KNOWN.items():
        known[name] = value
    whole, lost = known.path.read_bytes(), 0
    for seed in range(300):
        known.path.write_bytes(damaged(whole, random.Random(seed)))
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found = results(tmp_path)
        assert all(found[name] == KNOWN[name] for name in found)
        assert all(issubclass(each.category, Notice) for each in said) and len(said) <= 1
        lost += len(found) < len(KNOWN)
        found["more"] = 3
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert values(results(tmp_path)) == values(found)
    assert lost > 200


NO_LINES = (b"5", b"[{}, 2]", b"\xff\xfe", b"[" * 100_000, b'["a", 1]', b"", b"0" * 16 + b' ["a", 1]')


@pytest.mark.parametrize("line", NO_LINES)
def test_lines_that_are_none_are_skipped(tmp_path: Path, line: bytes) -> None:
    known = results(tmp_path)
    known["a"] = 1
    known.path.write_bytes(line + b"\n" + known.path.read_bytes() + line + b"\n")
    with pytest.warns(Notice, match="2 of its lines"):
        assert values(results(tmp_path)) == {"a": 1}


def test_a_line_that_a_killed_writer_has_torn_is_not_worth_a_word(tmp_path: Path) -> None:
    known = results(tmp_path)
    known["a"], known["b"] = 1, 2
    known.path.write_bytes(known.path.read_bytes()[:-3])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = results(tmp_path)
        again["c"] = 3
        assert values(results(tmp_path)) == {"a": 1, "c": 3}


def _write(folder: Path, begin: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number in range(begin, begin + 60):
            results(folder)[str(number)] = number


def test_writers_that_mend_the_same_file_lose_nothing(tmp_path: Path) -> None:
    """Four processes read and append, while damaged lines are put between theirs."""
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_write, args=(tmp_path, 60 * i)) for i in range(4)]
    for each in writers:
        each.start()
    path = results(tmp_path).path
    while any(each.is_alive() for each in writers):
        if path.exists():
            with path.open("ab") as file:
                file.write(b"damaged\n")
        writers[0].join(0.01)
    for each in writers:
        each.join()
        assert each.exitcode == 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert values(results(tmp_path)) == {str(n): n for n in range(240)}


def test_a_file_that_cannot_be_read_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "sensitivity" / "key.results").mkdir(parents=True)
    with pytest.raises(UserError, match="cannot be read"):
        results(tmp_path)


def test_results_are_json(tmp_path: Path) -> None:
    known = results(tmp_path)
    known["a b"] = {"c": [1]}
    seal, _, text = known.path.read_text().partition(" ")
    assert len(seal) == 16 and json.loads(text) == ["a b", {"c": [1]}]
