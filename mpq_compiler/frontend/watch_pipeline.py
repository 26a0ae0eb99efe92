"""Watches a diffusers pipeline draw: which parts it calls with what, and what it computes between them.

Nothing is known of a pipeline by its name. It draws once for each of two prompts, with its tokenizers, text encoders,
denoiser, scheduler and decoder under watch; the operators between them are its glue (`sampling.glue`).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from mpq_compiler.frontend.call_module import arguments_of
from mpq_compiler.frontend.checkpoint import DENOISERS
from mpq_compiler.frontend.checkpoint_module import one_line
from mpq_compiler.frontend.watching import tensors_of
from mpq_compiler.sampling import call_tree, schedulers
from mpq_compiler.sampling.call_tree import Arguments, Value
from mpq_compiler.sampling.glue import OPERATORS, Glue, Ref, Step
from mpq_compiler.sampling.schedulers import FlowMatchEuler, Scheduler
from mpq_compiler.support.errors import UserError

DiffusersPipeline = Value
"""A pipeline of diffusers, whose classes have no types."""
SAME = {"alias", "clone", "contiguous", "detach", "lift_fresh", "lift_fresh_copy", "to"}
"""Operators whose result is their operand."""
NAMES = {"reshape": "view", "_unsafe_view": "view", "split_with_sizes": "split", "permute_copy": "permute"}
"""Operators by the name of an equal one."""
PLACES = {"device", "layout", "memory_format", "non_blocking", "pin_memory", "copy"}
"""Arguments that say where a tensor lies, and nothing of its values."""
SCHEDULES = (2, 5, 9)
"""Numbers of steps whose schedules are looked at: two tell a line, the third that it is one."""
LARGEST = 4096
"""The most elements of a tensor that a pipeline has for its glue, such as the means of latents."""


@dataclass
class EncoderCall:
    """A call of a text encoder: its arguments, and what it returned."""

    name: str
    """The pipeline's attribute."""
    arguments: Arguments
    tree: call_tree.Tree
    outputs: dict[str, Tensor]
    """The tensors that it returned, by path."""


@dataclass
class Tokenized:
    """A call of a tokenizer."""

    name: str
    """The pipeline's attribute."""
    text: str
    """What it was given: the prompt, in what the pipeline puts around it."""
    outputs: dict[str, Tensor]


@dataclass
class Watched:
    """What was seen while a pipeline drew once."""

    recorder: Recorder
    tokenized: list[Tokenized] = field(default_factory=list)
    encoded: list[EncoderCall] = field(default_factory=list)
    calls: list[Arguments] = field(default_factory=list)
    """The arguments by name of the denoiser's calls in the first step: of a guided step there may be two."""
    predicted: Value = None
    """What the denoiser's first call gave."""
    taken: tuple[Tensor, ...] = ()
    """What the scheduler's first step was given: the prediction, the time and the latents."""
    latents: Tensor | None = None
    """What the scheduler's last step gave."""
    decoder: str | None = None
    """The pipeline's attribute of what decoded them."""
    decoded: Tensor | None = None
    """What the decoder was given."""
    sample: Tensor | None = None
    """What the decoder gave."""
    images: Tensor | None = None
    """What the pipeline gave: [N, channels, H, W] from 0 to 1."""

    @property
    def called(self) -> Arguments | None:
        """The arguments of the denoiser's first call; None: there was none."""
        return self.calls[0] if self.calls else None


