"""Our CUDA kernels and denoisers beside torch's on one GPU, in turns.

    python -m benchmarks.cuda                       # everything, into benchmarks/results/cuda.json
    python -m benchmarks.cuda --only sdxl --size 0.5 --folder built
    python -m benchmarks.cuda --plan --level 90 --folder built    # without a GPU: compiles all that a run would time

Layers and attentions (batch 1 and 2): what is timed is a CUDA graph of launches by events, on tensors that are on the
GPU, each launch with weights and activations of its own, several times what the level-2 cache holds. A contestant that
cannot be captured is launched one by one. Linear layers read codes and write floats, convolutions write codes; torch
reads and writes its own type, and `_int_mm` is cuBLAS's product of integers alone. Results of ours are held against
their definition before they are timed. Denoisers: a call by the wall, ours with the copies of its inputs and its
result; torch finds its inputs on the GPU. Their memory is what the GPU has less of after loading and three calls. SQNR
is to the float32 model. `--size` scales channels, depth and latents of all shapes.

All contestants of a case take turns, in rounds; a figure is the median, with least and most; ratios are medians of
those within rounds. The first of ours runs twice: what that control differs by is noise. Every case has a process of
its own once another has crashed: a kernel that faults ends no more than its case.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from benchmarks import cuda_cases, cuda_models, cuda_peers
from benchmarks.cuda_device import Call, Device
from benchmarks.machine import provenance
from benchmarks.timing import interleaved
from mpq_compiler.backends.tvm.toolchain import machine_code
from mpq_compiler.evaluation.metrics import sqnr_db
from mpq_compiler.frontend import denoiser
from mpq_compiler.runtime import compiled_denoiser
from mpq_compiler.support import terminal
from mpq_compiler.support.errors import UserError
from mpq_compiler.targets import nvidia

RESULTS = Path(__file__).parent / "results" / "cuda.json"
CONTROL = "control"
SETS = 4
"""Times what the level-2 cache holds: bytes of all tensors of a contestant."""
MOST_SETS = 16
WINDOW = {"kernel": 2e-3, "denoiser": 2e-2}
"""Seconds that a turn takes at the least."""
PATIENCE = 900
"""Seconds that a case may take: a kernel may never end."""
GOALS = {"int8": 0.6, "wgmma": 0.9, "w4": 1.0, "sdxl": 1.15, "bytes": 3.5}


@dataclass(frozen=True)
class Task:
    """A case at a batch size, or a denoiser, and what was compiled for it."""

    name: str
    case: cuda_cases.Case | str
    batch: int
    paths: Mapping[str, Path]
    source: str = ""

    @property
    def peers(self) -> Sequence[str]:
        return cuda_peers.DENOISER if isinstance(self.case, str) else cuda_peers.of(self.case)


# --- measuring ----------------------------------------------------------------------------------------------


def measure(task: Task, rounds: int) -> dict[str, Any]:
    """The row of a task."""
    cuda_peers.forget()
    return (_denoiser if isinstance(task.case, str) else _kernels)(task, Device(), rounds)


def _attempt(found: dict[str, Any], name: str, device: Device, make: Callable[[], Any]) -> Any:
    """What `make` makes; None, and the reason among what is found, where it raises. RuntimeError: the GPU is lost."""
    try:
        return make()
    except Exception as error:  # peers raise errors of many kinds
        found["failed"][name] = _reason(error)
        device.synchronize()
        return None


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no word'])[0]}"


def _repeated(make: Callable[[], Call], sets: int, device: Device, capture: Callable[[Sequence[Call]], Call]) -> Any:
    """(a launch of as many calls, why it is none of a graph)"""
    calls = [make() for _ in range(sets)]
    for call in (*calls, *calls):
        call()
    device.synchronize()
    try:
        graph = capture(calls)
        graph()
        device.synchronize()
        return lambda kept=calls: graph(), None  # which uses the tensors of the calls
    except Exception as error:  # torch's are of many kinds
        device.synchronize()
        return lambda: [call() for call in calls], _reason(error)


def _kernels(task: Task, device: Device, rounds: int) -> dict[str, Any]:
    assert not isinstance(task.case, str)
    found: dict[str, Any] = {"name": task.name, "failed": {}, "wrong": {}}
    launches: dict[str, Call] = {}
    ungraphed: dict[str, str | None] = {}
    sets: dict[str, int] = {}
    entries = cuda_cases.ours(task.case, task.batch, task.paths["library"], nvidia.levels()[0])
    first = next(iter(entries))
    for name, entry in [*entries.items(), (CONTROL, entries[first])]:

        def looked_at(name: str = name, entry: cuda_cases.Ours = entry) -> Any:
            call, result = entry.make()
            call()
            if reason := entry.wrong(result.numpy()):
                found["wrong"][name] = reason
            sets[name] = max(1, min(MOST_SETS, SETS * device.cache_bytes() // entry.bytes))
            return _repeated(lambda: entry.make()[0], sets[name], device, device.captured)

        if made := _attempt(found, name, device, looked_at):
            launches[name], ungraphed[name] = made
    for name in task.peers:
        if cuda_peers.missing(name) is None:
            sets[name] = max(sets.values(), default=1)
            make = functools.partial(cuda_peers.make, name, task.case, task.batch)
            repeated = functools.partial(_repeated, make, sets[name], device, cuda_peers.graph)
            if made := _attempt(found, name, device, repeated):
                launches[name], ungraphed[name] = made
    times = interleaved(launches, rounds, WINDOW["kernel"], warm=True, seconds=device.seconds)
    per_call = {name: [t / sets[name] for t in own] for name, own in times.items()}
    macs = task.case.macs(task.batch)
    found["rows"] = [
        figures(name, per_call, first) | {"ungraphed": ungraphed[name], "tops": 2e-12 * macs / statistics.median(own)}
        for name, own in per_call.items()
    ]
    return found


def _denoiser(task: Task, device: Device, rounds: int) -> dict[str, Any]:
    model = denoiser.load(task.source)
    tensors = model.random_inputs(task.batch, 0)
    arrays = {name: value.numpy() for name, value in tensors.items()}
    found: dict[str, Any] = {"name": task.name, "failed": {}, "parameters": int(model.parameters)}
    place = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.no_grad():
        exact = model.module.to(place)(**{n: t.to(place) for n, t in tensors.items()}).float().cpu().numpy()
    model.module.to("cpu")
    calls: dict[str, Callable[[], Any]] = {}
    facts: dict[str, dict[str, Any]] = {}

    def added(name: str, make: Callable[[], Callable[[], Any]], size: int) -> None:
        if place == "cuda":
            torch.cuda.empty_cache()
        before = device.free_bytes()

        def called() -> tuple[Callable[[], Any], Any]:
            call = make()
            results = [call() for _ in range(3)]
            device.synchronize()
            return call, results[-1]

        if made := _attempt(found, name, device, called):
            calls[name], result = made
            y = result.float().cpu().numpy() if isinstance(result, torch.Tensor) else np.asarray(result)
            facts[name] = {"sqnr_db": sqnr_db(exact, y), "bytes": size, "gpu_bytes": before - device.free_bytes()}

    first = next(iter(task.paths))
    for name in [*task.paths, CONTROL]:
        path = task.paths[first if name == CONTROL else name]

        def loaded(path: Path = path) -> Callable[[], Any]:
            return functools.partial(compiled_denoiser.load(path, reuse_bytes=0).run, arrays)

        added(name, loaded, compiled_denoiser.artifacts.read(path).manifest["weights"]["payload_bytes"])
    for name in task.peers:
        if cuda_peers.missing(name) is None:
            make = functools.partial(cuda_peers.denoiser, name, model.module, tensors)
            added(name, make, 2 * int(model.parameters))
    times = interleaved(calls, rounds, WINDOW["denoiser"], warm=True, seconds=device.wall)
    found["rows"] = [figures(name, times, first) | facts[name] for name in times]
    return found


def figures(name: str, times: Mapping[str, Sequence[float]], first: str) -> dict[str, Any]:
    """Microseconds of one, and how many times as long the others take; it itself, beside the first."""
    own = times[name]
    beside = [a / b for a, b in zip(own, times[first], strict=True)] if first in times else []
    ratios = {
        other: [b / a for a, b in zip(own, theirs, strict=True)] for other, theirs in times.items() if other != name
    }
    return {
        "name": name,
        "us": 1e6 * statistics.median(own),
        "spread": [1e6 * min(own), 1e6 * max(own)],
        "of_first": statistics.median(beside) if beside else None,
        "times_as_long": {other: statistics.median(each) for other, each in ratios.items()},
    }


def _serve(connection: Connection, tasks: Sequence[Task], rounds: int) -> None:
    """In a process of its own: the rows one by one."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    for task in tasks:
        connection.send(measure(task, rounds))


