"""A packed program to `kernels.so`: kernels are compiled in workers, kept by content, and linked in one order."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import os
import queue
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from mpq_compiler.artifact.bundle import CUDART, KERNELS, WEIGHTS
from mpq_compiler.backends.tvm import inspect, lowering
from mpq_compiler.backends.tvm.compile import tune as tune_
from mpq_compiler.backends.tvm.compile.worker import Crash, Failure, Worker
from mpq_compiler.backends.tvm.emit.walk import OUTPUT, SelectKernels
from mpq_compiler.backends.tvm.plan.calls import (
    BATCH,
    Accepted,
    Call,
    Function,
    Kernel,
    Lowered,
    Made,
    Part,
    Token,
    Value,
)
from mpq_compiler.backends.tvm.toolchain import machine_code
from mpq_compiler.ir import stored_tensors
from mpq_compiler.ir.findings import ASSUMPTIONS
from mpq_compiler.ir.program import Program
from mpq_compiler.ir.specialization import Specialization
from mpq_compiler.pipeline.backend import Built, Progress
from mpq_compiler.pipeline.stages import StageInstrument
from mpq_compiler.support import cache as caches
from mpq_compiler.support import tensorfile
from mpq_compiler.support.errors import UserError
from mpq_compiler.support.execution import tracked
from mpq_compiler.targets import numerics
from mpq_compiler.targets.table import Target

PREPARE = "prepare"
WORKSPACE = ".workspace"
"""Beside a kernel's object: how much memory a thread takes while it runs."""
KIND = "kernels"
"""Folder of the cache."""
PARTIAL = ".partial-"
"""Begins the names of folders in it that hold what is being compiled."""
ROOM = 4 << 20
"""Bytes; with less a disk counts as full when a compiler or linker has failed."""
ABANDONED = 24 * 3600
"""Seconds after which such a folder is taken to be that of a process that was killed."""


def build(
    program: Program,
    target: Target,
    batches: Sequence[int] = (1, 2, 4, 8),
    jobs: int = 1,
    progress: Progress | None = None,
    cache: Path | None = None,
    others: Sequence[Specialization] = (),
    workers: Sequence[Worker] | None = None,
    tune: bool = False,
    emit: str | None = None,
    instruments: Sequence[StageInstrument] = (),
) -> Built:
    """Compiles a packed program for a CPU or for CUDA, with a specialization for each batch size.

    others: the program at other image sizes, with the batch sizes for each; they share the stored tensors.
    jobs: worker processes; workers: those of `standby`, in their place. cache: folder of compiled kernels (default:
    `cache.folder()`). None of them changes a byte. tune: search for the fastest tiles (`tune`). emit: "c" or
    "machine", a program as well, without a runtime or with TVM's (`standalone`). instruments: look at every stage.
    Slow forms are added to ``program.fallbacks``.

    UserError: a node that no kernel computes; a kernel that cannot be compiled; no linker; no room in the cache.
    """
    if target.is_cuda:
        require_compiler(target)
    stored = stored_tensors.stored(program, *(other.program for other in others), coded=lowering.decodes(target))
    tensors = {name: tensor.array for name, tensor in stored.items()}
    lowered, looked_at = _lowered(program, target, batches, others, stored, jobs, cache, instruments)
    tiles: dict[str, tune_.Tile] | None = None
    if tune:
        with ExitStack() as stack:
            worker = workers[0] if workers else stack.enter_context(Worker())
            try:
                lowered, tiles = tune_.tuned(lowered, target, worker, sources(), cache, progress)
            except (Crash, Failure) as error:
                raise UserError(
                    f"kernels for '{target.name}' cannot be tuned: {error}; compile without --tune, and report it"
                ) from error
    beside: dict[str, bytes] = {}

    def further(worker: Worker, made: Made) -> None:
        if emit:
            beside.update(_standalone(lowered, target, tensors, worker, made, _accepted(program), emit == "machine"))
        if target.is_cuda12:
            worker("cudart", target, str(path := made.library.with_name(CUDART)))
            beside[CUDART] = path.read_bytes()

    library, reused, memory = compile_library(lowered, target, jobs, progress, cache, workers, further)
    return Built(
        files={KERNELS: library, **beside},
        tensors=tensors,
        entries=[tensor.entry(name) for name, tensor in stored.items()],
        functions=[_describe(function, batch) for function in lowered.functions for batch in function.batches],
        memory=memory,
        parts=[_describe_part(part) for part in lowered.parts().values()],
        stages=lowering.names(target),
        prepare={
            "name": PREPARE,
            "tensors": [value.name for value in lowered.stored],
            "reads": lowered.reads(),
        },
        features=() if target.is_cuda else _features(lowered, target),
        facts={
            "kernels": len(lowered.kernels()),
            "from_cache": reused - len(looked_at & lowered.kernels().keys()),
            "calls": len(lowered.functions[0].calls),
            "notes": _notes(lowered.functions[0]),
            "tiles": tiles,
            "schedule": [
                {
                    "node": call.node,
                    "kernel": call.kernel.name,
                    "template": call.kernel.template,
                    "problem": str(call.kernel),
                    "part": part,
                }
                for part, calls in _in_parts(lowered.functions[0])
                for call in calls
            ],
        },
    )


