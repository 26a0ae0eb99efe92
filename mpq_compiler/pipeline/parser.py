"""Pipelines as text: ``"trace,layout,calibrate{samples=64}"``, and in manifests ``" -> "`` and the lowering stages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from mpq_compiler.pipeline.options import make
from mpq_compiler.pipeline.passes import Pass
from mpq_compiler.support.errors import UserError

ARROW = "->"
"""Stands between the passes and the stages of the backend's lowering."""


def stages(text: str) -> tuple[str, ...]:
    """The names of the lowering stages in a pipeline, which its target decides on; none where it has passes alone."""
    return tuple(name.strip() for name in text.partition(ARROW)[2].split(",") if name.strip())


def parse(text: str) -> list[Pass]:
    """The passes of ``"a,b{x=1,y=2},c"``; tuples are written ``x=1/2``. What follows an arrow are `stages`."""
    passes: list[Pass] = []
    rest = text.partition(ARROW)[0].strip()
    while rest:
        end = min((i for i in (rest.find(","), rest.find("{")) if i >= 0), default=len(rest))
        name, options = rest[:end].strip(), {}
        if end < len(rest) and rest[end] == "{":
            close = rest.find("}", end)
            if close < 0:
                raise UserError(f"pipeline '{text}': '{{' after '{name}' is never closed")
            for item in filter(None, (i.strip() for i in rest[end + 1 : close].split(","))):
                key, equals, value = item.partition("=")
                if not equals:
                    raise UserError(f"pipeline '{text}': '{item}' of '{name}' must be written option=value")
                options[key.strip()] = value.strip()
            end = close + 1
        following = rest[end:].strip()
        if following and not following.startswith(","):
            raise UserError(f"pipeline '{text}': a comma is missing before '{following}'")
        if not name:
            raise UserError(f"pipeline '{text}': a pass name is missing before '{rest[end:]}'")
        passes.append(make(name, options))
        rest = following[1:].strip() if following else ""
    if not passes:
        raise UserError("the pipeline is empty; name at least the pass 'trace'")
    return passes


def to_text(passes: Iterable[Pass], stages: Sequence[str] = ()) -> str:
    """The pipeline as `parse` reads it, with the names of lowering stages behind it."""
    return ",".join(p.text() for p in passes) + (f" {ARROW} {','.join(stages)}" if stages else "")
