"""What an attack is, and how a mutant of it ends: ``refused`` with one sentence, ``right`` where it gave what the whole
thing gives, ``taken`` where it was accepted and what it gives is its own. Everything else is an error that it raises.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mpq_compiler.support.errors import UserError
from tests.harness import mutants
from tests.harness.damage import damaged, text_of

REFUSED, RIGHT, TAKEN = "refused", "right", "taken"


@dataclass(frozen=True)
class Attack:
    """An attack by its name."""

    base: Callable[[Path], None]
    """Makes in a folder what is attacked."""
    mutant: Callable[[Path, Path, random.Random], str]
    """Makes one from the base in an empty folder, tries it, and says how that ended."""
    share: float = 1.0
    """How many are tried of each that is asked for: fewer where one takes seconds."""


def nothing(folder: Path) -> None:
    """What needs no base."""


def sentence(error: UserError) -> str:
    """``refused``. AssertionError: what is said is no sentence."""
    said = str(error)
    assert said and "\n" not in said and len(said) < 2000, said
    return REFUSED


def said(*arguments: object) -> str:
    """How a command ends: AssertionError where it is neither done nor refused with one sentence."""
    from mpq_compiler.cli import mpqc

    errors, output = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(output):
        code = mpqc.main([*map(str, arguments)])
    sentences = [line for line in errors.getvalue().splitlines() if line.startswith("mpqc: ")]
    assert "internal error" not in errors.getvalue() and "Traceback" not in errors.getvalue(), errors.getvalue()[-500:]
    assert code == 0 or (code == 1 and len(sentences) == 1), (code, errors.getvalue()[-500:])
    return REFUSED if code else TAKEN


def tried(read: Callable[[], object]) -> str:
    """How reading a file ends."""
    try:
        read()
    except UserError as error:
        return sentence(error)
    return TAKEN


def mutant_of(file: Path, chance: random.Random) -> bytes:
    """By what the file is."""
    content = file.read_bytes()
    if file.suffix == ".json" and chance.random() < 0.8:
        return text_of(json.loads(content), chance)
    if file.suffix == ".safetensors" and chance.random() < 0.8:
        ((_, mutant),) = mutants.mutants(chance.randrange(2**32), 1, content)
        return mutant
    return damaged(content, chance)