class Recorder(TorchDispatchMode):
    """Records the operators on tensors that sources have led to, but for those within parts."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sources: list[str] = []
        self.steps: list[Step] = []
        self.inside = 0
        """Calls of parts that are going on: what they compute is their own."""
        self._values: dict[int, int] = {}
        self._kept: list[Tensor] = []  # so that no other tensor gets the identity of one that is gone
        self._odd: dict[int, str] = {}
        self._made: list[int] = []
        """What made each value: the index of a source, or ``~`` that of a step."""

    def source(self, name: str, value: Tensor) -> None:
        """Names a tensor from which on operators are recorded; what led to it is no glue."""
        self._odd.pop(id(value), None)
        self._hold(value, len(self.sources))
        self.sources.append(name)

    def _hold(self, value: Tensor, made: int) -> None:
        self._kept.append(value)
        self._values[id(value)] = len(self._made)
        self._made.append(made)

    def comes_from_sources(self, tensor: Tensor) -> bool:
        """Whether a tensor was made of sources, by operators that are known or not."""
        return id(tensor) in self._values or id(tensor) in self._odd

    def __torch_dispatch__(
        self, func: OpOverload, types: object, args: tuple[Value, ...] = (), kwargs: Arguments | None = None
    ) -> Value:
        kwargs = kwargs or {}
        recorded = not self.inside and any(map(self.comes_from_sources, tensors_of((args, kwargs))))
        before = args
        if recorded and func._schema.is_mutable and not self.comes_from_sources(args[0]):
            before = (args[0].clone(), *args[1:])  # a tensor of its own, which is about to be written to
        output = func(*args, **kwargs)
        if recorded:
            self._record(func, before, kwargs, output)
        return output

    def _record(self, func: OpOverload, args: tuple[Value, ...], kwargs: Arguments, output: Value) -> None:
        op = func.name().removeprefix("aten::").partition(".")[0]
        made = tensors_of(output)
        odd = next((self._odd[id(t)] for t in tensors_of((args, kwargs)) if id(t) in self._odd), None)
        if odd is not None:
            for tensor in made:
                self._is_odd(tensor, odd)
            return
        if op == "_to_copy":
            dtype = kwargs.get("dtype")
            op, args = ("cast", (args[0], str(dtype).removeprefix("torch."))) if dtype else ("clone", args[:1])
            kwargs = {}
        op = NAMES.get(op.removesuffix("_"), op.removesuffix("_"))
        further = {name: value for name, value in kwargs.items() if name not in PLACES and value is not None}
        if op in SAME and not further:
            self._values[id(output)] = self._values[id(args[0])]
            self._kept.append(output)
            return
        if op not in OPERATORS or further:
            for tensor in made:
                self._is_odd(tensor, func.name().removeprefix("aten::"))
            return
        self.steps.append(Step(op, tuple(self._argument(arg) for arg in args)))
        if isinstance(output, Tensor):
            self._hold(output, ~(len(self.steps) - 1))
            return
        self._made.append(~(len(self.steps) - 1))
        whole = len(self._made) - 1
        for index, part in enumerate(output):
            self.steps.append(Step("getitem", (Ref(whole), index)))
            self._hold(part, ~(len(self.steps) - 1))

    def _is_odd(self, tensor: Tensor, op: str) -> None:
        self._kept.append(tensor)
        self._odd[id(tensor)] = op

    def _argument(self, value: Value) -> Value:
        if isinstance(value, Tensor):
            if id(value) in self._values:
                return Ref(self._values[id(value)])
            least = _unrepeated(value)
            if least.numel() > LARGEST:
                raise UserError(f"the pipeline computes with a tensor {list(value.shape)} of its own between its parts")
            self.steps.append(Step("array", (least.tolist(), str(value.dtype).removeprefix("torch."))))
            self._made.append(~(len(self.steps) - 1))
            if least.shape != value.shape:
                self.steps.append(Step("expand", (Ref(len(self._made) - 1), [*value.shape])))
                self._made.append(~(len(self.steps) - 1))
            return Ref(len(self._made) - 1)
        if isinstance(value, list | tuple):
            return [self._argument(part) for part in value]
        return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value

    def glue(self, results: Mapping[str, Tensor], what: str) -> Glue:
        """The glue that makes tensors: the steps that they need, of the sources that these need.

        Args:
            results: what is made, by name.
            what: says in an error what that is.

        Raises:
            UserError: a tensor does not come from the sources, or by an operator that is not known.
        """
        for name, tensor in results.items():
            if id(tensor) in self._odd:
                raise UserError(
                    f"the pipeline makes '{name}' of {what} by '{self._odd[id(tensor)]}', which is not known between "
                    "parts: compile its denoiser alone with --parts denoiser"
                )
            if id(tensor) not in self._values:
                raise UserError(
                    f"the pipeline does not make '{name}' of {what}: compile its denoiser alone with --parts denoiser"
                )
        wanted = {name: self._values[id(tensor)] for name, tensor in results.items()}
        needed: set[int] = set()
        pending = [*wanted.values()]
        while pending:
            if (index := pending.pop()) in needed:
                continue
            needed.add(index)
            if self._made[index] < 0:
                pending.extend(_refs(self.steps[~self._made[index]].args))
        order = sorted(needed, key=lambda index: (self._made[index] < 0, index))  # sources first
        place = {index: i for i, index in enumerate(order)}
        sources = tuple(self.sources[self._made[i]] for i in order if self._made[i] >= 0)
        steps = [self.steps[~self._made[i]] for i in order if self._made[i] < 0]
        renamed = tuple(Step(step.op, _renamed(step.args, place)) for step in steps)
        return Glue(sources, renamed, {name: place[index] for name, index in wanted.items()})


def _unrepeated(value: Tensor) -> Tensor:
    """The least tensor that expands to this one: dimensions along which it repeats itself have one element."""
    for axis, size in enumerate(value.shape):
        first = value.narrow(axis, 0, 1) if size else value
        if size > 1 and torch.equal(first.expand_as(value), value):
            value = first
    return value


def _refs(args: Value) -> list[int]:
    if isinstance(args, Ref):
        return [args.index]
    return [index for part in args for index in _refs(part)] if isinstance(args, list | tuple) else []


def _renamed(args: Value, place: Mapping[int, int]) -> Value:
    if isinstance(args, Ref):
        return Ref(place[args.index])
    if isinstance(args, list | tuple):
        made = [_renamed(part, place) for part in args]
        return tuple(made) if isinstance(args, tuple) else made
    return args


def denoiser_of(pipeline: DiffusersPipeline) -> str | None:
    """The attribute of a pipeline's denoiser; None for anything that is no pipeline with one."""
    return next((name for name in DENOISERS if isinstance(getattr(pipeline, name, None), nn.Module)), None)


