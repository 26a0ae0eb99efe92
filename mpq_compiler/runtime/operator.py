"""A denoiser in a graph of torch's (`torch.compile`): one operator, into which nothing looks.

It has the shape, type and device of what a call yields, so that graphs are made of it without a call, on any device.
Imported where torch is: the runtime itself never loads it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence

from mpq_compiler.runtime.instances import INSTANCES
from mpq_compiler.sampling.call_tree import Value
from mpq_compiler.support.errors import UserError

torch = sys.modules["torch"]
SCHEMA = "(int denoiser, str paths, Tensor[] tensors, float[] numbers) -> Tensor"
"""paths: of the tensors, then of the numbers, in the arguments of the call."""


def called(denoiser: int, args: Sequence[object], kwargs: Mapping[str, object]) -> Value:
    """The result of a call as a node of the graph that is traced.

    Raises:
        UserError: an argument is neither a tensor nor a number.
    """
    tensors: dict[str, Value] = {}
    numbers: dict[str, float] = {}
    for path, value in _leaves("", {**{str(i): value for i, value in enumerate(args)}, **kwargs}):
        if isinstance(value, torch.Tensor):
            tensors[path] = value
        elif isinstance(value, int | float):
            numbers[path] = float(value)
        else:
            raise UserError(f"argument '{path}' is a {type(value).__name__}: torch.compile takes tensors and numbers")
    paths = ",".join([*tensors, *numbers])
    found: Value = torch.ops.mpq_compiler.predict(denoiser, paths, list(tensors.values()), list(numbers.values()))
    return found


def _leaves(path: str, value: object) -> Iterator[tuple[str, object]]:
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _leaves(f"{path}.{key}" if path else str(key), part)
    elif value is not None:
        yield path, value


def _predict(denoiser: int, paths: str, tensors: Sequence[Value], numbers: Sequence[float]) -> Value:
    arguments: dict[str, object] = {}
    for path, value in zip(paths.split(","), [*tensors, *numbers], strict=True):
        *parents, name = path.split(".")
        place = arguments
        for parent in parents:
            place = place.setdefault(parent, {})  # type: ignore[assignment]
        place[name] = value
    args = [arguments.pop(name) for name in sorted(filter(str.isdigit, arguments), key=int)]
    found = INSTANCES[denoiser](*args, **arguments, return_dict=False)[0]
    if not isinstance(found, torch.Tensor):
        raise UserError("this denoiser yields no single tensor, which torch.compile takes; call it outside of a graph")
    result: Value = found
    return result


def _shaped(denoiser: int, paths: str, tensors: Sequence[Value], numbers: Sequence[float]) -> Value:
    """An empty tensor in place of a result: of the latents' type and device, with the channels of the output."""
    own = INSTANCES[denoiser]
    names = [own.signature[int(path)] if path.isdigit() else path for path in paths.split(",")]
    given = dict(zip(names, tensors, strict=False))
    for function in own.manifest["functions"]:
        first = function["inputs"][0]["name"]
        latents = given[first] if first in given else tensors[0]
        if list(function["inputs"][0]["shape"][1:]) == [int(extent) for extent in latents.shape[1:]]:
            half = latents.dtype in (torch.float16, torch.bfloat16)
            shape = (latents.shape[0], *function["output"]["shape"][1:])
            found: Value = latents.new_empty(shape, dtype=latents.dtype if half else torch.float32)
            return found
    raise UserError(f"this artifact takes no latents of shape {[*tensors[0].shape]}: compile for it (--shapes)")


torch.library.define("mpq_compiler::predict", SCHEMA)
torch.library.impl("mpq_compiler::predict", ("cpu", "cuda"))(_predict)
torch.library.register_fake("mpq_compiler::predict")(_shaped)
