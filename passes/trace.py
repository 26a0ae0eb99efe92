"""Traces the denoiser to a torch.fx graph."""

from __future__ import annotations

import contextlib
import functools
import io
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, make_fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from mpq_compiler.frontend.call_module import CallModule
from mpq_compiler.frontend.deciding import deciding
from mpq_compiler.frontend.widened import stored, untouched
from mpq_compiler.ir import ops
from mpq_compiler.ir.aten import aten
from mpq_compiler.ir.batching import with_batch
from mpq_compiler.ir.complex_numbers import to_reals
from mpq_compiler.ir.editor import bound
from mpq_compiler.ir.graph import arguments, copy_graph, function_of, merge_equal, operand, prune
from mpq_compiler.ir.program import PARAMETERS, Program, Stage, TensorStore
from mpq_compiler.pipeline.passes import Contract, Pass, Role
from mpq_compiler.pipeline.session import Session
from mpq_compiler.sampling.call_tree import TIME
from mpq_compiler.support.errors import UserError
from mpq_compiler.support.execution import RunContext

if TYPE_CHECKING:
    from mpq_compiler.frontend.denoiser import Denoiser

NO_OPS = (aten.dropout.default, aten.detach.default, aten.detach_.default, aten.alias.default)
ASSERTIONS = (
    aten._assert_tensor_metadata.default,
    aten._assert_scalar.default,
    aten.sym_constrain_range_for_size.default,
)
CASTS = {
    *(aten.to.dtype, aten._to_copy.default, aten.to.dtype_layout, aten.to.device, aten.type_as.default),
}
REPEATS = {aten.expand.default, aten.repeat.default, aten.broadcast_to.default}
PRODUCTS = {aten.matmul.default, aten.mm.default}
TRANSPOSES = {aten.numpy_T.default, aten.t.default, aten.transpose.int, aten.permute.default}
MADE = {aten.ones.default, aten.zeros.default, aten.full.default}
QUANTIZERS = ("_q", "_w")
"""What names of quantizers end in, behind that of what they quantize; a model may have modules `norm` and `norm_q`."""
Target = Callable[..., object]
Arguments = tuple[object, ...]
Named = dict[str, object] | None
READS: set[Target] = {Tensor.item, Tensor.tolist, Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__}
"""Methods that make Python values of a tensor."""
LARGEST_BATCH = 60
"""The largest batch that is traced: from 64 samples on, diffusers' upsampling takes another path than below."""


MOST_APART = 1e-3
"""The most by which a graph of a batch departs from its model, relative to the output; the order of sums does less."""


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
        graph, attributes = _export(wrapper, denoiser, session)
        prefix = next(n for n, m in wrapper.named_modules() if m is denoiser.module.model) + "."
        _require_function(graph, denoiser, prefix)
        tensors = TensorStore()
        parameters = denoiser.module.model.named_parameters()  # one for tied parameters
        names = {stored(p).data_ptr(): name for name, p in parameters}
        for node in graph.nodes:
            if node.op == "get_attr":
                path, value = str(node.target), stored(attributes(str(node.target)))
                name = path.removeprefix(prefix) if path.startswith(prefix) else f"constant.{path}"
                node.target = tensors.hold(names.get(value.data_ptr(), name), value)
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
        prune(graph)
        executed = {str(n.target) for n in graph.nodes if n.op == "get_attr"}
        _leave_out_empty(graph)
        _strip(graph, tensors)
        _repeat_rows(graph)
        for name, _ in denoiser.module.model.named_parameters():
            if name not in executed:
                program.fallbacks[name] = "never executed, and left out of the artifact"
        merge_equal(graph)
        _fold_constants(graph, tensors)
        _without_counted_samples(graph, tensors)
        to_reals(graph, tensors)
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


class _Decided(ValueError):
    """The values of inputs decide what a model computes."""


