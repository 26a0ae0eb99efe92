"""Judges an artifact: its quality against the float model, and its agreement with the packed program."""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor

from mpq_compiler.driver.held_out import held_out
from mpq_compiler.driver.lower import Packed
from mpq_compiler.driver.options import Options
from mpq_compiler.evaluation.metrics import sqnr_db, sqnr_difference_db
from mpq_compiler.frontend.denoiser import Denoiser
from mpq_compiler.ir import costs
from mpq_compiler.ir.interpreter import run
from mpq_compiler.ir.specialization import Specialization, size_of
from mpq_compiler.runtime import compiled_denoiser, covered
from mpq_compiler.runtime.compiled_denoiser import CompiledDenoiser
from mpq_compiler.support import tensorfile
from mpq_compiler.support.errors import UserError
from mpq_compiler.support.execution import RunContext, child_environment
from mpq_compiler.support.execution import batches as in_batches
from mpq_compiler.targets import table as targets

REFERENCE_MACS = 64e9
"""The most multiply-accumulates that the reference interpreter computes for that: some minutes."""
REFERENCE_LEAST = 4
"""The fewest inputs on which artifact and reference are compared."""
AGREEMENT_DB = 0.1
"""The largest difference in dB between the SQNRs of artifact and reference: contract (c)."""
KINDS_DB = 6.0
"""The loss in dB of further kinds of calls, against the kind that was calibrated, from which on there is a note."""
JUDGED_TOGETHER = 8
"""The number of inputs that run together."""


