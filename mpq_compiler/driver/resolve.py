"""The passes of a recipe, with the command line's options over it."""

from __future__ import annotations

from mpq_compiler.driver import budgets
from mpq_compiler.driver.options import EFFORTS, MOST_SEED, Options
from mpq_compiler.formats.activation import LEAST_FLOAT_BITS
from mpq_compiler.pipeline import manager, recipes
from mpq_compiler.pipeline import options as pipeline_options
from mpq_compiler.pipeline.passes import Pass
from mpq_compiler.sampling.conditioning import require_guidance
from mpq_compiler.support.errors import UserError, nearest

MEASURING = ("sensitivity", "predict-scores", "orthogonality")
"""Passes that say between which formats is chosen."""


def resolve(options: Options) -> list[Pass]:
    """The passes of the recipe, with the command line's options over it."""
    by_hand = options.pipeline
    recipe = recipes.load(options.recipe) if by_hand is None else recipes.from_pipeline(by_hand)
    require_guidance(options.guidance)
    if not 0 <= options.seed <= MOST_SEED:
        raise UserError(f"--seed {options.seed} must be 0 to {MOST_SEED}")
    if options.sensitivity is not None:
        recipe.require("sensitivity", "sensitivity")
        if (uniform := recipe.options.get("bit-allocation", {}).get("uniform")) not in (None, "none"):
            raise UserError(f"--sensitivity changes nothing where every layer has the format {uniform}: leave it out")
    bits, size = budgets.parse_budget(options.weights)
    if bits is not None or size is not None:
        recipe = recipe.override("bit-allocation", weights=bits if bits is not None else "none", bytes=size)
    recipe = recipe.override(
        "bit-allocation",
        activations=options.activations,
        bops=budgets.parse_bops(options.bops),
        latency=budgets.parse_latency(options.latency),
        objective=options.objective,
    )
    recipe = recipe.override("calibrate", samples=options.samples, steps=options.steps)
    if options.steps is not None:  # what else is sampled has no other times than those of so few steps
        for name in ("equalize", "rotate", "distill"):
            if name in recipe.pipeline:
                usual = pipeline_options.make(name, recipe.options.get(name, {})).options()["steps"]
                recipe = recipe.override(name, steps=min(usual, options.steps))
    if options.numerics != "portable" or "numerics" in recipe.pipeline:
        recipe = recipe.override("numerics", mode=options.numerics)
    if options.activations is not None and options.activations < 8:
        recipe = _with_width(recipe, options.activations)
    if options.effort is not None:
        if options.effort not in EFFORTS:
            raise UserError(f"--effort '{options.effort}' is not known: {nearest(options.effort, EFFORTS)}")
        for name, given in EFFORTS[options.effort].items():
            if name == "distill" or name in recipe.pipeline:
                stated = recipe.options.get(name, {}).keys() - {"minutes"}  # what a recipe is, it stays
                recipe = recipe.override(name, **{o: value for o, value in given.items() if o not in stated})
    recipe = recipe.override("distill", minutes=options.minutes)
    passes = recipe.passes()
    manager.check(passes)
    return passes


def _with_width(recipe: recipes.Recipe, activations: float) -> recipes.Recipe:
    """The recipe for a budget of so many average bits of activations; what it says itself of widths stays."""
    plan, width = recipe.options.get("bit-allocation", {}), max(2, min(8, round(activations)))
    least = LEAST_FLOAT_BITS if plan.get("activation_format") == "float" else 2
    measured = (width,) if plan.get("mixed") is False else tuple(range(least, 9))
    for name, option, value in (
        ("equalize", "activations", width),
        ("rotate", "activations", width),
        ("time-groups", "bits", width),
        ("time-gains", "activations", width),
        ("sensitivity", "activations", measured),
        ("orthogonality", "activations", measured),
    ):
        if name in recipe.pipeline:
            usual = getattr(pipeline_options.make(name, {}), option)
            if recipe.options.get(name, {}).get(option, usual) == usual:
                recipe = recipe.override(name, **{option: value})
    return recipe
