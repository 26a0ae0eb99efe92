"""Inserts branches for LoRA, whose factors are data of the artifact."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import fx

from mpq_compiler.ir import ops, provenance, views
from mpq_compiler.ir.aten import aten
from mpq_compiler.ir.costs import weight_path
from mpq_compiler.ir.findings import ASSUMPTIONS, ATTENTION_NUMERICS
from mpq_compiler.ir.graph import arguments, operand, weight_of
from mpq_compiler.ir.lora import LORA, Lora, LoraBranch, module_of
from mpq_compiler.ir.program import PLANNED, Program
from mpq_compiler.ir.weight_basis import basis_of
from mpq_compiler.pipeline.passes import Contract, Pass, Role
from mpq_compiler.pipeline.session import Session
from mpq_compiler.support.errors import UserError

EXACT = 1e-5
"""The largest deviation of a rewritten weight from the model's, in its basis and relative to its largest element."""
_QUANTIZERS = (ops.quantize, ops.dynamic_quantize)
_CONVOLUTIONS = (ops.conv2d, ops.quant_conv2d)


@dataclass(frozen=True)
class LoraBranches(Pass):
    """Gives layers a float branch y = layer(x) + (x A^T) B^T, zero until a LoRA is loaded (arXiv 2106.09685).

    `CompiledDenoiser.load_lora` sets the factors of an artifact. The branch reads the activation before its quantizer;
    where passes have scaled, rotated or split the channels of a layer, factors are loaded in that basis
    (`ir.weight_basis`). It comes last, and changes no decision and no bit: an artifact without a LoRA computes what it
    would without branches. In a convolution A is a convolution of the same window. The bytes of the factors come on
    top of a budget of weights.

        %time_embedding_linear_1           = mpq::quant_linear(%time_proj_cat_1_q, %g, ...)
      =>
        %time_embedding_linear_1_base      = mpq::quant_linear(%time_proj_cat_1_q, %g, ...)
        %time_embedding_linear_1_lora_down = aten.linear(%time_proj_cat_1, time_embedding.linear_1.weight:lora_down)
        %time_embedding_linear_1_lora_up   = aten.linear(%time_embedding_linear_1_lora_down, ...)
        %time_embedding_linear_1           = aten.add(%time_embedding_linear_1_base, ...)
    """

    contract: ClassVar[Contract] = Contract.IDENTICAL
    role: ClassVar[Role | None] = Role.PACKS
    decides_kernels: ClassVar[bool] = True
    settings: ClassVar[Mapping[str, str]] = {"lora_rank": "rank", "lora_layers": "layers"}
    requires: ClassVar[frozenset[str]] = frozenset({"packed"})
    provides: ClassVar[frozenset[str]] = frozenset({"lora"})

    rank: int = 16
    """Rank of the branches; a layer with fewer inputs or outputs has a branch of as many."""
    layers: tuple[str, ...] = ()
    """Patterns of the layers that get a branch, by module path: ``*.attn*.to_?``. None given: all linear layers, and
    convolutions of a single pixel, which is where nearly every LoRA has its factors."""

    def __post_init__(self) -> None:
        self.require("rank", 1)

    def run(self, program: Program, session: Session) -> Program:
        program = program.fork()
        if program.regions:
            raise UserError("pass 'lora' finds layers in kernels already: put it before 'fuse-epilogues'")
        if ASSUMPTIONS in program.facts:
            raise UserError(
                "pass 'bos-split' has made constants of what layers compute of a text's first token, which a LoRA "
                "would change: leave it out of the pipeline, or --lora-rank"
            )
        sites = _sites(program)
        chosen = self._chosen(program, sites)
        branches = {path: self._branch(program, path, sites[path]) for path in chosen}
        for path, branch in branches.items():
            for call in sites[path]:
                _insert(program, path, call, branch)
            provenance.note(program, path, self.name(), rank=branch.rank)
        program.facts[LORA] = Lora(self.rank, branches)
        return program

    def _chosen(self, program: Program, sites: dict[str, list[fx.Node]]) -> list[str]:
        """The weights that get a branch. UserError: a pattern matches no layer, or no layer can have one."""
        names = {path: module_of(basis_of(program, path).origin) for path in sites}
        for pattern in self.layers:
            if not fnmatch.filter(names.values(), pattern):
                raise UserError(
                    f"no layer is called '{pattern}' (--lora-layers): patterns are of module paths such as "
                    f"'{next(iter(names.values()))}'"
                )
        planned = {weight_path(n): weight_of(n) for n in program.facts[PLANNED].quantizable}
        chosen = []
        for path, name in names.items():
            shape = program.tensors[path].shape
            usual = not self.layers and shape[2:].numel() == 1
            if not usual and not any(fnmatch.fnmatchcase(name, pattern) for pattern in self.layers):
                continue
            reason = _why_not(program, path, planned.get(path), sites[path])
            if reason is None:
                chosen.append(path)
            elif self.layers:
                program.note(f"lora: '{name}' has no branch, for {reason}")
        if not chosen:
            raise UserError("no layer of this model can have a branch for LoRA: leave --lora-rank out")
        return chosen

    def _branch(self, program: Program, path: str, calls: list[fx.Node]) -> LoraBranch:
        """Stores the factors of a weight, all of them zero."""
        rows, channels, *window = program.tensors[path].shape
        rank = min(self.rank, rows, channels * torch.Size(window).numel())
        down = torch.zeros((rank, *window, channels), dtype=torch.float16)
        up = torch.zeros((rows, rank), dtype=torch.float16)
        of_up, of_down = (f"{path}:{part}" for part in views.LORA_FACTORS)
        return LoraBranch(program.tensors.add(of_up, up), program.tensors.add(of_down, down), rank)


