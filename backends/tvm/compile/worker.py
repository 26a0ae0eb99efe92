"""A worker process that compiles kernels and links libraries, and the parent's side of it (`Worker`).

It is ``python -m mpq_compiler.backends.tvm.compile.worker``. TVM lives in workers only: where LLVM cannot select an
instruction it ends its process, which is then a worker, and `Worker` turns that into one sentence. Requests and answers
are pickles, each behind its length, over standard input and output.
"""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from mpq_compiler.backends.tvm.plan.calls import Accepted
from mpq_compiler.support.errors import UserError
from mpq_compiler.support.execution import child_environment
from mpq_compiler.targets.table import require_runnable


class Crash(Exception):
    """A worker ended without an answer; the message says how."""


class Failure(Exception):
    """A worker's request raised an error; the message says which."""


def _send(stream: IO[bytes], message: Any) -> None:
    data = pickle.dumps(message)
    stream.write(len(data).to_bytes(8, "little") + data)
    stream.flush()


def _receive(stream: IO[bytes]) -> Any:
    """Reads the next message. EOFError: there is none."""
    size = stream.read(8)
    data = stream.read(int.from_bytes(size, "little")) if len(size) == 8 else b""
    if len(size) < 8 or len(data) < int.from_bytes(size, "little"):
        raise EOFError
    return pickle.loads(data)


class Worker:
    """The parent's side of a worker: a context manager that starts it at once and ends it with the block."""

    def __init__(self) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the worker)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", __name__],  # -P: modules of the folder that the user is in are none of ours
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=child_environment(TVM_NUM_THREADS="1"),
        )

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Kills the worker."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            if stream is not None:
                stream.close()

    def __call__(self, function: str, *arguments: Any) -> Any:
        """Calls a function of `REQUESTS` in the worker and returns its result.

        Raises:
            UserError: the function raised one.
            Failure: the function raised another error.
            Crash: the worker died.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            _send(self._process.stdin, (function, arguments))
            kind, result = _receive(self._process.stdout)
        except (EOFError, BrokenPipeError):
            raise Crash(self._last_words()) from None
        if kind == "done":
            return result
        raise UserError(result) if kind == "user-error" else Failure(result)

    def _last_words(self) -> str:
        code = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").splitlines()
        telling = [line.strip() for line in lines if "LLVM ERROR" in line or "error:" in line.lower()]
        ended = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return f"{telling[0]} ({ended})" if telling else ended


def _compile(kernel: Any, target: Any, path: str) -> int:
    """Compiles a kernel to an object file; returns the bytes of workspaces that a thread takes for it, at most."""
    import tvm

    from mpq_compiler.backends.tvm import templates
    from mpq_compiler.backends.tvm.compile.workspaces import Workspaces
    from mpq_compiler.backends.tvm.kernels.common import template
    from mpq_compiler.backends.tvm.toolchain.linker import add_vector_granule
    from mpq_compiler.targets import streaming
    from mpq_compiler.targets.table import with_features

    if target.is_cuda:
        _compile_cuda(kernel, target, Path(path))
        return 0
    module = template.module({kernel.name: templates.build(kernel, target)})
    row, workspaces = with_features(target, kernel.features(target.arch)), Workspaces()
    # Without its checks of every argument, half of the code of a small kernel: the plan is what calls them, and the
    # runtime checks what the plan gets.
    checked = kernel.template == "rans"  # it asserts that what it decodes is sound
    with tvm.transform.PassContext(instruments=[workspaces], config={"tirx.disable_assert": not checked}):
        compiled = tvm.compile(module, target=tvm.target.Target(dict(row.tvm)))
    compiled.mod.write_to_file(path)
    if streaming.FEATURE in row.features:
        add_vector_granule(row, Path(path))
    return workspaces.size


def _compile_cuda(kernel: Any, target: Any, path: Path) -> None:
    """Compiles the launcher of a GPU kernel to an object file, and the kernel beside it to a module for the runtime."""
    import tvm

    from mpq_compiler.backends.tvm import templates
    from mpq_compiler.backends.tvm.toolchain import machine_code

    functions = {kernel.name: templates.build(kernel, target)}
    with tvm.transform.PassContext(config={"tirx.disable_assert": True}):
        launching, device = machine_code.compiled(functions, target)
    launching.write_to_file(str(path))
    path.with_suffix(machine_code.SOURCE).write_text(device.source)
    path.with_suffix(machine_code.DEVICE).write_bytes(device.packed(*machine_code.code_for(device.source, target)))


def _cudart(target: Any, output: str) -> None:
    from mpq_compiler.backends.tvm.compile.link import compile_cudart

    compile_cudart(target, Path(output))


def _link(lowered: Any, target: Any, objects: list[str], output: str, interface: str) -> dict[str, int]:
    from mpq_compiler.backends.tvm.compile.link import link

    tempfile.tempdir = str(Path(output).parent)  # what TVM leaves there goes with the parent's folder
    return link(lowered, target, [Path(p) for p in objects], Path(output), interface)


def _standalone(
    folder: Path,
    lowered: Any,
    target: Any,
    made: Any,
    weights: Path,
    places: Any,
    accepted: Accepted,
    machine: bool,
    owner: str,
) -> list[str]:
    from mpq_compiler.backends.tvm import standalone

    described = standalone.Weights(standalone.describe(weights), places)
    if machine:
        more = (made.library, described, made.held_bytes, accepted, owner)
        return standalone.write_machine(folder, lowered, target, *more)
    return standalone.write(folder, lowered, target, made.objects, described, made.workspace_bytes, accepted, owner)


def _tune(kernel: Any, target: Any) -> list[tuple[int, int, float]]:
    from mpq_compiler.backends.tvm.compile.tune import measure

    require_runnable(target)  # which asks for what a process has to ask for
    return measure(kernel, target)


def _signatures(lowered: Any, target: Any) -> list[tuple[str, str]]:
    from mpq_compiler.backends.tvm.compile.signatures import check

    return check(lowered, target)


def _execute(lowered: Any, target: Any, objects: list[str], tensors: Any, inputs: Any, known: Any) -> dict[str, Any]:
    from mpq_compiler.backends.tvm.compile.execute import execute

    require_runnable(target)
    return execute(lowered, target, objects, tensors, inputs, known)


REQUESTS: dict[str, Callable[..., Any]] = {
    "compile": _compile, "cudart": _cudart, "execute": _execute, "link": _link, "signatures": _signatures,
    "standalone": _standalone, "tune": _tune,
}  # fmt: skip


def main() -> None:
    """Answers requests until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's affair
    sys.modules["torch"] = None  # type: ignore[assignment]  # TVM imports torch where it can: seconds, and 200 MB
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what anything prints must not end up among the answers
    with suppress(ImportError):  # a request says so
        import tvm  # noqa: F401  (half a second, spent before the first request)
    while True:
        try:
            function, arguments = _receive(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer: tuple[str, Any] = ("done", REQUESTS[function](*arguments))
        except UserError as error:
            answer = ("user-error", str(error))
        except Exception as error:
            answer = ("failure", f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[-1]}")
        _send(answers, answer)


if __name__ == "__main__":
    main()
