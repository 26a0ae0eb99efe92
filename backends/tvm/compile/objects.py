"""Object files of kernels: compiled by workers, and kept in the cache.

A kernel is one file of the cache, with all that is kept beside its object. What is linked are files of the
compilation's own folder, made of the very bytes whose hash was compared (`support.cache`).
"""

from __future__ import annotations

import importlib.metadata
import queue
import shutil
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from mpq_compiler.backends.tvm.compile.worker import Crash, Worker
from mpq_compiler.backends.tvm.plan.calls import Kernel
from mpq_compiler.backends.tvm.toolchain import machine_code
from mpq_compiler.pipeline.backend import Progress
from mpq_compiler.support import cache as caches
from mpq_compiler.support.errors import UserError
from mpq_compiler.support.execution import tracked
from mpq_compiler.targets.table import Target

OBJECT = ".o"
WORKSPACE = ".workspace"
"""Beside a kernel's object: how much memory a thread takes while it runs."""
KIND = "kernels"
"""Folder of the cache."""
ROOM = 4 << 20
"""Bytes; with less a disk counts as full when a compiler or linker has failed."""


class Objects:
    """The objects of a compilation, in a folder that goes with it.

    Args:
        target: of the kernels.
        sources: the digest of what they are made from.
        folder: of the compilation, empty.
        cache: the cache folder; None takes the user's.
        fresh: whether all kernels are compiled, though the cache holds them.
    """

    def __init__(
        self, target: Target, sources: str, folder: Path, cache: Path | None = None, fresh: bool = False
    ) -> None:
        self.target, self.folder, self.fresh = target, folder, fresh
        self.cached = caches.folder(cache) / KIND
        self.reused: set[Kernel] = set()
        """Those that the cache held."""
        options = repr(sorted((k, str(v)) for k, v in target.tvm.items()))
        compilers = [importlib.metadata.version("apache-tvm")]
        if target.is_cuda:
            compilers.append(machine_code.compiler_version(target))
        self._about = (sources, target.name, options, *compilers)
        more = (machine_code.DEVICE, machine_code.SOURCE) if target.is_cuda else ()
        self._suffixes = (WORKSPACE, *more, OBJECT)

    def path(self, kernel: Kernel) -> Path:
        """The object of a kernel."""
        return self.folder / f"{kernel.name}{OBJECT}"

    def workspace(self, kernel: Kernel) -> int:
        """The bytes that a thread takes while the kernel runs."""
        return int(self.path(kernel).with_suffix(WORKSPACE).read_text())

    def missing(self, kernels: Iterable[Kernel]) -> list[Kernel]:
        """The kernels that have to be compiled; those that the cache holds are taken from there."""
        return [kernel for kernel in kernels if not self.path(kernel).is_file() and not self._taken(kernel)]

    def compile(
        self, kernels: Mapping[Kernel, str], workers: Sequence[Worker], progress: Progress | None = None
    ) -> None:
        """Compiles the missing ones of kernels, each with the node that asks for it, and keeps them in the cache.

        UserError: a kernel that cannot be compiled; no room.
        """
        from safetensors.numpy import save

        missing = self.missing(kernels)
        with tracked(progress, "compiling kernels", len(kernels)) as advance:
            advance(len(kernels) - len(missing))
            caches.make(self.cached)
            for kernel in self._compiled({each: kernels[each] for each in sorted(missing, key=_cost)}, workers):
                own = self.path(kernel)
                content = {s: np.frombuffer(own.with_suffix(s).read_bytes(), np.uint8) for s in self._suffixes}
                caches.write(self._place(kernel), save(content))
                advance(1)

    def _place(self, kernel: Kernel) -> Path:
        """The file of a kernel in the cache, named by all that its object depends on."""
        return self.cached / caches.digest(str(kernel), *self._about)

    def _taken(self, kernel: Kernel) -> bool:
        """Whether the cache holds a kernel, which is taken from there."""
        from safetensors.numpy import load

        content = None if self.fresh else caches.read(self._place(kernel))
        if content is None:
            return False
        files = load(content)
        for suffix in self._suffixes:
            self.path(kernel).with_suffix(suffix).write_bytes(files[suffix].tobytes())
        self.reused.add(kernel)
        return True

    def _compiled(self, kernels: Mapping[Kernel, str], workers: Sequence[Worker]) -> Iterator[Kernel]:
        """The kernels as they are compiled."""
        waiting: queue.SimpleQueue[Kernel] = queue.SimpleQueue()
        finished: queue.SimpleQueue[tuple[Kernel, Exception | None]] = queue.SimpleQueue()
        for kernel in kernels:
            waiting.put(kernel)
        stop = threading.Event()

        def serve(worker: Worker) -> None:
            while not stop.is_set():
                try:
                    kernel = waiting.get_nowait()
                except queue.Empty:
                    return
                own = self.path(kernel)
                try:
                    taken = worker("compile", kernel, self.target, str(own))
                    own.with_suffix(WORKSPACE).write_text(str(taken))
                    finished.put((kernel, None))
                except Exception as error:
                    own.unlink(missing_ok=True)
                    finished.put((kernel, error))
                    return

        threads = [threading.Thread(target=serve, args=(worker,), daemon=True) for worker in workers]
        for thread in threads:
            thread.start()
        try:
            for _ in kernels:
                kernel, error = finished.get()
                if error is not None:
                    require_room(self.folder)
                    raise _refusal(kernel, kernels[kernel], self.target, error) from error
                yield kernel
        except BaseException:  # an error, or Ctrl-C: what still compiles is not waited for
            stop.set()
            for worker in workers:
                worker.close()
            raise
        finally:
            for thread in threads:
                thread.join()


def require_room(folder: Path) -> None:
    """UserError where an error has been that of a full disk: LLVM and linkers do not always say so."""
    if shutil.disk_usage(folder).free < ROOM:
        raise UserError(f"there is no space left in the folder for temporary files (TMPDIR), {folder}; free some")


def _cost(kernel: Kernel) -> tuple[int, str]:
    """Kernels that take long to compile come first, so that no worker is left alone with one at the end."""
    order = ("fast_attention", "gemm", "float_gemm", "weight_only", "attention", "matmul", "prepare", "norms")
    return order.index(kernel.template) if kernel.template in order else len(order), kernel.name


def _refusal(kernel: Kernel, node: str, target: Target, error: Exception) -> UserError:
    how = "its compiler aborted" if isinstance(error, Crash) else "it cannot be generated"
    return UserError(f"the kernel of node '{node}', {kernel}, for '{target.name}': {how}: {error}; report the model")
