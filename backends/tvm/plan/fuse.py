"""Rules that join kernel calls once all of a function are known, and so save passes over memory.

The emitter sees one node at a time; what a value's *other* readers do is known only at the end. Each rule below turns
calls into fewer or cheaper ones with the same results under the same names, bit for bit; each is a stage of `stages`.

Skip connections are read, not written, in parts: a part is read by others long before the concatenation is, and would
hold memory for the whole of it all the while. What is left of concatenations are copies; `copies` lists them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from mpq_compiler.backends.tvm.plan.calls import BATCH, Call, Kernel, Record, Shape, Value, record
from mpq_compiler.backends.tvm.plan.views import contiguous

QUANTIZER = ("qscale", "qzero", "group")


def copies(calls: Sequence[Call]) -> dict[str, str]:
    """Concatenations that are copied, in whole or in part: node -> what is copied, and the kernels that make it."""
    maker = {name: call for call in calls for _, name in call.results}
    found = {}
    for call in calls:
        if _is_join(call) or (call.into and call.kernel.template == "movement"):
            made = (maker[name].kernel.template if name in maker else "no kernel" for _, name in call.operands)
            parts = zip(call.operands, made, strict=True)
            found[call.node] = ", ".join(f"'{name}' by {how}" for (_, name), how in parts)
    return found


class Known:
    """The calls of a function, and who makes and who reads what. Rules add the values that they introduce."""

    def __init__(self, calls: Sequence[Call], values: dict[str, Value], output: str) -> None:
        self.calls, self.values, self.output = list(calls), values, output
        self.maker = {name: call for call in calls for _, name in call.results}
        self.place = {name: i for i, call in enumerate(calls) for _, name in call.results}
        self.readers: dict[str, list[Call]] = {}
        for call in calls:
            for name in dict.fromkeys(name for _, name in call.operands):
                self.readers.setdefault(name, []).append(call)

    def of(self, type: str) -> Iterator[tuple[int, Call]]:
        """The calls whose kernels are of this type, each with its place."""
        return ((i, call) for i, call in enumerate(self.calls) if _is(call, type))

    def made_by(self, name: str, type: str) -> Call | None:
        """The call that makes a value, where its kernel is of this type."""
        call = self.maker.get(name)
        return call if call is not None and _is(call, type) else None

    def only_reader(self, name: str, call: Call) -> bool:
        return self.readers.get(name) == [call] and name != self.output

    def replaced(self, changes: Mapping[int, Sequence[Call]]) -> list[Call]:
        """The calls, with those at some places replaced."""
        return [new for i, call in enumerate(self.calls) for new in changes.get(i, (call,))]

    def known_at(self, place: int, names: Sequence[str]) -> bool:
        """Whether values are made before the call at this place (or by no call)."""
        return all(self.place.get(name, -1) < place for name in names)


def _is(call: Call, type: str) -> bool:
    return call.kernel.problem.type == type


def _operands(call: Call) -> dict[str, str]:
    return dict(call.operands)


def _changed(call: Call, problem: Record, operands: Mapping[str, str], results: Mapping[str, str]) -> Call:
    return replace(
        call,
        kernel=Kernel(call.kernel.template, problem),
        operands=tuple(operands.items()),
        results=tuple(results.items()),
    )


# ------------------------------------------------------------------------------------------ concatenations


def _channel_parts(call: Call) -> tuple[int, ...] | None:
    """Channels of the operands of a call that puts whole float32 tensors side by side, else None."""
    problem = call.kernel.problem
    if not _is(call, "movement.Movement") or problem.get("dtype") != "float32" or "fill" in dict(problem.fields):
        return None
    moves, inputs, shape = problem.get("copies"), problem.get("inputs"), problem.get("shape")
    if len(inputs) < 2 or len(moves) != len(inputs) or shape[:1] != (BATCH,):
        return None
    before, target = 0, contiguous(shape)
    for i, (move, own) in enumerate(zip(moves, inputs, strict=True)):
        source = contiguous(own)
        expected = (i, 0, before, source.extents, source.strides, target.strides)
        if own[:-1] != shape[:-1] or _move(move) != expected:
            return None
        before += int(own[-1])
    return tuple(int(own[-1]) for own in inputs)


def _move(copy: Record) -> tuple[Any, ...]:
    fields = {"source_offset": 0, "target_offset": 0, **dict(copy.fields)}
    return tuple(
        fields[name]
        for name in ("source", "source_offset", "target_offset", "extents", "source_strides", "target_strides")
    )


def _is_join(call: Call) -> bool:
    """Whether a call is a concatenation (of parts, perhaps, that lie scattered)."""
    problem = call.kernel.problem
    return _is(call, "movement.Movement") and "fill" not in dict(problem.fields) and len(problem.get("copies")) > 1


def in_place(calls: Sequence[Call], values: dict[str, Value], output: str) -> tuple[Call, ...]:
    """The calls with parts of concatenations written by the kernels that make them, where nothing else reads them."""
    known = Known(calls, values, output)
    changes: dict[int, list[Call]] = {}
    for i, call in enumerate(known.calls):
        joined = dict(call.results).get("y")
        if not _is_join(call) or joined is None or joined == output:
            continue
        problem, left = call.kernel.problem, []
        sources = [_operands(call)[f"x{move.get('source')}"] for move in problem.get("copies")]
        for move, source in zip(problem.get("copies"), sources, strict=True):
            own = problem.get("inputs")[move.get("source")]
            place = known.place.get(source, -1)
            maker = known.calls[place] if place >= 0 and place not in changes else None
            alone = known.only_reader(source, call) and sources.count(source) == 1
            written = _into(move, own, problem.get("shape"), maker) if maker and alone else None
            if maker is None or written is None:
                left.append(move)
                continue
            ((argument, _),) = maker.results
            placed = _changed(maker, written, _operands(maker), {argument: f"{source}|{joined}"})
            changes[place] = [replace(placed, into=joined)]
        if len(left) < len(sources):
            changes[i] = [_rest(call, left, joined)] if left else []
    return tuple(known.replaced(changes))


def _into(move: Record, own: Shape, shape: Shape, maker: Call) -> Record | None:
    """The problem of a kernel that writes its result to where the copy would, or None where it cannot."""
    source, target = contiguous(own), contiguous(shape)
    problem = maker.kernel.problem
    if maker.into or len(maker.results) != 1 or own[:1] != (BATCH,) or shape[:1] != (BATCH,):
        return None
    if problem.type == "problem.QuantMatmul":
        width = problem.get("outputs")
    elif problem.type in ("norms.LayerNorm", "norms.RmsNorm"):
        width = problem.get("channels")
    else:
        return None
    _, source_offset, offset, extents, source_strides, target_strides = _move(move)
    if source_offset or (extents, source_strides) != (source.extents, source.strides):
        return None
    if source_strides == target_strides:  # one block in every sample
        return problem.replace(into=(target.source.size, offset, width))
    if target_strides == target.strides and own[1:-1] == shape[1:-1] and own[-1] == width:  # some of the channels
        return problem.replace(into=(target.source.size, offset, int(shape[-1])))
    return None


def _rest(call: Call, moves: Sequence[Record], joined: str) -> Call:
    """The copies that are left of a concatenation."""
    problem, operands = call.kernel.problem, _operands(call)
    used = sorted({move.get("source") for move in moves})
    renumbered = [move.replace(source=used.index(move.get("source"))) for move in moves]
    inputs = [problem.get("inputs")[k] for k in used]
    read = {f"x{n}": operands[f"x{k}"] for n, k in enumerate(used)}
    rest = _changed(call, problem.replace(inputs=inputs, copies=renumbered), read, {"y": f"|{joined}"})
    return replace(rest, into=joined)


def read_parts(known: Known) -> list[Call]:
    """A reader of channels side by side that can take them apart reads the parts where they lie."""
    changes: dict[int, list[Call]] = {}
    for i, call in enumerate(known.calls):
        joined = known.maker.get(_operands(call).get("x", ""))
        parts = _channel_parts(joined) if joined else None
        if joined is None or parts is None or not (_is(call, "norms.GroupNorm") or _is(call, "quantize.Quantize")):
            continue
        problem = call.kernel.problem
        if _is(call, "norms.GroupNorm") and problem.get("channels") != sum(parts):
            continue
        if _is(call, "quantize.Quantize"):
            (size,) = problem.get("shape")
            problem = problem.replace(shape=(size // sum(parts), sum(parts)))
        sources = dict(joined.operands)
        operands = {f"x{k}": sources[f"x{k}"] for k in range(len(parts))}
        operands |= {name: value for name, value in call.operands if name != "x"}
        changes[i] = [_changed(call, problem.replace(parts=parts), operands, dict(call.results))]
    return known.replaced(changes)


# ------------------------------------------------------------------------------------------------ quantizers


def quantize_first(known: Known) -> list[Call]:
    """quantize(upsample(x)) = upsample(quantize(x)): a code depends on its value alone."""
    changes: dict[int, list[Call]] = {}
    for i, call in known.of("quantize.Quantize"):
        operands = _operands(call)
        moved = known.made_by(operands.get("x", ""), "movement.upsample")
        if moved is None or not known.only_reader(operands["x"], call):
            continue
        source = known.values.get(_operands(moved)["x0"])
        if source is None:  # an input of the model
            continue
        problem = call.kernel.problem.replace(shape=(source.size,))
        codes = Value(f"{source.name}|{call.node}", source.shape, "uint8")
        known.values[codes.name] = codes
        first = _changed(call, problem, operands | {"x": source.name}, {"out": codes.name})
        then = _changed(
            moved, moved.kernel.problem.replace(dtype="uint8"), {"x0": codes.name}, {"y": dict(call.results)["out"]}
        )
        changes[i] = [first, replace(then, node=call.node)]
        changes[known.place[operands["x"]]] = []
    return known.replaced(changes)


def codes_beside_norms(known: Known) -> list[Call]:
    """A quantizer of what a group norm reads: the norm writes its codes as well."""
    changes: dict[int, list[Call]] = {}
    for i, call in known.of("quantize.Quantize"):
        sources = {name: value for name, value in call.operands if name.startswith("x")}

        def reads_the_same(other: Call, sources: dict[str, str] = sources) -> bool:
            own = {name: value for name, value in other.operands if name.startswith("x")}
            return _is(other, "norms.GroupNorm") and own == sources and "raw" not in dict(other.results)

        source = next(iter(sources.values()))
        norm = next((c for c in known.readers[source] if reads_the_same(c)), None)
        if norm is None:
            continue
        j = known.place[dict(norm.results)["y"]]
        place, operands, own = min(i, j), _operands(call), _operands(norm)
        if j in changes or not known.known_at(place, [*operands.values(), *own.values()]):
            continue
        problem = norm.kernel.problem.replace(
            raw=call.kernel.problem.get("bits"), raw_groups=call.kernel.problem.get("groups")
        )
        added = {"raw_scale": operands["qscale"], "raw_zero": operands["qzero"], "group": operands["group"]}
        results = {**dict(norm.results), "raw": dict(call.results)["out"]}
        changes |= {i: [], j: []}
        changes[place] = [_changed(norm, problem, own | added, results)]
    return known.replaced(changes)


def codes_behind_products(known: Known) -> list[Call]:
    """A quantizer of what a product of codes makes: it writes the codes, and the value where others read it."""
    changes: dict[int, list[Call]] = {}
    for i, call in known.of("quantize.Quantize"):
        operands = _operands(call)
        product = known.made_by(operands.get("x", ""), "problem.QuantMatmul")
        if product is None or dict(product.results).keys() != {"out"}:
            continue
        j, own = known.place[operands["x"]], _operands(product)
        epilogue, groups = product.kernel.problem.get("epilogue"), call.kernel.problem.get("groups")
        steps = epilogue.get("steps")
        if j in changes or any(step.get("op") == "quantize" for step in steps):
            continue
        quantizer = {name: operands[name] for name in QUANTIZER}
        if own.get("group", quantizer["group"]) != quantizer["group"] or not known.known_at(j, [*quantizer.values()]):
            continue
        if product.kernel.problem.get("groups") != groups and "group" in own:
            continue
        alone = known.only_reader(operands["x"], call)
        step = record("epilogue.Step", op="quantize", value=call.kernel.problem.get("bits"))
        problem = product.kernel.problem.replace(
            epilogue=epilogue.replace(steps=(*steps, step), **({} if alone else {"keeps": True})), groups=groups
        )
        results = {"out": dict(call.results)["out"]} | ({} if alone else {"full": operands["x"]})
        changes[i] = []
        changes[j] = [_changed(product, problem, own | quantizer, results)]
    return known.replaced(changes)


# ------------------------------------------------------------------------------------------------- rotations


NORMS = ("norms.GroupNorm", "norms.LayerNorm", "norms.RmsNorm")


def rotated_by_norms(known: Known) -> list[Call]:
    """A rotation of what a norm makes, and of nothing else's: the norm has a row at hand, and rotates it."""
    changes: dict[int, list[Call]] = {}
    for i, call in known.of("hadamard.Hadamard"):
        operands, problem = _operands(call), call.kernel.problem
        source = operands.pop("x")
        norm = next((made for kind in NORMS if (made := known.made_by(source, kind))), None)
        if norm is None or not known.only_reader(source, call) or problem.get("epilogue").get("operands"):
            continue
        if any(step.get("op") != "quantize" for step in problem.get("epilogue").get("steps")):
            continue  # a norm computes the steps of its own epilogue before it rotates
        j, own, block = known.place[source], norm.kernel.problem, problem.get("block")
        sizes = (own.get("channels"), *(dict(own.fields).get("parts") or ()))
        if any(size % block for size in sizes) or not known.known_at(j, [*operands.values()]):
            continue
        if dict(norm.operands).get("group", operands.get("group")) != operands.get("group"):
            continue
        steps = (*own.get("epilogue").get("steps"), *problem.get("epilogue").get("steps"))
        merged = own.replace(
            epilogue=own.get("epilogue").replace(steps=steps), block=block, time_groups=problem.get("time_groups")
        )
        results = dict(norm.results) | {"y": dict(call.results)["y"]}
        changes |= {i: [], j: [_changed(norm, merged, _operands(norm) | operands, results)]}
    return known.replaced(changes)