def require_cpu(pipeline: DiffusersPipeline, denoiser: str) -> None:
    """Raises a UserError where a pipeline is on a GPU."""
    if (device := next(getattr(pipeline, denoiser).parameters()).device).type != "cpu":
        raise UserError(f"the pipeline is on {device}, and is compiled on the CPU: pipeline.to('cpu')")


@torch.no_grad()
def schedule_of(pipeline: DiffusersPipeline, **call: Value) -> Scheduler:
    """The scheduler of a pipeline with what the pipeline itself tells it, found in three schedules; nothing is drawn.

    UserError: its schedule is of no known kind.
    """
    scheduler, note = schedulers.from_config(schedulers.config_of(pipeline.scheduler))
    kind = type(pipeline.scheduler).__name__
    if note is not None or not isinstance(scheduler, FlowMatchEuler):
        raise UserError(f"the pipeline's {kind} is not known here: compile its denoiser alone with --parts denoiser")
    told = {steps: _told(pipeline, {**call, "num_inference_steps": steps}) for steps in SCHEDULES}
    few, more, _ = SCHEDULES
    if scheduler.use_dynamic_shifting:
        a, b = (float(told[steps][0]) for steps in (few, more))
        slope = (b - a) / (more - few)
        scheduler = replace(scheduler, mu=(a - slope * few, slope))
    for even in (False, True):
        tried = replace(scheduler, even_sigmas=even)
        if all(np.allclose(tried.timesteps(steps), times, rtol=1e-4) for steps, (_, times) in told.items()):
            return tried
    raise UserError(
        f"the pipeline numbers the times of its {kind} in a way that is not known: compile its denoiser alone with "
        "--parts denoiser"
    )


