"""Values as bytes for processes of other machines: programs, graphs, nodes and tensors among them.

pickle cannot take torch's operators, takes a graph node by node as deep as it is long, and copies every tensor into its
stream. Here operators go by name, a graph as a list with all of its nodes, and large tensors beside the stream, where
machines share them: what is unpacked reads them in place.
"""

from __future__ import annotations

import io
import operator
import pickle
import platform
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import version
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from mpq_compiler.ir.facts import Facts
from mpq_compiler.ir.program import Program, TensorStore
from mpq_compiler.support import plugins
from mpq_compiler.support.cluster import Shipping
from mpq_compiler.support.host import vendor

LARGE = 1 << 16
"""The bytes from which on a tensor lies beside the stream."""
NO_TENSORS: Mapping[str, Tensor] = MappingProxyType({})
ALIGNED = 64
"""The alignment of torch's own memory: on other addresses kernels may take other paths, and give other bits."""


def pack(value: object, known: Mapping[str, Tensor] = NO_TENSORS) -> tuple[bytes, list[Tensor]]:
    """Packs a value: the stream, and the large tensors that lie beside it, as `memory` gives their bytes.

    Tensors that are ``known`` to whoever unpacks it go by their names.
    """
    stream = io.BytesIO()
    packer = _Packer(stream, known)
    packer.dump(value)
    return stream.getvalue(), packer.large


def unpack(
    stream: bytes, large: Sequence[np.ndarray], copy: bool = False, known: Mapping[str, Tensor] = NO_TENSORS
) -> object:
    """Unpacks what `pack` gave.

    Args:
        stream: of `pack`.
        large: the bytes of the large tensors, u8 [N], in their order.
        copy: makes large tensors of their own memory; else they read ``large`` in place and must not be changed.
        known: the tensors that were known to `pack`.
    """
    return _Unpacker(io.BytesIO(stream), large, copy, known).load()


def memory(tensor: Tensor) -> np.ndarray:
    """The bytes of a tensor's memory from its first element to its last, u8 [N], not copied where it is on the CPU."""
    return _flat(tensor).cpu().view(torch.uint8).numpy()


def prepare() -> None:
    """Makes a process ready for tasks: torch runs on one thread, as it does wherever bits must be equal."""
    torch.set_num_threads(1)


@cache
def identity() -> dict[str, str]:
    """What the bits of a result depend on beside its inputs: versions, and the CPU's features and maker."""
    return {
        "Python": f"{sys.version_info.major}.{sys.version_info.minor}",
        "mpq-compiler": f"{version('mpq-compiler')} ({plugins.digest('mpq_compiler')})",
        "torch": torch.__version__,
        "NumPy": np.__version__,
        "CPU": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()} {vendor()}".strip(),
    }


def lean(program: Program, *facts: str) -> Program:
    """The program with what running it takes: its graphs, the very same, the tensors that they read, these facts."""
    graphs = (program.graph, *program.regions.values())
    read = dict.fromkeys(str(n.target) for graph in graphs for n in graph.nodes if n.op == "get_attr")
    tensors = TensorStore({name: program.tensors[name] for name in read})
    known = Facts({fact: program.facts[fact] for fact in program.facts if fact.name in facts})
    return replace(program, tensors=tensors, config={}, weights={}, activations={}, fallbacks={}, facts=known)


def _flat(tensor: Tensor) -> Tensor:
    """The elements of a tensor's memory from the first to the last, [N], whatever its strides."""
    return tensor.detach().as_strided((_span(tensor),), (1,))


def _dense(tensor: Tensor) -> Tensor:
    """The tensor, with its strides; a thin slice of something large is copied."""
    return tensor if _span(tensor) <= 2 * max(tensor.numel(), 1) else tensor.contiguous()


def _span(tensor: Tensor) -> int:
    return 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))


@dataclass(frozen=True)
class _Place:
    """A node in its graph's list."""

    index: int


class _Nodes(list[fx.Node]):
    """The nodes of a graph, which are pickled together."""

    def __init__(self, graph: fx.Graph) -> None:
        super().__init__(graph.nodes)
        self.graph = graph
        self.places = {node: _Place(i) for i, node in enumerate(self)}

    def rows(self) -> list[tuple[object, ...]]:
        """Each node as plain data, with nodes in its arguments by their places."""
        return [
            (n.name, n.op, n.target, _mapped(n.args, self._place), _mapped(n.kwargs, self._place), n.type)
            for n in self
        ]

    def _place(self, node: object) -> object:
        assert isinstance(node, fx.Node)
        return self.places[node]


