"""Denoisers of any class, taken by a recorded call: what varies are their inputs, everything else is part of them."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mpq_compiler.frontend import flex_attention
from mpq_compiler.frontend.deciding import deciding
from mpq_compiler.sampling import call_tree
from mpq_compiler.sampling.call_tree import TIME, VALUES, Argument, Arguments, CallForm, Value, input_name
from mpq_compiler.sampling.convention import Convention
from mpq_compiler.support.errors import UserError

LATENTS = ("sample", "hidden_states", "x", "latents", "latent_model_input", "noisy_latents")
"""The names of parameters with noisy latents, the likeliest first."""
TIMES = ("timestep", "timesteps", "t", "time", "timestep_ratio", "sigma", "noise_level", "decoder_noise_time")
"""The names of parameters with the time, the likeliest first."""

MOST_KINDS = 8
"""The most kinds of calls in an artifact, each of which is a function of its own."""


MOST_APART = 0.01
"""The most by which a sample's output may differ from that in a batch, relative to it; the order of sums does less."""


class CallModule(torch.nn.Module):
    """A model as a function from named tensors to one tensor; its parameters are below `model.`.

    It takes the inputs of a `CallForm`, [B, ...] each. Tensors that are the same in every call are kept here as
    buffers. Where the model returns several tensors, they are joined, a row for each sample.
    """

    convention = Convention()

    def __init__(self, model: torch.nn.Module, form: CallForm, constants: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.model, self.form, self.latent = model, form, form.latent
        self._constants = {path: f"constant_{path.replace('.', '_')}" for path in constants}
        for path, buffer in self._constants.items():
            self.register_buffer(buffer, constants[path], persistent=False)
        self.quiet = "return_dict" in inspect.signature(model.forward).parameters
        self.alone = False
        """Whether the model takes one sample at a time, as those do whose Python values count the samples."""
        self.decided: frozenset[str] | None = None
        """The inputs whose values decide what the model computes, where that is known."""

    def forward(self, **inputs: Tensor) -> Tensor:
        """Calls the model; its output [B, ...]."""
        # `len` makes the traced batch a constant, and the graph that of one sample, which has fewer operators; texts,
        # whose masks are read at the number of each sample, have none of one
        first = inputs[self.latent]
        batch = len(first) if first.is_floating_point() else first.shape[0]
        if self.alone and batch > 1:
            return torch.cat([self(**{n: v[i : i + 1] for n, v in inputs.items()}) for i in range(batch)])
        constants = {
            p: v.expand(batch, *v.shape[1:]) if p in self.form.held else v for p, v in self.constants().items()
        }
        tensors = constants | {a.path: a.given(inputs[a.input]) for a in self.form.arguments}
        return joined(self.called(call_tree.unflatten(self.form.tree, tensors)), batch if self.form.lists else 0)

    def constants(self) -> dict[str, Tensor]:
        """The tensors that are the same in every call, by path."""
        return {path: self.get_buffer(buffer) for path, buffer in self._constants.items()}

    def called(self, arguments: Mapping[str, Value]) -> Value:
        """What the model returns for arguments by name."""
        with flex_attention.dense():
            return self.model(**arguments, **({"return_dict": False} if self.quiet else {}))


def joined(output: Value, samples: int = 0) -> Tensor:
    """The one tensor of an output, or its tensors joined to [B, sum of their elements].

    ``samples`` is their number where lists have a tensor for each of them.
    """
    _, tensors = call_tree.flatten(output, samples=samples, stack=_stack)
    values: list[Tensor] = [*tensors.values()]
    return values[0] if len(values) == 1 else torch.cat([value.flatten(1) for value in values], 1)


def arguments_of(model: torch.nn.Module, args: tuple[Value, ...], kwargs: Mapping[str, Value]) -> Arguments:
    """The arguments of a call by name, but for those that are the forward's defaults."""
    signature = inspect.signature(model.forward)
    named: Arguments = {}
    for name, value in signature.bind(*args, **kwargs).arguments.items():
        if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            named |= value
        else:
            named[name] = value
    named.pop("return_dict", None)
    return call_tree.without(named, defaults_of(model))


def defaults_of(model: torch.nn.Module) -> Arguments:
    """The Python values that a model's forward takes where none is given."""
    parameters = inspect.signature(model.forward).parameters.items()
    return {
        name: p.default
        for name, p in parameters
        if p.default is not inspect.Parameter.empty and p.default is not None and isinstance(p.default, VALUES)
    }


def as_tensors(arguments: Mapping[str, Value], time: str | None = None) -> Arguments:
    """The arguments with the time as a tensor, whatever it is; ``time`` names it, where its name does not tell."""
    return {
        name: torch.tensor(value) if name in (*TIMES, time) and isinstance(value, int | float) else value
        for name, value in arguments.items()
    }


def kinds_of(
    model: torch.nn.Module, calls: Sequence[Arguments], latent: str | None = None, time: str | None = None
) -> list[list[Arguments]]:
    """Groups calls by their structure, their Python values and the shapes of a sample's tensors.

    Args:
        model: the model.
        calls: arguments by name (`arguments_of`).
        latent: the path of the latents; None finds it by name.
        time: the path of the time; None finds it by name.

    Returns:
        The calls of each kind in their order; the kind with the most calls first.

    Raises:
        UserError: there are more than `MOST_KINDS`.
    """
    kinds: list[tuple[call_tree.Tree, dict[str, tuple[int, ...]], list[Arguments]]] = []
    for call in calls:
        tree, tensors = _flat(as_tensors(call, time), latent)
        path = latent or _likeliest(LATENTS, tensors)
        batch = len(tensors[path]) if path is not None and path in tensors else 1
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()} | {"": (batch,)}
        for other, theirs, alike in kinds:
            if call_tree.difference(tree, other) is None and _alike(shapes, theirs):
                alike.append(call)
                break
        else:
            kinds.append((tree, shapes, [call]))
    if len(kinds) > MOST_KINDS:
        (first, sizes, _), (other, others, _), *_ = kinds
        clause = call_tree.difference(other, first) or "; ".join(
            f"'{name}' is {list(others[name])}, and was {list(sizes[name])}"
            for name in sizes
            if name and others[name] != sizes[name]
        )
        raise UserError(
            f"calls of {type(model).__name__} are of {len(kinds)} kinds, and an artifact holds {MOST_KINDS}: "
            f"{clause.replace('when it was compiled', 'in the first call')}; what changes with every call must be a "
            "tensor"
        )
    return sorted((alike for *_, alike in kinds), key=lambda alike: -len(alike))