def _export(
    wrapper: nn.Module, denoiser: Denoiser, context: RunContext
) -> tuple[fx.Graph, Callable[[str], Tensor]]:
    try:
        graph, module, in_place = _exported(wrapper, denoiser)
    except Exception as error:
        try:
            graph, module, in_place = _of_one(wrapper, denoiser, context)
        except Exception as second:
            # that the first one took a size for a constant says nothing of what stands in the way
            told = second if "Constraints violated" in str(error) else error
            text = str(second) if isinstance(second, _Decided) else None
            reason = _reason(told, denoiser.module.model, text)
            raise UserError(f"{denoiser.name} cannot be traced: {reason}") from error
    for node in graph.nodes:
        if in_place and node.target in (aten.view.default, aten._unsafe_view.default):
            node.target = aten.reshape.default  # which it was, and has the strides that it was traced with
        if node.op == "output" and isinstance(node.args[0], tuple | list) and len(node.args[0]) == 1:
            node.args = (node.args[0][0],)

    shape, (_, *sides) = operand(graph.output_node(), 0).meta["val"].shape, denoiser.latent_shape
    if denoiser.form is None and list(shape[2:]) != sides:
        given, made = "x".join(map(str, sides)), "x".join(map(str, shape[1:]))
        raise UserError(f"{denoiser.name} takes no latents of {given}, it gives {made} for them: give another size")

    return graph, functools.partial(_attribute, module)


def _exported(wrapper: nn.Module, denoiser: Denoiser) -> tuple[fx.Graph, nn.Module, bool]:
    """The graph at a symbolic batch, its module, and whether calls in place were rewritten."""
    inputs = tuple(value.contiguous() for value in denoiser.example_inputs().values())
    symbol = torch.export.Dim("batch", min=2, max=LARGEST_BATCH)
    dynamic = {"tensors": tuple({0: symbol} for _ in inputs)}
    # torch prints the whole graph where an export fails; the exception says what went wrong
    with torch.no_grad(), contextlib.redirect_stderr(io.StringIO()), untouched(wrapper) as restore, _DataIsSeen():
        exported = torch.export.export(wrapper, inputs, dynamic_shapes=dynamic, strict=False)
        module = exported.module(check_guards=False)
        if in_place := bool(_in_place(module.graph)):
            exported = exported.run_decompositions({})  # to operators that return a new tensor
            module = exported.module(check_guards=False)
    restore(module)
    return copy_graph(module.graph), module, in_place  # without the module, whose parameters live in the store


def _of_one(wrapper: nn.Module, denoiser: Denoiser, context: RunContext) -> tuple[fx.Graph, nn.Module, bool]:
    """The graph of a model whose code cannot be traced for any batch: that of one sample, made one of a batch."""
    given = {name: value.contiguous() for name, value in denoiser.example_inputs(1).items()}
    module = denoiser.module
    known = module.decided if isinstance(module, CallModule) else None  # to call a large model takes a minute
    names = sorted(deciding(module, given) if known is None else known)
    if {denoiser.latent, TIME} & {*names}:
        raise _Decided(
            "its control flow depends on the values of what it computes of its latents or their time, as routers of "
            "experts do; a compiled graph has no such choices"
        )
    if names:
        raise _Decided(
            f"its control flow depends on the values of {', '.join(map(repr, names))}, which differ between the "
            "samples that were recorded: record calls in which they are equal, such as texts padded to one length"
        )
    inputs = tuple(given.values())
    with torch.no_grad(), contextlib.redirect_stderr(io.StringIO()), untouched(wrapper) as restore, _ConstantsAreRead():
        traced = make_fx(wrapper, tracing_mode="real", pre_dispatch=True, record_module_stack=True)(*inputs)
        _without_autocasts(traced.graph)
        _compute_made(traced)
        if in_place := bool(_in_place(traced.graph)):
            traced.recompile()
            exported = torch.export.export(traced, inputs, strict=False).run_decompositions({})
            traced = exported.module(check_guards=False)
    restore(traced)
    for node in [n for n in traced.graph.nodes if n.target in ASSERTIONS or n.op == "call_module"]:
        traced.graph.erase_node(node)
    _read_masks(traced)
    _leave_out_empty(traced.graph)
    graph = with_batch(traced.graph)
    _require_equal(fx.GraphModule(traced, copy_graph(graph)), wrapper, denoiser, context)
    return graph, traced, in_place