def _nodes(rows: Sequence[tuple[str, str, fx.node.Target, object, object, object]]) -> _Nodes:
    graph, nodes = fx.Graph(), list[fx.Node]()

    def node_at(value: object) -> object:
        assert isinstance(value, _Place)
        return nodes[value.index]

    for name, op, target, args, kwargs, kind in rows:
        # the arguments of nodes as `fx.Graph.create_node` types them, which no plain value has
        node = graph.create_node(op, target, _mapped(args, node_at), _mapped(kwargs, node_at), name, kind)  # type: ignore[arg-type]
        node.name = name
        nodes.append(node)
    return _Nodes(graph)


def _mapped(value: object, change: Callable[[object], object]) -> object:
    """The arguments of a node with the nodes in them changed to places, or back."""
    if isinstance(value, tuple | list):
        return type(value)([_mapped(v, change) for v in value])
    if isinstance(value, dict):
        return {name: _mapped(v, change) for name, v in value.items()}
    if isinstance(value, slice):
        return slice(*(_mapped(v, change) for v in (value.start, value.stop, value.step)))
    if isinstance(value, fx.Node | _Place):
        return change(value)
    return value


def _operator(name: str, overload: str) -> OpOverload:
    namespace, _, function = name.partition("::")
    found: OpOverload = getattr(getattr(getattr(torch.ops, namespace), function), overload)
    return found


def _small(data: bytes, dtype: torch.dtype, shape: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    flat = torch.empty(len(data) // dtype.itemsize, dtype=dtype)
    if data:
        flat.view(torch.uint8).copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    return flat.as_strided(shape, stride)


class _Packer(pickle.Pickler):
    def __init__(self, stream: io.BytesIO, known: Mapping[str, Tensor]) -> None:
        super().__init__(stream, protocol=5)
        self.large: list[Tensor] = []
        self._known = {id(tensor): name for name, tensor in known.items()}
        self._places: dict[int, tuple[int, Tensor]] = {}
        """The place of a large tensor beside the stream, and the tensor itself, which keeps its id its own."""
        self._tables: dict[fx.Graph, _Nodes] = {}

    def persistent_id(self, obj: object) -> object:
        if (name := self._known.get(id(obj))) is not None:
            return name
        if type(obj) is not Tensor or obj.layout != torch.strided or obj.numel() * obj.element_size() < LARGE:
            return None
        if id(obj) not in self._places:
            self._places[id(obj)] = len(self.large), obj
            self.large.append(_dense(obj))
        place, _ = self._places[id(obj)]
        return place, obj.dtype, tuple(obj.shape), self.large[place].stride()

    def reducer_override(self, obj: object) -> str | tuple[Callable[..., object], tuple[object, ...]]:
        if isinstance(obj, torch.nn.Parameter):
            return torch.nn.Parameter, (obj.detach(), obj.requires_grad)
        if type(obj) is Tensor and obj.layout == torch.strided and obj.device.type == "cpu":
            held = _dense(obj)
            data = memory(held).tobytes() if obj.numel() else b""
            return _small, (data, obj.dtype, tuple(obj.shape), held.stride())
        if isinstance(obj, OpOverload):
            return _operator, (obj._schema.name, obj._overloadname)
        if isinstance(obj, TensorStore):
            return TensorStore, ({name: obj[name] for name in obj},)
        if isinstance(obj, _Nodes):
            return _nodes, (obj.rows(),)
        if isinstance(obj, fx.Graph):
            return getattr, (self._table(obj), "graph")
        if isinstance(obj, fx.Node):
            table = self._table(obj.graph)
            return operator.getitem, (table, table.places[obj].index)
        return NotImplemented  # type: ignore[no-any-return]

    def _table(self, graph: fx.Graph) -> _Nodes:
        if graph not in self._tables:
            self._tables[graph] = _Nodes(graph)
        return self._tables[graph]


class _Unpacker(pickle.Unpickler):
    def __init__(
        self, stream: io.BytesIO, large: Sequence[np.ndarray], copy: bool, known: Mapping[str, Tensor]
    ) -> None:
        super().__init__(stream)
        self._large, self._copy, self._known = large, copy, known
        self._made: dict[int, Tensor] = {}

    def persistent_load(self, pid: str | tuple[int, torch.dtype, tuple[int, ...], tuple[int, ...]]) -> Tensor:
        if isinstance(pid, str):
            return self._known[pid]
        place, dtype, shape, stride = pid
        if place not in self._made:
            array = self._large[place]
            copied = self._copy or array.ctypes.data % ALIGNED
            with warnings.catch_warnings():  # that arrays are read-only: so are tensors of tasks
                warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
                flat = torch.from_numpy(array)
            self._made[place] = (flat.clone() if copied else flat).view(dtype).as_strided(shape, stride)
        return self._made[place]


SHIPPING = Shipping(pack, memory, unpack, prepare, identity)
"""How programs and tensors go to a cluster."""
