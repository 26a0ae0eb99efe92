"""`Program`: the graph, the tensors and the plans that the passes work on, and the interpreter that runs it.

The graph is a bare `torch.fx.Graph`; its ``get_attr`` nodes name tensors of the store. Every stage of the
compiler runs in torch through `run`, so every pass is checked the same way: run before, run after, compare.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from mpq_compiler import meta, ops
from mpq_compiler.errors import UserError


class Stage(StrEnum):
    """The dialects, in the order in which a program passes through them."""

    FLOAT = "float"
    REWRITTEN = "rewritten"
    PLANNED = "planned"
    FAKE_QUANTIZED = "fake-quantized"
    PACKED = "packed"


@dataclass(frozen=True)
class InputSpec:
    """One input of the denoiser: ``shape`` begins with the symbolic batch "B"."""

    name: str
    shape: tuple[int | str, ...]
    dtype: torch.dtype

    def sized(self, batch: int) -> tuple[int, ...]:
        return tuple(batch if d == "B" else int(d) for d in self.shape)


class TensorStore(Mapping[str, Tensor]):
    """Immutable tensors by name, shared by all stages: passes add, never change or copy."""

    def __init__(self, tensors: Mapping[str, Tensor] | None = None) -> None:
        self._tensors: dict[str, Tensor] = dict(tensors or {})

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def add(self, name: str, tensor: Tensor) -> str:
        """Adds ``tensor`` under ``name``, or ``name.1``, ``name.2`` ... where another has it; returns the name."""
        unique, n = name, 0
        while unique in self._tensors:
            held = self._tensors[unique]
            if held is tensor or (held.dtype == tensor.dtype and torch.equal(held, tensor)):
                return unique
            n += 1
            unique = f"{name}.{n}"
        self._tensors[unique] = tensor.detach()
        return unique

    def read(self, name: str) -> Tensor:
        """The value the graph sees: half-precision floats are stored, and read as f32."""
        tensor = self._tensors[name]
        return tensor.to(torch.float32) if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def part_of(name: str) -> str:
    """What a stored tensor is of its parameter ("scale" of "conv.weight:scale.2"), without the store's number."""
    return re.sub(r"\.\d+$", "", name.partition(":")[2])


@dataclass(frozen=True)
class WeightPlan:
    """How a weight is stored; `format` names an entry of `mpq_compiler.formats`."""

    format: str
    sites: tuple[str, ...] = ()
    """Names of the call nodes that use the weight."""


@dataclass(frozen=True)
class ActivationPlan:
    """How a tensor edge (named by its producing node) is quantized, or the probabilities of an attention (`softmax`).

    A dynamic plan has no tables: scale and zero point of each row are measured when the tensor is made. A plan with an
    ``exponent`` rounds to small floats, which have no zero points; the layers that read them compute in float.
    """

    bits: int
    scale: str | None
    """Store name of the f16 scales, one a time group."""
    zero_point: str | None
    """Store name of the u8 zero points, one a time group."""
    dynamic: bool = False
    exponent: int | None = None
    """Bits of exponent of a small float of ``bits`` bits, a sign among them; None for integers."""

    @property
    def kind(self) -> str:
        """``u8`` for integers; ``e4m3`` for small floats, by the bits of exponent and mantissa."""
        return f"u{self.bits}" if self.exponent is None else f"e{self.exponent}m{self.bits - 1 - self.exponent}"

    @property
    def group_bytes(self) -> int:
        """Stored bytes of a time group: an f16 scale, and a u8 zero point where there is one."""
        return 2 * (self.scale is not None) + (self.zero_point is not None)

    def label(self, groups: int) -> str:
        """``u8/t4``: the kind and the number of time groups; ``u8/token`` where every row has a range of its own."""
        return f"{self.kind}/token" if self.dynamic else f"{self.kind}/t{groups}"


def softmax(attention: str) -> str:
    """Under which the probabilities within an attention call have their plan."""
    return f"{attention}:softmax"


