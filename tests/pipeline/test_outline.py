"""The list of passes without torch: what sources say is what the classes say."""

from __future__ import annotations

import subprocess
import sys

from mpq_compiler.pipeline import describe, outline, registry
from tests.harness.tree import ROOT


def test_sources_say_what_classes_say() -> None:
    described = [describe.describe_pass(each) for each in registry.built_in()]
    assert outline.built_in() == [(one["name"], one["contract"], one["summary"]) for one in described]


def test_the_list_needs_no_torch() -> None:
    script = "import sys; sys.modules['torch'] = None; from mpq_compiler.cli import mpqc; mpqc.main(['passes'])"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in registry.BUILT_IN)
