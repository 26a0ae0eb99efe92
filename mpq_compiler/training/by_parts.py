"""Trains a program part by part, each against its own output in the float program, those before it trained already.

Both streams that a part reads are kept (`streams`): a step costs one part, and memory holds the variables and the
activations of one part, whatever the size of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mpq_compiler.ir import segments
from mpq_compiler.ir.graph import weight_of
from mpq_compiler.ir.parts import Part, parts
from mpq_compiler.ir.program import PLANNED, Program
from mpq_compiler.pipeline.session import Session
from mpq_compiler.support import cache
from mpq_compiler.training.data import Data
from mpq_compiler.training.objective import VALUES
from mpq_compiler.training.outputs import Outputs
from mpq_compiler.training.state import Kept, Stage, key
from mpq_compiler.training.streams import Streams
from mpq_compiler.training.student import applied, variables
from mpq_compiler.training.trainer import Outcome, descend, group_times, outcome_of

FROZEN, LATENT = 12, 44
"""The bytes that training holds for each number of a weight whose codes are frozen, and of one that is trained."""
WIDE = 8
"""The part of the memory, one in so many, that the training of a single weight may take without adapters."""

Stages = Callable[[int, Program], Sequence[Stage]]
"""The stages of a part, given its number and its program."""


def train_parts(
    program: Program, last: Sequence[str], stages: Stages, data: Data, held_out: Data, session: Session, seed: int
) -> tuple[Program, list[Outcome]]:
    """Trains the parts of a program one after the other.

    Args:
        program: fake-quantized, with settled weights.
        last: the last call of each part, by names of the float program.
        stages: makes the stages of a part.
        data: the calls to train on.
        held_out: the calls to judge by.
        session: runs the parts of a step, shows progress, and has the cache.
        seed: decides the order of the calls, and all that is drawn.

    Returns:
        The trained program, and the outcome of each stage. A variable is trained with the first part that reads it.
    """
    planned = program.facts[PLANNED]
    found = parts((planned, program), last)
    streams = Streams(planned, data, held_out, session)
    earlier = cache.digest(data.tensors(), held_out.tensors())
    outcomes: list[Outcome] = []
    done: set[str] = set()
    for number, part in enumerate(found):
        streams.targets(part)
        factors = streams.factors(part)
        given = streams.data(part, factors)
        for stage in stages(number, streams.student(program, part, factors)):
            times = group_times(program, data.inputs["timestep"]) if stage.range_network else None
            piece = streams.student(program, part, factors)
            own = _untrained(piece, done)
            trained = variables(piece, stage.latent, stage.adapters, times, seed, stage.widest, own, stage.svd)
            if not trained:
                continue
            earlier = key(piece, trained, stage, seed, earlier, given[1])
            objective = Outputs(piece, stage, *given, session, seed)
            state = descend(piece, trained, stage, objective, Kept(earlier, session), session)
            program = applied(program, trained, state.best)
            outcomes.append(outcome_of(stage, state))
        read = streams.student(program, part, factors).graph.nodes
        done |= {n.name for n in read if n.op == "get_attr"}
        streams.go_on(program, part)
        streams.forget(_dead(found, number))
    return program, outcomes


def cuts(program: Program, latent: bool, batch: int, memory: int) -> list[str]:
    """The last call of each part, so that training a part takes about ``memory`` bytes.

    Args:
        program: fake-quantized.
        latent: whether weights are trained.
        batch: calls that are run at a time, by all jobs together.
        memory: bytes.
    """
    planned = program.facts[PLANNED]
    held = {name: VALUES * count for name, count in segments.value_bytes(planned, batch).items()}
    for node in planned.quantizable:
        held[node.name] += planned.tensors[str(weight_of(node))].numel() * (LATENT if latent else FROZEN)
    return segments.ends(planned, held, memory)


def held(program: Program, latent: bool) -> int:
    """The bytes of variables that training a whole program holds."""
    planned = program.facts[PLANNED]
    numbers = sum(planned.tensors[str(weight_of(node))].numel() for node in planned.quantizable)
    return numbers * (LATENT if latent else FROZEN)


def widest(memory: int) -> int:
    """The most numbers of a weight that is trained itself within ``memory`` bytes."""
    return memory // (WIDE * LATENT)


def _untrained(program: Program, done: set[str]) -> set[str]:
    """The store names that no earlier part reads; ``done`` has the nodes by which earlier parts read theirs."""
    reads = [n for n in program.graph.nodes if n.op == "get_attr"]
    return {str(n.target) for n in reads} - {str(n.target) for n in reads if n.name in done}


def _dead(found: Sequence[Part], number: int) -> list[str]:
    """What the parts up to a number read or make, and none behind it reads."""
    later = {name for part in found[number + 1 :] for name in part.inputs}
    return [name for part in found[: number + 1] for name in (*part.inputs, *part.outputs) if name not in later]