@dataclass
class Program:
    """What a pass takes and returns."""

    graph: fx.Graph
    tensors: TensorStore
    inputs: tuple[InputSpec, ...]
    stage: Stage
    model: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    regions: dict[str, fx.Graph] = field(default_factory=dict)
    weights: dict[str, WeightPlan] = field(default_factory=dict)
    activations: dict[str, ActivationPlan] = field(default_factory=dict)
    fallbacks: dict[str, str] = field(default_factory=dict)
    """Float leftovers of the plan: node or weight name -> the reason, in words."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What passes found out for later ones, by the names of their `provides`."""

    def fork(self, **changes: Any) -> Program:
        """A copy with its own graph, regions and tables; the tensors are shared."""
        own: dict[str, Any] = {
            "graph": copy_graph(self.graph),
            "regions": {name: copy_graph(g) for name, g in self.regions.items()},
            "weights": dict(self.weights),
            "activations": dict(self.activations),
            "fallbacks": dict(self.fallbacks),
            "facts": dict(self.facts),
        }
        return dataclasses.replace(self, **(own | changes))

    def note(self, sentence: str) -> None:
        """Tells the user something: report and dumps repeat it."""
        self.facts["notes"] = (*self.facts.get("notes", ()), sentence)

    def node(self, name: str) -> fx.Node:
        for n in self.graph.nodes:
            if n.name == name:
                return n
        raise KeyError(name)

    def reads_floats(self, call: fx.Node) -> bool:
        """Whether the tensor that a quantizable call reads is planned as small floats."""
        plan = self.activations.get(operand(call, 0).name)
        return plan is not None and plan.exponent is not None

    @property
    def attentions(self) -> list[fx.Node]:
        """Attention calls on computed tensors, in graph order: those that have a quantized form."""
        calls = [n for n in self.graph.nodes if n.target is ops.attention]
        return [n for n in calls if all(operand(n, i).op != "get_attr" for i in range(3))]

    @property
    def quantizable(self) -> list[fx.Node]:
        """Linear and conv2d calls whose weight is a stored parameter, in graph order."""
        return [n for n in self.graph.nodes if weight_of(n) is not None]


def arguments(node: fx.Node) -> tuple[Any, ...]:
    """The positional arguments of a call, for a reader who knows their types from the operator.

    torch.fx types each as the union of everything an argument can be.
    """
    return node.args


def operand(node: fx.Node, index: int) -> fx.Node:
    """The positional argument at ``index``, which the operator requires to be a tensor of the graph."""
    value = node.args[index]
    assert isinstance(value, fx.Node), f"argument {index} of {node.name} is {value!r}, not a node"
    return value


def function_of(node: fx.Node) -> Callable[..., Any]:
    """The operator that a call_function node calls."""
    assert callable(node.target), f"{node.name} calls no function"
    return node.target


CONTRACTIONS: tuple[Callable[..., Any], ...] = (torch.ops.aten.linear.default, ops.conv2d)
"""Calls (x, weight, bias, ...) that have a quantized form."""


