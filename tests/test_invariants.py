"""Every invariant of `invariants.toml` has a test that is marked with it, and the page about them is up to date."""

from __future__ import annotations

import subprocess
import sys

from tests.harness.tree import ROOT
from tests.invariants import DOCUMENT, Method, faults, methods, page


def test_the_page_is_what_is_written_of_the_tests(tmp_path):
    """In a process of its own: pytest collects, whatever part of the tests is running here."""
    command = [sys.executable, "-m", "tests.invariants", str(tmp_path / "invariants.md")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
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
