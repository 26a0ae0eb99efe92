"""The rules that every program obeys, checked after each pass.

A rule is a small generator of (node name, what is wrong) with a name and the stages it holds in. Rules of the
structure come first: where one of them is broken the others are not asked, because they could not read the graph.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from mpq_compiler.ir.program import Program
from mpq_compiler.ir.verifier import packed, plans, structure, weights
from mpq_compiler.ir.verifier.view import Branch, Findings, Rule, Rules, View

__all__ = [
    "RULES",
    "Branch",
    "Findings",
    "Rule",
    "Rules",
    "VerificationError",
    "View",
    "Violation",
    "check",
    "verify",
]


class VerificationError(Exception):
    """A pass made a program that breaks a rule: a fault of the compiler, not of its input."""


@dataclass(frozen=True)
class Violation:
    """A broken rule: its name, the node or plan that breaks it, and a sentence."""

    rule: str
    node: str
    what: str

    def __str__(self) -> str:
        return f"rule '{self.rule}' at %{self.node}: {self.what}"


RULES: dict[str, Rule] = {rule.name: rule for subject in (structure, plans, weights, packed) for rule in subject.RULES}
"""All rules by name, in the order in which they are asked."""


def check(program: Program, rules: Iterable[str] | None = None) -> list[Violation]:
    """Violations of the program, in the order of the rules (all of them, or the named ones)."""
    view = View(program)
    chosen = [RULES[name] for name in (RULES if rules is None else rules)]
    found: list[Violation] = []
    for structural in (True, False):
        for rule in chosen:
            if rule.structural == structural and program.stage in rule.stages:
                found += [Violation(rule.name, node, what) for node, what in rule.check(view)]
        if found:
            break
    return found


def verify(program: Program, after: str = "") -> None:
    """Raises VerificationError with the first violation; ``after`` names the pass that made the program."""
    if found := check(program):
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        where = f" after pass '{after}'" if after else ""
        raise VerificationError(f"{found[0]}{where}{more}; this is a fault of the compiler, please report it")