def _lowered(
    program: Program,
    target: Target,
    batches: Sequence[int],
    others: Sequence[Specialization],
    stored: Mapping[str, stored_tensors.Stored],
    jobs: int,
    cache: Path | None,
    instruments: Sequence[StageInstrument],
) -> tuple[Lowered, set[Kernel]]:
    """(the plan after all stages, the kernels that were compiled for the instruments to look at it)."""
    stages = [SelectKernels(program, batches, others, stored), *lowering.of_target(target)]
    if not instruments:
        return lowering.run(stages), set()
    fresh: set[Kernel] = set()

    def compiled(kernels: Mapping[Kernel, str], workers: Sequence[Worker]) -> list[Path]:
        fresh.update(missing_kernels(kernels, target, cache))
        return [*compile_objects(kernels, target, workers, cache=cache).values()]

    arrays = {name: tensor.array for name, tensor in stored.items()}
    with inspect.runner(target, arrays, compiled, jobs) as runner:

        def observe(index: int, stage: lowering.Stage, plan: Lowered) -> None:
            looked_at = inspect.InspectablePlan(plan, runner)
            looked_at.verify(stage.name())
            for instrument in instruments:
                instrument(index, stage, looked_at)

        return lowering.run(stages, observe), fresh


def require_compiler(target: Target) -> None:
    """UserError: there is no compiler of kernels for that GPU."""
    machine_code.require_compiler(target)


@contextmanager
def standby(jobs: int) -> Iterator[list[Worker]]:
    """The workers of a compilation; each takes half a second to be ready, which may pass before they are needed."""
    with ExitStack() as stack:
        yield [stack.enter_context(Worker()) for _ in range(jobs)]


def _describe(function: Function, batch: int) -> dict[str, Any]:
    """The manifest's entry of a specialization."""
    found: dict[str, Any] = {
        "name": function.name(batch),
        "batch": batch,
        "inputs": [_described(value.name, value, batch) for value in function.inputs],
        "output": _described(OUTPUT, function.output, batch),
    }
    return found | ({"parts": [part.name for part in function.parts]} if function.parts else {})


def _notes(function: Function) -> list[str]:
    """Notes for what a user may expect of the parts and of concatenations, and does not get."""
    notes = []
    if function.mixed:
        some = ", ".join(function.mixed[:3]) + (", ..." if len(function.mixed) > 3 else "")
        notes.append(
            f"{len(function.mixed)} of {len(function.own)} kernel calls of a step depend on the timestep and the texts "
            f"together, though not on the image: they are not kept between steps ({some}; docs/artifact.md)"
        )
    if function.copied:
        copied = "; ".join(f"{node} ({parts})" for node, parts in function.copied)
        notes.append(f"concatenated by a copy, for others read the parts as well or cannot write them there: {copied}")
    return notes


def _features(lowered: Lowered, target: Target) -> tuple[str, ...]:
    """What the kernels ask of a CPU."""
    return tuple(sorted({feature for kernel in lowered.kernels() for feature in kernel.features(target.arch)}))


def _describe_part(part: Part) -> dict[str, Any]:
    """The manifest's entry of a part, which computes one sample."""
    return {
        "name": part.name,
        "inputs": [_described(value.name, value, 1) for value in part.inputs],
        "outputs": [_described(value.name, value, 1) for value in part.outputs],
    }


def _described(name: str, value: Value, batch: int) -> dict[str, Any]:
    return {"name": name, "shape": [batch if d == BATCH else d for d in value.shape], "dtype": value.dtype}


def _in_parts(function: Function) -> list[tuple[str, tuple[Call, ...]]]:
    """The calls of a run in which nothing is known yet, by the parts that make them."""
    return [*((part.name, part.calls) for part in function.parts), ("step", function.own)]