def _alike(shapes: Mapping[str, tuple[int, ...]], others: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether tensors have equal shapes, or equally many rows a sample and equal rows; ``""`` has the batch."""
    (batch,), (theirs,) = shapes[""], others[""]
    return all(
        now == then or (now[1:] == then[1:] and len(now) == len(then) > 0 and now[0] * theirs == then[0] * batch)
        for now, then in ((shape, others[name]) for name, shape in shapes.items() if name)
    )


def form_of(
    model: torch.nn.Module,
    calls: list[Arguments],
    latent: str | None = None,
    time: str | None = None,
) -> tuple[CallForm, dict[str, Tensor], list[dict[str, Tensor]]]:
    """Finds the form of a model's calls.

    Args:
        model: the model.
        calls: arguments by name (`arguments_of`), of one structure.
        latent: the path of the latents; None finds it by name, and by what varies.
        time: the path of the time; None finds it by name.

    Returns:
        The form, the constants by path, and the inputs of each call by name, [B, ...].

    Raises:
        UserError: calls differ in structure; no argument is the latents; a tensor that varies has rows of no samples.
    """
    kind = type(model).__name__
    flat = [_flat(as_tensors(call, time), latent) for call in calls]
    tree, first = flat[0]
    for name in (latent, time):
        call_tree.require_path(name, [*first])
    for other, _ in flat[1:]:
        if (clause := call_tree.difference(other, tree)) is not None:
            raise UserError(f"calls of {kind} differ: {clause.replace('when it was compiled', 'in the first')}")
    varying = {path for path in first if any(not _equal(tensors[path], first[path]) for _, tensors in flat[1:])}
    latent = latent or _latent(first, varying)
    if latent is None:
        raise UserError(
            f"{kind} is no denoiser, for its calls have no noisy latents: name their argument with --latent"
        )
    time = time or _likeliest(TIMES, first)
    if time is not None and first[time].ndim > 1:
        time = None  # each frame has its own: an input like others, for samples are not of one time
    batch = len(first[latent])
    arguments, constants = [], {}
    for path, tensor in first.items():
        rows = _rows(tensor, batch, path == time)
        if rows is None:
            axis = next((axis for axis, size in enumerate(tensor.shape) if size == batch), None)
            if path in varying and axis is None:
                shape = list(tensor.shape)
                raise UserError(f"'{path}' of {kind} varies between calls, and {shape} are no rows of {batch} samples")
            if path in varying and axis is not None:
                arguments.append(Argument(path, input_name(path, time), 1, axis))
            else:
                constants[path] = _float(tensor)
        else:
            arguments.append(Argument(path, input_name(path, time), rows))
    form = CallForm(tree, tuple(arguments), {"value": None}, {}, defaults_of(model), input_name(latent, time), time)
    module = CallModule(model, form, constants)
    with torch.no_grad():
        output = module.called({k: _to_float(v) for k, v in as_tensors(calls[0], time).items()})
    outputs, returned = call_tree.flatten(output, samples=batch if form.lists else 0, stack=_stack)
    whole = joined(output, batch if form.lists else 0)
    form, constants = _without_tables(module, form, constants, first, varying, whole)
    form = _with_axes(module, form, constants, first, whole)
    if not returned or any(not _is_rows(value, batch) for value in returned.values()):
        said = ", ".join(str(list(value.shape)) for value in returned.values()) or "none"
        raise UserError(f"{kind} returns tensors {said}, which have no row for each of {batch} samples")
    form = replace(
        form,
        outputs=outputs,
        shapes={path: tuple(value.shape[1:]) for path, value in returned.items()},
        fields=_fields(module, calls[0]) if isinstance(output, tuple | list) else (),
    )
    inputs = []
    for _, tensors in flat:
        count = len(tensors[latent])
        inputs.append({a.input: _float(a.rows_of(tensors[a.path], count)) for a in form.arguments})
        if time is None:
            inputs[-1][TIME] = torch.zeros(count)
    _require_apart(model, form, constants, inputs[0], whole)
    return form, constants, inputs


@torch.no_grad()
def _require_apart(
    model: torch.nn.Module, form: CallForm, constants: Mapping[str, Tensor], inputs: Mapping[str, Tensor], whole: Tensor
) -> None:
    """Raises a UserError where samples of a call are not what they are alone: an artifact computes each by itself."""
    if len(whole) == 1:
        return  # it is alone, and a large model takes a minute to say so again
    module = CallModule(model, form, constants)
    module.alone = True
    try:
        apart = module(**{a.input: inputs[a.input] for a in form.arguments})
    except Exception:  # a model may raise anything, and what takes no sample alone is refused where it is wrapped
        return
    for sample, (together, alone) in enumerate(zip(whole.flatten(1), apart.flatten(1), strict=True)):
        if float((together - alone).norm()) > MOST_APART * float(together.norm()):
            nested = {path.partition(".")[0] for path in call_tree.values(form.tree) if "." in path}
            named = f"{' or '.join(map(repr, sorted(nested)))} may name samples by number, or " if nested else ""
            raise UserError(
                f"{type(model).__name__} makes something else of sample {sample} of a call than of it alone: {named}"
                "they see each other; record calls of one sample"
            )


def _flat(call: Mapping[str, Value], latent: str | None = None) -> tuple[call_tree.Tree, Arguments]:
    """A call taken apart; where its latents are a list, lists of as many tensors have one for each sample."""
    name = latent or _likeliest(LATENTS, call)
    return call_tree.flatten(call, samples=call_tree.samples_of(call, name) if name else 0, stack=_stack)


def _stack(values: Sequence[Tensor]) -> Tensor:
    return torch.stack([*values])


@torch.no_grad()
def _without_tables(
    module: CallModule,
    form: CallForm,
    constants: dict[str, Tensor],
    tensors: Mapping[str, Tensor],
    varying: set[str],
    output: Tensor,
) -> tuple[CallForm, dict[str, Tensor]]:
    """Moves what has several rows a sample by chance to the constants: the model takes it whole for one sample, too."""
    tables = {a.path for a in form.arguments if a.rows > 1 and a.path not in varying}
    if not tables:
        return form, constants
    arguments = tuple(a for a in form.arguments if a.path not in tables)
    without = replace(form, arguments=arguments)
    held = constants | {path: _float(tensors[path]) for path in tables}
    return (without, held) if _takes_one(module.model, without, held, tensors, output) else (form, constants)


@torch.no_grad()
def _with_axes(
    module: CallModule,
    form: CallForm,
    constants: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    output: Tensor,
) -> CallForm:
    """Finds the argument whose samples another dimension counts, where the model does not take one row of all."""
    batch = len(output)
    if batch == 1 or _takes_one(module.model, form, constants, tensors, output):
        return form
    for argument in form.arguments:
        for axis, size in enumerate(tensors[argument.path].shape):
            if not axis or size != batch or argument.input == form.latent:
                continue
            turned = replace(argument, rows=1, axis=axis)
            other = replace(form, arguments=tuple(turned if a is argument else a for a in form.arguments))
            if _takes_one(module.model, other, constants, tensors, output):
                return other
    return form


def _takes_one(
    model: torch.nn.Module,
    form: CallForm,
    constants: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    output: Tensor,
) -> bool:
    """Whether a model makes of the first sample alone what it makes of it in a call."""
    inputs = {a.input: _float(a.rows_of(tensors[a.path], len(output)))[:1] for a in form.arguments}
    try:
        alone = CallModule(model, form, constants)(**inputs)
    except Exception:  # a model may raise anything
        return False
    return alone.shape == output[:1].shape and torch.allclose(alone, output[:1], rtol=1e-3, atol=1e-4)


def held(module: CallModule, rows: Mapping[str, Tensor]) -> CallModule:
    """The module with those inputs as constants whose values decide what it computes, as masks of text lengths do.

    Only inputs whose rows are all equal; neither the latents nor the time. A model that takes one sample of them and
    not two, or other samples for what the first is, is called with one at a time from then on.

    Args:
        module: a model taken by its calls.
        rows: its recorded inputs by name, [N, ...].
    """
    one = {name: value[:1].clone() for name, value in rows.items()}
    found = deciding(module, one)
    module.alone = _is_of_one(module, one)
    fixed = {name for name in found - {module.latent, TIME} if bool((rows[name] == rows[name][:1]).all())}
    if not fixed:
        module.decided = frozenset(found)
        return module
    form = module.form
    taken = {a.path: a.given(one[a.input]) for a in form.arguments if a.input in fixed}
    form = replace(
        form,
        arguments=tuple(a for a in form.arguments if a.input not in fixed),
        held=tuple(a.path for a in form.arguments if a.input in fixed and a.rows == 1),
    )
    made = CallModule(module.model, form, module.constants() | taken)
    made.decided = frozenset(found - fixed)
    made.alone = _is_of_one(made, {name: value for name, value in one.items() if name not in fixed})
    return made


@torch.no_grad()
def _is_of_one(module: CallModule, one: Mapping[str, Tensor]) -> bool:
    """Whether a model takes one sample and not two, or makes something else of the second of two that are equal."""
    try:
        first, second = module(**{name: torch.cat([value, value]) for name, value in one.items()})
    except Exception:  # a model may raise anything
        return True
    return float((first - second).norm()) > MOST_APART * float(first.norm())


@torch.no_grad()
def _fields(module: CallModule, call: Mapping[str, Value]) -> tuple[str, ...]:
    """The names of what the model returns, where it returns names with it, as diffusers' outputs do."""
    if not module.quiet:
        return ()
    output = module.model(**{k: _to_float(v) for k, v in as_tensors(call, module.form.time).items()}, return_dict=True)
    return tuple(output.keys()) if isinstance(output, Mapping) else ()


def _latent(tensors: Mapping[str, Tensor], varying: set[str]) -> str | None:
    others = (p for p, t in tensors.items() if p in varying and t.is_floating_point() and t.ndim > 1)
    return _likeliest(LATENTS, tensors) or next(others, None)


def _likeliest(names: Sequence[str], given: Collection[str]) -> str | None:
    """The first of the names that is given; None where none is."""
    return next((name for name in names if name in given), None)


def variations(
    model: torch.nn.Module, example: Mapping[str, Value], count: int, seed: int, latent: str | None = None
) -> list[Arguments]:
    """Calls like the example: its own, and ``count`` - 1 with other noise of the same mean and deviation as latents.

    ``latent`` is the path of the latents; None finds it by name.
    """
    call = as_tensors(arguments_of(model, (), example))
    tree, tensors = _flat(call, latent)
    call_tree.require_path(latent, [*tensors])
    path = latent or _latent(tensors, set())
    if path is None:
        raise UserError(
            f"{type(model).__name__} is no denoiser, for its call has no noisy latents: name their argument with "
            "--latent"
        )
    generator = torch.Generator().manual_seed(seed)
    calls = [call]
    for _ in range(count - 1):
        latents = tensors[path].float()
        noise = torch.randn(latents.shape, generator=generator) * latents.std() + latents.mean()
        calls.append(call_tree.unflatten(tree, tensors | {path: noise.to(tensors[path].dtype)}))
    return calls


def _rows(tensor: Tensor, batch: int, time: bool) -> int | None:
    """Rows a sample (`Argument.rows`); None: the tensor has no rows of samples."""
    if tensor.ndim == 0 or (time and tensor.shape == (1,)):
        return 0 if tensor.ndim == 0 else 1
    if len(tensor) == batch:
        return 1
    if batch > 1 and tensor.ndim > 1 and len(tensor) % batch == 0:
        return len(tensor) // batch
    return None


def _is_rows(value: Tensor, batch: int) -> bool:
    return value.ndim > 0 and len(value) == batch


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)


def _float(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def _to_float(value: Value) -> Value:
    tree, tensors = call_tree.flatten(value)
    return call_tree.unflatten(tree, {path: _float(tensor) for path, tensor in tensors.items()})
