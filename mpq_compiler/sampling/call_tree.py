"""The tree of a call: which arguments of a model's forward are tensors, and what the others are.

A tree is plain JSON data, so that an artifact holds it. Its leaves are tensors by their path, and Python values:

>>> tree, tensors = flatten({"x": [image, image], "scale": 1.0, "added": {"ids": ids}})
>>> tree
{"dict": {"x": {"list": [{"tensor": "x.0"}, {"tensor": "x.1"}]}, "scale": {"value": 1.0},
          "added": {"dict": {"ids": {"tensor": "added.ids"}}}}}

An argument that is None is one that is not given. Where a model takes a list with a tensor for each sample, that list
is one tensor, ``{"samples": "x"}``. Nothing here imports torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from mpq_compiler.support.errors import UserError, nearest

Value = Any
"""An argument of a call, or what it returns: a tensor, a number, a string, None, or lists, tuples and dicts of them."""
Arguments = dict[str, Value]
"""Arguments by name, or tensors by path."""
Tree = dict[str, Any]
"""One of ``{"tensor": path}``, ``{"samples": path}``, ``{"value": a bool, number, string or None}``,
``{"list": [tree]}``, ``{"tuple": [tree]}``, ``{"dict": {key: tree}}`` and, with integers for keys,
``{"numbered": [[key, tree]]}``."""

VALUES = (bool, int, float, str, type(None))
"""The types of Python values in a call."""


def is_tensor(value: Value) -> bool:
    """Whether a value is an array or a tensor."""
    return hasattr(value, "shape") and hasattr(value, "dtype") and hasattr(value, "__getitem__")


Stack = Callable[[Sequence[Value]], Value]
"""Makes one tensor of equal ones, such as `np.stack`."""


def flatten(value: Value, path: str = "", samples: int = 0, stack: Stack = np.stack) -> tuple[Tree, Arguments]:
    """Takes a value apart: its tree, and its tensors by path.

    Args:
        value: arguments by name, or what a call returns.
        path: the path of the value itself.
        samples: where it is not 0, lists of so many tensors of one shape have one for each sample, and are stacked.
        stack: stacks them.

    Raises:
        UserError: a value of a type that no tree can hold.
    """
    tensors: Arguments = {}

    def taken_apart(value: Value, path: str) -> Tree:
        if is_tensor(value):
            tensors[path] = value
            return {"tensor": path}
        if isinstance(value, Mapping):
            if odd := [key for key in value if not isinstance(key, str)]:
                if not all(type(key) is int for key in value):
                    raise UserError(f"{_named(path)} has the key {odd[0]!r}: keys are strings, or integers")
                return {"numbered": [[k, taken_apart(v, _join(path, str(k)))] for k, v in value.items()]}
            return {"dict": {k: taken_apart(v, _join(path, k)) for k, v in value.items() if v is not None}}
        if samples and isinstance(value, list) and _one_for_each(value, samples):
            tensors[path] = stack(value)
            return {"samples": path}
        if isinstance(value, list | tuple):
            parts = [taken_apart(v, _join(path, str(i))) for i, v in enumerate(value)]
            return {"list" if isinstance(value, list) else "tuple": parts}
        if isinstance(value, VALUES):
            return {"value": value}
        raise UserError(
            f"{_named(path)} is a {type(value).__name__}: a call holds tensors, numbers, strings, None, and lists, "
            "tuples and dicts of them"
        )

    return taken_apart(value, path), tensors


def _one_for_each(values: Sequence[Value], samples: int) -> bool:
    return len(values) == samples and all(map(is_tensor, values)) and len({tuple(v.shape) for v in values}) == 1


def unflatten(tree: Tree, tensors: Mapping[str, Value]) -> Value:
    """Puts a value together again; the inverse of `flatten`."""
    ((kind, content),) = tree.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "samples":
        return list(tensors[content])
    if kind == "value":
        return content
    if kind == "dict":
        return {key: unflatten(part, tensors) for key, part in content.items()}
    if kind == "numbered":
        return {key: unflatten(part, tensors) for key, part in content}
    parts = [unflatten(part, tensors) for part in content]
    return parts if kind == "list" else tuple(parts)


def paths(tree: Tree) -> list[str]:
    """The paths of the tensors, in the order of `flatten`."""
    ((kind, content),) = tree.items()
    if kind in ("tensor", "samples"):
        return [content]
    if kind == "value":
        return []
    parts = content.values() if kind == "dict" else [part for _, part in content] if kind == "numbered" else content
    return [path for part in parts for path in paths(part)]


def values(tree: Tree, path: str = "") -> Arguments:
    """The Python values by path."""
    ((kind, content),) = tree.items()
    if kind in ("tensor", "samples"):
        return {}
    if kind == "value":
        return {path: content}
    parts = content.items() if kind == "dict" else content if kind == "numbered" else enumerate(content)
    return {name: value for key, part in parts for name, value in values(part, _join(path, str(key))).items()}


def difference(tree: Tree, other: Tree, path: str = "") -> str | None:
    """The first difference of two trees as a clause, such as "'x' is a list of 2, and not of 1"; None: they are equal.

    The second tree is what the first one should be.
    """
    return next(_differences(tree, other, path), None)


def _differences(tree: Tree, other: Tree, path: str) -> Iterator[str]:
    ((kind, content),), ((wanted_kind, wanted),) = tree.items(), other.items()
    where = _named(path)
    if kind == wanted_kind and kind in ("tensor", "samples"):
        return
    if kind == wanted_kind == "dict":
        for name in content:
            if name not in wanted:
                known = f": {nearest(name, wanted)}" if wanted else ""
                yield f"{_named(_join(path, name))} was not given when it was compiled{known}"
        for name, part in wanted.items():
            if name not in content:
                yield f"{_named(_join(path, name))} is missing"
            else:
                yield from _differences(content[name], part, _join(path, name))
    elif kind == wanted_kind and kind in ("list", "tuple") and len(content) == len(wanted):
        for index, (part, goal) in enumerate(zip(content, wanted, strict=True)):
            yield from _differences(part, goal, _join(path, str(index)))
    elif kind == wanted_kind == "numbered" and [key for key, _ in content] == [key for key, _ in wanted]:
        for (key, part), (_, goal) in zip(content, wanted, strict=True):
            yield from _differences(part, goal, _join(path, str(key)))
    elif kind == wanted_kind == "value" and _same(content, wanted):
        return
    else:
        yield f"{where} is {_text(kind, content)}, and was {_text(wanted_kind, wanted)} when it was compiled"


def _same(a: Value, b: Value) -> bool:
    return a == b and isinstance(a, bool) == isinstance(b, bool)


def _text(kind: str, content: Value) -> str:
    if kind == "tensor":
        return "a tensor"
    if kind == "samples":
        return "a list with a tensor for each sample"
    if kind == "value":
        return repr(content)
    if kind == "dict":
        return f"a dict of {', '.join(content) or 'nothing'}"
    if kind == "numbered":
        return f"a dict of {', '.join(str(key) for key, _ in content)}"
    return f"a {kind} of {len(content)}"


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _named(path: str) -> str:
    return f"'{path}'" if path else "the call"


def without(arguments: Mapping[str, Value], defaults: Mapping[str, Value]) -> Arguments:
    """The arguments but for those that are None, or a Python value that is the forward's default."""
    return {
        name: value
        for name, value in arguments.items()
        if value is not None and not (name in defaults and isinstance(value, VALUES) and _same(value, defaults[name]))
    }


