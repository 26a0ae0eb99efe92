"""Traces the denoiser to a torch.fx graph."""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils import _pytree as pytree

from mpq_compiler.ir.aten import aten
from mpq_compiler.ir.graph import copy_graph, merge_equal, operand, prune
from mpq_compiler.ir.program import PARAMETERS, Program, Stage, TensorStore
from mpq_compiler.pipeline.passes import Contract, Pass, Role
from mpq_compiler.pipeline.session import Session
from mpq_compiler.support.errors import UserError

NO_OPS = (aten.dropout.default, aten.detach.default, aten.alias.default)
ASSERTIONS = (
    aten._assert_tensor_metadata.default,
    aten._assert_scalar.default,
    aten.sym_constrain_range_for_size.default,
)
LARGEST_BATCH = 60
"""The largest batch that is traced: from 64 samples on, diffusers' upsampling takes another path than below."""


@dataclass(frozen=True)
class Trace(Pass):
    """Traces the denoiser once, cleans the graph and names it by weight paths.

    `torch.export` (non-strict) with a symbolic batch; the graph it gives is the only one there ever is. Cleaning keeps
    every bit: assertions, dropout, casts and arithmetic that change nothing go, equal calls are merged, and what does
    not depend on an input is computed here.

        %dropout = aten.dropout(%silu_2, 0.0, False)
        %conv2d_4 = aten.conv2d(%dropout, %p_model_mid_block_resnets_0_conv1_weight, ...)
      =>
        %mid_block_resnets_0_nonlinearity_silu = aten.silu(%mid_block_resnets_0_norm1)
        %mid_block_resnets_0_conv1             = aten.conv2d(%mid_block_resnets_0_nonlinearity_silu, .weight, ...)
    """

    contract: ClassVar[Contract] = Contract.IDENTICAL
    role: ClassVar[Role | None] = Role.REWRITES
    provides: ClassVar[frozenset[str]] = frozenset({"graph"})

    def run(self, program: Program, session: Session) -> Program:
        denoiser = session.denoiser
        assert denoiser is not None
        specs = tuple(denoiser.input_specs.values())
        wrapper = _Positional(denoiser.module, [s.name for s in specs])
        graph, attributes = _export(wrapper, denoiser)
        prefix = next(n for n, m in wrapper.named_modules() if m is denoiser.module.model) + "."
        _require_function(graph, denoiser, prefix)
        tensors = TensorStore()
        names = {p.data_ptr(): name for name, p in denoiser.module.model.named_parameters()}  # one for tied parameters
        for node in graph.nodes:
            if node.op == "get_attr":
                path, value = str(node.target), attributes(str(node.target))
                name = path.removeprefix(prefix) if path.startswith(prefix) else f"constant.{path}"
                node.target = tensors.add(names.get(value.data_ptr(), name), value)
        for node, spec in zip([n for n in graph.nodes if n.op == "placeholder"], specs, strict=True):
            node.target = spec.name
        program = program.fork(
            graph=graph,
            tensors=tensors,
            inputs=specs,
            stage=Stage.FLOAT,
            model=denoiser.name,
            config=dict(denoiser.config),
        )
        program.facts[PARAMETERS] = denoiser.parameters
        _strip(graph)
        executed = {str(n.target) for n in graph.nodes if n.op == "get_attr"}
        for name, _ in denoiser.module.model.named_parameters():
            if name not in executed:
                program.fallbacks[name] = "never executed, and left out of the artifact"
        merge_equal(graph)
        _fold_constants(graph, tensors)
        _require_real(graph, denoiser, prefix)
        _rename(graph, prefix)
        program.graph = copy_graph(graph)
        return program