def _require_equal(graph: fx.GraphModule, wrapper: nn.Module, denoiser: Denoiser, context: RunContext) -> None:
    """ValueError: the graph of a batch, which rules made here and not torch, computes something else than the model."""
    given = [value.contiguous() for value in denoiser.example_inputs().values()]

    def output(of: nn.Module) -> Tensor:
        with torch.no_grad():
            found: Tensor = of(*given)
        return found

    expected, made = context.map(output, (wrapper, graph))  # each takes minutes of a large model
    apart = float((expected - made).norm() / expected.norm())
    if not apart <= MOST_APART:
        raise ValueError(f"the graph of a batch departs from the model by {100 * apart:.2g} %, a fault of the compiler")


class _DataIsSeen(TorchFunctionMode):
    """Makes `tensor.data` a view that a trace sees: what models write there would be lost."""

    def __torch_function__(self, func: Target, types: object, args: Arguments = (), kwargs: Named = None) -> object:
        if func == torch.Tensor.data.__get__:  # type: ignore[attr-defined]
            (tensor,) = args
            assert isinstance(tensor, Tensor)
            return tensor.detach()
        return func(*args, **(kwargs or {}))


class _ConstantsAreRead(_DataIsSeen):
    """Lets code read numbers of tensors that depend on no input."""

    def __torch_function__(self, func: Target, types: object, args: Arguments = (), kwargs: Named = None) -> object:
        if func in READS:
            with disable_proxy_modes_tracing():
                return func(*args)
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            with disable_proxy_modes_tracing():
                args = (args[0], _with_numbers(args[1]), *args[2:])
        return super().__torch_function__(func, types, args, kwargs)


def _with_numbers(index: object) -> object:
    """An index whose slices have numbers for bounds."""
    if isinstance(index, tuple):
        return tuple(map(_with_numbers, index))
    if isinstance(index, slice):
        bounds = (index.start, index.stop, index.step)
        return slice(*(int(bound) if isinstance(bound, Tensor) else bound for bound in bounds))
    return index


def _compute_made(module: fx.GraphModule) -> None:
    """Computes what is made of no input and no parameter, in the order of the calls: some change what others made."""
    values: dict[fx.Node, Any] = {}
    graph = module.graph
    for node in list(graph.nodes):
        if node.op == "get_attr" and str(node.target).startswith("_tensor_constant"):
            values[node] = _attribute(module, str(node.target)).clone()
        elif node.op == "call_function" and all(n in values for n in node.all_input_nodes):
            args, kwargs = (fx.map_arg(part, values.__getitem__) for part in (node.args, node.kwargs))
            values[node] = function_of(node)(*args, **kwargs)
    made = [n for n, v in values.items() if n.op == "call_function" and isinstance(v, Tensor)]
    stored_as: dict[str, Tensor] = {}
    for node in [n for n in made if any(user not in values for user in n.users)]:
        name = next((n for n, value in stored_as.items() if _equal(value, values[node])), f"made_{node.name}")
        stored_as[name] = values[node]
        module.register_buffer(name, values[node])
        with graph.inserting_before(node):
            stored = graph.get_attr(name)
        stored.meta = dict(node.meta)
        for user in [user for user in node.users if user not in values]:
            user.replace_input_with(node, stored)
    for node in reversed([n for n in values if n.op == "call_function"]):
        if not node.users:
            graph.erase_node(node)


def _read_masks(module: fx.GraphModule) -> None:
    """Reads and writes by stored masks at the places that they name; of one sample that is all of it or nothing."""
    for node in list(module.graph.nodes):
        if node.target not in (aten.index.Tensor, aten.index_put.default) or len(arguments(node)[1]) != 1:
            continue
        x, (index,), *rest = arguments(node)
        if index is None or index.op != "get_attr" or index.meta["val"].dtype != torch.bool:
            continue
        mask = _attribute(module, str(index.target))
        if tuple(mask.shape) == (1,) and rest[1:] in ([], [False]):
            whole = bool(mask)
            if whole or rest:
                with module.graph.inserting_before(node):
                    made = x if not (whole and rest) else module.graph.call_function(
                        aten.expand.default, (rest[0], list(node.meta["val"].shape))
                    )  # fmt: skip
                if made is not x:
                    made.meta = dict(node.meta)
                node.replace_all_uses_with(made)
        elif mask.ndim == 1 and not rest:
            name = f"places_{node.name}"
            module.register_buffer(name, mask.nonzero().flatten())
            with module.graph.inserting_before(node):
                places = module.graph.get_attr(name)
            places.meta = {**node.meta, "val": module.get_buffer(name)}
            node.args = (x, [places])


