"""Resolves a recipe and the settings of the command line to passes.

Passes declare which settings reach which of their options (`Pass.settings`, `capped`, `width`, `efforts`).
"""

from __future__ import annotations

import typing
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from mpq_compiler import formats
from mpq_compiler.driver import budgets
from mpq_compiler.driver.options import EFFORTS, MOST_SEED, Options
from mpq_compiler.formats.activation import LEAST_FLOAT_BITS
from mpq_compiler.pipeline import manager, parser, registry
from mpq_compiler.pipeline import recipes as recipe_files
from mpq_compiler.pipeline.backend import backend_of
from mpq_compiler.pipeline.options import make
from mpq_compiler.pipeline.passes import Pass, Role
from mpq_compiler.pipeline.recipes import Recipe
from mpq_compiler.sampling.conditioning import require_guidance
from mpq_compiler.support.errors import UserError, nearest
from mpq_compiler.targets import table as targets


def resolve(options: Options) -> list[Pass]:
    """Resolves the options to passes: the recipe's, with the options' settings applied.

    Raises:
        UserError: a setting that no pass of the recipe takes, or a value out of range.
    """
    by_hand = options.pipeline
    recipe = recipe_files.load(options.recipe) if by_hand is None else recipe_files.from_pipeline(by_hand)
    if by_hand is not None:
        _require_stages(parser.stages(by_hand), options.target)
    require_guidance(options.guidance)
    if not 0 <= options.seed <= MOST_SEED:
        raise UserError(f"--seed {options.seed} must be 0 to {MOST_SEED}")
    if options.sensitivity is not None:
        recipe = _require_choice(recipe)
    recipe = _with_budgets(recipe, options) if options.plan is None else _with_plan(recipe, options)
    recipe = _with_settings(recipe, samples=options.samples, steps=options.steps)
    if options.steps is not None:
        recipe = _with_fewer_steps(recipe, options.steps)
    row = targets.resolve(options.target)
    numerics = options.numerics
    if numerics is None and by_hand is None:
        numerics = _numerics_of(recipe, row)
    if numerics != "portable" or _taker(recipe, "numerics").name() in recipe.pipeline:
        recipe = _with_settings(recipe, numerics=numerics)
    if options.activations is not None and options.activations < 8:
        recipe = _with_width(recipe, options.activations)
    if options.effort is not None:
        recipe = _with_effort(recipe, options.effort)
    recipe = _with_settings(recipe, minutes=options.minutes)
    if options.lora_rank is not None:
        recipe = _with_pass(recipe, _taker(recipe, "lora_rank"))
    elif options.lora_layers is not None:
        raise UserError("--lora-layers says which layers have a branch of --lora-rank: add that, or leave it out")
    recipe = _with_settings(recipe, lora_rank=options.lora_rank, lora_layers=options.lora_layers)
    if options.reuse is not None:
        recipe = _with_reuse(recipe, options)
    if not backend_of(row).capabilities(row).decodes:
        recipe = _with_packed(recipe)
    passes = recipe.passes()
    manager.check(passes)
    return passes


def _numerics_of(recipe: Recipe, row: targets.Target) -> str | None:
    """The numerics mode for a target, where neither an option nor the recipe names one; None: that of the pass.

    Of GPUs it is "fast": what stays float there is on tensor cores or slow, and its bits differ from a CPU's anyway.
    """
    taker = _taker(recipe, "numerics")
    silent = taker.name() in recipe.pipeline and taker.settings["numerics"] not in recipe.options.get(taker.name(), {})
    return "fast" if row.is_cuda and silent else None


def _require_stages(named: tuple[str, ...], target: str) -> None:
    """UserError: a pipeline names other lowering stages than those of the target."""
    if not named:
        return
    row = targets.resolve(target)
    stages = backend_of(row).capabilities(row).stages
    if named != stages:
        there = f"are {', '.join(stages)}" if stages else "do not exist"
        raise UserError(
            f"the pipeline names the lowering stages {', '.join(named)}, and those of '{row.name}' {there}: "
            f"leave out what follows '{parser.ARROW}'"
        )


def _passes_of(recipe: Recipe) -> list[type[Pass]]:
    return [registry.find(name) for name in recipe.pipeline]


def _taker(recipe: Recipe, setting: str) -> type[Pass]:
    """The pass that takes a setting: one of the recipe or, where none does, the built-in one that is missing."""
    return next(step for step in (*_passes_of(recipe), *registry.built_in()) if setting in step.settings)


def _with_settings(recipe: Recipe, **settings: Any) -> Recipe:
    """Applies every setting that is not None; the settings of one pass are applied together."""
    by_pass: dict[str, dict[str, Any]] = {}
    for setting, value in settings.items():
        taker = _taker(recipe, setting)
        by_pass.setdefault(taker.name(), {})[taker.settings[setting]] = value
    for name, values in by_pass.items():
        recipe = recipe.override(name, **values)
    return recipe


def _with_pass(recipe: Recipe, added: type[Pass]) -> Recipe:
    """Adds a pass behind those that provide what it requires, unless the recipe has it."""
    if added.name() in recipe.pipeline:
        return recipe
    passes = _passes_of(recipe)
    behind = max((i + 1 for i, step in enumerate(passes) if step.provides & added.requires), default=len(passes))
    return replace(recipe, pipeline=(*recipe.pipeline[:behind], added.name(), *recipe.pipeline[behind:]))


