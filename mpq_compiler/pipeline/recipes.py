"""Recipes: named pipelines with their options, in TOML. A paper is a recipe.

    schema = 1
    description = "..."
    extends = "default"              # optional: start from another recipe
    pipeline = ["trace", ...]        # optional where one is extended
    [options.calibrate]
    samples = 64
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mpq_compiler.pipeline import parser
from mpq_compiler.pipeline.options import make as make_pass
from mpq_compiler.pipeline.passes import Pass
from mpq_compiler.support.errors import UserError, nearest

SCHEMA = 1
BUILT_IN = Path(__file__).parents[1] / "recipes"
"""The folder of the built-in recipes."""
_KEYS = {"schema", "description", "extends", "pipeline", "options"}


@dataclass(frozen=True)
class Recipe:
    """A recipe: the names of passes in order, and options by pass name."""

    name: str
    description: str
    pipeline: tuple[str, ...]
    options: dict[str, dict[str, Any]] = field(default_factory=dict)

    def override(self, pass_name: str, **options: Any) -> Recipe:
        """Overrides the options of a pass that are not None. UserError: the pipeline lacks the pass."""
        given = {k: v for k, v in options.items() if v is not None}
        if not given:
            return self
        self.require(pass_name, next(iter(given)))
        merged = {**self.options, pass_name: {**self.options.get(pass_name, {}), **given}}
        return Recipe(self.name, self.description, self.pipeline, merged)

    def require(self, pass_name: str, option: str) -> None:
        """Raises a UserError where the pipeline lacks the pass that an option of the command line belongs to."""
        if pass_name not in self.pipeline:
            raise UserError(
                f"recipe '{self.name}' has no pass '{pass_name}', which option '{option}' belongs to; "
                "choose another recipe or leave the option out"
            )

    def passes(self) -> list[Pass]:
        """Makes the passes. UserError: an unknown pass or option."""
        return [make_pass(name, self.options.get(name, {})) for name in self.pipeline]


def names() -> list[str]:
    """The names of the built-in recipes."""
    return sorted(file.stem for file in BUILT_IN.glob("*.toml"))


def load(name: str | Path, extending: tuple[str, ...] = ()) -> Recipe:
    """Loads a recipe by its name or file.

    Args:
        name: a built-in recipe, or a .toml file.
        extending: the chain of recipes that led here, each of which extends the next.

    Raises:
        UserError: there is no such recipe, or it is malformed; the sentence names the file and the key.
    """
    path = Path(name)
    by = f"{extending[-1]}: 'extends': " if extending else ""
    if path.suffix == ".toml" or path.parent != Path():
        if not path.is_file():
            raise UserError(f"{by}there is no recipe file '{path}'")
        try:
            return _parse(path.stem, path.read_text(encoding="utf-8"), str(path), extending)
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not valid TOML: {error}") from error
    if str(name) not in names():
        raise UserError(f"{by}unknown recipe '{name}': {nearest(str(name), names())}; a file must end in .toml")
    text = (BUILT_IN / f"{name}.toml").read_text(encoding="utf-8")
    return _parse(str(name), text, f"recipe '{name}'", extending)


def from_pipeline(text: str) -> Recipe:
    """Makes a recipe of a pipeline's text. UserError: a pass is wrong, or occurs twice with different options."""
    passes = parser.parse(text)
    options: dict[str, dict[str, Any]] = {}
    for p in passes:
        if options.setdefault(p.name(), p.changed()) != p.changed():
            raise UserError(f"pass '{p.name()}' stands twice in the pipeline with different options; it has one set")
    return Recipe("custom", "a pipeline given by hand", tuple(p.name() for p in passes), options)


def _parse(name: str, text: str, where: str, extending: tuple[str, ...]) -> Recipe:
    try:
        data = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise UserError(f"{where} is not valid TOML: {error}") from error
    if unknown := sorted(set(data) - _KEYS):
        raise UserError(f"{where} has an unknown key '{unknown[0]}': {nearest(unknown[0], _KEYS)}")
    if data.get("schema") != SCHEMA:
        raise UserError(f"{where} must say schema = {SCHEMA}, not {data.get('schema')!r}")
    base = Recipe(name, "", ())
    if "extends" in data:
        if not isinstance(data["extends"], str):
            raise UserError(f"{where}: 'extends' must be the name or the file of a recipe")
        if where in extending:
            raise UserError(f"{where}: 'extends' leads back to the recipe itself")
        base = load(data["extends"], (*extending, where))
    pipeline = data.get("pipeline", list(base.pipeline))
    if not isinstance(pipeline, list) or not pipeline or not all(isinstance(p, str) for p in pipeline):
        raise UserError(f"{where}: 'pipeline' must be a list of pass names, and is missing or empty")
    options = data.get("options", {})
    if not isinstance(options, dict) or not all(isinstance(o, dict) for o in options.values()):
        raise UserError(f"{where}: 'options' must be tables such as [options.calibrate]")
    if stray := sorted(set(options) - set(pipeline)):
        raise UserError(f"{where} sets options of '{stray[0]}', which is not in its pipeline")
    inherited = {p: o for p, o in base.options.items() if p in pipeline}
    merged = {p: {**inherited.get(p, {}), **options.get(p, {})} for p in {*inherited, *options}}
    description = data.get("description", base.description)
    if not isinstance(description, str):
        raise UserError(f"{where}: 'description' must be a text, not {description!r}")
    recipe = Recipe(name, description, tuple(pipeline), merged)
    try:
        recipe.passes()  # unknown passes and options are refused here, with the nearest name
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    return recipe