def bound(signature: Sequence[str], args: Sequence[Value], kwargs: Mapping[str, Value]) -> Arguments:
    """The arguments by name. UserError: too many by position, or one given twice."""
    if len(args) > len(signature):
        raise UserError(f"{len(args)} positional inputs are too many: there are {', '.join(signature)}")
    named = dict(zip(signature, args, strict=False))
    for name, value in kwargs.items():
        if name in named:
            raise UserError(f"input '{name}' is given twice, by position and by name")
        named[name] = value
    return named


class NoSuchCall(UserError):
    """A call that is not of a kind that was compiled."""

    def __init__(self, sentence: str, differences: int = 1) -> None:
        """differences: in how many places it differs; those of the structure count more."""
        super().__init__(sentence)
        self.differences = differences


@dataclass(frozen=True)
class Argument:
    """A tensor of a call, and the input of the program that it is."""

    path: str
    input: str
    rows: int = 1
    """Rows a sample: the first dimension is that many times the batch. 0: one value for all samples of a call."""
    axis: int = 0
    """The dimension that counts the samples, where each has one row."""

    def rows_of(self, array: Value, batch: int) -> Value:
        """The input, with a sample in each row [B, ...]. NoSuchCall: it has another number of rows."""
        if self.axis:
            return array.swapaxes(0, self.axis)
        if not self.rows:
            shape = (1, *array.shape)
            return array.reshape(shape) if batch == 1 else _repeated(array.reshape(shape), batch)
        if self.rows == 1:
            array = array if array.ndim else array.reshape(1)
            return array if len(array) == batch or len(array) != 1 else _repeated(array, batch)
        if len(array) != self.rows * batch:
            raise NoSuchCall(f"'{self.path}' has {len(array)} rows, and {batch} samples have {self.rows * batch}")
        return array.reshape(batch, self.rows, *array.shape[1:])

    def given(self, rows: Value) -> Value:
        """What the model is given for the input; the inverse of `rows_of` but for values of all samples, which repeat.

        A value of all samples becomes one for each sample, which is what models make of it.
        """
        if self.axis:
            return rows.swapaxes(0, self.axis)
        return rows if self.rows in (0, 1) else rows.reshape(-1, *rows.shape[2:])


