"""Code that a model's folder brings along: it is never run, and a model that needs it is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from mpq_compiler.support.errors import UserError


def files(folder: Path) -> list[str]:
    """The names of the Python files in a denoiser's folder."""
    return sorted(path.name for path in folder.glob("*.py"))


def require_none(
    config: Mapping[str, object], folder: Path, pipeline: Mapping[str, object], known: Callable[[str], bool]
) -> None:
    """UserError: the denoiser is built by code of its repository, and not by diffusers'.

    Args:
        config: its config.json.
        folder: that config.json lies in.
        pipeline: model_index.json of the pipeline that it is a part of; empty without one.
        known: whether diffusers has a library, a module of its pipelines or a class of that name.
    """
    named, part = config.get("_class_name"), pipeline.get(folder.name)
    library = part[0] if isinstance(part, list) and part else None
    needs: str | None = None
    if "auto_map" in config:
        needs = f"'{folder / 'config.json'}' has an auto_map to code of its repository"
    elif isinstance(named, list):
        needs = f"'{folder / 'config.json'}' takes its class from a module, {'.'.join(map(str, named))}"
    elif isinstance(named, str) and not known(named) and (code := files(folder)):
        needs = f"'{folder / 'config.json'}' names the class '{named}', which may be that of '{code[0]}' beside it"
    elif isinstance(library, str) and not known(library):
        needs = f"'{folder.parent / 'model_index.json'}' takes '{folder.name}' from the module '{library}'"
    if needs is not None:
        raise UserError(
            f"{needs}, and code of a repository is never executed: build the module yourself, with code that you have "
            "read, and use mpq_compiler.compile(module, out, example=...)"
        )
