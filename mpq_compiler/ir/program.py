"""The program: the graph, the tensors and the plans that passes work on.

The graph is a bare `torch.fx.Graph`; its ``get_attr`` nodes name tensors of the store. Every stage of the compiler runs
in torch through `interpreter.run`, so every pass is checked in one way: run before, run after, compare.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor, fx

from mpq_compiler.ir import ops, scratch
from mpq_compiler.ir.facts import Fact, Facts
from mpq_compiler.ir.graph import copy_graph, operand, weight_of

BOUNDARIES = "time_groups.boundaries"
"""The stored tensor f32 [groups - 1] that separates the time groups, ascending."""
HALVES = (torch.float16, torch.bfloat16)
"""Types that a graph never sees: what is stored in them is read as f32."""


class Stage(StrEnum):
    """The stages (dialects) of a program, in their order."""

    FLOAT = "float"
    REWRITTEN = "rewritten"
    PLANNED = "planned"
    FAKE_QUANTIZED = "fake-quantized"
    PACKED = "packed"


@dataclass(frozen=True)
class InputSpec:
    """One input of a denoiser and of its program: ``shape`` begins with the symbolic batch "B"."""

    name: str
    shape: tuple[int | str, ...]
    dtype: torch.dtype
    below: int | None = None
    """Exclusive upper bound of an input of whole numbers, such as class labels; None where there is no bound."""

    @property
    def sample(self) -> tuple[int, ...]:
        """Shape of one sample, without the batch."""
        return tuple(int(d) for d in self.shape[1:])

    def sized(self, batch: int) -> tuple[int, ...]:
        """The shape at a batch size."""
        return tuple(batch if d == "B" else int(d) for d in self.shape)

    def __str__(self) -> str:
        name = str(self.dtype).removeprefix("torch.").replace("float", "f").replace("int", "i")
        return f"{name}[{','.join(map(str, self.shape))}]"


class TensorStore(Mapping[str, Tensor]):
    """The store of immutable tensors by name, shared by all stages: passes add tensors, and never change one."""

    def __init__(self, tensors: Mapping[str, Tensor] | None = None) -> None:
        self._tensors: dict[str, Tensor] = dict(tensors or {})
        self._held = {_place(tensor) for tensor in self._tensors.values()}
        self._finite: set[str] = set()

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def add(self, name: str, tensor: Tensor) -> str:
        """Adds ``tensor`` under ``name``, or ``name.1``, ``name.2`` ... where another has it; returns the name.

        A large one that is no view of what the store holds is moved to a file (`scratch.kept`).
        """
        unique, n = name, 0
        while unique in self._tensors:
            held = self._tensors[unique]
            if held is tensor or (held.dtype == tensor.dtype and torch.equal(held, tensor)):
                return unique
            n += 1
            unique = f"{name}.{n}"
        tensor = tensor.detach()
        self._tensors[unique] = tensor if _place(tensor) in self._held else scratch.kept(tensor)
        return unique

    def hold(self, name: str, tensor: Tensor) -> str:
        """Adds a tensor as `add` does, but where it lies: in the memory or the file of the model."""
        self._held.add(_place(tensor))
        return self.add(name, tensor)

    def read(self, name: str, device: str = "cpu") -> Tensor:
        """Reads a tensor to a device, as the graph sees it: half-precision floats are converted to f32."""
        tensor = self._tensors[name].to(device)
        return tensor.to(torch.float32) if tensor.dtype in HALVES else tensor

    def finite(self, name: str) -> bool:
        """Whether a tensor holds no NaN and no infinity: it never changes, so that it is read once."""
        if name not in self._finite and _is_finite(self._tensors[name]):
            self._finite.add(name)
        return name in self._finite

    def content(self, names: Iterable[str]) -> Mapping[str, Tensor]:
        """The tensors of those names for a digest, which reads one after the other (`_Content`)."""
        return _Content(self, names)

    def meta(self, name: str) -> Tensor:
        """The shape, strides and type of what `read` gives, on the meta device."""
        tensor = self._tensors[name]
        return torch.empty_like(tensor, dtype=torch.float32 if tensor.dtype in HALVES else None, device="meta")


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


class _Content(Mapping[str, Tensor]):
    """Tensors that are made contiguous as they are read, and bfloat16, which NumPy lacks, whole numbers of its bits."""

    def __init__(self, tensors: Mapping[str, Tensor], names: Iterable[str]) -> None:
        self._tensors, self._names = tensors, sorted(names)

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._tensors[name].contiguous()
        return tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@dataclass(frozen=True)
class WeightPlan:
    """The plan of a weight; `format` names an entry of `mpq_compiler.formats`."""

    format: str
    sites: tuple[str, ...] = ()
    """The names of the calls that read the weight."""


@dataclass(frozen=True)
class ActivationPlan:
    """The plan of a tensor edge (named by its producing node), or of an attention's probabilities (`graph.softmax`).

    A dynamic plan stores nothing: scale and zero point of each row are computed with the tensor. A plan with an
    ``exponent`` rounds to small floats, which have no zero points; layers that read them compute in float.
    """

    bits: int
    scale: str | None
    """The store name of the f16 scales, one for each time group."""
    zero_point: str | None
    """The store name of the u8 zero points, one for each time group."""
    dynamic: bool = False
    exponent: int | None = None
    """The bits of exponent of a small float of ``bits`` bits, a sign among them; None for integers."""

    @property
    def kind(self) -> str:
        """The kind of the codes: ``u8`` for integers, ``e4m3`` (bits of exponent and mantissa) for small floats."""
        return f"u{self.bits}" if self.exponent is None else f"e{self.exponent}m{self.bits - 1 - self.exponent}"

    @property
    def group_bytes(self) -> int:
        """The stored bytes of a time group: an f16 scale, and a u8 zero point where there is one."""
        return 2 * (self.scale is not None) + (self.zero_point is not None)

    def label(self, groups: int) -> str:
        """The kind and the number of time groups, ``u8/t4``; ``u8/token`` where every row has its own scale."""
        return f"{self.kind}/token" if self.dynamic else f"{self.kind}/t{groups}"


@dataclass
class Program:
    """A program in any stage, which passes take and return."""

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
    """The float leftovers of the plan: the reason, in words, by the name of the node or weight."""
    facts: Facts = field(default_factory=Facts)
    """The facts that passes leave for later ones."""

    def __post_init__(self) -> None:
        if not isinstance(self.facts, Facts):
            self.facts = Facts(self.facts)

    def fork(self, **changes: Any) -> Program:
        """Copies the program: graph, regions, plans and facts are its own, the tensors are shared."""
        own: dict[str, Any] = {
            "graph": copy_graph(self.graph),
            "regions": {name: copy_graph(g) for name, g in self.regions.items()},
            "weights": dict(self.weights),
            "activations": dict(self.activations),
            "fallbacks": dict(self.fallbacks),
            "facts": Facts(self.facts),
        }
        return dataclasses.replace(self, **(own | changes))

    def note(self, sentence: str) -> None:
        """Notes a sentence for the user, which report and dumps repeat."""
        self.facts[NOTES] = (*self.facts.get(NOTES, ()), sentence)

    def node(self, name: str) -> fx.Node:
        """The node called ``name``. KeyError: there is none."""
        found: fx.Node | None = next((n for n in self.graph.nodes if n.name == name), None)
        if found is None:
            raise KeyError(name)
        return found

    def reads_floats(self, call: fx.Node) -> bool:
        """Whether the tensor that a quantizable call reads is planned as small floats."""
        plan = self.activations.get(operand(call, 0).name)
        return plan is not None and plan.exponent is not None

    @property
    def attentions(self) -> list[fx.Node]:
        """The attention calls on computed tensors, which have a quantized form, in graph order."""
        calls = [n for n in self.graph.nodes if n.target is ops.attention]
        return [n for n in calls if all(operand(n, i).op != "get_attr" for i in range(3))]

    @property
    def quantizable(self) -> list[fx.Node]:
        """The linear and conv2d calls whose weight is a stored parameter, in graph order."""
        return [n for n in self.graph.nodes if weight_of(n) is not None]


NOTES = Fact[tuple[str, ...]]("notes")
"""Sentences for the user, by `Program.note`."""
PARAMETERS = Fact[int]("parameters")
"""Parameters of the model, those that the program does not read among them."""
TIME_GROUPS = Fact[Tensor]("time-groups")
"""f32 [groups - 1]: the boundaries of the time groups, ascending."""
PLANNED = Fact[Program]("planned")
"""The program before its quantizers were inserted."""