def measured(tasks: Sequence[Task], rounds: int) -> Iterator[dict[str, Any]]:
    """The row of each task. One in which the process ends has `crashed`, and the next ones get another process."""
    context = multiprocessing.get_context("spawn")
    left = list(tasks)
    while left:
        receiving, sending = context.Pipe(duplex=False)
        process = context.Process(target=_serve, args=(sending, left, rounds))
        process.start()
        sending.close()
        try:
            while left:
                if not receiving.poll(PATIENCE):
                    process.kill()
                row = receiving.recv()
                left.pop(0)
                yield row
            process.join()
        except EOFError:
            process.join()
            yield {"name": left.pop(0).name, "crashed": process.exitcode, "rows": [], "failed": {}}


# --- what is measured ---------------------------------------------------------------------------------------


def build(options: argparse.Namespace, level: int, folder: Path) -> tuple[list[Task], list[dict[str, Any]]]:
    """(all that is asked for, compiled; rows of what cannot be). In other processes, for denoisers are run there."""
    scaled = [case if options.size == 1 else case.scaled(options.size) for case in cuda_cases.CASES]
    cases = [case for case in scaled if options.only in case.name]
    models = [name for name in options.model if options.only in f"denoiser {name}"]
    tasks, refused = [], []
    context = multiprocessing.get_context("spawn")

    def made(name: str, job: Future[Any]) -> Any:
        try:
            return job.result()
        except Exception as error:  # one that is refused ends nothing else
            refused.append({"name": name, "rows": [], "failed": {"compiling": _reason(error)}})
            return None

    with ProcessPoolExecutor(options.jobs, context) as pool, terminal.progress("kernels", len(cases)) as advance:
        libraries = [pool.submit(cuda_cases.library, case, level, folder) for case in cases]
        for case, job in zip(cases, libraries, strict=True):
            if library := made(case.name, job):
                tasks += [Task(f"{case.name}, batch {n}", case, n, {"library": library}) for n in options.batch]
            advance(1)
    for name in models:
        source, paths = cuda_models.save(name, options.size, folder), {}
        for ours in cuda_models.OURS:
            with ProcessPoolExecutor(1, context) as pool:
                artifact = pool.submit(cuda_models.compiled, source, ours, level, folder, options.jobs)
                if found := made(f"denoiser {name}, {ours}", artifact):
                    paths[ours], seconds = found
                    terminal.say(f"{name} {ours}: compiled in {seconds:.0f} s")
        if paths:
            tasks += [Task(f"denoiser {name}, batch {n}", name, n, paths, source) for n in options.batch]
    return tasks, refused


