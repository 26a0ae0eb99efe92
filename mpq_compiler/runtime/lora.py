"""Fits a LoRA to the branches of an artifact: cut to their rank, and mapped to channels that passes have rewritten."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from mpq_compiler.artifact.bundle import LORA, Artifact
from mpq_compiler.artifact.manifest import Lora, LoraBranch
from mpq_compiler.runtime import lora_file
from mpq_compiler.runtime.lora_file import Factors
from mpq_compiler.support.errors import UserError

TELLING = 1e-3
"""The relative loss from which on a cut is worth a sentence; below it is what f16 loses anyway."""


class LoadedLora(NamedTuple):
    """What a LoRA has come to in an artifact."""

    layers: int
    """The number of layers that it changes."""
    rank: int
    """Its largest rank, before it was cut."""
    loss: float
    """What the cut took of it: the Frobenius norm of that part of all changes, relative to theirs."""
    worst: tuple[str, float]
    """The layer that lost most, and its own loss."""
    notes: tuple[str, ...] = ()
    """Sentences on the cut, and on what is left out."""


def fit(artifact: Artifact, path: str | os.PathLike[str], scale: float) -> tuple[dict[str, np.ndarray], LoadedLora]:
    """Fits a LoRA file to the branches of an artifact.

    Args:
        artifact: has branches (`require`).
        path: a safetensors file (`lora_file`).
        scale: multiplies the change of every weight.

    Returns:
        The factors of every branch, by the name of the stored tensor, and what the LoRA has come to.

    Raises:
        UserError: the file is damaged, or does not fit the artifact.
    """
    lora = require(artifact)
    if not isinstance(scale, int | float) or not math.isfinite(scale):
        raise UserError(f"scale is {scale!r}; a LoRA is scaled by a finite number")
    maps = artifact.tensors(LORA) if LORA in artifact.manifest["files"] else {}
    layers = {layer["name"]: layer for layer in lora["layers"]}
    names = lora_file.spellings(layers, artifact.manifest["model"]["config"].get("layers_per_block"))
    given, notes = lora_file.read(path, names)
    tensors = zeros(artifact)
    lost: dict[str, tuple[float, float]] = {}
    for name, factors in given.items():
        layer = layers[name]
        change, lost[name] = cut(_shaped(path, name, factors, layer["shape"]), lora["rank"])
        change = Factors(change.up * np.float64(scale), change.down)
        for branch in layer["branches"]:
            tensors |= _stored(path, name, change, branch, maps)
    largest = max(factors.rank for factors in given.values())
    losses = {name: math.sqrt(part / whole) if whole else 0.0 for name, (part, whole) in lost.items()}
    part, whole = (sum(pair[i] for pair in lost.values()) for i in (0, 1))
    total, worst = math.sqrt(part / whole) if whole else 0.0, max(losses, key=losses.__getitem__)
    if losses[worst] > TELLING:
        notes.append(
            f"{path} has rank {largest} and the artifact branches of rank {lora['rank']}: cut to those it loses "
            f"{100 * total:.2g} % of its change of the weights, most in '{worst}' ({100 * losses[worst]:.2g} %)"
        )
    return tensors, LoadedLora(len(given), largest, total, (worst, losses[worst]), tuple(notes))


def require(artifact: Artifact) -> Lora:
    """The manifest's entry on branches. UserError: the artifact has none."""
    found: Lora | None = artifact.manifest.get("lora")
    if found is None:
        raise UserError(
            f"{artifact.path} has no branches that a LoRA could be loaded into: compile it with --lora-rank, or fuse "
            "the LoRA into the model before it is compiled"
        )
    return found


def zeros(artifact: Artifact) -> dict[str, np.ndarray]:
    """The factors of every branch as they were compiled, by the name of the stored tensor."""
    stored = artifact.tensors()
    branches = (branch for layer in require(artifact)["layers"] for branch in layer["branches"])
    return {name: stored[name] for branch in branches for name in (branch["up"], branch["down"])}


def cut(factors: Factors, rank: int) -> tuple[Factors, tuple[float, float]]:
    """Cuts factors to a rank, by the singular values of their product.

    Returns:
        The best factors f64 of that rank, and the squared norms of what was cut and of the whole product.
    """
    up, down = factors.up.astype(np.float64), factors.down.astype(np.float64)
    left, small = np.linalg.qr(up)
    right, other = np.linalg.qr(down.reshape(len(down), -1).T)
    u, values, v = np.linalg.svd(small @ other.T)
    part, whole = float((values[rank:] ** 2).sum()), float((values**2).sum())
    if factors.rank > rank:
        up = left @ (u[:, :rank] * values[:rank])
        down = (v[:rank] @ right.T).reshape(-1, *down.shape[1:])
    return Factors(up, down), (part, whole)


def _shaped(path: object, name: str, factors: Factors, shape: Sequence[int]) -> Factors:
    """The factors with the input channels of ``down`` last. UserError: they are of another weight than ``shape``."""
    down = factors.down
    window, own = tuple(shape[2:]), tuple(down.shape[2:])
    if math.prod(window) == math.prod(own) == 1:  # a linear layer and a convolution of one pixel are the same
        down = down.reshape(*down.shape[:2], *window)
    if len(factors.up) != shape[0] or down.shape[1:] != tuple(shape[1:]):
        change = [len(factors.up), *factors.down.shape[1:]]
        raise UserError(f"{path} changes '{name}' by {change}, and its weight is {list(shape)}: it is of another model")
    return Factors(factors.up, np.moveaxis(down, 1, -1))


def _stored(
    path: object, name: str, change: Factors, branch: LoraBranch, maps: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The stored tensors of a branch: the change in its channels, in f16."""
    up, down = change.up, change.down
    for step in branch["steps"]:
        if step["kind"] == "outputs":
            up = up * maps[step["tensor"]][:, None]
        elif step["kind"] == "inputs":
            down = down * maps[step["tensor"]]
        elif step["kind"] == "rotate":
            matrix = maps[step["tensor"]].astype(np.float64)
            down = (down.reshape(*down.shape[:-1], -1, len(matrix)) @ matrix).reshape(down.shape)
        else:
            down = down[..., step["start"] : step["stop"]]
    rank = branch["rank"]
    if len(down) > rank:  # a part of a layer has fewer channels than the rank of the whole
        whole, _ = cut(Factors(up, down), rank)
        up, down = whole.up, whole.down
    up, down = _balanced(up, down)
    stored_up = np.zeros((len(up), rank), np.float16)
    stored_down = np.zeros((rank, *down.shape[1:]), np.float16)
    with np.errstate(over="ignore"):
        stored_up[:, : len(down)], stored_down[: len(down)] = up, down
    if not (np.isfinite(stored_up).all() and np.isfinite(stored_down).all()):
        raise UserError(f"{path} changes '{name}' by more than the f16 factors of a branch hold: give a smaller scale")
    return {branch["up"]: stored_up, branch["down"]: stored_down}


def _balanced(up: np.ndarray, down: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Factors of the same product that are about as large as each other, by powers of two, which round nothing."""
    most = [np.abs(up).max(0), np.abs(down).reshape(len(down), -1).max(1)]
    known = (most[0] > 0) & (most[1] > 0)
    ratio = np.divide(most[0], most[1], out=np.ones(len(down)), where=known)
    factor = np.exp2(np.round(np.log2(ratio) / 2))
    return up / factor, down * factor.reshape(-1, *[1] * (down.ndim - 1))