def compared_together(inputs: int) -> int:
    """The number of inputs that run together through the reference, of few half of them: two threads have one then."""
    return min(JUDGED_TOGETHER, -(-inputs // 2))


def runs_here(target: targets.Target) -> bool:
    """Whether this machine has what an artifact for the target needs; on GPUs loading it tells."""
    return target.backend != "reference" and not targets.missing_features(target)


def load_runnable(path: str | Path, target: targets.Target) -> tuple[CompiledDenoiser | None, list[str]]:
    """Loads the artifact where this machine has what the target needs; a note says why it cannot, all the same."""
    if not runs_here(target):
        return None, []
    try:
        return compiled_denoiser.load(path), []
    except UserError as error:
        return None, [f"the artifact was not executed here: {error}"]


def disagreements(
    compiled: CompiledDenoiser | None,
    target: targets.Target,
    denoiser: Denoiser,
    others: Sequence[Specialization],
) -> Iterator[str]:
    """Notes the sizes at which artifact and packed program differ in quality, on a few random inputs.

    Args:
        compiled: the loaded artifact; None gives no notes.
        target: for the sentences.
        denoiser: the float model.
        others: the packed program at its other sizes.
    """
    if compiled is None:
        return
    for other in others:
        called = denoiser.kinds[other.kind - 1] if other.kind else denoiser.resized(*size_of(other.program))
        drawn = {name: value.numpy() for name, value in called.random_inputs(REFERENCE_LEAST).items()}
        arrays = covered.clipped(compiled.manifest, drawn)
        inputs = {name: torch.from_numpy(array) for name, array in arrays.items()}
        expected = called(**inputs).numpy()
        output = compiled.run(arrays, kind=other.kind)
        difference, error = sqnr_difference_db(expected, output, run(other.program, inputs).numpy())
        if note := disagreement(difference, error, REFERENCE_LEAST, target):
            yield f"{_called(other, denoiser)}: {note}"


def _called(other: Specialization, denoiser: Denoiser) -> str:
    """Where a further program runs, in words."""
    return f"in calls of {denoiser.kind_texts[other.kind]}" if other.kind else f"at {other.name}"


def disagreement(difference: float | None, error: float | None, inputs: int, target: targets.Target) -> str | None:
    """The note on an artifact whose quality is not the packed program's; None where contract (c) holds.

    Where a model amplifies the last bits of a sum up to the errors of its quantization, the SQNRs of both are drawn as
    it were by chance, and a few inputs do not tell: the note says so, where the difference is within two standard
    errors of what is allowed.

    Args:
        difference: dB that the artifact's SQNR is above that of the packed program.
        error: its standard error, where that is known.
        inputs: the number of inputs.
        target: for the sentence.
    """
    if difference is None or abs(difference) <= AGREEMENT_DB:
        return None
    if not _is_certain(difference, error):
        return (
            f"the artifact's SQNR is {difference:+.2f} +- {error:.2f} dB from the packed program's, by "
            f"{inputs} inputs: too few to say that its kernels compute something else"
        )
    return (
        f"the artifact's SQNR is {difference:+.2f} dB from the packed program's: its kernels for '{target.name}' "
        "compute something else, report it with the model"
    )


def _is_certain(difference: float, error: float | None) -> bool:
    """Whether a difference in dB is beyond contract (c) by more than two standard errors."""
    return abs(difference) - 2 * (error or 0.0) > AGREEMENT_DB


class KindQuality(TypedDict):
    """A kind of calls in words, and the SQNR of its program."""

    text: str
    sqnr_db: float


@dataclass(frozen=True)
class Judged:
    """The judgement: the manifest's figures of quality, and notes where artifact and packed program differ."""

    quality: dict[str, Any]
    notes: list[str]
    calls: list[KindQuality]
    """The kinds of recorded calls in words, each with the SQNR of its program; empty where there are none."""


class Judge:
    """Measures teacher-forced quality against the float model, and the agreement of artifact and packed program.

    The reference computes exactly, which takes hundreds of times as long as the artifact. For large models it runs only
    some of the inputs, spread over time, and the two are compared on these.
    """

    def __init__(self, denoiser: Denoiser, lowering: Packed, options: Options, context: RunContext) -> None:
        self.denoiser, program = denoiser, lowering.program
        macs = sum(costs.macs(lowering.planned).values())
        self.inputs = inputs = held_out(denoiser, options)
        self.count = len(next(iter(inputs.values())))
        self.compared = min(self.count, max(REFERENCE_LEAST, int(REFERENCE_MACS / macs)))
        index = torch.linspace(0, self.count - 1, self.compared).round().long()
        self.rows = index.numpy()
        with context.track("judging", self.count + self.compared) as advance:

            def outputs(
                of: Callable[[dict[str, Tensor]], Tensor], inputs: dict[str, Tensor], together: int
            ) -> np.ndarray:
                def output(batch: dict[str, Tensor]) -> np.ndarray:
                    found = of(batch).numpy()
                    advance(len(found))
                    return found

                return np.concatenate(context.map(output, in_batches(inputs, together)))

            self.expected = outputs(lambda batch: denoiser(**batch), inputs, JUDGED_TOGETHER)
            compared = {name: value[index] for name, value in inputs.items()}
            self.packed = outputs(lambda batch: run(program, batch), compared, compared_together(self.compared))
            self.given = {name: value.numpy() for name, value in compared.items()}
            """The inputs of `packed`."""
        self.reference_sqnr_db = round(sqnr_db(self.expected[self.rows], self.packed), 6)

    def reference_quality(self) -> dict[str, Any]:
        """The manifest's figures of quality of the packed program."""
        return {"reference_sqnr_db": self.reference_sqnr_db, "inputs": self.compared}

    def refuted(self, folder: Path, target: targets.Target) -> str | None:
        """What is wrong with an artifact whose kernels are not known to be right, in a clause; None where nothing is.

        It is run where this machine can, on the inputs of the packed program, in a process that may crash.
        """
        if not runs_here(target):
            return None
        with tempfile.TemporaryDirectory(prefix="mpq-") as scratch:
            given, found = Path(scratch, "inputs"), Path(scratch, "output")
            with given.open("wb") as stream:
                tensorfile.save(stream, self.given)
            command = [sys.executable, "-P", "-m", "mpq_compiler", "run", folder.resolve()]
            command += ["--input", given, "--output", found]
            environment = child_environment()
            done = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=scratch, env=environment)
            if done.returncode < 0:
                return f"they end their process with {signal.Signals(-done.returncode).name}"
            if done.returncode:
                return f"they cannot be run ({(done.stderr.strip().splitlines() or ['no word'])[-1]})"
            output = tensorfile.load(found)["output"]
        difference, error = sqnr_difference_db(self.expected[self.rows], output, self.packed)
        if difference is not None and _is_certain(difference, error):
            return f"they compute something else ({difference:+.2f} dB of SQNR from the packed program)"
        return None

    def judged(self, path: str | Path, target: targets.Target, others: Sequence[Specialization]) -> Judged:
        """Judges the artifact at ``path``, which is executed where this machine can run it."""
        compiled, refusal = load_runnable(path, target)
        quality = self.quality(compiled)
        notes = [*refusal, *disagreements(compiled, target, self.denoiser, others)]
        if note := disagreement(quality["agreement_db"], quality["agreement_error_db"], self.compared, target):
            notes.insert(0, note)
        calls = self.of_kinds(quality["sqnr_db"], others)
        for entry in calls:
            if entry["sqnr_db"] < quality["sqnr_db"] - KINDS_DB:
                notes.append(
                    f"calls of {entry['text']} have an SQNR of {entry['sqnr_db']:.1f} dB, those that were calibrated "
                    f"{quality['sqnr_db']:.1f} dB: record more of these, or compile an artifact for each"
                )
        return Judged(quality, notes, calls)

    def of_kinds(self, first: float, others: Sequence[Specialization]) -> list[KindQuality]:
        """The kinds of calls, with the SQNR in dB of each, ``first`` that of the calibrated kind.

        That of others is of the packed program, on some recorded inputs.
        """
        if self.denoiser.form is None:
            return []
        found = [first]
        for kind, other in zip(self.denoiser.kinds, others, strict=False):
            assert kind.examples is not None
            inputs = {name: value[:JUDGED_TOGETHER] for name, value in kind.examples.items()}
            found.append(sqnr_db(kind(**inputs).numpy(), run(other.program, inputs).numpy()))
        return [KindQuality(text=text, sqnr_db=db) for text, db in zip(self.denoiser.kind_texts, found, strict=True)]

    def quality(self, compiled: CompiledDenoiser | None) -> dict[str, Any]:
        """The figures of quality: `sqnr_db` of the artifact where it runs here, else of the reference.

        `agreement_db` is the artifact's SQNR minus the reference's, on the `reference_inputs`, and `agreement_error_db`
        its standard error by the choice of these.
        """
        reference = {"reference_sqnr_db": self.reference_sqnr_db, "reference_inputs": self.compared}
        if compiled is None:
            return {
                "sqnr_db": self.reference_sqnr_db,
                "executed_by": "reference",
                "inputs": self.compared,
                **reference,
                "agreement_db": None,
                "agreement_error_db": None,
            }
        output = compiled.run({name: value.numpy() for name, value in self.inputs.items()})
        difference, error = sqnr_difference_db(self.expected[self.rows], output[self.rows], self.packed)
        return {
            "sqnr_db": sqnr_db(self.expected, output),
            "executed_by": "artifact",
            "inputs": self.count,
            **reference,
            "agreement_db": difference,
            "agreement_error_db": error,
        }