def _with_reuse(recipe: Recipe, options: Options) -> Recipe:
    """Adds the passes by which steps of a sampler reuse a part of the network.

    UserError: there is no budget of time, or nothing chooses under it.
    """
    if options.latency is None:
        raise UserError("--reuse says how many steps a budget of time is shared among: add --latency, or leave it out")
    recipe = _with_pass(recipe, _taker(recipe, "reuse"))
    keeps = next(step for step in registry.built_in() if "kept" in step.provides)
    recipe = _with_pass(recipe, keeps).override(keeps.name(), steps=options.reuse)
    return _with_settings(recipe, reuse=options.reuse)


def _require_choice(recipe: Recipe) -> Recipe:
    """Requires that the recipe uses a given sensitivity table. UserError: no pass takes it, or one format is set."""
    taker = _taker(recipe, "sensitivity")
    recipe.require(taker.name(), taker.settings["sensitivity"])
    allocator = _taker(recipe, "weights").name()
    if (uniform := recipe.options.get(allocator, {}).get("uniform")) not in (None, "none"):
        raise UserError(f"--sensitivity changes nothing where every layer has the format {uniform}: leave it out")
    return recipe


def _with_plan(recipe: Recipe, options: Options) -> Recipe:
    """Has the allocator take a given plan, and leaves out what measures for it.

    UserError: options that decide on a plan too.
    """
    for name in ("weights", "activations", "bops", "latency", "objective", "sensitivity"):
        if getattr(options, name) is not None:
            raise UserError(f"--{name} and --plan exclude each other: the plan is what a budget would decide on")
    kept = tuple(step.name() for step in _passes_of(recipe) if step.role is not Role.MEASURES)
    options_of = {name: given for name, given in recipe.options.items() if name in kept}
    return _with_settings(replace(recipe, pipeline=kept, options=options_of), weights="none", plan=True)


def _with_budgets(recipe: Recipe, options: Options) -> Recipe:
    """Replaces the recipe's budgets by those of the options."""
    bits, size = budgets.parse_budget(options.weights)
    if bits is not None or size is not None:
        recipe = _with_settings(recipe, weights=bits if bits is not None else "none", bytes=size)
    return _with_settings(
        recipe,
        activations=options.activations,
        bops=budgets.parse_bops(options.bops),
        latency=budgets.parse_latency(options.latency),
        objective=options.objective,
    )


def _with_fewer_steps(recipe: Recipe, steps: int) -> Recipe:
    """Lowers the sampling steps of all passes to ``steps``, since calibration has no other times then."""
    for step in _passes_of(recipe):
        if "steps" in step.capped:
            usual = make(step.name(), recipe.options.get(step.name(), {})).options()["steps"]
            recipe = recipe.override(step.name(), steps=min(usual, steps))
    return recipe


def _with_effort(recipe: Recipe, effort: str) -> Recipe:
    """Applies an effort of training; options that the recipe states itself stay, but for the minutes."""
    if effort not in EFFORTS:
        raise UserError(f"--effort '{effort}' is not known: {nearest(effort, EFFORTS)}")
    trainer = _taker(recipe, "minutes")
    for step in dict.fromkeys([trainer, *_passes_of(recipe)]):
        stated = recipe.options.get(step.name(), {}).keys() - {"minutes"}
        given = {option: value for option, value in step.efforts.get(effort, {}).items() if option not in stated}
        recipe = recipe.override(step.name(), **given)
    return recipe


def _with_packed(recipe: Recipe) -> Recipe:
    """Puts packed formats in the place of entropy-coded ones, where the recipe names some for that."""
    for step in _passes_of(recipe):
        if (option := step.settings.get("packed")) is not None:
            stated = make(step.name(), recipe.options.get(step.name(), {})).options()
            if stated[option] and formats.any_coded(stated["formats"]):
                recipe = recipe.override(step.name(), formats=stated[option])
    return recipe


def _with_width(recipe: Recipe, activations: float) -> Recipe:
    """Applies a budget of average activation bits; widths that the recipe states itself stay."""
    plan, width = recipe.options.get(_taker(recipe, "activations").name(), {}), max(2, min(8, round(activations)))
    least = LEAST_FLOAT_BITS if plan.get("activation_format") == "float" else 2
    measured = tuple(range(least, 9))
    if plan.get("mixed") is False:
        ends = plan.get("ends")
        measured = tuple(sorted({width, ends if isinstance(ends, int) else width}))
    for step in _passes_of(recipe):
        if step.width is not None:
            several = typing.get_origin(typing.get_type_hints(step)[step.width]) is tuple
            usual = getattr(make(step.name(), {}), step.width)
            if recipe.options.get(step.name(), {}).get(step.width, usual) == usual:
                recipe = recipe.override(step.name(), **{step.width: measured if several else width})
    return recipe


def with_role(passes: Sequence[Pass], role: Role) -> Pass | None:
    """The first pass that has the role; None where none has."""
    return next((step for step in passes if step.role is role), None)
