"""Settles open weights: fits their quantizers to the final values, and stores codes in place of the float weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from mpq_compiler import formats
from mpq_compiler.formats import base, low_rank
from mpq_compiler.ir import views
from mpq_compiler.ir.costs import stored_dtype
from mpq_compiler.ir.facts import Fact
from mpq_compiler.ir.graph import operand, part_of
from mpq_compiler.ir.program import Program
from mpq_compiler.quantization.fitting import REST, FitCache, Rounding, Wanted, bias_of, corrected_bias
from mpq_compiler.quantization.statistics import CALIBRATION, GRAM_COLUMNS
from mpq_compiler.support.execution import RunContext

LATENTS = Fact[dict[str, str]]("latents")
"""Store names of the float weights that were settled, by the node of their quantized value: for training."""


@dataclass(frozen=True)
class Open:
    """A fake-quantized weight whose codes are still open."""

    quantizer: fx.Node
    """The node that quantizes it."""
    call: fx.Node
    """The first call that reads it."""
    format: str
    """The format that it is to have."""

    @property
    def weight(self) -> str:
        """The store name of the float weight."""
        return str(operand(self.quantizer, 0).target)

    @property
    def path(self) -> str:
        """The parameter's name in the model."""
        return self.weight.split(":")[0]


def unsettled(program: Program) -> list[Open]:
    """The fake-quantized weights with open codes, in graph order.

    A weight of a low-rank format that has its branch already is open in the format's base.
    """
    found = []
    for node in program.graph.nodes:
        if node.op == "call_function" and node.target in views.OPEN_LEVELS:
            name = str(operand(node, 0).target)
            planned = formats.get(program.weights[name.split(":")[0]].format)
            if part_of(name) == REST and isinstance(planned, low_rank.LowRankFormat):
                planned = planned.base
            found.append(Open(node, next(iter(node.users)), planned.name))
    return found


def fit_unsettled(
    program: Program,
    context: RunContext,
    fits: FitCache,
    rounding: Rounding,
    title: str,
    kind: type[base.Format] = base.Format,
) -> list[tuple[Open, Any]]:
    """Fits the open weights on all jobs; returns each with its fit, in graph order.

    The program gets a note where weights are rounded to nearest because they lack the second moments.

    Args:
        program: has the open weights and the calibration.
        context: runs the fits and shows their progress.
        fits: the fits that are known, to which these are added.
        rounding: how codes are chosen.
        title: of the progress bar.
        kind: the class of formats to fit; weights of other formats are left out.
    """
    chosen = [u for u in unsettled(program) if isinstance(formats.get(u.format), kind)]
    if rounding != Rounding.NEAREST:
        _note_nearest(program, chosen, rounding)
    wanted = [Wanted(w.call, w.weight, w.format, rounding) for w in chosen]
    return list(zip(chosen, fits.fit_all(program, wanted, context, title), strict=True))


def _note_nearest(program: Program, chosen: list[Open], rounding: Rounding) -> None:
    grams = program.facts[CALIBRATION].grams
    kept = {w.path: gram.dim() if (gram := grams.get(w.call.name)) is not None else 0 for w in chosen}
    learned = rounding == Rounding.LEARNED
    for instead, dims in (("those of the nearest levels", (0, 1)), ("GPTQ's", (3,) if learned else ())):
        if layers := [path for path, dim in kept.items() if dim in dims]:
            program.note(
                f"{'learned rounding' if learned else 'GPTQ'} needs the second moments of all pairs of inputs, which "
                f"are kept up to {GRAM_COLUMNS} inputs: codes are {instead} in {', '.join(layers)}"
            )


def attributes(program: Program, prefix: str, **tensors: Tensor | None) -> list[fx.Node | None]:
    """Stores tensors as ``prefix + name`` and inserts their reads; the node is None where the tensor is."""
    add, read = program.tensors.add, program.graph.get_attr
    return [None if tensor is None else read(add(prefix + name, tensor)) for name, tensor in tensors.items()]


def settle(program: Program, weight: Open, value: fx.Node, quantized: base.Fit) -> None:
    """Replaces an open weight by its settled value, and corrects the bias of its calls.

    Calls that share weight and bias share the corrected bias, the mean of their own. The program's fact "latents" keeps
    the store name of the float weight by the name of the value's node, for training.

    Args:
        program: is changed in place.
        weight: the open weight.
        value: the node of the settled weight.
        quantized: its levels.
    """
    quantizer = weight.quantizer
    readers: dict[fx.Node, list[fx.Node]] = {}
    for call in quantizer.users:
        if (bias := bias_of(call)) is not None:
            readers.setdefault(bias, []).append(call)
    for bias, sites in readers.items():
        found = [corrected_bias(program, call, weight.weight, quantized) for call in sites]
        corrections = [c for c in found if c is not None]
        if corrections and set(bias.users) == set(sites):  # else other layers read it as it is
            corrected = torch.stack(corrections).mean(0)
            name = str(bias.target).split(":")[0] + ":corrected"
            with program.graph.inserting_before(bias):
                new = program.graph.get_attr(program.tensors.add(name, corrected.to(stored_dtype(name, corrected))))
            bias.replace_all_uses_with(new)
    name = quantizer.name
    known = program.facts.get(LATENTS, {})
    program.facts[LATENTS] = known | {name: weight.weight}
    quantizer.replace_all_uses_with(value)
    program.graph.erase_node(quantizer)
    value.name = name