def _leave_out_empty(graph: fx.Graph) -> None:
    """Leaves out of joined tensors those without elements, such as the frames before the first."""
    for node in list(graph.nodes):
        if node.target is not aten.cat.default:
            continue
        parts, axis = bound(node, None, 0)
        full = [part for part in parts if not any(size == 0 for size in part.meta["val"].shape)]
        if len(full) == 1 and full[0].meta["val"].dtype == node.meta["val"].dtype:
            node.replace_all_uses_with(full[0])
        elif 0 < len(full) < len(parts):
            node.args, node.kwargs = (full, axis), {}
    prune(graph)


def _without_counted_samples(graph: fx.Graph, tensors: TensorStore) -> None:
    """Writes what is read at the number of each sample, which no graph has, as rows of the samples.

    So texts are pooled, at a place of their tokens, and masks of tokens are read, at places that are stored.
    """
    for node in list(graph.nodes):
        if node.target is not aten.index.Tensor or len(arguments(node)[1]) != 2:
            continue
        x, (samples, place) = arguments(node)
        if not isinstance(place, fx.Node) or not _counts_samples(samples):
            continue
        with graph.inserting_before(node):
            made = _token_row(graph, x, place) or _row_of_places(graph, tensors, x, place)
        if made is not None:
            made.meta = dict(node.meta)
            node.replace_all_uses_with(made)
    prune(graph)


def _counts_samples(node: object) -> bool:
    """Whether a call gives the samples their numbers, in whatever shape."""
    while isinstance(node, fx.Node) and node.target in (aten.unsqueeze.default, aten.view.default):
        node = operand(node, 0)
    return isinstance(node, fx.Node) and node.target is aten.arange.default


def _token_row(graph: fx.Graph, x: fx.Node, place: fx.Node) -> fx.Node | None:
    """The row of each sample at the place of a token, or of the largest; None where it is none."""
    if place.target is not aten.argmax.default:
        return None
    keys, axis = bound(place, None, None)
    token, keys = None, _uncast(keys)
    if keys.target is aten.eq.Scalar:
        token, keys = arguments(keys)[1], _uncast(operand(keys, 0))
    made = keys.meta["val"]
    if x.meta["val"].ndim != 3 or made.ndim != 2 or axis not in (1, -1) or made.is_floating_point():
        return None
    return graph.call_function(ops.row_of_token, (x, keys, token))


def _row_of_places(graph: fx.Graph, tensors: TensorStore, x: fx.Node, place: fx.Node) -> fx.Node | None:
    """The whole row of each sample, where it is read at all its places in their order; None where it is not."""
    whole = x.meta["val"]
    if place.op != "get_attr" or whole.ndim != 2:
        return None
    places = tensors[str(place.target)]
    if len(places) != 1 or not torch.equal(places.flatten(), torch.arange(whole.shape[1])):
        return None
    return graph.call_function(aten.view.default, (x, [-1, *places.shape[1:]]))


def _uncast(node: fx.Node) -> fx.Node:
    """What a call casts to another type of numbers or truth values; the node itself where it is no cast."""
    while node.target in CASTS:
        node = operand(node, 0)
    return node


def _without_autocasts(graph: fx.Graph) -> None:
    """Removes what changes no type here: automatic casts of other devices, and those that are switched off."""
    entered = {n for n in graph.nodes if n.target is torch.amp.autocast_mode._enter_autocast}
    idle = {n for n in entered if n.args[0] != "cpu" or not n.args[2]}
    for node in [n for n in reversed(graph.nodes) if n in idle or not idle.isdisjoint(n.all_input_nodes)]:
        graph.erase_node(node)


