"""A few kills of compilations at random points; `python -m tests.fuzz --kills 200` goes on (docs/trust.md)."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fuzz import kills


@pytest.mark.invariant("trust-2")
def test_nothing_is_lost(tmp_path: Path) -> None:
    assert kills.campaign(tmp_path, 4)["killed"] >= 4
