"""Rotates channels of activations to spread outliers over many channels; the weights undo the rotation."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from mpq_compiler.analysis.rewrite_search import RewriteSearch
from mpq_compiler.formats.contract import row_parts
from mpq_compiler.ir import ops, provenance
from mpq_compiler.ir.costs import weight_path
from mpq_compiler.ir.graph import prune, weight_of
from mpq_compiler.ir.program import Program
from mpq_compiler.ir.weight_basis import Rotated, record
from mpq_compiler.pipeline.passes import Contract, Role
from mpq_compiler.pipeline.session import Session
from mpq_compiler.quantization import rewrite_gain
from mpq_compiler.quantization.channel_scaling import sharing
from mpq_compiler.quantization.rewrite_gain import Layers
from mpq_compiler.support.errors import UserError


@dataclass(frozen=True)
class Rotate(RewriteSearch):
    """Rotates the channels of a tensor by a Hadamard matrix, and the columns of the layers that read it alike.

    ``W x = (W R)(R^T x)``: a rotated channel is a sum, with signs, of a whole block of them, so that none is much
    louder than others (QuaRot, arXiv 2404.00456). Blocks are as large as powers of two divide the channels. A rotation
    of channels commutes with the taps of a convolution and with its zeros. Weights are rotated here, once; activations
    where they are quantized, in ``log2(block)`` additions a value. There is one rotation for all times: with one for
    each, as in TR-DQ (arXiv 2503.06564), every time group would store weights of its own. Rotated is what gains by it,
    both sides quantized; layers that read one tensor share its rotation.

        %mid_block_attentions_0_to_q               = aten.linear(%mid_block_attentions_0_group_norm, .weight, .bias)
      =>
        %mid_block_attentions_0_group_norm_rotated = mpq::hadamard(%mid_block_attentions_0_group_norm, block=64)
        %mid_block_attentions_0_to_q               = aten.linear(%mid_block_attentions_0_group_norm_rotated, ...)
    """

    contract: ClassVar[Contract] = Contract.REWRITE
    role: ClassVar[Role | None] = Role.REWRITES
    capped: ClassVar[frozenset[str]] = frozenset({"steps"})
    width: ClassVar[str | None] = "activations"

    rule: Literal["search", "everywhere"] = "search"
    """Which tensors are rotated. ``everywhere``: all that layers read, whether they gain or not."""
    block: int = 256
    """Most channels of a block, a power of two."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block < 2 or self.block & (self.block - 1):
            raise UserError(f"option 'block' of pass 'rotate' must be a power of two from 2 on, not {self.block}")

    def run(self, program: Program, session: Session) -> Program:
        program = program.fork()
        groups = self.layers(program, session)
        shared = sharing(program)
        chosen = [g for g in groups if self._size(g) > 1 and not shared & {*g.readers}]
        with session.track("rotating", len(chosen)) as advance:

            share = self.share(program)

            def trial(group: Layers) -> float:
                gain = self._gain(program, group, share)
                advance(1)
                return gain

            gains = session.map(trial, chosen)
        found = [(g, db) for g, db in zip(chosen, gains, strict=True) if self.rule == "everywhere" or db >= self.gain]
        for group, gain in found:
            self._apply(program, group, gain)
        prune(program.graph)
        if not found:
            program.note(
                f"rotate changes nothing: of {len(groups)} tensors that layers read {len(chosen)} can be rotated "
                f"(others have odd numbers of channels, or shared weights), and none gains {self.gain:g} dB"
            )
        return program

    def _size(self, group: Layers) -> int:
        """The number of channels of a block."""
        return min(self.block, group.channels & -group.channels)

    def _gain(self, program: Program, group: Layers, share: float) -> float:
        """The gain of rotating, in dB of the error of the layers' outputs, by a share of the rows of weights."""
        weights = self.some_rows(program, group, share)
        rows, turn = group.rows(), functools.partial(ops.hadamard, block=self._size(group))
        before, after = (self.error(group, rows, weights, change, change) for change in (lambda x: x, turn))
        return rewrite_gain.gain_db(before, after)

    def _apply(self, program: Program, group: Layers, gain: float) -> None:
        graph, block = program.graph, self._size(group)
        with graph.inserting_before(group.readers[0]):
            rotated = graph.call_function(ops.hadamard, (group.edge, block))
        rotated.name = f"{group.edge.name}_rotated"
        for reader in group.readers:
            name = str(weight_of(reader))
            weight = _turned(program.tensors[name], block)
            path, _, part = name.partition(":")
            record(program, path, Rotated(ops.hadamard(torch.eye(block, dtype=torch.float64), block)))
            with graph.inserting_before(reader):
                new = graph.get_attr(program.tensors.add(f"{path}:{part + '.' if part else ''}rotated", weight))
            reader.update_arg(0, rotated)
            reader.update_arg(1, new)
            provenance.note(program, str(weight_path(reader)), self.name(), block=block, gain_db=gain)


def _turned(weight: Tensor, block: int) -> Tensor:
    """A weight [O, ..., C] with rotated channels, f32, computed in f64 some rows at a time."""
    parts = row_parts(weight)
    return torch.cat([ops.hadamard(weight[part].double(), block).to(torch.float32) for part in parts])
