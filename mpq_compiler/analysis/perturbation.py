"""Perturbs single values of a program, and re-executes only what depends on them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from mpq_compiler.ir.interpreter import Interpreter
from mpq_compiler.ir.program import Program


class Ablation:
    """Keeps every value of one run, and computes the output under changes to some of them.

    Thread-safe: a call of `output` reads the kept values and holds its changed ones apart.
    """

    @torch.no_grad()
    def __init__(self, program: Program, inputs: Mapping[str, Tensor]) -> None:
        self._interpreter = Interpreter(program)
        self._values: dict[fx.Node, Any] = {}
        self.reference = self._interpreter.run(inputs, watch=self._values.__setitem__)

    def value(self, node: fx.Node) -> Any:
        """The value of a node in the unchanged run."""
        return self._values[node]

    @torch.no_grad()
    def output(
        self, values: Mapping[fx.Node, Tensor] | None = None, operands: Mapping[fx.Node, Tensor] | None = None
    ) -> Tensor:
        """Computes the program's output under changes.

        Args:
            values: replaces the values of these nodes.
            operands: replaces the first operand of these calls, for them alone.
        """
        values, operands = values or {}, operands or {}
        changed: dict[fx.Node, Any] = dict(values)
        env = _Overlay(self._values, changed)
        for node in self._interpreter.program.graph.nodes:
            if node.op == "output":
                output: Tensor = fx.map_arg(node.args[0], env.__getitem__)
                return output
            if node in values or node.op in ("placeholder", "get_attr"):
                continue
            if node in operands:
                rest = fx.map_arg(node.args[1:], env.__getitem__)
                changed[node] = self._interpreter.call(node, (operands[node], *rest), dict(node.kwargs))
            elif any(source in changed for source in node.all_input_nodes):
                changed[node] = self._interpreter.evaluate(node, env)
        raise AssertionError("a graph without an output")


class _Overlay(Mapping[fx.Node, Any]):
    def __init__(self, base: Mapping[fx.Node, Any], top: Mapping[fx.Node, Any]) -> None:
        self._base, self._top = base, top

    def __getitem__(self, node: fx.Node) -> Any:
        return self._top[node] if node in self._top else self._base[node]

    def __iter__(self) -> Any:
        return iter(self._base)

    def __len__(self) -> int:
        return len(self._base)
