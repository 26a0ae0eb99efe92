"""Peak memory of a subject, counted by the operating system in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from mpq_compiler.artifact import bundle as artifacts
from mpq_compiler.artifact.signature import Key
from mpq_compiler.bench.subject import Subject
from mpq_compiler.latency.timing import random_inputs
from mpq_compiler.runtime import compiled_denoiser
from mpq_compiler.support import terminal
from mpq_compiler.support.execution import child_environment


def peak_memory(
    entries: Sequence[Subject], batch: int, threads: int, key: Key | None = None
) -> dict[str, int | None]:
    """Peak resident bytes of a process of its own that loads each and calls it once; ``key`` is that of `load`."""
    found: dict[str, int | None] = {}
    for entry in entries:
        if not entry.loader:
            continue
        code = "import sys; from mpq_compiler.bench import memory; memory.child(sys.argv[1])"
        asked = {"loader": entry.loader, "reference": entries[0].loader[1], "batch": batch, "threads": threads}
        request = json.dumps(asked | {"key": None if key is None else os.fspath(key)})
        command = [sys.executable, "-P", "-c", code, request]  # -P: no modules of the folder that the user is in
        done = subprocess.run(command, env=child_environment(), capture_output=True, text=True)
        found[entry.name] = int(done.stdout.split()[-1]) if done.returncode == 0 else None
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no word"])[-1]
            terminal.note(f"the peak memory of {entry.name} is not known: its process ended with {last}")
    return found


def child(request: str) -> None:
    """Load one subject, call it once, and print the peak resident bytes of its process."""
    asked = json.loads(request)
    kind, source = asked["loader"]
    threads, key = asked["threads"], asked["key"]
    inputs = random_inputs(artifacts.read(asked["reference"], key).manifest, asked["batch"])
    if kind == "artifact":
        compiled_denoiser.load(source, threads, key=key).run(inputs)
    else:
        from mpq_compiler.bench import baselines

        with baselines.torch_threads(threads, kind.startswith("torch")):
            baselines.load(kind, source, inputs, threads)()
    status = Path("/proc/self/status").read_text()
    print(1024 * int(status.partition("VmHWM:")[2].split()[0]))