def begin_with(stack: ExitStack, pipeline: DiffusersPipeline, noise: Tensor) -> None:
    """Has a pipeline begin with this noise until the stack is closed, in place of its own of the same shape."""
    own = pipeline.prepare_latents

    def prepared(*args: Value, **kwargs: Value) -> Value:
        made = own(*args, **kwargs)
        if isinstance(made, Tensor):
            return noise if made.shape == noise.shape else made
        return tuple(noise if isinstance(part, Tensor) and part.shape == noise.shape else part for part in made)

    _replaced(stack, pipeline, "prepare_latents", prepared)


class _Told(Exception):
    """Ends a drawing whose schedule is known."""


def _told(pipeline: DiffusersPipeline, call: Arguments) -> tuple[Value, np.ndarray]:
    """The shift that a pipeline gives its scheduler, and the times that come of it."""
    own = pipeline.scheduler.set_timesteps
    found: list[tuple[Value, np.ndarray]] = []

    @functools.wraps(own)
    def told(*args: Value, **kwargs: Value) -> None:
        own(*args, **kwargs)
        found.append((kwargs.get("mu", 0.0), pipeline.scheduler.timesteps.numpy().copy()))
        raise _Told

    with ExitStack() as stack, suppress(_Told):
        _replaced(stack, pipeline.scheduler, "set_timesteps", told)
        pipeline(**call)
    return found[0]


@contextmanager
def _inside(recorder: Recorder) -> Iterator[None]:
    recorder.inside += 1
    try:
        yield
    finally:
        recorder.inside -= 1


@torch.no_grad()
def watch(pipeline: DiffusersPipeline, denoiser: str, **call: Value) -> Watched:
    """Lets a pipeline draw, and watches it.

    Args:
        pipeline: a diffusers pipeline on the CPU.
        denoiser: the attribute of its denoiser.
        call: the keyword arguments of its call; one prompt, and `output_type="pt"`.

    Raises:
        UserError: the call fails.
    """
    recorder = Recorder()
    watched = Watched(recorder)
    with ExitStack() as stack:
        for name, part in _components(pipeline):
            if hasattr(part, "batch_decode") and callable(part):
                _watch_tokenizer(stack, watched, name, part)
            elif isinstance(part, nn.Module) and name == denoiser:
                _watch_denoiser(stack, watched, part)
            elif isinstance(part, nn.Module) and hasattr(part, "decode"):
                _watch_decoder(stack, watched, name, part)
            elif isinstance(part, nn.Module):
                _watch_encoder(stack, watched, name, part)
        _watch_scheduler(stack, watched, pipeline.scheduler)
        stack.enter_context(recorder)
        try:
            watched.images = pipeline(**call).images
        except UserError:
            raise
        except Exception as error:  # a pipeline may raise anything
            raise UserError(
                f"{type(pipeline).__name__} does not draw, so that its parts cannot be compiled together "
                f"({type(error).__name__}: {one_line(error)})"
            ) from error
    return watched


def _components(pipeline: DiffusersPipeline) -> list[tuple[str, Value]]:
    return [(name, part) for name, part in pipeline.components.items() if part is not None]


def _replaced(stack: ExitStack, holder: object, name: str, value: object) -> None:
    """Sets an attribute of one object until the stack is closed."""
    object.__setattr__(holder, name, value)
    stack.callback(object.__delattr__, holder, name)


