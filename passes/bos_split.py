"""Takes the first token of a text, which is the same in every prompt, out of quantization."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, fx

from mpq_compiler.ir import ops, provenance
from mpq_compiler.ir.aten import aten, is_pointwise
from mpq_compiler.ir.costs import weight_path
from mpq_compiler.ir.findings import ASSUMPTIONS
from mpq_compiler.ir.graph import arguments, function_of, operand, prune
from mpq_compiler.ir.interpreter import Interpreter, shapes
from mpq_compiler.ir.program import Program
from mpq_compiler.pipeline.passes import Contract, Pass, Role
from mpq_compiler.pipeline.session import Session

TEXT = "encoder_hidden_states"
"""The prefix of the names of text inputs [B, tokens, channels]."""
PROMPTS = 16
"""The number of the denoiser's own prompts that are compared."""


@dataclass(frozen=True)
class BosSplit(Pass):
    """Computes the keys and values of a text's first token once, in floats, and quantizes the other tokens alone.

    CLIP begins every prompt with one token, whose embedding has channels some fifty times as large as any other: in one
    range with it the rest is left with a few levels (MixDQ, arXiv 2405.17873, section 4.1). A linear layer that reads
    the text token by token reads all tokens but the first, and what it made of the first is a constant before them, in
    f32. This needs two prompts or more that begin with the same bits, of the calibration or of the denoiser's own; else
    the program stays as it is, with a note. The artifact records the token and refuses texts that begin otherwise.

        %up_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k = aten.linear(%encoder_hidden_states, .weight)
      =>
        %encoder_hidden_states_rest = aten.slice(%encoder_hidden_states, 1, 1, ...)
        %up_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k_rest = aten.linear(%encoder_hidden_states_rest, ...)
        %up_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k = mpq::prepend(...)
    """

    contract: ClassVar[Contract] = Contract.REWRITE
    role: ClassVar[Role | None] = Role.REWRITES
    requires: ClassVar[frozenset[str]] = frozenset({"channels-last"})

    def run(self, program: Program, session: Session) -> Program:
        program = program.fork()
        for spec in program.inputs:
            if spec.name.startswith(TEXT) and len(spec.shape) == 3:
                rows = _prompts(session, spec.name)
                reason = _why_not(rows)
                if reason is None:
                    assert rows is not None
                    reason = None if _split(program, spec.name, rows[:1]) else "no linear layer reads it by tokens"
                if reason is not None:
                    program.note(f"bos-split leaves '{spec.name}' as it is: {reason}")
        prune(program.graph)
        return program


def _prompts(session: Session, name: str) -> Tensor | None:
    """Texts [N, T, C] that the denoiser may be asked for, the empty prompt among them; None where none are known."""
    if session.calibration is not None:
        return session.calibration.get(name)
    if session.denoiser is None or not session.denoiser.conditioning.possible:
        return None
    conditions = session.denoiser.conditioning.mixed(PROMPTS, session.seed)
    found = [values[name] for values in (conditions.values, conditions.null or {}) if name in values]
    return torch.from_numpy(np.concatenate(found)) if found else None


def _why_not(rows: Tensor | None) -> str | None:
    """The reason, in words, why the first token of these texts is not a constant; None where it is one."""
    if rows is None:
        return "there are no prompts to compare; give --calibration or --conditions"
    if rows.shape[1] < 2:
        return "it has a single token"
    if len(rows.flatten(1).unique(dim=0)) < 2:
        return "all its prompts are the same one, so that nothing is known of the first token of others"
    if not torch.equal(rows[:, 0], rows[:1, 0].expand_as(rows[:, 0])):
        return "its prompts do not all begin with the same token"
    return None


def _split(program: Program, name: str, text: Tensor) -> bool:
    """Rewrites the layers that read the input token by token; False where there are none. ``text`` is [1, T, C]."""
    graph, sizes = program.graph, shapes(program, 2)
    source = next(n for n in graph.nodes if n.op == "placeholder" and n.target == name)
    values: dict[fx.Node, Any] = {source: text}
    computed: set[fx.Node] = set()
    """The calls behind a linear layer; calls before one are cheap, and stay for their other readers."""
    interpreter = Interpreter(program)
    for node in graph.nodes:
        if node.op == "get_attr":
            values[node] = interpreter.attribute(str(node.target))
        elif _by_tokens(node, values, sizes, text.shape[1]):
            values[node] = interpreter.evaluate(node, values)
            if node.target is aten.linear.default or computed & {*node.all_input_nodes}:
                computed.add(node)
    if not computed:
        return False
    rest: dict[fx.Node, fx.Node] = {}
    first_call = next(n for n in graph.nodes if n.op not in ("placeholder", "get_attr"))
    with graph.inserting_before(first_call):
        rest[source] = graph.call_function(aten.slice.Tensor, (source, 1, 1, text.shape[1]))
    rest[source].name = f"{name}_rest"
    order = [n for n in values if n.op == "call_function"]
    for node in order:
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: rest.get(n, n))
        with graph.inserting_before(node):
            rest[node] = graph.call_function(function_of(node), args, kwargs)
        rest[node].name = f"{node.name}_rest"
    for node in reversed(order):
        if (path := weight_path(node)) is not None:
            provenance.note(program, path, "bos-split", reads=f"all tokens of '{name}' but the first")
        if node in computed:
            _join(program, node, rest[node], values[node][0, 0])
    token = {"input": name, "token": 0, "values": text[0, 0].tolist()}
    program.facts[ASSUMPTIONS] = (*program.facts.get(ASSUMPTIONS, ()), token)
    return True


def _by_tokens(node: fx.Node, values: dict[fx.Node, Any], sizes: dict[str, Any], tokens: int) -> bool:
    """Whether the call computes each token [B, T, ...] from the same token of calls that do, too, and constants."""
    if node.op != "call_function" or any(n not in values for n in node.all_input_nodes):
        return False
    constants = [n for n in node.all_input_nodes if n.op == "get_attr"]
    if len(constants) == len(node.all_input_nodes) or tuple(sizes[node.name].shape[:-1]) != (2, tokens):
        return False
    if is_pointwise(node):
        return all(values[n].dim() < 2 or values[n].shape[-2] == 1 for n in constants)
    if node.target is aten.layer_norm.default:
        return len(arguments(node)[1]) == 1
    return node.target in (aten.linear.default, ops.rms_norm) and operand(node, 0) not in constants


def _join(program: Program, node: fx.Node, rest: fx.Node, token: Tensor) -> None:
    """Gives the other readers of ``node`` the constant and the rest of the tokens, joined, under its name."""
    graph = program.graph
    if node.users:
        with graph.inserting_before(node):
            constant = graph.get_attr(program.tensors.add(f"constant.{node.name}_bos", token.contiguous()))
            whole = graph.call_function(ops.prepend, (rest, constant))
        node.replace_all_uses_with(whole)
        name = node.name
        graph.erase_node(node)
        whole.name = name
    else:
        graph.erase_node(node)