def compile_library(
    lowered: Lowered,
    target: Target,
    jobs: int = 1,
    progress: Progress | None = None,
    cache: Path | None = None,
    workers: Sequence[Worker] | None = None,
    further: Callable[[Worker, Made], None] | None = None,
) -> tuple[bytes, int, dict[str, Any]]:
    """(the shared library of the plan, how many of its kernels came from the cache, the manifest's entry on memory).

    further: what else is to be made of it all, by a worker.
    """
    kernels = lowered.kernels()
    with ExitStack() as stack:
        missing = missing_kernels(kernels, target, cache)
        if workers is None:
            workers = stack.enter_context(standby(max(1, min(jobs, len(missing)))))
        objects = compile_objects(kernels, target, workers, progress, cache)
        with tempfile.TemporaryDirectory(prefix="mpq-") as scratch:
            output = Path(scratch, KERNELS)
            files = [str(objects[kernel]) for kernel in sorted(kernels, key=lambda k: k.name)]
            try:
                held = workers[0]("link", lowered, target, files, str(output))
            except (Crash, Failure) as error:
                _require_room(Path(scratch), "the folder for temporary files (TMPDIR)")
                raise UserError(
                    f"the {len(kernels)} kernels for '{target.name}' cannot be linked: {error}; report the model"
                ) from error
            taken = {kernel: int(objects[kernel].with_suffix(WORKSPACE).read_text()) for kernel in kernels}
            memory = _memory(lowered, held, taken)
            if further is not None:
                workspace, activations = max(taken.values(), default=0), max(memory["activation_bytes"].values())
                held_bytes = memory["prepared_bytes"] + activations + workspace
                further(workers[0], Made([Path(file) for file in files], output, workspace, held_bytes))
            return output.read_bytes(), len(kernels) - len(missing), memory


def _objects(kernels: Iterable[Kernel], target: Target, cache: Path | None) -> dict[Kernel, Path]:
    """Where in the cache the objects of kernels are, or will be."""
    folder = caches.folder(cache) / KIND
    return {kernel: folder / f"{_key(kernel, target)}.o" for kernel in kernels}


def _beside(target: Target) -> tuple[str, ...]:
    """What is kept beside the object of a kernel."""
    return (WORKSPACE, machine_code.DEVICE, machine_code.SOURCE) if target.is_cuda else (WORKSPACE,)


def missing_kernels(kernels: Iterable[Kernel], target: Target, cache: Path | None = None) -> list[Kernel]:
    """The kernels that the cache does not hold."""
    suffixes = (".o", *_beside(target))
    return [
        kernel
        for kernel, path in _objects(kernels, target, cache).items()
        if not all(path.with_suffix(suffix).is_file() for suffix in suffixes)
    ]


def compile_objects(
    kernels: Mapping[Kernel, str],
    target: Target,
    workers: Sequence[Worker],
    progress: Progress | None = None,
    cache: Path | None = None,
) -> dict[Kernel, Path]:
    """The kernels' objects in the cache; those that it lacks are compiled. ``kernels``: with who asks for them."""
    folder, objects = caches.folder(cache) / KIND, _objects(kernels, target, cache)
    missing = missing_kernels(kernels, target, cache)
    with tracked(progress, "compiling kernels", len(kernels)) as advance:
        advance(len(kernels) - len(missing))
        with _writable(folder):
            folder.mkdir(parents=True, exist_ok=True)
            _sweep(folder)
            pending = {kernel: kernels[kernel] for kernel in sorted(missing, key=_cost)}
            for kernel, path in _compiled(pending, target, workers, folder):
                for suffix in (*_beside(target), path.suffix):
                    os.replace(path.with_suffix(suffix), objects[kernel].with_suffix(suffix))
                advance(1)
    return objects


def _accepted(program: Program) -> Accepted:
    """What the runtime looks for in every call, from the manifest (`driver.manifest`)."""
    below = tuple((spec.name, spec.below) for spec in program.inputs if spec.below is not None)
    assumed = program.facts.get(ASSUMPTIONS, ())
    return Accepted(below, tuple(Token(each["input"], each["token"], tuple(each["values"])) for each in assumed))


def _standalone(
    lowered: Lowered,
    target: Target,
    tensors: Mapping[str, Any],
    worker: Worker,
    made: Made,
    accepted: Accepted,
    machine: bool,
) -> dict[str, bytes]:
    """The files of a program, by name. machine: it runs on TVM's runtime."""
    with tempfile.TemporaryDirectory(prefix="mpq-") as scratch:
        weights = Path(scratch, WEIGHTS)
        with weights.open("wb") as stream:
            tensorfile.save(stream, tensors)
        folder = Path(scratch, "standalone")
        folder.mkdir()
        try:
            places = tensorfile.places(tensors)
            names = worker("standalone", folder, lowered, target, made, weights, places, accepted, machine)
        except (Crash, Failure) as error:
            raise UserError(f"the program for '{target.name}' cannot be linked: {error}; report the model") from error
        return {name: (folder / name).read_bytes() for name in names}