def _watch_tokenizer(stack: ExitStack, watched: Watched, name: str, tokenizer: Value) -> None:
    kind = type(tokenizer)

    def call(self: Value, text: Value = None, *args: Value, **kwargs: Value) -> Value:
        made = kind.__call__(self, text, *args, **kwargs)
        given = text[0] if isinstance(text, list | tuple) and len(text) == 1 else text
        if isinstance(given, str):
            index = len(watched.tokenized)
            outputs = {key: value for key, value in made.items() if isinstance(value, Tensor)}
            for key, value in outputs.items():
                watched.recorder.source(f"{index}:{key}", value)
            watched.tokenized.append(Tokenized(name, given, outputs))
        return made

    # Python looks for `__call__` in the class: the tokenizer is of one of its own while it is watched
    tokenizer.__class__ = type(kind.__name__, (kind,), {"__call__": call, "__module__": kind.__module__})
    stack.callback(setattr, tokenizer, "__class__", kind)


def _watch_encoder(stack: ExitStack, watched: Watched, name: str, encoder: nn.Module) -> None:
    forward = encoder.forward

    @functools.wraps(forward)
    def called(*args: Value, **kwargs: Value) -> Value:
        arguments = _named(forward, args, kwargs)
        with _inside(watched.recorder):
            output = forward(*args, **kwargs)
        tree, tensors = call_tree.flatten(_plain(output))
        named = {id(tensor): (path, tensor) for path, tensor in reversed(tensors.items())}  # the first of equal ones
        for path, tensor in named.values():
            watched.recorder.source(f"{name}:{path}", tensor)
        watched.encoded.append(EncoderCall(name, arguments, tree, tensors))
        return output

    _replaced(stack, encoder, "forward", called)


def _named(forward: Callable[..., Value], args: Sequence[Value], kwargs: Arguments) -> Arguments:
    """The arguments of a call by name, without those that are None."""
    signature = inspect.signature(forward)
    named: Arguments = {}
    for name, value in signature.bind(*args, **kwargs).arguments.items():
        named |= value if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD else {name: value}
    return {name: value for name, value in named.items() if value is not None}


def _plain(output: Value) -> Value:
    """What an encoder returned as plain dicts, tuples and tensors."""
    if isinstance(output, Mapping):
        return {str(key): _plain(value) for key, value in output.items() if value is not None}
    return tuple(map(_plain, output)) if isinstance(output, list | tuple) else output


def _watch_denoiser(stack: ExitStack, watched: Watched, denoiser: nn.Module) -> None:
    forward = denoiser.forward

    @functools.wraps(forward)
    def called(*args: Value, **kwargs: Value) -> Value:
        with _inside(watched.recorder):
            if watched.latents is None:  # in the first step
                watched.calls.append(arguments_of(denoiser, args, kwargs))
            output = forward(*args, **kwargs)
        if watched.predicted is None:
            watched.predicted = output
        return output

    _replaced(stack, denoiser, "forward", called)


def _watch_decoder(stack: ExitStack, watched: Watched, name: str, decoder: Value) -> None:
    decode = decoder.decode

    @functools.wraps(decode)
    def called(z: Tensor, *args: Value, **kwargs: Value) -> Value:
        watched.decoder, watched.decoded = name, z
        with _inside(watched.recorder):
            output = decode(z, *args, **kwargs)
        watched.sample = output[0]
        assert watched.sample is not None
        watched.recorder.source("sample", watched.sample)
        return output

    _replaced(stack, decoder, "decode", called)


def _watch_scheduler(stack: ExitStack, watched: Watched, scheduler: Value) -> None:
    step = scheduler.step

    @functools.wraps(step)
    def called(*args: Value, **kwargs: Value) -> Value:
        with _inside(watched.recorder):
            output = step(*args, **kwargs)
        if watched.latents is None:
            named = inspect.signature(step).bind(*args, **kwargs).arguments
            watched.taken = tuple(torch.as_tensor(named[key]) for key in ("model_output", "timestep", "sample"))
        watched.latents = output[0]
        watched.recorder.source("latents", output[0])
        return output

    _replaced(stack, scheduler, "step", called)
