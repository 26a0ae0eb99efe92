"""The target `reference`: torch interprets the packed program itself, anywhere, and thereby defines what is right.

The artifact holds the graph as JSON (`graph.json`) and the stored tensors of every other target.
"""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from mpq_compiler.artifact.bundle import Artifact
from mpq_compiler.ir import ops, stored_tensors
from mpq_compiler.ir.interpreter import run
from mpq_compiler.ir.program import InputSpec, Program, Stage, TensorStore
from mpq_compiler.support.errors import UserError
from mpq_compiler.support.files import decode_json

GRAPH = "graph.json"
_VERSION = 2
_MPQ = {entry.name: function for function, entry in ops.OPS.items()}


def load(artifact: Artifact, threads: int) -> Interpreter:
    """Loads the executor of an artifact (`runtime.compiled_denoiser`). UserError: its graph is not sound."""
    arrays = artifact.tensors()
    tensors = {entry["name"]: stored_tensors.restored(entry, arrays) for entry in artifact.manifest["tensors"]}
    return Interpreter(loads(artifact.file(GRAPH).read_text(encoding="utf-8"), tensors), threads)


class Interpreter:
    """Executes programs, by the names of their functions, with ``threads`` threads of torch."""

    def __init__(self, programs: Mapping[str, Program], threads: int) -> None:
        self.programs, self.threads = programs, threads
        self._own = dict(next(iter(programs.values())).tensors)

    def replace(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Replaces stored tensors, by name; all others are those of the artifact."""
        given = {name: torch.from_numpy(np.array(array)) for name, array in tensors.items()}
        for program in self.programs.values():
            program.tensors = TensorStore({**self._own, **given})

    def run(self, function: str, inputs: Sequence[np.ndarray]) -> np.ndarray:
        """Runs a function on inputs in the program's order; returns its output."""
        program = self.programs[function]
        named = zip((spec.name for spec in program.inputs), inputs, strict=True)
        tensors = {name: torch.from_numpy(np.array(array)) for name, array in named}
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            return run(program, tensors).numpy()
        finally:
            torch.set_num_threads(before)


# ------------------------------------------------------------------------------------- graphs as JSON


def dumps(programs: Mapping[str, Program]) -> str:
    """Encodes packed programs, by the names of their functions, as JSON: inputs, graphs and regions; tensors by name.

    Equal programs give equal text.
    """
    document = {"version": _VERSION, "functions": {name: _document(program) for name, program in programs.items()}}
    return json.dumps(document, indent=1, sort_keys=True, allow_nan=False) + "\n"


def _document(program: Program) -> dict[str, Any]:
    return {
        "inputs": [{"name": s.name, "shape": list(s.shape), "dtype": type_name(s.dtype)} for s in program.inputs],
        "graph": _nodes(program.graph),
        "regions": {name: _nodes(graph) for name, graph in sorted(program.regions.items())},
    }


def loads(text: str, tensors: dict[str, torch.Tensor]) -> dict[str, Program]:
    """Decodes the programs that `dumps` encoded, over the given tensors. UserError: the text holds no such graphs."""
    try:
        document = decode_json(text)
        if document["version"] != _VERSION:
            raise ValueError(f"version {document['version']}")
        store = TensorStore(tensors)
        return {name: _program(each, store) for name, each in document["functions"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"{GRAPH} holds no graph that this version reads ({error})"
        raise UserError(f"{what}; compile the artifact again") from error


def _program(document: dict[str, Any], tensors: TensorStore) -> Program:
    inputs = tuple(InputSpec(i["name"], tuple(i["shape"]), _dtype(i["dtype"])) for i in document["inputs"])
    regions = {name: _graph(nodes) for name, nodes in document["regions"].items()}
    return Program(_graph(document["graph"]), tensors, inputs, Stage.PACKED, regions=regions)


def _nodes(graph: fx.Graph) -> list[dict[str, Any]]:
    return [
        {
            "name": node.name,
            "op": node.op,
            "target": _target_name(node.target) if node.op == "call_function" else str(node.target),
            "args": _encode(node.args),
            "kwargs": {key: _encode(value) for key, value in node.kwargs.items()},
        }
        for node in graph.nodes
    ]


def _graph(nodes: list[dict[str, Any]]) -> fx.Graph:
    graph = fx.Graph()
    known: dict[str, fx.Node] = {}
    for entry in nodes:
        op, target = entry["op"], entry["target"]
        if op not in ("placeholder", "get_attr", "call_function", "call_module", "output"):
            raise ValueError(f"node '{entry['name']}' is a {op}")
        args = _decode(entry["args"], known)
        kwargs = {key: _decode(value, known) for key, value in entry["kwargs"].items()}
        node = graph.create_node(op, _target(target) if op == "call_function" else target, args, kwargs)
        node.name = entry["name"]
        known[node.name] = node
    return graph


def _target_name(target: Any) -> str:
    if target in ops.OPS:
        return ops.OPS[target].name
    if target is operator.getitem:
        return "getitem"
    if isinstance(target, torch._ops.OpOverload) and target.namespace == "aten":
        return str(target)
    raise UserError(f"operator {target} has no name in {GRAPH}; pack the program first (fold-fake-quant)")


def _target(name: str) -> Any:
    """The operator of a name: one of mpq, `getitem`, or one of aten; nothing else can be named."""
    if name in _MPQ:
        return _MPQ[name]
    if name == "getitem":
        return operator.getitem
    namespace, packet, overload = name.split(".")
    if namespace != "aten":
        raise ValueError(f"operator '{name}'")
    found = getattr(getattr(torch.ops.aten, packet), overload)
    if not isinstance(found, torch._ops.OpOverload):
        raise ValueError(f"operator '{name}'")
    return found


def _encode(value: Any) -> Any:
    """Encodes an argument as JSON; a value that JSON has no form for becomes an object with one key."""
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, tuple):
        return {"tuple": [_encode(v) for v in value]}
    if isinstance(value, list):
        return [_encode(v) for v in value]
    if isinstance(value, torch.dtype):
        return {"dtype": type_name(value)}
    if isinstance(value, torch.device):
        return {"device": "cpu"}
    if isinstance(value, torch.layout | torch.memory_format):
        return {"torch": str(value).removeprefix("torch.")}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise UserError(f"an argument of type {type(value).__name__} has no form in {GRAPH}")


_NAMES = ("strided", "contiguous_format", "preserve_format", "channels_last")


def _decode(value: Any, known: dict[str, fx.Node]) -> Any:
    if isinstance(value, list):
        return [_decode(v, known) for v in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "node":
        return known[content]
    if kind == "tuple":
        return tuple(_decode(v, known) for v in content)
    if kind == "dtype":
        return _dtype(content)
    if kind == "device":
        return torch.device("cpu")
    if kind == "float":
        return float(content)
    if kind == "torch" and content in _NAMES:
        return getattr(torch, content)
    raise ValueError(f"an argument of kind '{kind}'")


def type_name(dtype: torch.dtype) -> str:
    """The name of a type without "torch."."""
    return str(dtype).removeprefix("torch.")


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"'{name}' is no type")
    return found