def _memory(lowered: Lowered, held: dict[str, int], taken: dict[Kernel, int]) -> dict[str, Any]:
    """The manifest's entry: bytes by the names of functions and parts (docs/artifact.md)."""
    calls = {name: part.calls for name, part in lowered.parts().items()}
    calls |= {f.name(batch): f.own for f in lowered.functions for batch in f.batches}
    return {
        "prepared_bytes": held.pop(PREPARE),
        "activation_bytes": held,
        "workspace_bytes": {name: max((taken[call.kernel] for call in own), default=0) for name, own in calls.items()},
    }


def _cost(kernel: Kernel) -> tuple[int, str]:
    """Kernels that take long to compile come first, so that no worker is left alone with one at the end."""
    order = ("fast_attention", "gemm", "float_gemm", "weight_only", "attention", "matmul", "prepare", "norms")
    return order.index(kernel.template) if kernel.template in order else len(order), kernel.name


def _require_room(folder: Path, what: str) -> None:
    """UserError where an error has been that of a full disk: LLVM and linkers do not always say so."""
    if shutil.disk_usage(folder).free < ROOM:
        raise UserError(f"there is no space left in {what}, {folder}; free some")


def _sweep(folder: Path) -> None:
    """Removes what compilations that were killed have left."""
    for path in folder.glob(f"{PARTIAL}*"):
        with suppress(OSError):  # another process may sweep as well
            if time.time() - path.stat().st_mtime > ABANDONED:
                shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _writable(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"the cache {folder} cannot be written ({error.strerror}); "
            "free some space there or name another folder with --cache"
        ) from error


def _compiled(
    kernels: Mapping[Kernel, str], target: Target, workers: Sequence[Worker], folder: Path
) -> Iterator[tuple[Kernel, Path]]:
    """The kernels (each with the node that asks for it) as they are compiled, in files of `folder`."""
    waiting: queue.SimpleQueue[Kernel] = queue.SimpleQueue()
    finished: queue.SimpleQueue[tuple[Kernel, Path | Exception]] = queue.SimpleQueue()
    for kernel in kernels:
        waiting.put(kernel)
    stop = threading.Event()

    def serve(worker: Worker, folder: Path) -> None:
        while not stop.is_set():
            try:
                kernel = waiting.get_nowait()
            except queue.Empty:
                return
            own = folder / f"{kernel.name}.o"
            try:
                own.with_suffix(WORKSPACE).write_text(str(worker("compile", kernel, target, str(own))))
                finished.put((kernel, own))
            except Exception as error:
                finished.put((kernel, error))
                return

    with tempfile.TemporaryDirectory(prefix=PARTIAL, dir=folder) as scratch:
        threads = [threading.Thread(target=serve, args=(worker, Path(scratch)), daemon=True) for worker in workers]
        for thread in threads:
            thread.start()
        try:
            for _ in kernels:
                kernel, result = finished.get()
                if isinstance(result, Exception):
                    _require_room(folder, "the cache (--cache)")
                    raise _refusal(kernel, kernels[kernel], target, result) from result
                yield kernel, result
        except BaseException:  # an error, or Ctrl-C: what still compiles is not waited for
            stop.set()
            for worker in workers:
                worker.close()
            raise
        finally:
            for thread in threads:
                thread.join()


def _refusal(kernel: Kernel, node: str, target: Target, error: Exception) -> UserError:
    how = "its compiler aborted" if isinstance(error, Crash) else "it cannot be generated"
    return UserError(f"the kernel of node '{node}', {kernel}, for '{target.name}': {how}: {error}; report the model")


def _key(kernel: Kernel, target: Target) -> str:
    """What the object depends on: the templates' source, the kernel, the target and the compiler."""
    options = repr(sorted((k, str(v)) for k, v in target.tvm.items()))
    compilers = [importlib.metadata.version("apache-tvm")]
    if target.is_cuda:
        compilers.append(machine_code.compiler_version(target))
    return caches.digest(sources(), str(kernel), target.name, options, *compilers)


@functools.cache
def sources() -> str:
    """SHA-256 of what kernels are made from."""
    here = Path(__file__).parent
    rooms = [path for room in ("kernels", "toolchain") for path in sorted((here / room).rglob("*.py"))]
    beside = [here / name for name in ("templates.py", "compile/worker.py", "compile/workspaces.py", "plan/calls.py")]
    shared = [Path(numerics.__file__).with_name(name) for name in ("numerics.py", "table.py", "nvidia.py")]
    return hashlib.sha256(b"".join(path.read_bytes() for path in (*rooms, *beside, *shared))).hexdigest()