def _sites(program: Program) -> dict[str, list[fx.Node]]:
    """The calls that multiply with each parameter of the model, by its path."""
    calls = views.flatten(program)
    levels = {found.call.name: found for found in views.levels_of(calls)}
    nodes = {node.name: node for node in program.graph.nodes}
    found: dict[str, list[fx.Node]] = {}
    for call in calls:
        path = views.weight_path(call, levels)
        if path is not None and path in program.tensors and ":" not in path and not path.startswith("constant."):
            found.setdefault(path, []).append(nodes[call.name])
    return found


def _why_not(program: Program, path: str, planned: str | None, calls: list[fx.Node]) -> str | None:
    """The reason, in words, why a weight cannot have a branch; None where it can."""
    basis = basis_of(program, path)
    if not basis.origin.endswith(".weight"):
        return "its weight is no module's"
    original = program.tensors.read(basis.origin)
    if planned is None or original.dim() not in (2, 4):
        return "it is a grouped convolution or of other axes than two"
    if any(_input(call) is None for call in calls):
        return "what it reads is put together of codes"
    weight, now = basis.rewritten(original.movedim(1, -1)), program.facts[PLANNED].tensors.read(planned)
    largest = float(now.abs().max()) if now.numel() else 0.0
    if weight.shape != now.shape or float((weight - now).abs().max()) > EXACT * largest:
        return "a pass has rewritten its weight in a way that a LoRA cannot follow"
    return None


def _input(call: fx.Node) -> fx.Node | None:
    """The activation that a layer reads, before its quantizer; None where several quantizers made it."""
    x = views.made_by(call.args[0])
    if call.target in views.PACKED_LAYERS:
        return operand(x, 0) if x.target in _QUANTIZERS else None
    return operand(x, 0) if x.target in views.FAKE_QUANTIZERS else x


def _insert(program: Program, path: str, call: fx.Node, branch: LoraBranch) -> None:
    graph, x, name = program.graph, _input(call), call.name
    with graph.inserting_after(call):
        total = graph.call_function(aten.add.Tensor)
    with graph.inserting_before(total):
        down, up = (graph.get_attr(factor) for factor in (branch.down, branch.up))
        if call.target in _CONVOLUTIONS:
            stride, padding = arguments(call)[12:14] if call.target is ops.quant_conv2d else arguments(call)[3:5]
            narrow = graph.call_function(ops.conv2d, (x, down, None, list(stride), list(padding)))
        else:
            narrow = graph.call_function(aten.linear.default, (x, down))
        wide = graph.call_function(aten.linear.default, (narrow, up))
    call.replace_all_uses_with(total)
    total.args = (call, wide)
    call.name, narrow.name, wide.name, total.name = f"{name}_base", f"{name}_lora_down", f"{name}_lora_up", name
    _rename_site(program, path, name, call.name)


def _rename_site(program: Program, path: str, old: str, new: str) -> None:
    """Renames the layer in plan and lists, since the sum of layer and branch has taken its name."""
    if (plan := program.weights.get(path)) is not None:
        program.weights[path] = replace(plan, sites=tuple(new if site == old else site for site in plan.sites))
    if old in program.fallbacks:
        program.fallbacks[new] = program.fallbacks.pop(old)
    if old in (numerics := program.facts.get(ATTENTION_NUMERICS, {})):
        program.facts[ATTENTION_NUMERICS] = {new if site == old else site: kind for site, kind in numerics.items()}