def _attribute(module: nn.Module, path: str) -> Tensor:
    found = operator.attrgetter(path)(module)
    if not isinstance(found, Tensor):
        raise ValueError(f"'{path}' is a {type(found).__name__}")
    return found.detach()


def _reason(error: BaseException, model: nn.Module, text: str | None = None) -> str:
    """The module that could not be traced and the reason, in one line: ``text`` or the error's own."""
    paths = {id(module): name for name, module in model.named_modules()}
    at: Any = model
    trace = error.__traceback__
    while trace is not None:
        found = trace.tb_frame.f_locals.get("self")
        if id(found) in paths:
            at = found
        trace = trace.tb_next
    known, text = text, text or " ".join(str(error).strip().split("\n")[0].split()) or type(error).__name__
    if known is None and ("data-dependent" in text or "symbolic_shapes" in type(error).__module__):
        text = f"its control flow depends on the values of tensors ({text})"
    where = f"module '{paths[id(at)]}' ({type(at).__name__})" if paths[id(at)] else type(at).__name__
    return f"{where}: {text}"


def _in_place(graph: fx.Graph) -> list[fx.Node]:
    """The calls that write to an operand, but for those that make constants and are read themselves."""
    decided: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" or not decided.isdisjoint(node.all_input_nodes):
            decided.add(node)
    calls = (n for n in graph.nodes if n.target not in NO_OPS)
    mutable = (n for n in calls if getattr(getattr(n.target, "_schema", None), "is_mutable", False))
    return [node for node in mutable if node in decided or not node.users]


def _require_function(graph: fx.Graph, denoiser: Denoiser, prefix: str) -> None:
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


def _require_real(graph: fx.Graph, denoiser: Denoiser, prefix: str) -> None:
    """Raises a UserError where a call returns complex numbers, or a tensor whose size depends on values."""
    for node in graph.nodes:
        made = node.meta.get("val") if node.op == "call_function" else None
        if free_unbacked_symbols(made):
            reason = f"the size of what {_operator(node)} gives depends on the values of tensors"
            raise _refusal(node, denoiser, prefix, reason)
        if any(isinstance(t, Tensor) and t.is_complex() for t in pytree.tree_leaves(made)):
            raise _refusal(node, denoiser, prefix, f"{_operator(node)} computes with complex numbers")


def _refusal(node: fx.Node, denoiser: Denoiser, prefix: str, reason: str) -> UserError:
    path = _module_path(node, prefix)
    kind = type(denoiser.module.model.get_submodule(path)).__name__
    return UserError(f"{denoiser.name} cannot be traced: {f'module {path!r} ({kind})' if path else kind}: {reason}")


def _same_value(node: fx.Node, tensors: TensorStore) -> fx.Node | None:
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
    if node.target in CASTS:
        return node.args[0]
    if node.target in (aten.mul.Tensor, aten.div.Tensor) and len(node.args) == 2:
        factor = node.args[1]
        if factor == 1 and not isinstance(factor, fx.Node):
            return node.args[0]
        if isinstance(factor, fx.Node) and factor.target is aten.ones.default:
            return node.args[0]
        if isinstance(factor, fx.Node) and factor.op == "get_attr" and bool((tensors[str(factor.target)] == 1).all()):
            return node.args[0]
    if node.target is aten.expand.default:
        return node.args[0]
    return None


def _is_whole(node: fx.Node) -> bool:
    """Whether a slice is all of its dimension, whatever the batch is."""
    start, end, step = bound(node, None, 0, None, None, 1)[2:]
    return start in (0, None) and (end is None or (isinstance(end, int) and end > 2**60)) and step in (1, None)


def _strip(graph: fx.Graph, tensors: TensorStore) -> None:
    for node in list(graph.nodes):
        if node.target in ASSERTIONS:
            graph.erase_node(node)
        elif (same := _same_value(node, tensors)) is not None:
            node.replace_all_uses_with(same)
        elif node.target in (aten.view.default, aten.reshape.default):
            # -1 in place of the size that grows with the batch, which leaves no arithmetic on sizes in the graph
            sizes = [s if isinstance(s, int) else -1 for s in node.meta["val"].shape]
            if sizes.count(-1) == 1:
                node.args = (node.args[0], sizes)
        elif node.target is aten.repeat_interleave.self_int:
            node.kwargs = {}  # the size of the output, known without
        elif node.target in (aten.type_as.default, aten.to.device):  # a graph is of no device
            node.target, node.args, node.kwargs = aten.to.dtype, (node.args[0], node.meta["val"].dtype), {}
        elif node.target in PRODUCTS and (weight := _turned(node.args[1])) is not None:
            node.target, node.args = aten.linear.default, (node.args[0], weight)
        elif node.target is aten.slice.Tensor and _is_whole(node):
            node.replace_all_uses_with(operand(node, 0))
    prune(graph)


