"""What need not be computed in every step of a sampler: calls that read no latents, as functions of their own.

A sampler calls the denoiser with the same timesteps for every image and with the same texts in every step. Two parts of
the work depend on nothing else:

- ``time``: what is made of the timestep and of vectors beside it (classes, pooled texts, the guidance): the time
  embedding, its projections in every block, the modulations of adaptive norms, the time group;
- ``text``: what is made of token sequences and their masks: the keys and values of cross-attention. Where activations
  are quantized by time group it depends on the *group* of the timestep as well, so there is one result a group.

Each is a function for one sample, whose results the runtime keeps by the bytes of its inputs (`runtime.memo`).
Kernels and their order are those that a step would have run, so no bit changes. What depends on timestep and texts both
beyond that (joint attention, texts pooled into the time embedding) changes with every step, and stays in it:
`mixed` lists it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mpq_compiler.backends.tvm.plan.calls import Call, Part, Value, needed

TIME, TEXT = "time", "text"
_STEP, _MIXED = "step", "mixed"


def split(
    inputs: Sequence[Value], calls: Sequence[Call], output: str, values: dict[str, Value], suffix: str = ""
) -> tuple[tuple[Part, ...], tuple[Call, ...]]:
    """(the parts in the order in which they run, the calls of a step).

    values: what the calls make, by name. Calls that read no input at all, fills for example, are repeated wherever
    their results are read. suffix: of the parts' names.
    """
    of: dict[str, list[Call]] = {TIME: [], TEXT: [], _STEP: [], "": []}
    for call, kind in zip(calls, _kinds(inputs, calls, values), strict=True):
        of[_STEP if kind == _MIXED else kind].append(call)
    parts: list[Part] = []
    known = {value.name: value for value in inputs}
    for kind in (TIME, TEXT):
        others = {TIME: (TEXT, _STEP), TEXT: (_STEP,)}[kind]
        read = {output} | {name for other in others for call in of[other] for _, name in call.operands}
        outputs = tuple(values[name] for call in of[kind] for _, name in call.results if name in read)
        if not outputs:
            continue
        own = _in_order(calls, of[kind], of[""], [value.name for value in outputs])
        made = {name for call in own for _, name in call.results}
        taken = {name for call in own for _, name in call.operands} - made
        arguments = tuple(value for name, value in known.items() if name in taken)
        parts.append(Part(f"{kind}{suffix}", arguments, own, outputs))
        known |= {value.name: value for value in outputs}
    return tuple(parts), _in_order(calls, of[_STEP], of[""], [output])


def shared(parts: Sequence[Part], known: Sequence[Part]) -> tuple[Part, ...]:
    """The parts, with known ones in place of those that are the same: time and texts know no image size."""
    return tuple(next((k for k in known if replace(part, name=k.name) == k), part) for part in parts)


def mixed(inputs: Sequence[Value], calls: Sequence[Call], values: dict[str, Value]) -> list[str]:
    """Nodes of the calls that read no latents and stay in the step all the same."""
    kinds = _kinds(inputs, calls, values)
    return [call.node for call, kind in zip(calls, kinds, strict=True) if kind == _MIXED]


def _kinds(inputs: Sequence[Value], calls: Sequence[Call], values: dict[str, Value]) -> list[str]:
    """The part that each call belongs to."""
    known = {value.name: _kind(i, value) for i, value in enumerate(inputs)}
    found = []
    for call in calls:
        found.append(_part_of(call, known, values))
        known |= {name: found[-1] for _, name in call.results if found[-1]}
    return found


def changes_with_steps(index: int, value: Value) -> bool:
    """Whether an input changes with every step: latents come first, and images change as they do."""
    return index == 0 or len(value.shape) > 3


def _kind(index: int, value: Value) -> str:
    """The part that an input belongs to."""
    if changes_with_steps(index, value):
        return _STEP
    return TEXT if len(value.shape) == 3 or "mask" in value.name else TIME


def _part_of(call: Call, kinds: dict[str, str], values: dict[str, Value]) -> str:
    """The part that a call belongs to; "" where it reads no input."""
    read = {kinds[name]: name for _, name in call.operands if name in kinds}
    if not read:
        return ""
    if _STEP in read:
        return _STEP
    if _MIXED in read or not all(values[name].batched for _, name in call.results):
        return _MIXED
    if TEXT not in read:
        return TIME
    timed = [values[n] for _, n in call.operands if kinds.get(n) == TIME and n in values]
    by_input = any(kinds.get(n) == TIME and n not in values for _, n in call.operands)
    return _MIXED if by_input or any(value.dtype != "int64" for value in timed) else TEXT


def _in_order(
    calls: Sequence[Call], own: Sequence[Call], free: Sequence[Call], results: Sequence[str]
) -> tuple[Call, ...]:
    """Own calls, and the free ones that they need, in the order of all."""
    chosen = {id(call) for call in (*own, *free)}
    return needed([call for call in calls if id(call) in chosen], results)
