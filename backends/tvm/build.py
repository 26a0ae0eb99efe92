"""A packed program to `kernels.so`: kernels are compiled in workers, kept by content, and linked in one order."""

from __future__ import annotations

import functools
import hashlib
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from mpq_compiler.artifact import interface
from mpq_compiler.artifact.bundle import CUDART, KERNELS, WEIGHTS
from mpq_compiler.backends.tvm import inspect, lowering
from mpq_compiler.backends.tvm.compile import tune as tune_
from mpq_compiler.backends.tvm.compile.objects import Objects, require_room
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
from mpq_compiler.support import tensorfile
from mpq_compiler.support.errors import UserError
from mpq_compiler.targets import numerics
from mpq_compiler.targets.table import Target

_logger = logging.getLogger(__name__)
PREPARE = "prepare"
Entry = dict[str, Any]
"""An entry of the manifest."""


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
    owner: str = "",
    instruments: Sequence[StageInstrument] = (),
    fresh: bool = False,
) -> Built:
    """Compiles a packed program for a CPU or for CUDA, with a specialization for each batch size.

    others: the program at other image sizes, with the batch sizes for each; they share the stored tensors.
    jobs: worker processes; workers: those of `standby`, in their place. cache: folder of compiled kernels (default:
    `cache.folder()`). None of them changes a byte. tune: search for the fastest tiles (`tune`). emit: "c" or
    "machine", a program as well, without a runtime or with TVM's (`standalone`); owner: the key whose owner has to have
    signed what it opens. instruments: look at every stage. fresh: compile all kernels, though the cache holds some.
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
            asked = _accepted(program)
            beside.update(_standalone(lowered, target, tensors, worker, made, asked, emit == "machine", owner))
        if target.is_cuda12:
            worker("cudart", target, str(path := made.library.with_name(CUDART)))
            beside[CUDART] = path.read_bytes()

    library, reused, memory = compile_library(lowered, target, jobs, progress, cache, workers, further, fresh)
    return Built(
        files={KERNELS: library, **beside},
        tensors=tensors,
        entries=[tensor.entry(name) for name, tensor in stored.items()],
        functions=_functions(lowered),
        memory=memory,
        parts=_parts(lowered),
        stages=lowering.names(target),
        prepare=_prepared(lowered),
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
                    **({"beside": [*call.beside]} if call.beside else {}),
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
    compiled: set[Kernel] = set()
    arrays = {name: tensor.array for name, tensor in stored.items()}
    with tempfile.TemporaryDirectory(prefix="mpq-") as scratch:
        objects = Objects(target, sources(), Path(scratch), cache)

        def compile(kernels: Mapping[Kernel, str], workers: Sequence[Worker]) -> list[Path]:
            compiled.update(objects.missing(kernels))
            objects.compile(kernels, workers)
            return [*map(objects.path, kernels)]

        with inspect.runner(target, arrays, compile, jobs) as runner:

            def observe(index: int, stage: lowering.Stage, plan: Lowered) -> None:
                looked_at = inspect.InspectablePlan(plan, runner)
                looked_at.verify(stage.name())
                for instrument in instruments:
                    instrument(index, stage, looked_at)

            return lowering.run(stages, observe), compiled


def require_compiler(target: Target) -> None:
    """UserError: there is no compiler of kernels for that GPU."""
    machine_code.require_compiler(target)


@contextmanager
def standby(jobs: int) -> Iterator[list[Worker]]:
    """The workers of a compilation; each takes half a second to be ready, which may pass before they are needed."""
    with ExitStack() as stack:
        yield [stack.enter_context(Worker()) for _ in range(jobs)]


def interface_of(lowered: Lowered) -> str:
    """The hash of what the functions of a plan take and yield, which its library states (`artifact.interface`)."""
    tensors = {value.name: (value.dtype, [*value.inner]) for value in lowered.stored}
    return interface.digest(_functions(lowered), _parts(lowered), _prepared(lowered), tensors)


def _functions(lowered: Lowered) -> list[Entry]:
    return [_describe(function, batch) for function in lowered.functions for batch in function.batches]


def _parts(lowered: Lowered) -> list[Entry]:
    return [_describe_part(part) for part in lowered.parts().values()]


def _prepared(lowered: Lowered) -> Entry:
    return {"name": PREPARE, "tensors": [value.name for value in lowered.stored], "reads": lowered.reads()}


def _describe(function: Function, batch: int) -> Entry:
    """The manifest's entry of a specialization."""
    found: Entry = {
        "name": function.name(batch),
        "batch": batch,
        "inputs": [_described(value.name, value, batch) for value in function.inputs],
        "output": _described(OUTPUT, function.output, batch),
    }
    return found | ({"parts": [part.name for part in function.parts]} if function.parts else {})