def _turned(node: object) -> fx.Node | None:
    """The stored matrix of which a call is the transpose, or None."""
    if not isinstance(node, fx.Node) or node.target not in TRANSPOSES or node.meta["val"].ndim != 2:
        return None
    source, order = operand(node, 0), [0, 1]
    if node.target is aten.permute.default:
        order = [int(d) % 2 for d in arguments(node)[1]]
    elif node.target is not aten.transpose.int or {int(d) % 2 for d in arguments(node)[1:]} == {0, 1}:
        order = [1, 0]
    return source if source.op == "get_attr" and order == [1, 0] else None


def _repeat_rows(graph: fx.Graph) -> None:
    """Makes tensors that get their batch by a size, which no graph has, rows that are repeated for each sample."""
    like = next(node for node in graph.nodes if node.op == "placeholder")
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target not in REPEATS | MADE:
            continue
        sizes = list(node.args[node.target in REPEATS])
        source = operand(node, 0) if node.target in REPEATS else None
        if not sizes or (isinstance(sizes[0], int) and sizes[0] != -1):
            continue
        shape = None if source is None else source.meta["val"].shape
        if shape is not None and len(shape) == len(sizes) and shape[0] != 1:
            if node.target is not aten.repeat.default:
                node.args = (source, [-1, *sizes[1:]])  # has the batch already, whose size no kernel knows
            continue
        with graph.inserting_before(node):
            once = [1, *sizes[1:]]
            arguments = (once, *node.args[1:]) if source is None else (source, once)
            row = graph.call_function(node.target, arguments, dict(node.kwargs))
            row.meta = {**node.meta, "val": node.meta["val"][:1]}
            made = graph.call_function(ops.for_each_sample, (row, like))
            made.meta = dict(node.meta)
        node.replace_all_uses_with(made)
    prune(graph)


def _fold_constants(graph: fx.Graph, tensors: TensorStore) -> None:
    """Folds calls that depend on no input into stored constants; parameters themselves stay as they are.

    A result that equals a parameter (a part of several joined) is read as that parameter; what is made of one alone has
    its name.
    """
    values: dict[fx.Node, Any] = {}
    parameters: dict[fx.Node, set[str]] = {}

    def value_of(node: fx.Node) -> Any:
        return tensors.read(str(node.target)) if node.op == "get_attr" else values[node]

    for node in graph.nodes:
        parameters[node] = set().union(*(parameters[n] for n in node.all_input_nodes))
        if node.op == "get_attr":
            values[node] = None
            parameters[node] = {str(node.target)}
        elif node.op == "call_function" and all(n in values for n in node.all_input_nodes):
            args, kwargs = fx.map_arg(node.args, value_of), fx.map_arg(node.kwargs, value_of)
            with torch.no_grad():
                value = node.target(*args, **kwargs)
            if isinstance(value, Tensor | tuple | list):
                values[node] = value
    for node in list(graph.nodes):
        folded = node.op == "call_function" and isinstance(values.get(node), Tensor)
        if folded and any(u not in values for u in node.users):
            same = (name for name in sorted(parameters[node]) if _equal(tensors.read(name), values[node]))
            name = next(same, None)
            if name is None:
                (only,) = parameters[node] if len(parameters[node]) == 1 else ("constant.",)
                own = node.name if only.startswith("constant.") else only
                name = tensors.add(f"constant.{own}", values[node].contiguous())
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
    for node in graph.nodes:
        if node.name[-2:] in QUANTIZERS and node.name[:-2] in taken:
            node.name = f"{node.name}_0"


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
