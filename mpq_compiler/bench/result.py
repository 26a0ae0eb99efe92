"""The result of a benchmark as a type (schemas/bench.json says the same, and what `mpqc bench --json` prints)."""

from __future__ import annotations

from typing import TypedDict


class Row(TypedDict):
    """The times of an artifact or a baseline; null what is not known of it."""

    name: str
    ms: float
    ms_min: float
    ms_max: float
    cpu_ms: float | None
    wall_ms: float
    bytes: int | None
    peak_bytes: int | None
    speedup: dict[str, float]
    spread: dict[str, list[float]]
    sqnr_db: float | None


class Peak(TypedDict):
    """What the machine does at most, and how much of that the model reaches; 10^9 a second."""

    gmacs: float | None
    float_gmacs: float | None
    gbytes: float | None
    model_gmacs: float | None
    reached: float | None
    reason: str | None


class KernelRow(TypedDict):
    """The times of a kernel call."""

    node: str
    layer: str | None
    kernel: str
    template: str
    part: str
    weights: str | None
    ms: float
    ms_min: float
    ms_max: float
    bytes: int
    macs: int
    gmacs: float | None
    reached: float | None
    share: float


class FasterLayer(TypedDict):
    """A layer that would be faster with its weight in another form."""

    layer: str
    weights: str
    ms: float
    best: str
    best_ms: float


class Latency(TypedDict):
    """The prediction of a latency table beside what was measured."""

    predicted_ms: float
    measured_ms: float
    error: float
    missing: int
    layers: list[FasterLayer] | None


class BenchResult(TypedDict):
    """Everything that a benchmark found."""

    rows: list[Row]
    peak: Peak
    rounds: int
    threads: int
    batch: int
    clock: str
    cpu: str
    skipped: dict[str, str]
    latency: Latency | None
    kernels: list[KernelRow] | None
