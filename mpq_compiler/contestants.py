"""What `mpqc bench` compares: something that is called, and what a process of its own needs for it."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mpq_compiler import artifact as artifacts
from mpq_compiler import runtime, terminal
from mpq_compiler.runtime import CompiledDenoiser

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Contestant:
    """Something that computes the same function: a call, its stored bytes, and how another process would load it."""

    name: str
    call: Callable[..., Any]
    bytes: int | None = None
    loader: tuple[str, ...] = ()
    """Its kind and its path or model, for `child`; empty where its memory is not asked for."""


def random_inputs(manifest: Mapping[str, Any], batch: int) -> dict[str, np.ndarray]:
    """Inputs of an artifact, always the same: normal floats, a timestep of 500, class 0, tokens as were compiled in."""
    generator = np.random.default_rng(0)
    found = {}
    for value in manifest["functions"][0]["inputs"]:
        shape, dtype = (batch, *value["shape"][1:]), np.dtype(value["dtype"])
        if value["name"] == "timestep":
            found["timestep"] = np.full(shape, 500, dtype)
        elif dtype.kind == "f":
            found[value["name"]] = generator.standard_normal(shape).astype(dtype)
        else:
            found[value["name"]] = np.full(shape, dtype.kind == "b", dtype)
    for assumed in manifest.get("assumptions", ()):
        found[assumed["input"]][:, assumed["token"]] = np.asarray(assumed["values"], np.float32)
    return found


def of_artifact(path: str | Path, compiled: CompiledDenoiser, inputs: Arrays, name: str) -> Contestant:
    size = compiled.manifest["weights"]["payload_bytes"]
    return Contestant(name, functools.partial(compiled.run, inputs), size, ("artifact", str(path)))


# --- memory -------------------------------------------------------------------------------------------------


def peak_memory(entries: Sequence[Contestant], batch: int, threads: int) -> dict[str, int | None]:
    """Peak resident bytes of a process of its own that loads each and calls it once."""
    found: dict[str, int | None] = {}
    root = str(Path(__file__).resolve().parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))}
    for entry in entries:
        if not entry.loader:
            continue
        code = "import sys; from mpq_compiler import contestants; contestants.child(sys.argv[1])"
        asked = {"loader": entry.loader, "reference": entries[0].loader[1], "batch": batch, "threads": threads}
        request = json.dumps(asked)
        command = [sys.executable, "-P", "-c", code, request]  # -P: no modules of the folder that the user is in
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        found[entry.name] = int(done.stdout.split()[-1]) if done.returncode == 0 else None
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no word"])[-1]
            terminal.note(f"the peak memory of {entry.name} is not known: its process ended with {last}")
    return found


def child(request: str) -> None:
    """Loads one contestant, calls it once, and prints its process's peak resident bytes."""
    asked = json.loads(request)
    kind, source = asked["loader"]
    threads = asked["threads"]
    inputs = random_inputs(artifacts.read(asked["reference"]).manifest, asked["batch"])
    if kind == "artifact":
        runtime.load(source, threads).run(inputs)
    else:
        from mpq_compiler import peers

        with peers.torch_threads(threads, kind.startswith("torch")):
            peers.load(kind, source, inputs, threads)()
    status = Path("/proc/self/status").read_text()
    print(1024 * int(status.partition("VmHWM:")[2].split()[0]))
