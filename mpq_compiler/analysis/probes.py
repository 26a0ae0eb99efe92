"""What small errors inside a program do to its output, estimated for all of them at once by random probes.

An error e of a value changes the output by J e, with the value's Jacobian J. For a random vector v of independent
normal numbers, ``v^T J`` is one backward pass, and ``(v^T J e)^2`` has the mean ``|J e|^2`` (Hutchinson 1990): so one
backward pass gives an estimate for every error of every value, where measuring runs the model once for each.

Errors of rounding are nearly independent of each other, from one row of a weight to the next and from one element of a
tensor to the next, and products of independent errors have no mean. So the sum of the squares of elements stands for
the square of their sum, with less scatter; and where only some rows of a weight are known, the sum of their squares
does. Where all rows are, their sum is squared: of coarse formats all rows err a little in the same direction.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from mpq_compiler.ir import parcels
from mpq_compiler.ir.edges import input_edge, row_geometry
from mpq_compiler.ir.graph import operand
from mpq_compiler.ir.interpreter import Interpreter
from mpq_compiler.ir.program import Program
from mpq_compiler.quantization.statistics import every_row

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
    ) -> None:
        """Takes the errors.

        Args:
            program: the float program.
            weights: errors of weights, by the node that reads the weight; all layers that it goes into count.
            edges: what layers read in place of an edge, whose elements change independently of each other.
            calls: what all read in place of a call's value, whose elements may change together.
            seed: of the probes.
        """
        super().__init__(program)
        self.weights, self.edges, self.calls = weights, edges, calls
        self.seed = seed
        self.layers = frozenset(program.quantizable)

    def __reduce__(self) -> tuple[type[Probes], tuple[object, ...]]:
        """Takes along what running the program takes."""
        return Probes, (parcels.lean(self.program), self.weights, self.edges, self.calls, self.seed)

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
        run = _Run(self, sample["timestep"])
        floating = {name: value.is_floating_point() and name != "timestep" for name, value in sample.items()}
        with torch.enable_grad():
            output = run.run({n: v.detach().clone().requires_grad_(floating[n]) for n, v in sample.items()})
        found: dict[Name, float] = {}
        if not output.requires_grad:
            return float(output.double().square().sum()), found
        for probe in range(count):
            run.projected, run.squares = {}, {}
            # leaves' own gradients are not asked for: hooks see all that is
            torch.autograd.backward(
                output, torch.randn(output.shape, generator=generator), retain_graph=probe + 1 < count
            )
            for (node, name), seen in run.projected.items():
                run.squares[name] = self.weights[node].square(seen.double())
            for name, square in run.squares.items():
                found[name] = found.get(name, 0.0) + square / count
        return float(output.detach().double().square().sum()), found


class _Run(Interpreter):
    """One forward pass with hooks on what has errors; backward passes fill `projected` and `squares`."""

    def __init__(self, probes: Probes, timestep: Tensor) -> None:
        super().__init__(probes.program)
        self.probes, self.timestep = probes, timestep
        self.taps: dict[fx.Node, Tensor] = {}
        self.projected: dict[tuple[fx.Node, Name], Tensor] = {}
        """What a probe sees of the error of each row, by the weight's node and the error's name."""
        self.squares: dict[Name, float] = {}

    def call(self, node: fx.Node, args: tuple[Tensor, ...], kwargs: Mapping[str, object]) -> Tensor:
        if node in self.probes.layers:
            args = (self._tapped(input_edge(node), args[0]), *args[1:])
        value: Tensor = super().call(node, args, kwargs)
        if node in self.probes.layers and operand(node, 1) in self.probes.weights:
            self._watch_weight(node, args[0].detach(), args[1].shape, value)
        if (changes := self.probes.calls.get(node)) is not None:
            known = [x.detach() if isinstance(x, Tensor) else x for x in args]
            made = {name: change(known, self.timestep) - value.detach() for name, change in changes.items()}

            def dependent(gradient: Tensor) -> None:
                for name, error in made.items():
                    self.squares[name] = float((gradient * error).double().sum().square())

            value = _watched(value, dependent)
        return value

    def _tapped(self, edge: fx.Node, value: Tensor) -> Tensor:
        """An edge's value as layers read it: its gradient is that of errors which nothing else reads."""
        if edge not in self.taps:
            known, changes = value.detach(), self.probes.edges.get(edge, {})
            made = {name: change(known, self.timestep) - known for name, change in changes.items()}

            def independent(gradient: Tensor) -> None:
                for name, error in made.items():
                    self.squares[name] = float((gradient * error).double().square().sum())

            self.taps[edge] = _watched(value.view_as(value), independent)
        return self.taps[edge]

    def _watch_weight(self, node: fx.Node, x: Tensor, shape: torch.Size, value: Tensor) -> None:
        weight = operand(node, 1)
        errors, geometry = self.probes.weights[weight], row_geometry(node, shape)

        def project(gradient: Tensor) -> None:
            rows = every_row(geometry, x)
            if errors.mean is not None:
                rows = rows - errors.mean
            weighted = gradient.reshape(-1, gradient.shape[-1])[:, errors.picked].T @ rows
            for name, error in errors.errors.items():
                seen = torch.linalg.vecdot(weighted, error.float())
                self.projected[weight, name] = self.projected.get((weight, name), 0) + seen

        value.register_hook(project)


def _watched(value: Tensor, hook: Callable[[Tensor], None]) -> Tensor:
    """The value with a hook on its gradient; a value that depends on no input becomes one that has gradients."""
    if not value.requires_grad:
        value = value.detach().requires_grad_()
    value.register_hook(hook)
    return value
