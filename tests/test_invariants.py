"""Every invariant of `invariants.toml` has a test that is marked with it, and the page about them is up to date."""

from __future__ import annotations

from tests.invariants import DOCUMENT, Method, faults, main, methods, page


def test_the_page_is_what_is_written_of_the_tests(tmp_path):
    main(tmp_path / "invariants.md")
    same = (tmp_path / "invariants.md").read_text() == DOCUMENT.read_text()
    assert same, "docs/invariants.md is not that of the tests: write it with `python -m tests.invariants`"


def test_what_is_missing_is_named():
    known = [Method("M", "", {"m-1": "It holds.", "m-2": "It holds too."})]
    assert not list(faults(known, {"m-1": ["a.py::f"], "m-2": ["a.py::f", "a.py::g"]}))
    assert list(faults(known, {"m-1": ["a.py::f"]})) == ["the invariant 'm-2' has no test"]
    (unknown,) = faults(known, {"m-1": ["a.py::f"], "m-2": ["a.py::f"], "m-3": ["a.py::g"]})
    assert unknown == "'m-3' is no invariant, and a.py::g is marked with it"
    assert "| `m-1` | It holds. | `a.py::f`<br>`a.py::g` |" in page(known, {"m-1": ["a.py::f", "a.py::g"], "m-2": []})


def test_an_invariant_is_one_sentence_said_once():
    sentences = [text for method in methods() for text in method.invariants.values()]
    assert len(sentences) == len({*sentences})
    assert all(text.endswith(".") and "|" not in text and "\n" not in text for text in sentences)