def _repeated(array: Value, batch: int) -> Value:
    repeats = (batch, *[1] * (array.ndim - 1))
    return array.repeat(repeats) if hasattr(array, "new_zeros") else np.tile(array, repeats)


@dataclass(frozen=True)
class CallForm:
    """The form of calls of one kind, which a compiled denoiser takes: those of the model's own forward."""

    tree: Tree
    arguments: tuple[Argument, ...]
    outputs: Tree
    """The tree of what the forward returns; its tensors are those of `shapes`."""
    shapes: Mapping[str, tuple[int, ...]]
    """The shape of each returned tensor, without the batch."""
    defaults: Mapping[str, Value] = field(default_factory=dict)
    """The Python values that the forward takes where none is given."""
    latent: str = ""
    """The input with the noisy latents, whose rows are the samples."""
    time: str | None = None
    """The path of the time; None: the model has none."""
    fields: tuple[str, ...] = ()
    """The names of what the forward returns, where it has names."""
    held: tuple[str, ...] = ()
    """The paths of constants with a row for each sample, all of them equal: their values decide what is computed."""

    @property
    def constants(self) -> list[str]:
        """The paths of tensors that are the same in every call, which the compiled denoiser holds."""
        known = {argument.path for argument in self.arguments}
        return [path for path in paths(self.tree) if path not in known]

    def to_json(self) -> Arguments:
        """The form as plain data."""
        return {
            "tree": self.tree,
            "arguments": [[a.path, a.input, a.rows, a.axis] for a in self.arguments],
            "outputs": self.outputs,
            "shapes": {path: list(shape) for path, shape in self.shapes.items()},
            "defaults": dict(self.defaults),
            "latent": self.latent,
            "time": self.time,
            "fields": list(self.fields),
            "held": list(self.held),
        }

    @classmethod
    def from_json(cls, found: Mapping[str, Value]) -> CallForm:
        """The form that `to_json` wrote."""
        return cls(
            **{
                **found,
                "arguments": tuple(Argument(*argument) for argument in found["arguments"]),
                "shapes": {path: tuple(shape) for path, shape in found["shapes"].items()},
                "fields": tuple(found["fields"]),
                "held": tuple(found["held"]),
            }
        )

    @property
    def latents(self) -> Argument:
        """The argument with the noisy latents."""
        return next(argument for argument in self.arguments if argument.input == self.latent)

    @property
    def lists(self) -> bool:
        """Whether the latents are a list with a tensor for each sample."""
        path = self.latents.path
        return bool(self.tree["dict"].get(path) == {"samples": path})

    def saying(self, latent: str | None, time: str | None) -> CallForm:
        """The form with other arguments as latents and time; None leaves them.

        UserError: there is no such tensor, or what the form holds besides hangs on the latents that it has.
        """
        for name in (latent, time):
            require_path(name, paths(self.tree))
        latent, time = latent or self.latents.path, time or self.time
        rows = {a.path: (a.rows, a.axis) for a in self.arguments}
        if latent != self.latents.path and (self.lists or rows.get(latent) != (1, 0) or self.latents.rows != 1):
            raise UserError(
                f"these calls were recorded with '{self.latents.path}' as latents, whose samples are not the rows of "
                f"'{latent}': record them again with latent='{latent}'"
            )
        if time is not None and time not in rows:
            raise UserError(f"'{time}' was the same in every call, and is no time: record calls of several times")
        arguments = tuple(replace(a, input=input_name(a.path, time)) for a in self.arguments)
        return replace(self, arguments=arguments, latent=input_name(latent, time), time=time)

    def described(self, shapes: Mapping[str, Sequence[int | str | None]]) -> dict[str, str]:
        """Its tensors and Python values as text, by path. ``shapes``: those of the program's inputs by name."""
        found = {path: "a constant tensor" for path in self.constants}
        for argument in self.arguments:
            sizes = [*map(str, shapes[argument.input][1:])]
            sizes.insert(argument.axis, "B")
            found[argument.path] = f"[{', '.join(sizes)}]"
        return found | {path: f"= {value!r}" for path, value in values(self.tree).items()}

    def taken(self, arguments: Mapping[str, Value], stack: Stack = np.stack) -> tuple[Arguments, Arguments]:
        """The inputs [B, ...] by name, and the tensors that must be the constants by path.

        NoSuchCall: the call has another structure, or other Python values.
        """
        latent = self.latents
        samples = samples_of(arguments, latent.path) if self.lists else 0
        given = without(arguments, self.defaults)
        if isinstance(number := given.get(self.time or ""), int | float):
            given[str(self.time)] = np.asarray(number)
        tree, tensors = flatten(given, samples=samples, stack=stack)
        if clauses := [*_differences(tree, self.tree, "")]:
            raise NoSuchCall(f"this denoiser was compiled for other calls: {clauses[0]}", 1 + len(clauses))
        batch = len(tensors[latent.path]) // max(latent.rows, 1)
        inputs = {a.input: a.rows_of(tensors[a.path], batch) for a in self.arguments}
        if TIME not in inputs:
            inputs[TIME] = np.zeros(batch, np.float32)
        return inputs, {path: tensors[path] for path in self.constants}

    def returned(self, output: Value) -> Value:
        """What the forward returns, of the program's output [B, ...]."""
        if len(self.shapes) == 1:
            ((path, _),) = self.shapes.items()
            return unflatten(self.outputs, {path: output})
        parts, begin = {}, 0
        for path, shape in self.shapes.items():
            size = math.prod(shape)
            parts[path] = output[:, begin : begin + size].reshape(len(output), *shape)
            begin += size
        return unflatten(self.outputs, parts)


