"""LoRA branches: float branches beside layers whose factors are data of an artifact, zero as it is compiled."""

from __future__ import annotations

from dataclasses import dataclass

from mpq_compiler.ir.facts import Fact
from mpq_compiler.ir.program import Program


@dataclass(frozen=True)
class LoraBranch:
    """The branch of a weight, by store names: ``up`` f16 [O, r] times ``down`` f16 [r, ..., I]."""

    up: str
    down: str
    rank: int


@dataclass(frozen=True)
class Lora:
    """The branches of a program."""

    rank: int
    """The rank that was asked for; a smaller weight has a branch of its own rank."""
    branches: dict[str, LoraBranch]
    """The branch of each weight, by the parameter's path in the program."""


LORA = Fact[Lora]("lora")
"""The branches that pass `lora` inserted."""


def branch_bytes(program: Program) -> int:
    """The stored bytes of a program's LoRA branches, which no plan counts."""
    found = program.facts.get(LORA)
    branches = () if found is None else found.branches.values()
    return sum(program.tensors[name].nbytes for branch in branches for name in (branch.up, branch.down))


def module_of(parameter: str) -> str:
    """The path of the module whose weight a parameter is; of one that an unfused LoRA wraps, the wrapped one's."""
    return parameter.removesuffix(".weight").removesuffix(".base_layer")