def _notes(function: Function) -> list[str]:
    """Notes for what a user may expect of the parts, and does not get."""
    notes = []
    if function.mixed:
        some = ", ".join(function.mixed[:3]) + (", ..." if len(function.mixed) > 3 else "")
        notes.append(
            f"{len(function.mixed)} of {len(function.own)} kernel calls of a step depend on the timestep and the texts "
            f"together, though not on the image: they are not kept between steps ({some}; docs/artifact.md)"
        )
    for node, parts in function.copied:  # no note, for nobody can do anything about it
        _logger.info("%s is concatenated by a copy: others read its parts or cannot write them there: %s", node, parts)
    return notes


def _features(lowered: Lowered, target: Target) -> tuple[str, ...]:
    """What the kernels ask of a CPU."""
    return tuple(sorted({feature for kernel in lowered.kernels() for feature in kernel.features(target.arch)}))


def _describe_part(part: Part) -> Entry:
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
    fresh: bool = False,
) -> tuple[bytes, int, dict[str, Any]]:
    """(the shared library of the plan, how many of its kernels came from the cache, the manifest's entry on memory).

    further: what else is to be made of it all, by a worker.
    """
    kernels = lowered.kernels()
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mpq-")))
        objects = Objects(target, sources(), scratch, cache, fresh)
        missing = objects.missing(kernels)
        _logger.info("kernels: the cache has %d of %d", len(kernels) - len(missing), len(kernels))
        if workers is None:
            workers = stack.enter_context(standby(max(1, min(jobs, len(missing)))))
        objects.compile(kernels, workers, progress)
        output = scratch / KERNELS
        files = [str(objects.path(kernel)) for kernel in sorted(kernels, key=lambda k: k.name)]
        try:
            held = workers[0]("link", lowered, target, files, str(output), interface_of(lowered))
        except (Crash, Failure) as error:
            require_room(scratch)
            raise UserError(
                f"the {len(kernels)} kernels for '{target.name}' cannot be linked: {error}; report the model"
            ) from error
        taken = {kernel: objects.workspace(kernel) for kernel in kernels}
        memory = _memory(lowered, held, taken)
        if further is not None:
            workspace, activations = max(taken.values(), default=0), max(memory["activation_bytes"].values())
            held_bytes = memory["prepared_bytes"] + activations + workspace
            further(workers[0], Made([Path(file) for file in files], output, workspace, held_bytes))
        return output.read_bytes(), len(objects.reused), memory


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
    owner: str,
) -> dict[str, bytes]:
    """The files of a program, by name. machine: it runs on TVM's runtime. owner: as for `build`."""
    with tempfile.TemporaryDirectory(prefix="mpq-") as scratch:
        weights = Path(scratch, WEIGHTS)
        with weights.open("wb") as stream:
            tensorfile.save(stream, tensors)
        folder = Path(scratch, "standalone")
        folder.mkdir()
        try:
            places = tensorfile.places(tensors)
            names = worker("standalone", folder, lowered, target, made, weights, places, accepted, machine, owner)
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


@functools.cache
def sources() -> str:
    """SHA-256 of what kernels are made from."""
    here = Path(__file__).parent
    rooms = [path for room in ("kernels", "toolchain") for path in sorted((here / room).rglob("*.py"))]
    beside = [here / name for name in ("templates.py", "compile/worker.py", "compile/workspaces.py", "plan/calls.py")]
    shared = [Path(numerics.__file__).with_name(name) for name in ("numerics.py", "table.py", "nvidia.py")]
    return hashlib.sha256(b"".join(path.read_bytes() for path in (*rooms, *beside, *shared))).hexdigest()