def prefix(kind: int) -> str:
    """The prefix of names of tensors that calls of a kind hold; "" for the first."""
    return f"{kind}:" if kind else ""


def kinds_text(described: Sequence[Mapping[str, str]], latents: str) -> list[str]:
    """Each kind of calls in words: its latents, and what of it differs from other kinds (`CallForm.described`)."""
    known = dict.fromkeys(path for each in described for path in each)
    differing = [path for path in known if path != latents and len({each.get(path) for each in described}) > 1]
    found = []
    for each in described:
        given = [f"{path} {each[path]}" for path in differing if path in each]
        lacking = [path for path in differing if path not in each]
        parts = [f"with {', '.join(given)}"] * bool(given) + [f"without {', '.join(lacking)}"] * bool(lacking)
        found.append(" ".join([f"{latents} {each.get(latents, '')}".strip(), *parts]))
    return found


def input_name(path: str, time: str | None) -> str:
    """The name of the program's input that the tensor is; ``time`` is the path of the time."""
    if path == TIME != time:
        return f"{path}s"
    return TIME if path == time else path


def require_path(name: str | None, known: Sequence[str]) -> None:
    """UserError: the name is not None and none of a call's tensors."""
    if name is not None and name not in known:
        raise UserError(f"the calls have no tensor '{name}': they have {', '.join(known) or 'none'}")


def samples_of(arguments: Mapping[str, Value], latent: str) -> int:
    """The number of tensors in a list of latents; 0: the latents are no list."""
    found = arguments.get(latent)
    return len(found) if isinstance(found, list) and _one_for_each(found, len(found)) else 0


TIME = "timestep"
"""The program's input with the time of each sample."""
CONSTANTS = "call.safetensors"
"""The file of an artifact with the tensors that are the same in every call."""
CONSTANT_TO = 1e-3
"""The largest deviation of such a tensor in a call, relative to its mean magnitude."""


def require_constants(
    given: Mapping[str, np.ndarray], constants: Mapping[str, np.ndarray], held: Sequence[str] = ()
) -> None:
    """NoSuchCall where a tensor of a call is not the one that was the same in every call when it was compiled."""
    for path, value in given.items():
        constant = constants[path]
        if value.ndim > constant.ndim and value.shape[: -constant.ndim or None] == (1,) * (value.ndim - constant.ndim):
            value = value.reshape(value.shape[value.ndim - constant.ndim :])  # once for all samples of a batch
        where = f"'{path}' was the same in every call that this denoiser was compiled from"
        if path in held and value.shape[1:] == constant.shape[1:]:
            constant = np.broadcast_to(constant, value.shape)
        if value.shape != constant.shape:
            raise NoSuchCall(f"{where}, {list(constant.shape)}, and is {list(value.shape)}")
        wide = np.complex128 if "c" in (value.dtype.kind, constant.dtype.kind) else np.float64
        room = CONSTANT_TO * float(np.abs(constant.astype(wide)).mean() if constant.size else 0.0)
        if np.abs(value.astype(wide) - constant).max(initial=0.0) > room:
            raise NoSuchCall(f"{where}, and has other values now: record calls in which it varies, and compile again")
