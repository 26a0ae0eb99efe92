"""Describes LoRA branches for the runtime: which layer each belongs to, and what its factors have to go through."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mpq_compiler.artifact import manifest
from mpq_compiler.ir.lora import LORA, module_of
from mpq_compiler.ir.program import Program
from mpq_compiler.ir.weight_basis import Part, Rotated, Step, basis_of


def describe(program: Program) -> tuple[manifest.Lora | None, dict[str, np.ndarray]]:
    """(the manifest's entry on LoRA branches, or None where there are none; the tensors of its steps, by name)."""
    found = program.facts.get(LORA)
    if found is None:
        return None, {}
    tensors: dict[str, np.ndarray] = {}
    layers: dict[str, manifest.LoraLayer] = {}
    for path, branch in found.branches.items():
        basis = basis_of(program, path)
        shape = list(program.tensors[basis.origin].shape)
        layer = layers.setdefault(basis.origin, {"name": module_of(basis.origin), "shape": shape, "branches": []})
        steps = _steps(path, basis.steps, tensors)
        layer["branches"].append({"up": branch.up, "down": branch.down, "rank": branch.rank, "steps": steps})
    return {"rank": found.rank, "layers": list(layers.values())}, tensors


def _steps(path: str, steps: Sequence[Step], tensors: dict[str, np.ndarray]) -> list[manifest.LoraStep]:
    """Steps as JSON; what they multiply with is added to ``tensors``."""
    described: list[manifest.LoraStep] = []
    for number, step in enumerate(steps):
        if isinstance(step, Part):
            described.append({"kind": "part", "start": step.start, "stop": step.stop})
            continue
        if isinstance(step, Rotated):
            kind, name, values = "rotate", f"rotation.{len(step.matrix)}", step.matrix
        else:
            kind, values = "outputs" if step.outputs else "inputs", step.factor
            name = f"{path}:{kind}.{number}"
        tensors[name] = values.float().contiguous().numpy()
        described.append({"kind": kind, "tensor": name})
    return described