class _Positional(nn.Module):
    """A denoiser with positional inputs, since torch.export binds dynamic shapes to positional tensors only."""

    def __init__(self, inner: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.inner = inner
        self.names = names

    def forward(self, *tensors: Tensor) -> Tensor:
        output: Tensor = self.inner(**dict(zip(self.names, tensors, strict=True)))
        return output


def _export(wrapper: nn.Module, denoiser: Any) -> tuple[fx.Graph, Any]:
    inputs = {name: value.contiguous() for name, value in denoiser.example_inputs().items()}
    batch = torch.export.Dim("batch", min=2, max=LARGEST_BATCH)
    dynamic = tuple({0: batch} for _ in inputs)
    try:
        # torch prints the whole graph where an export fails; the exception says what went wrong
        with torch.no_grad(), contextlib.redirect_stderr(io.StringIO()):
            exported = torch.export.export(
                wrapper,
                tuple(inputs.values()),
                dynamic_shapes={"tensors": dynamic},
                strict=False,
            )
            module = exported.module(check_guards=False)
            if in_place := bool(_in_place(module.graph)):
                exported = exported.run_decompositions({})  # to operators that return a new tensor
                module = exported.module(check_guards=False)
    except Exception as error:
        raise UserError(f"{denoiser.name} cannot be traced: {_reason(error, denoiser.module.model)}") from error
    graph = copy_graph(module.graph)  # without the module, whose parameters live in the store
    for node in graph.nodes:
        if in_place and node.target is aten.view.default:  # was a reshape, and has the strides that it was traced with
            node.target = aten.reshape.default
        if node.op == "output" and isinstance(node.args[0], tuple | list) and len(node.args[0]) == 1:
            node.args = (node.args[0][0],)

    shape, (_, *sides) = operand(graph.output_node(), 0).meta["val"].shape, denoiser.latent_shape
    if list(shape[2:]) != sides:
        given, made = "x".join(map(str, sides)), "x".join(map(str, shape[1:]))
        raise UserError(f"{denoiser.name} takes no latents of {given}, it gives {made} for them: give another size")

    def attribute(path: str) -> Tensor:
        value: Any = module
        for part in path.split("."):
            value = getattr(value, part)
        found: Tensor = value.detach()
        return found

    return graph, attribute


def _reason(error: BaseException, model: nn.Module) -> str:
    """The module that could not be traced and the reason, in one line."""
    paths = {id(module): name for name, module in model.named_modules()}
    at: Any = model
    trace = error.__traceback__
    while trace is not None:
        found = trace.tb_frame.f_locals.get("self")
        if id(found) in paths:
            at = found
        trace = trace.tb_next
    text = " ".join(str(error).strip().split("\n")[0].split()) or type(error).__name__
    if "data-dependent" in text or "symbolic_shapes" in type(error).__module__:
        text = f"its control flow depends on the values of tensors ({text})"
    where = f"module '{paths[id(at)]}' ({type(at).__name__})" if paths[id(at)] else type(at).__name__
    return f"{where}: {text}"


def _in_place(graph: fx.Graph) -> list[fx.Node]:
    """The calls that write to an operand and depend on an input; others only make constants."""
    decided: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" or not decided.isdisjoint(node.all_input_nodes):
            decided.add(node)
    mutable = (n for n in graph.nodes if getattr(getattr(n.target, "_schema", None), "is_mutable", False))
    return [node for node in mutable if node in decided]


def _require_function(graph: fx.Graph, denoiser: Any, prefix: str) -> None:
    """Raises a UserError where a call draws random numbers, or changes a tensor in place."""
    for node in _in_place(graph):
        raise _refusal(node, denoiser, prefix, f"{_operator(node)} changes a tensor in place")
    for node in graph.nodes:
        seeded = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        if node.target is aten.scaled_dot_product_attention.default:
            seeded = bool(node.args[4] if len(node.args) > 4 else node.kwargs.get("dropout_p"))
        if seeded and node.target not in NO_OPS:
            reason = f"{_operator(node)} draws random numbers, and a compiled denoiser is a function of its inputs"
            raise _refusal(node, denoiser, prefix, reason)


def _require_real(graph: fx.Graph, denoiser: Any, prefix: str) -> None:
    """Raises a UserError where a call returns complex numbers, or a tensor whose size depends on values."""
    for node in graph.nodes:
        made = node.meta.get("val") if node.op == "call_function" else None
        if free_unbacked_symbols(made):
            reason = f"the size of what {_operator(node)} gives depends on the values of tensors"
            raise _refusal(node, denoiser, prefix, reason)
        if any(isinstance(t, Tensor) and t.is_complex() for t in pytree.tree_leaves(made)):
            raise _refusal(node, denoiser, prefix, f"{_operator(node)} computes with complex numbers")


def _refusal(node: fx.Node, denoiser: Any, prefix: str, reason: str) -> UserError:
    path = _module_path(node, prefix)
    kind = type(denoiser.module.model.get_submodule(path)).__name__
    return UserError(f"{denoiser.name} cannot be traced: {f'module {path!r} ({kind})' if path else kind}: {reason}")


def _same_value(node: fx.Node) -> fx.Node | None:
    """The operand that the call returns unchanged, bit for bit, or None."""
    if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
        return None
    x, out = node.args[0].meta.get("val"), node.meta.get("val")
    if node.target in NO_OPS:
        return node.args[0]
    if not isinstance(x, Tensor) or not isinstance(out, Tensor) or free_unbacked_symbols([x, out]):
        return None
    if x.dtype != out.dtype or x.shape != out.shape:
        return None
    if node.target in (aten.to.dtype, aten._to_copy.default, aten.to.dtype_layout, aten.to.device):
        return node.args[0]
    if node.target in (aten.mul.Tensor, aten.div.Tensor) and len(node.args) == 2:
        factor = node.args[1]
        if factor == 1 and not isinstance(factor, fx.Node):
            return node.args[0]
        if isinstance(factor, fx.Node) and factor.target is aten.ones.default:
            return node.args[0]
    if node.target is aten.expand.default:
        return node.args[0]
    return None


def _strip(graph: fx.Graph) -> None:
    for node in list(graph.nodes):
        if node.target in ASSERTIONS:
            graph.erase_node(node)
        elif (same := _same_value(node)) is not None:
            node.replace_all_uses_with(same)
        elif node.target in (aten.view.default, aten.reshape.default):
            # -1 in place of the size that grows with the batch, which leaves no arithmetic on sizes in the graph
            sizes = [s if isinstance(s, int) else -1 for s in node.meta["val"].shape]
            if sizes.count(-1) == 1:
                node.args = (node.args[0], sizes)
        elif node.target is aten.repeat_interleave.self_int:
            node.kwargs = {}  # the size of the output, known without
    prune(graph)


def _fold_constants(graph: fx.Graph, tensors: TensorStore) -> None:
    """Folds calls that depend on no input into stored constants; parameters themselves stay as they are.

    A result that equals a parameter (a part of several joined) is read as that parameter.
    """
    values: dict[fx.Node, Any] = {}
    parameters: dict[fx.Node, set[str]] = {}
    for node in graph.nodes:
        parameters[node] = set().union(*(parameters[n] for n in node.all_input_nodes))
        if node.op == "get_attr":
            values[node] = tensors[str(node.target)]
            parameters[node] = {str(node.target)}
        elif node.op == "call_function" and all(n in values for n in node.all_input_nodes):
            args, kwargs = fx.map_arg(node.args, values.__getitem__), fx.map_arg(node.kwargs, values.__getitem__)
            with torch.no_grad():
                value = node.target(*args, **kwargs)
            if isinstance(value, Tensor | tuple | list):
                values[node] = value
    for node in list(graph.nodes):
        folded = node.op == "call_function" and isinstance(values.get(node), Tensor)
        if folded and any(u not in values for u in node.users):
            same = (name for name in sorted(parameters[node]) if _equal(tensors[name], values[node]))
            name = next(same, None) or tensors.add(f"constant.{node.name}", values[node].contiguous())
            with graph.inserting_before(node):
                constant = graph.get_attr(name)
            constant.meta = dict(node.meta)
            node.replace_all_uses_with(constant)
    prune(graph)


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


def _rename(graph: fx.Graph, prefix: str) -> None:
    """Names calls by their weight's path, else by the module that makes them."""
    taken: dict[str, int] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            name = str(node.target)
        elif node.op == "get_attr":
            name = "p_" + str(node.target)
        elif node.op == "call_function":
            name = _call_name(node, prefix)
        else:
            continue
        name = name.replace(".", "_")
        taken[name] = taken.get(name, -1) + 1
        node.name = name if not taken[name] else f"{name}_{taken[name]}"


def _call_name(node: fx.Node, prefix: str) -> str:
    weights = [n for n in node.all_input_nodes if n.op == "get_attr" and not str(n.target).startswith("constant.")]
    if weights:
        return str(weights[0].target).rpartition(".")[0] or str(weights[0].target)
    path = _module_path(node, prefix)
    return f"{path}.{_operator(node)}" if path else _operator(node)


def _operator(node: fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target)).split(".")[0]


def _module_path(node: fx.Node, prefix: str) -> str:
    """The path in the model of the innermost module that makes the call; empty for the model itself."""
    paths = [entry[0] for entry in (node.meta.get("nn_module_stack") or {}).values()]
    return paths[-1].removeprefix(prefix) if paths and paths[-1].startswith(prefix) else ""
