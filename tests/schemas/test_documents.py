"""The types of the documents name the same keys as their JSON schemas, and require the same."""

from __future__ import annotations

from typing import Any, NotRequired, get_origin, get_type_hints

import pytest

from mpq_compiler import schemas
from mpq_compiler.artifact import manifest
from mpq_compiler.bench import result
from mpq_compiler.ir import findings, provenance

DOCUMENTS: dict[str, tuple[Any, str, tuple[str, ...]]] = {
    "sensitivity table": (findings.SensitivityTable, "sensitivity", ()),
    "costs of a layer": (findings.LayerCosts, "sensitivity", ("properties", "layers", "items")),
    "costs in a format": (
        findings.FormatCosts,
        "sensitivity",
        ("properties", "layers", "items", "properties", "formats", "additionalProperties"),
    ),
    "decisions": (provenance.Decisions, "decisions", ()),
    "bench": (result.BenchResult, "bench", ()),
    "row of a benchmark": (result.Row, "bench", ("properties", "rows", "items")),
    "peak": (result.Peak, "bench", ("properties", "peak")),
    "kernel of a benchmark": (result.KernelRow, "bench", ("properties", "kernels", "items")),
    "latency of a benchmark": (result.Latency, "bench", ("properties", "latency")),
    "faster layer": (result.FasterLayer, "bench", ("properties", "latency", "properties", "layers", "items")),
    "manifest": (manifest.Manifest, "manifest", ()),
    "target": (manifest.Target, "manifest", ("properties", "target")),
    "model": (manifest.Model, "manifest", ("properties", "model")),
    "source of a model": (manifest.Source, "manifest", ("properties", "model", "properties", "source")),
    "part": (manifest.Part, "manifest", ("properties", "parts", "items")),
    "memory": (manifest.Memory, "manifest", ("properties", "memory")),
    "prepare": (manifest.Prepare, "manifest", ("properties", "prepare")),
    "weights": (manifest.Weights, "manifest", ("properties", "weights")),
    "assumption": (manifest.Assumption, "manifest", ("properties", "assumptions", "items")),
    "function": (manifest.Function, "manifest", ("$defs", "function")),
    "value": (manifest.Value, "manifest", ("$defs", "value")),
    "LoRA": (manifest.Lora, "manifest", ("properties", "lora")),
    "layer of a LoRA": (manifest.LoraLayer, "manifest", ("properties", "lora", "properties", "layers", "items")),
    "branch of a LoRA": (manifest.LoraBranch, "manifest", ("$defs", "lora_branch")),
    "step of a LoRA": (manifest.LoraStep, "manifest", ("$defs", "lora_branch", "properties", "steps", "items")),
    "stored tensor": (manifest.Tensor, "manifest", ("$defs", "tensor")),
    "file": (manifest.File, "manifest", ("$defs", "file")),
}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_a_type_and_its_schema_name_the_same_keys(name: str) -> None:
    document, of, path = DOCUMENTS[name]
    schema = schemas.schema(of)
    for step in path:
        schema = schema[step]
    hints = get_type_hints(document, include_extras=True)
    assert hints.keys() == schema["properties"].keys()
    assert {key for key, hint in hints.items() if get_origin(hint) is not NotRequired} == {*schema["required"]}
