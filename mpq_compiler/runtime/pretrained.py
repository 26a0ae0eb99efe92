"""A compiled denoiser among the parts of a diffusers pipeline: how diffusers saves it, and what only a model can do."""

from __future__ import annotations

import sys

from mpq_compiler.support.errors import UserError

NAME = "CompiledDenoiser"
"""The name that model_index.json has for it, as a class of the package."""
_METHODS = {NAME: ["save_pretrained", "from_pretrained"]}


class NotOfAnArtifact(UserError, AttributeError):
    """An attribute that a model has, and no artifact can have."""


def register() -> None:
    """Tells diffusers, where it is loaded, how a compiled denoiser is saved and loaded."""
    loading = sys.modules.get("diffusers.pipelines.pipeline_loading_utils")
    if loading is not None:
        loading.LOADABLE_CLASSES.setdefault("mpq_compiler", _METHODS)
        loading.ALL_IMPORTABLE_CLASSES.update(_METHODS)


def of_the_model(kind: str, name: str) -> NotOfAnArtifact | None:
    """The error for an attribute that a model's class has; None: it has none of this name, or cannot be asked.

    Args:
        kind: the class of the compiled model.
        name: the attribute.
    """
    for package in ("diffusers", "torch.nn"):
        if (module := sys.modules.get(package)) is not None:
            of_it = getattr(module, kind if package == "diffusers" else "Module", None)
            if of_it is not None and hasattr(of_it, name) and not name.startswith("_"):
                return NotOfAnArtifact(
                    f"'{name}' is of the model: an artifact has the weights and the code that {kind} had when it was "
                    "compiled; call it before compiling, and compile again"
                )
    return None
