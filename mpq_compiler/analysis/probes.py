"""What small errors inside a program do to its output, estimated for all of them at once by random probes.

An error e of a value changes the output by J e, with the value's Jacobian J. For a random vector v of independent
normal numbers, ``v^T J`` is one backward pass, and ``(v^T J e)^2`` has the mean ``|J e|^2`` (Hutchinson 1990): so one
backward pass gives an estimate for every error of every value, where measuring runs the model once for each.

Errors of rounding are nearly independent of each other, from one row of a weight to the next and from one element of a
tensor to the next, and products of independent errors have no mean. So the sum of the squares of elements stands for
the square of their sum, with less scatter; and where only some rows of a weight are known, the sum of their squares
does. Where all rows are, their sum is squared: of coarse formats all rows err a little in the same direction.

Where activations and errors of a sample take more than `segments.HELD` bytes, the graph is gone back through by
segments: the same numbers to the bit, for one more forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, fx

from mpq_compiler.ir import parcels, segments
from mpq_compiler.ir.edges import input_edge, row_geometry
from mpq_compiler.ir.graph import operand
from mpq_compiler.ir.interpreter import Interpreter
from mpq_compiler.ir.program import Program
from mpq_compiler.quantization.statistics import every_row

_Known = TypeVar("_Known")
Name = Hashable
"""What an error is called in the results."""


@dataclass(frozen=True)
class WeightErrors:
    """Errors of a weight [O, K], each under its name: of all rows, or of some that stand for all."""

    picked: Tensor
    """The numbers of the rows that the errors are of, i64 [R]."""
    rows: int
    """The number of all rows, O."""
    errors: Mapping[Name, Tensor]
    """Quantized minus float, bf16 [R, K]."""
    mean: Tensor | None = None
    """The mean [K] of the layer's input where a bias takes up the error of it, else None."""

    def square(self, seen: Tensor) -> float:
        """The squared projection of all rows' error, given that of each row that is here [R]."""
        if len(self.picked) == self.rows:
            return float(seen.sum().square())
        return float(seen.square().mean()) * self.rows


EdgeChanges = Mapping[Name, Callable[[Tensor, Tensor], Tensor]]
"""Changed values of an edge, as functions of its value and of the timestep, each under its name."""
CallChanges = Mapping[Name, Callable[[Sequence[Tensor], Tensor], Tensor]]
"""Changed values of a call, as functions of its arguments and of the timestep, each under its name."""


class Probes(Interpreter):
    """A program with errors, whose powers at the output are estimated one sample at a time.

    Thread-safe: a call of `powers` keeps what it computes to itself.
    """

    def __init__(
        self,
        program: Program,
        weights: Mapping[fx.Node, WeightErrors],
        edges: Mapping[fx.Node, EdgeChanges],
        calls: Mapping[fx.Node, CallChanges],
        seed: int = 0,
        device: str = "cpu",
    ) -> None:
        """Takes the errors.

        Args:
            program: the float program.
            weights: errors of weights, by the node that reads the weight; all layers that it goes into count.
            edges: what layers read in place of an edge, whose elements change independently of each other.
            calls: what all read in place of a call's value, whose elements may change together.
            seed: of the probes.
            device: where the program runs.
        """
        super().__init__(_tapped(program), device)
        self.given = program, weights, edges, calls
        here = {node.name: node for node in self.program.graph.nodes}
        self.weights = {here[node.name]: errors for node, errors in weights.items()}
        self.edges = {here[f"{node.name}_tap"]: changes for node, changes in edges.items()}
        self.calls = {here[node.name]: changes for node, changes in calls.items()}
        self.seed = seed
        self.layers = frozenset(n for n in self.program.graph.nodes if n.name in {q.name for q in program.quantizable})
        self.last = self._segments()

    def _segments(self) -> list[str]:
        """The last calls of the segments that are gone back through one by one."""
        held = segments.held_bytes(self.program, 1)
        for kind in (self.edges, self.calls):
            for node, changes in kind.items():
                held[node.name] *= 1 + len(changes)
        return segments.leanest(self.program, held, segments.HELD).last

    def __reduce__(self) -> tuple[type[Probes], tuple[object, ...]]:
        """Takes along what running the program takes."""
        program, *errors = self.given
        return Probes, (parcels.lean(program), *errors, self.seed, self.device)

    def powers(self, sample: Mapping[str, Tensor], number: int, count: int) -> tuple[float, dict[Name, float]]:
        """Estimates the squared error of the output under each error alone.

        Args:
            sample: inputs of one sample.
            number: of the sample, with which its probes differ from others'.
            count: the number of probes.

        Returns:
            The squared output, and the mean over the probes of the squared error by name.
        """
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        run = _Run(self, sample["timestep"], count)
        floating = {name: value.is_floating_point() and name != "timestep" for name, value in sample.items()}
        inputs = {n: v.detach().clone().requires_grad_(floating[n]) for n, v in sample.items()}

        def probes(output: Tensor) -> list[Tensor]:
            return [torch.randn(output.shape, generator=generator).to(self.device) for _ in range(count)]

        def begin(probe: int) -> None:
            run.probe = probe

        if len(self.last) > 1:
            output = segments.backward(run, inputs, self.last, probes, begin)
        else:
            with torch.enable_grad():
                output = run.run(inputs)
            for probe, gradient in enumerate(probes(output) if output.requires_grad else ()):
                begin(probe)
                # leaves' own gradients are not asked for: hooks see all that is
                torch.autograd.backward(output, gradient, retain_graph=probe + 1 < count)
        found: dict[Name, float] = {}
        for projected, squares in zip(run.projected, run.squares, strict=True):
            for (node, name), seen in projected.items():
                squares[name] = self.weights[node].square(seen.double())
            for name, square in squares.items():
                found[name] = found.get(name, 0.0) + square / count
        return float(output.detach().double().square().sum()), found


