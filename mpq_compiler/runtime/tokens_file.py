"""The file that `mpqc tokenize` makes of a prompt, from which the C program of a pipeline draws without a tokenizer.

It holds tokens, noise, and what the pipeline computes of them as instructions (`recording`). It is made wherever the
pipeline's folder can be read: nothing of the pipeline is run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mpq_compiler.artifact import bundle
from mpq_compiler.artifact import pipeline as pipelines
from mpq_compiler.artifact.pipeline import Pipeline
from mpq_compiler.runtime.compiled_denoiser import CompiledDenoiser
from mpq_compiler.runtime.pipeline import CompiledPipeline, as_bytes
from mpq_compiler.runtime.recording import Op, Recorded, Recording
from mpq_compiler.support import tensorfile
from mpq_compiler.support.errors import UserError
from mpq_compiler.support.files import write_whole

Array = np.ndarray


@dataclass(frozen=True)
class _Recorder:
    """Stands in for what runs a part, and notes that it was called."""

    recording: Recording
    part: int
    functions: Mapping[str, tuple[int, tuple[int, ...]]]
    """The number of each function, and the shape of its output."""

    def run(self, function: str, inputs: Sequence[Array]) -> Recorded:
        number, shape = self.functions[function]
        return self.recording.call(self.part, number, inputs, shape)


def recorder(made: Pipeline, recording: Recording) -> Callable[[Path], CompiledDenoiser]:
    """What loads a part of the pipeline to be recorded."""
    numbers = {name: number for number, name in enumerate(sorted(made.hashes))}

    def load(path: Path) -> CompiledDenoiser:
        artifact = bundle.read(path)
        functions = {
            function["name"]: (number, tuple(int(size or 0) for size in function["output"]["shape"]))
            for number, function in enumerate(artifact.manifest["functions"])
        }
        executor = _Recorder(recording, numbers[path.name], functions)
        return CompiledDenoiser(artifact, 1, check_finite=False, executor=executor)

    return load


def write(
    pipeline: str | Path,
    output: str | Path,
    prompt: str,
    negative_prompt: str | None = None,
    *,
    images: int = 1,
    steps: int | None = None,
    guidance: float | None = None,
    seed: int = 0,
    scheduler: str | Mapping[str, object] | None = None,
    note: Callable[[str], None] = lambda said: None,
) -> dict[str, int]:
    """Writes the file of a prompt; the C program draws of it what `CompiledPipeline` draws of the same arguments.

    Args:
        pipeline: the folder of a compiled pipeline with the C program (`--emit c`).
        output: the file.
        prompt: what is drawn.
        negative_prompt: what guidance leads away from; None takes what the pipeline does.
        images: how many, side by side in one picture.
        steps: sampling steps; None takes the pipeline's.
        guidance: classifier-free guidance; None takes the pipeline's.
        seed: of the noise.
        scheduler: another than the pipeline's, as for `CompiledPipeline`.
        note: is called with what is cut off a prompt that is too long.

    Returns:
        How many calls of parts and instructions the file has.

    Raises:
        UserError: no pipeline, one without the C program, or one that computes what the program cannot.
    """
    made = pipelines.read(pipeline)
    if bundle.PROGRAM not in made.document["files"]:
        raise UserError(f"{pipeline} has no C program to draw with tokens: compile it with --emit c")
    recording = Recording()
    pipe = CompiledPipeline(made, load=recorder(made, recording))
    for said in pipe.cut(prompt):
        note(said)
    negative = None if negative_prompt is None else [negative_prompt] * images
    latents = pipe.latents(
        [prompt] * images, negative, steps=steps, guidance=guidance, seed=seed, scheduler=scheduler
    )
    pixels = pipe.decode(latents)
    recording.picture(as_bytes(np.concatenate([*pixels], axis=1)))
    arrays = recording.data() | {"parts": np.frombuffer(pipelines.digests(made.hashes), np.uint8)}
    write_whole(Path(output), lambda stream: tensorfile.save(stream, arrays))
    calls = sum(1 for row in recording.instructions if row[0] == Op.CALL)
    return {"calls": calls, "instructions": len(recording.instructions), "bytes": Path(output).stat().st_size}