def goals(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Each with what was reached, where it was measured."""
    found = []

    def goal(task: str, what: str, least: float, value: float | None) -> None:
        if value is not None:
            found.append({"task": task, "goal": what, "least": least, "value": value, "met": value >= least})

    for task in rows:
        own = {row["name"]: row for row in task["rows"]}
        eight, four = own.get("W8A8"), own.get("W4A8")
        if eight is None:
            continue
        ratios = eight["times_as_long"]
        if "linear" in task["name"]:
            # On Hopper the first is by wgmma, and mma.sync stands beside it.
            other = own.get("W8A8_mma")
            least = GOALS["int8" if other is None else "wgmma"]
            goal(task["name"], "W8A8 as fast as cuBLAS int8", least, ratios.get(cuda_peers.INT8))
            if other is not None:
                ratio = other["times_as_long"].get(cuda_peers.INT8)
                goal(task["name"], "W8A8 by mma.sync as fast as cuBLAS int8", GOALS["int8"], ratio)
        if four is not None:
            goal(task["name"], "W4A8 as fast as W8A8", GOALS["w4"], four["times_as_long"]["W8A8"])
        if "denoiser sdxl" in task["name"]:
            goal(task["name"], "W8A8 as fast as fp16 in a CUDA graph", GOALS["sdxl"], ratios.get(cuda_peers.GRAPH))
        if "denoiser" in task["name"] and four is not None:
            smaller = 2 * task["parameters"] / four["bytes"]
            goal(task["name"], "weights of W4A8 smaller than in fp16", GOALS["bytes"], smaller)
    return found


def report(rows: Sequence[Mapping[str, Any]], reached: Sequence[Mapping[str, Any]]) -> None:
    """Tables of all rows, what went wrong, and the goals."""
    lines = [
        (
            task["name"],
            row["name"],
            f"{row['us']:.1f}",
            "{:.1f} .. {:.1f}".format(*row["spread"]),
            "" if row["of_first"] is None else f"{row['of_first']:.2f} x",
            f"{row['tops']:.1f}" if "tops" in row else "",
            f"{row['sqnr_db']:.1f} dB" if "sqnr_db" in row else "",
            terminal.size(row["bytes"]) if "bytes" in row else "",
            terminal.size(row["gpu_bytes"]) if "gpu_bytes" in row else "",
            "launched one by one" if row.get("ungraphed") else "",
        )
        for task in rows
        for row in task["rows"]
    ]
    headers = ("", "", "us", "least .. most", "of the first", "TOPS", "SQNR", "weights", "GPU memory", "")
    if lines:
        terminal.table("on the GPU, in turns", headers, lines, numeric=range(2, 9))
    for task in rows:
        if "crashed" in task:
            print(f"CRASHED {task['name']}: its process ended with {task['crashed']}")
        for name, reason in task["failed"].items():
            print(f"FAILED {task['name']}, {name}: {reason}")
        for name, reason in task.get("wrong", {}).items():
            print(f"WRONG {task['name']}, {name}: {reason}")
    for each in reached:
        verdict = "met" if each["met"] else "MISSED"
        print(f"{verdict}: {each['task']}: {each['goal']}: {each['value']:.2f} x, goal {each['least']} x")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--model", nargs="*", choices=cuda_models.MODELS, default=list(cuda_models.MODELS))
    parser.add_argument("--size", type=float, default=1.0, help="scale of channels, depth and latents")
    parser.add_argument("--batch", type=int, nargs="+", choices=(1, 2), default=[1, 2])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--jobs", type=int, default=2, help="to compile with")
    parser.add_argument("--plan", action="store_true", help="compile everything, time nothing; needs no GPU")
    parser.add_argument("--level", type=int, help="compute capability to compile for with --plan, 90 of an H200")
    parser.add_argument("--folder", type=Path, help="for models and what is compiled, kept (default: temporary)")
    parser.add_argument("--json", default=str(RESULTS), help="'' for none")
    options = parser.parse_args()
    try:
        run(options)
    except UserError as error:
        sys.exit(f"benchmarks.cuda: {error}")


def run(options: argparse.Namespace) -> None:
    """Compiles and, without --plan, measures. UserError: there is no GPU."""
    if not nvidia.gpus() and not options.plan:
        raise UserError("the NVIDIA driver finds no GPU on this machine; --plan --level 90 does all that needs none")
    if options.plan and options.level is None:
        raise UserError("--plan compiles for no GPU that is here: name its compute capability with --level, such as 90")
    level = options.level if options.plan else nvidia.levels()[0]
    names = {*cuda_peers.LINEAR, *cuda_peers.CONV, *cuda_peers.ATTENTION, *cuda_peers.DENOISER}
    missing = {name: reason for name in sorted(names) if (reason := cuda_peers.missing(name))}
    for name, reason in missing.items():
        print(f"MISSING {name}: {reason}", flush=True)
    print(f"size {options.size:g}, sm_{level}, batches {options.batch}", flush=True)
    with tempfile.TemporaryDirectory(prefix="mpq-cuda-") as scratch:
        folder = options.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        tasks, rows = build(options, level, folder)
        if options.plan:
            for task in tasks:
                ours = task.paths if isinstance(task.case, str) else cuda_cases.names(task.case, level)
                peers = [name for name in task.peers if name not in missing]
                print(f"{task.name}: {', '.join([*ours, CONTROL, *peers])}")
            report(rows, [])
            return
        with terminal.progress("measuring", len(tasks)) as advance:
            for row in measured(tasks, options.rounds):
                rows.append(row)
                advance(1)
                if options.json:  # what is there stays, whatever happens later
                    write(options, rows, missing)
    report(rows, goals(rows))


def write(options: argparse.Namespace, rows: Sequence[Mapping[str, Any]], missing: Mapping[str, str]) -> None:
    device = nvidia.gpus()[0]
    found = {
        **provenance(),
        "gpu": {"name": device.name, "level": device.level, "bytes": device.memory, "driver": nvidia.driver_version()},
        "nvcc": (machine_code.version(machine_code.compiler()).strip().splitlines() or [""])[-1],
        "torch_cuda": torch.version.cuda,
        "size": options.size,
        "missing": missing,
        "tasks": rows,
        "goals": goals(rows),
    }
    Path(options.json).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
