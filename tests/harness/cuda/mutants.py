"""Modules with a mistake in them."""

from __future__ import annotations

import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

Mutants = Mapping[str, tuple[str, str]]
"""By what is wrong: the text, and what stands in its place."""


def mutated(module: Any, before: str, after: str) -> Any:
    """The module with another text in one place."""
    source = Path(module.__file__).read_text()
    assert before in source, f"a mutant's place is gone: {before!r}"
    return _executed(module, source.replace(before, after, 1))


def with_mutated(module: Any, before: str, after: str, users: tuple[Any, ...]) -> dict[str, Any]:
    """The module with another text, and the modules that use it, each also those before it; by name."""
    changed, found = mutated(module, before, after), {}
    replaced = _parts(module, changed)
    found[module.__name__] = changed
    for user in users:
        own = _executed(user, Path(user.__file__).read_text())
        for name, value in list(vars(own).items()):
            if id(value) in replaced:
                setattr(own, name, replaced[id(value)])
        replaced |= _parts(user, own)
        found[user.__name__] = own
    return found


def _parts(module: Any, changed: Any) -> dict[int, Any]:
    """What stands for the module, and for the functions and classes that are its own."""
    own = {name: value for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__}
    return {id(module): changed} | {id(value): getattr(changed, name) for name, value in own.items()}


def _executed(module: Any, source: str) -> Any:
    changed = types.ModuleType(module.__name__)
    changed.__dict__["__file__"] = module.__file__
    exec(compile(source, module.__file__, "exec"), changed.__dict__)
    return changed
