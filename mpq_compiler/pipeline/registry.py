"""The registry of passes: the built-in ones, and those of installed packages."""

from __future__ import annotations

from importlib.metadata import EntryPoint

from mpq_compiler.pipeline.outline import ENTRY_POINTS
from mpq_compiler.pipeline.passes import Contract, Pass
from mpq_compiler.support import plugins
from mpq_compiler.support.errors import UserError, nearest

BUILT_IN = tuple(entry.name for entry in plugins.built_in(ENTRY_POINTS))
"""The names of the built-in passes, in the order in which the default recipe runs them."""


def find(name: str) -> type[Pass]:
    """The class of the pass called ``name``, built in or from a package's entry point.

    Raises:
        UserError: an unknown name, a name that is defined twice, or a package whose pass cannot be used.
    """
    external = [e for e in plugins.of(ENTRY_POINTS) if e.name == name]
    found = [*(e for e in plugins.built_in(ENTRY_POINTS) if e.name == name), *external]
    if len(found) > 1:
        owners = ", ".join(_owner(e) for e in external)
        raise UserError(f"pass '{name}' is defined more than once ({owners}); uninstall one of the packages")
    if not found:
        raise UserError(f"unknown pass '{name}': {nearest(name, all_names())}")
    return _load(found[0])


def _owner(entry: EntryPoint) -> str:
    """The origin of an entry point: its object, and its distribution."""
    return f"{entry.value} of {entry.dist.name} {entry.dist.version}" if entry.dist else entry.value


def _load(entry: EntryPoint) -> type[Pass]:
    """Loads the pass behind an entry point. UserError: it fails to import, or is no pass."""
    where = f"pass '{entry.name}' ({_owner(entry)})"
    try:
        loaded = entry.load()
    except (Exception, SystemExit) as error:  # importing a package runs what its author wrote
        raise UserError(f"{where} fails to import: {type(error).__name__}: {error}") from error
    if not (isinstance(loaded, type) and issubclass(loaded, Pass)):
        raise UserError(f"{where} is no subclass of mpq_compiler.pipeline.passes.Pass")
    if loaded.name() != entry.name:
        raise UserError(f"{where} calls itself '{loaded.name()}': name its module after it, or override name()")
    if not isinstance(getattr(loaded, "contract", None), Contract):
        raise UserError(f"{where} declares no contract: set it to {', '.join(f'Contract.{c.name}' for c in Contract)}")
    if missing := sorted(getattr(loaded, "__abstractmethods__", ())):
        raise UserError(f"{where} does not define {', '.join(missing)}")
    return loaded


def built_in() -> list[type[Pass]]:
    """The built-in passes, in the order in which the default recipe runs them."""
    return [find(name) for name in BUILT_IN]


def all_names() -> list[str]:
    """The names of all passes in pipeline order, third-party ones last; some of these may be unusable."""
    return [*BUILT_IN, *sorted({e.name for e in plugins.of(ENTRY_POINTS)} - {*BUILT_IN})]


def usable() -> tuple[dict[str, type[Pass]], dict[str, str]]:
    """The usable passes by name, and the reason for each name that is not usable."""
    found: dict[str, type[Pass]] = {}
    broken: dict[str, str] = {}
    for name in all_names():
        try:
            found[name] = find(name)
        except UserError as error:
            broken[name] = str(error)
    return found, broken
