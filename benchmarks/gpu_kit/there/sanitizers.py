"""Step 2: NVIDIA's compute-sanitizer over the calls of step 1: memory, races, what was never written, barriers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from . import bits, machine

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
PATIENCE = 60
"""Seconds of one tool."""


def run(out: Path) -> list[str]:
    """Writes `sanitizers.json`; returns what is wrong."""
    if (program := machine.tool("compute-sanitizer", "nothing is checked by it")) is None:
        return []
    path = out / "sanitizers.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for tool in TOOLS:
        if tool in found:
            continue
        child = [sys.executable, str(machine.HERE / "run.py"), "--child", "all", "-", "0"]
        options = ["--tool", tool, "--error-exitcode", "9", "--print-limit", "20", "--target-processes", "all"]
        try:
            done = subprocess.run(
                [program, *options, *child], capture_output=True, text=True, timeout=PATIENCE, check=False
            )
            text, code = done.stdout + done.stderr, done.returncode
        except subprocess.TimeoutExpired as error:
            text, code = (error.stdout or b"").decode(), -1
        said = [line for line in text.splitlines() if line.startswith("=========")]
        done_calls = sum(line.startswith("done ") for line in text.splitlines())
        found[tool] = {"code": code, "calls": done_calls, "said": said[:60], "end": text.splitlines()[-3:]}
        machine.say(f"{tool}: exit code {code} after {done_calls} libraries; {said[-1] if said else 'silent'}")
        machine.write(path, found)
    return [f"{tool}: {found[tool]['said'][-1:]}" for tool in TOOLS if found[tool]["code"]]


def child() -> None:
    """Makes all calls of step 1 once."""
    for library in bits.fitting():
        for _ in bits.calls(library, twice=False):
            pass
        print(f"done {bits.about(library)['test']}", flush=True)
