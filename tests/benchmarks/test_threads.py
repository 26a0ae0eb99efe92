"""What scales on two threads, as its command measures it: in a process of its own, for it gives TVM other threads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path


def test_every_subject_has_a_row(tmp_path: Path) -> None:
    report = tmp_path / "threads.json"
    own = ["--isa", "x86-64-avx2", "--only", "norm 4096x320", "--seconds", "0.2", "--json", str(report)]
    command = [sys.executable, "-m", "benchmarks.threads", *own]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
    rows = json.loads(report.read_text())["rows"]
    assert [row["name"] for row in rows] == ["group norm 4096x320", "layer norm 4096x320"]
    assert all(row["tried"] for row in rows)