def weight_of(node: fx.Node) -> str | None:
    """Store name of the weight of a quantizable call, or None."""
    if node.op != "call_function" or node.target not in CONTRACTIONS:
        return None
    weight = node.args[1]
    if not isinstance(weight, fx.Node) or weight.op != "get_attr":
        return None
    if node.target is ops.conv2d and len(node.args) > 5 and node.args[5] != 1:
        return None  # grouped convolutions stay float
    return str(weight.target)


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A copy of the graph with the same node names."""
    new = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        env[node] = new.node_copy(node, lambda n: env[n])
        env[node].name = node.name
    return new


def prune(graph: fx.Graph) -> None:
    """Removes what the output does not need; inputs stay, and random operators count as any other."""
    graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output"))


def merge_equal(graph: fx.Graph) -> None:
    """One node for all calls of the same operator on the same operands (there is no randomness and no mutation)."""
    seen: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op not in ("call_function", "get_attr"):
            continue
        key = (node.op, str(node.target), repr(node.args), repr(node.kwargs))
        if key in seen:
            node.replace_all_uses_with(seen[key])
            graph.erase_node(node)
        else:
            seen[key] = node


class Interpreter:
    """Runs a graph node by node. Subclasses override `call` for other meanings of the same graph."""

    def __init__(self, program: Program) -> None:
        self.program = program

    def run(
        self,
        inputs: Mapping[str, Tensor],
        *,
        watch: Callable[[fx.Node, Any], None] | None = None,
    ) -> Tensor:
        """The output for the inputs by name; ``watch(node, value)`` sees every value as it is made."""
        return self.execute(self.program.graph, [self._input(inputs, s.name) for s in self.program.inputs], watch)

    def execute(
        self, graph: fx.Graph, arguments: list[Any], watch: Callable[[fx.Node, Any], None] | None = None
    ) -> Any:
        env: dict[fx.Node, Any] = {}
        feed = iter(arguments)
        last_use = _last_uses(graph)
        for node in graph.nodes:
            if node.op == "output":
                return self.result(fx.map_arg(node.args[0], env.__getitem__))
            env[node] = next(feed) if node.op == "placeholder" else self.evaluate(node, env)
            if watch is not None:
                watch(node, env[node])
            for dead in last_use.get(node, ()):
                del env[dead]
        raise AssertionError("a graph without an output")

    def evaluate(self, node: fx.Node, env: Mapping[fx.Node, Any]) -> Any:
        if node.op == "get_attr":
            return self.attribute(str(node.target))
        args = fx.map_arg(node.args, env.__getitem__)
        kwargs = fx.map_arg(node.kwargs, env.__getitem__)
        if node.op == "call_module":
            return self.execute(self.program.regions[str(node.target)], list(args))
        return self.call(node, args, kwargs)

    def attribute(self, name: str) -> Any:
        return self.program.tensors.read(name)

    def call(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        return function_of(node)(*args, **kwargs)

    def result(self, value: Any) -> Any:
        return value

    @staticmethod
    def _input(inputs: Mapping[str, Tensor], name: str) -> Tensor:
        if name not in inputs:
            raise UserError(f"input '{name}' is missing; the denoiser takes it by that name")
        return inputs[name]


def _last_uses(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    seen: set[fx.Node] = set()
    uses: dict[fx.Node, list[fx.Node]] = {}
    for node in reversed(graph.nodes):
        for source in node.all_input_nodes:
            if source not in seen:
                seen.add(source)
                uses.setdefault(node, []).append(source)
    return uses


@torch.no_grad()
def run(
    program: Program,
    inputs: Mapping[str, Tensor],
    watch: Callable[[fx.Node, Any], None] | None = None,
) -> Tensor:
    """Runs the program without gradients; ``watch`` sees every node's value."""
    return Interpreter(program).run(inputs, watch=watch)


KNOWN_SHAPES = 50_000
"""Kept at most, by the process."""


class _MetaInterpreter(Interpreter):
    """Shapes and dtypes only: every tensor lives on the meta device.

    What an operator gives for operands of some shapes is kept between programs: a pipeline asks for the shapes of
    nearly the same graph after every pass, and meta kernels are slow (a group norm takes two milliseconds).
    """

    known: ClassVar[dict[Any, Any]] = {}

    def attribute(self, name: str) -> Any:
        return torch.empty_like(super().attribute(name), device="meta")

    def call(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        key = (node.target, _shape_key(args), _shape_key(kwargs))
        if key not in self.known:
            if len(self.known) >= KNOWN_SHAPES:
                self.known.clear()
            self.known[key] = self._shape(node, args, kwargs)
        return self.known[key]

    def _shape(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        if "device" in kwargs:
            kwargs = {**kwargs, "device": "meta"}
        if node.target in meta.SHAPES:
            return meta.SHAPES[node.target](*args, **kwargs)
        return super().call(node, args, kwargs)


def _shape_key(value: Any) -> Any:
    """What the shape of an operator's result can depend on; 1, 1.0 and True differ."""
    if isinstance(value, Tensor):
        return value.dtype, tuple(value.shape), value.stride()
    if isinstance(value, tuple | list):
        return tuple(_shape_key(v) for v in value)
    if isinstance(value, Mapping):
        return tuple((name, _shape_key(v)) for name, v in value.items())
    return type(value), value


@torch.no_grad()
def shapes(program: Program, batch: int) -> dict[str, Any]:
    """Node name -> a meta tensor (or a plain value) as it is at that batch size."""
    found: dict[str, Any] = {}

    def watch(node: fx.Node, value: Any) -> None:
        found[node.name] = value

    inputs = {s.name: torch.empty(s.sized(batch), dtype=s.dtype, device="meta") for s in program.inputs}
    _MetaInterpreter(program).run(inputs, watch=watch)
    return found
