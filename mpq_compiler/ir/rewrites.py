"""The rewrites of a model's parameters in an artifact: `weight_basis` as a list for the manifest, and back.

With it the stored tensors can be turned into those of the model that was compiled (`mpq_compiler.interchange`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from mpq_compiler.artifact import manifest
from mpq_compiler.ir import ops
from mpq_compiler.ir.program import Program
from mpq_compiler.ir.weight_basis import BASES, Basis, Part, Rotated, Scaled, Step


def describe(program: Program) -> tuple[list[manifest.Rewrite], dict[str, np.ndarray]]:
    """(the manifest's entries on the parameters that passes rewrote; the tensors of their steps, by name)."""
    tensors: dict[str, np.ndarray] = {}
    entries: list[manifest.Rewrite] = []
    for path, basis in sorted(program.facts.get(BASES, {}).items()):
        steps = [_described(f"{path}:{number}", step, tensors) for number, step in enumerate(basis.steps)]
        entries.append({"parameter": path, "origin": basis.origin, "steps": steps})
    return entries, tensors


def _described(name: str, step: Step, tensors: dict[str, np.ndarray]) -> manifest.RewriteStep:
    if isinstance(step, Part):
        return {"kind": "part", "start": step.start, "stop": step.stop}
    if isinstance(step, Rotated):
        return {"kind": "rotate", "block": len(step.matrix)}
    small, factor = step.factor.to(torch.float16), step.factor.float()
    tensors[name] = (small if torch.equal(small.float(), factor) else factor).contiguous().numpy()
    return {"kind": "outputs" if step.outputs else "inputs", "tensor": name}


def bases(entries: Sequence[manifest.Rewrite], tensors: Mapping[str, np.ndarray]) -> dict[str, Basis]:
    """The basis of each rewritten parameter, of what `describe` gave."""
    return {
        entry["parameter"]: Basis(entry["origin"], tuple(_step(step, tensors) for step in entry["steps"]))
        for entry in entries
    }


def _step(step: manifest.RewriteStep, tensors: Mapping[str, np.ndarray]) -> Step:
    if step["kind"] == "part":
        return Part(step["start"], step["stop"])
    if step["kind"] == "rotate":
        return Rotated(ops.hadamard(torch.eye(step["block"], dtype=torch.float64), step["block"]))
    return Scaled(torch.from_numpy(tensors[step["tensor"]]).double(), outputs=step["kind"] == "outputs")
