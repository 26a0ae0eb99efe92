"""Plans between the stages of a lowering, as dumps look at them: as text, and run call by call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mpq_compiler.backends.tvm.compile.worker import Crash, Failure, Worker
from mpq_compiler.backends.tvm.plan import printer
from mpq_compiler.backends.tvm.plan.calls import Kernel, Lowered
from mpq_compiler.ir.verifier import VerificationError, Violation
from mpq_compiler.pipeline.stages import Inspectable
from mpq_compiler.support.errors import UserError
from mpq_compiler.targets.numerics import BOUNDS, F32
from mpq_compiler.targets.table import Target, missing_features, with_features

EXACT_TEMPLATES = frozenset({"gemm", "quantize", "hadamard", "movement", "pointwise"})
EXACT_STEPS = frozenset(
    {"add", "sub", "rsub", "mul", "div", "rdiv", "neg", "square", "cast", "quantize", "rotate", "ne", "where"}
    | {"maximum", "minimum", "binade"}
)
"""Operations that IEEE 754 defines to the last bit, and the quantizer."""
SMALL_FLOAT_STEP = 0.5
"""How far a tie of a small float may move a value at most, relative to the largest one."""

Compile = Callable[[Mapping[Kernel, str], Sequence[Worker]], list[Path]]


@dataclass
class Runner:
    """Runs plans of one compilation on the stored tensors, with workers of its own, started when needed.

    compiled: compiles kernels, each with the node that asks for it, and returns the objects

    The compilation has other workers, and keeps them where one of these is lost.
    """

    target: Target
    tensors: Mapping[str, np.ndarray]
    compiled: Compile
    jobs: int = 1
    verified: Lowered | None = None
    """The plan that was verified last."""
    last: tuple[Lowered, dict[str, np.ndarray]] | None = None
    """The plan that was run last, and its values."""
    _stack: ExitStack = field(default_factory=ExitStack)
    _workers: list[Worker] = field(default_factory=list)

    def workers(self) -> list[Worker]:
        """The workers. They are alive."""
        if not self._workers:
            self._workers = [self._stack.enter_context(Worker()) for _ in range(self.jobs)]
        return self._workers

    def restart(self) -> None:
        """Leaves the workers, of which one was lost."""
        self._stack.close()
        self._workers = []

    def close(self) -> None:
        """Ends the workers."""
        self._stack.close()


@contextmanager
def runner(target: Target, tensors: Mapping[str, np.ndarray], compiled: Compile, jobs: int) -> Iterator[Runner]:
    """A runner that ends with the block."""
    made = Runner(target, tensors, compiled, max(1, jobs))
    try:
        yield made
    finally:
        made.close()


class InspectablePlan(Inspectable):
    """A plan with what runs it."""

    def __init__(self, lowered: Lowered, runner: Runner) -> None:
        self.lowered, self.runner = lowered, runner
        function = lowered.functions[0]
        self._kernels = {name: call.kernel for call in function.calls for _, name in call.results if not call.into}

    def text(self, stage: str) -> str:
        return printer.text(self.lowered, stage)

    def output(self) -> str:
        return self.lowered.functions[0].output.name

    def tolerance(self, value: str) -> float:
        kernel = self._kernels.get(value)
        if kernel is None or is_exact(kernel):
            return 0.0
        codes = next((v.dtype == "uint8" for v in self.lowered.functions[0].made if v.name == value), False)
        if codes:
            return 1.0
        if "binade" in steps_of(kernel):
            return SMALL_FLOAT_STEP
        return BOUNDS[kernel.numerics if kernel.template == "fast_attention" else F32]

    def verify(self, stage: str) -> None:
        """Raises VerificationError where a kernel takes or yields something else than the plan has.

        A kernel that cannot be described is left to the compilation, which says why.
        """
        if self.lowered == self.runner.verified:
            return
        try:
            found = self.runner.workers()[0]("signatures", self.lowered, self.runner.target)
        except (Crash, Failure):
            self.runner.restart()
            return
        if found:
            first = Violation("signatures", *found[0])
            raise VerificationError(f"{first} after stage '{stage}'; this is a fault of the compiler, please report it")
        self.runner.verified = self.lowered

    def run(
        self, inputs: Mapping[str, np.ndarray], known: Mapping[str, np.ndarray] | None = None
    ) -> dict[str, np.ndarray]:
        if known is None and self.runner.last is not None and self.runner.last[0] == self.lowered:
            return dict(self.runner.last[1])  # a stage that had nothing to do
        target = self.runner.target
        if target.is_cuda:
            raise UserError("kernels of a GPU are launched as one graph, and are not run one by one")
        needed = {feature for kernel in self.lowered.kernels() for feature in kernel.features(target.arch)}
        if lacking := missing_features(with_features(target, sorted(needed))):
            raise UserError(f"this machine lacks {', '.join(lacking)}, which '{target.name}' needs")
        try:
            objects = self.runner.compiled(self.lowered.kernels(), self.runner.workers())
            given = (dict(self.runner.tensors), dict(inputs), dict(known or {}))
            worker, names = self.runner.workers()[0], [str(path) for path in objects]
            found: dict[str, np.ndarray] = worker("execute", self.lowered, target, names, *given)
        except (Crash, Failure) as error:
            self.runner.restart()
            raise UserError(f"its kernels cannot be run one by one: {error}") from error
        except UserError:
            self.runner.restart()
            raise
        if known is None:
            self.runner.last = (self.lowered, found)
        return found


def steps_of(kernel: Kernel) -> list[str]:
    """Names of the pointwise operations that a kernel computes."""
    fields = dict(kernel.problem.fields)
    holder = fields.get("epilogue", kernel.problem if kernel.template == "pointwise" else None)
    return [step.get("op") for step in holder.get("steps")] if holder else []


def is_exact(kernel: Kernel) -> bool:
    """Whether its result is defined to the bit: integers, moved elements, IEEE operations."""
    return kernel.template in EXACT_TEMPLATES and {*steps_of(kernel)} <= EXACT_STEPS
