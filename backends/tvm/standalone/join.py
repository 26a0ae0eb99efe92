"""Joins the C programs of a pipeline's parts to one, which draws what a file of tokens says (mpq_draw.c)."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from mpq_compiler.artifact.bundle import PROGRAM
from mpq_compiler.backends.tvm.standalone import CRYPTOGRAPHY, HEADERS, KERNELS, MODEL, OPTIONS, OWNER, run
from mpq_compiler.backends.tvm.toolchain.linker import linker
from mpq_compiler.support.errors import UserError
from mpq_compiler.targets.table import Target

SHARED = (*HEADERS, "mpq.c", "mpq_pool.h")
"""The sources that every part has as well."""
DRAWING = ("mpq_draw.c", "stb_image_write.h")
TABLE = "mpq_parts.c"


def join(parts: Sequence[Path], digests: bytes, target: Target) -> dict[str, bytes]:
    """Compiles the program of a pipeline: kernels and plans of all parts, without their weights.

    Args:
        parts: the artifacts of the parts, in the order of their numbers, each with its C program.
        digests: the SHA-256 of each, one behind the other.
        target: decides the compiler.

    Returns:
        The files by name: the sources, and `PROGRAM`.

    Raises:
        UserError: there is no compiler for the target, or it fails.
    """
    compiler = linker(target)
    with tempfile.TemporaryDirectory(prefix="mpq-") as scratch:
        try:
            return _joined(Path(scratch), compiler, parts, digests)
        except RuntimeError as error:
            raise UserError(f"the program of the pipeline cannot be compiled: {error}; report the pipeline") from error


def _joined(work: Path, compiler: str, parts: Sequence[Path], digests: bytes) -> dict[str, bytes]:
    """The files of the program, which is compiled in the folder `work`."""
    for name in (*SHARED, *DRAWING):
        (work / name).write_text(Path(__file__).with_name(name).read_text())
    (work / OWNER).write_bytes((parts[0] / OWNER).read_bytes())  # they have one owner
    (work / TABLE).write_text(_table([part.name for part in parts], digests))
    objects = []
    for number, part in enumerate(parts):
        names = [f"-Dmpq_the_{what}=mpq_{what}_{number}" for what in ("build", "plan")]
        (work / f"{number}.c").write_bytes((part / MODEL).read_bytes())
        run(work, compiler, "-std=c11", "-O2", "-DMPQ_PART", *names, "-c", f"{number}.c", "-o", f"{number}.o")
        objects.append(f"{number}.o")
    archives = [str((part / KERNELS).resolve()) for part in parts]
    run(work, compiler, *OPTIONS, "-ffp-contract=off", "mpq.c", "mpq_draw.c", TABLE, *CRYPTOGRAPHY, *objects, *archives,
         "-lpthread", "-lm", "-o", PROGRAM)  # fmt: skip
    return {name: (work / name).read_bytes() for name in (*SHARED, *DRAWING, TABLE, PROGRAM)}


def _table(names: Sequence[str], digests: bytes) -> str:
    """The source of the table of parts."""
    count = range(len(names))
    rows = ", ".join(f'{{"{name}", &mpq_build_{i}, &mpq_plan_{i}}}' for i, name in enumerate(names))
    hashes = ", ".join("{" + ", ".join(str(byte) for byte in digests[32 * i : 32 * i + 32]) + "}" for i in count)
    return "\n".join(
        [
            "/* Generated: the parts of a pipeline, and the hashes of their artifacts. */",
            '#include "mpq_plan.h"',
            "",
            *(f"extern const mpq_build mpq_build_{i};" for i in count),
            *(f"extern const mpq_plan mpq_plan_{i};" for i in count),
            f"const mpq_numbered mpq_the_models[] = {{{rows}}};",
            f"const int mpq_the_count = {len(names)};",
            f"const uint8_t mpq_the_parts[][32] = {{{hashes}}};",
            "",
        ]
    )