def _tapped(program: Program) -> Program:
    """A copy of the program in which layers read each edge through a `tap`, whose gradient is that of their errors."""
    program = program.fork()
    taps: dict[fx.Node, fx.Node] = {}
    for node in program.quantizable:
        edge = input_edge(node)
        if edge not in taps:
            with program.graph.inserting_before(node):
                taps[edge] = program.graph.call_function(tap, (edge,))
            taps[edge].name = f"{edge.name}_tap"
        node.update_arg(0, taps[edge])
    return program


def tap(value: Tensor) -> Tensor:
    """An edge's value as layers read it: its gradient is that of errors which nothing else reads."""
    return value.view_as(value)


class _Run(Interpreter):
    """One forward pass with hooks on what has errors; backward passes fill `projected` and `squares`."""

    def __init__(self, probes: Probes, timestep: Tensor, count: int) -> None:
        super().__init__(probes.program, probes.device)
        self.probes, self.timestep = probes, timestep
        self.probe = 0
        """The number of the backward pass that is under way."""
        self.projected: list[dict[tuple[fx.Node, Name], Tensor]] = [{} for _ in range(count)]
        """What each probe sees of the error of each row, by the weight's node and the error's name."""
        self.squares: list[dict[Name, float]] = [{} for _ in range(count)]

    def call(self, node: fx.Node, args: tuple[Tensor, ...], kwargs: Mapping[str, object]) -> Tensor:
        value: Tensor = super().call(node, args, kwargs)
        probes = self.probes
        known = [x.detach() if isinstance(x, Tensor) else x for x in args]
        if (edge := probes.edges.get(node)) is not None or node.target is tap:
            value = self._watched(value, lambda: _errors(edge or {}, known[0], self.timestep, known[0]), _independent)
        if node in probes.layers and operand(node, 1) in probes.weights and torch.is_grad_enabled():
            self._watch_weight(node, known[0], args[1].shape, value)
        if (call := probes.calls.get(node)) is not None:
            plain = value.detach()
            value = self._watched(value, lambda: _errors(call, known, self.timestep, plain), _dependent)
        return value

    def _watch_weight(self, node: fx.Node, x: Tensor, shape: torch.Size, value: Tensor) -> None:
        weight = operand(node, 1)
        errors, geometry = self.probes.weights[weight], row_geometry(node, shape)

        def project(gradient: Tensor) -> None:
            rows = every_row(geometry, x)
            if errors.mean is not None:
                rows = rows - errors.mean.to(rows.device)
            weighted = gradient.reshape(-1, gradient.shape[-1])[:, errors.picked].T @ rows
            for name, error in errors.errors.items():
                seen = torch.linalg.vecdot(weighted, error.to(weighted.device).float()).cpu()
                projected = self.projected[self.probe]
                projected[weight, name] = projected.get((weight, name), 0) + seen

        value.register_hook(project)

    def _watched(
        self, value: Tensor, errors: Callable[[], Mapping[Name, Tensor]], square: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """The value with a hook that projects its errors on the gradient, and squares what it sees.

        A value that depends on no input becomes one that has gradients. Without gradients, on the way forth through
        segments, no errors are made.
        """
        if not value.requires_grad:
            value = value.detach().requires_grad_()
        if torch.is_grad_enabled():
            made = errors()

            def project(gradient: Tensor) -> None:
                for name, error in made.items():
                    self.squares[self.probe][name] = float(square((gradient * error).double()))

            value.register_hook(project)
        return value


def _errors(
    changes: Mapping[Name, Callable[[_Known, Tensor], Tensor]], known: _Known, timestep: Tensor, value: Tensor
) -> dict[Name, Tensor]:
    """Changed values minus the value."""
    return {name: change(known, timestep) - value for name, change in changes.items()}


def _independent(projected: Tensor) -> Tensor:
    return projected.square().sum()


def _dependent(projected: Tensor) -> Tensor:
    return projected.sum().square()
