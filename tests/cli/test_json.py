"""Every command's JSON obeys its schema, for every bundled model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mpq_compiler import schemas
from mpq_compiler.cli import mpqc
from mpq_compiler.frontend import checkpoint, denoiser
from mpq_compiler.latency import measure
from mpq_compiler.support import tensorfile

Command = Callable[..., Any]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs `mpqc` in an empty folder; the JSON it wrote, checked against the schema of that name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(measure, "SECONDS", 0.0)

    def run(schema: str, *arguments: str) -> Any:
        assert mpqc.main([*arguments, "--json", "result.json"]) == 0, arguments
        result = json.loads(Path("result.json").read_text())
        assert schemas.check(result, schema) is None, f"mpqc {' '.join(arguments)}: {schemas.check(result, schema)}"
        return result

    return run


@pytest.mark.parametrize("name", ["passes", "recipes", "targets", "models", "cache"])
def test_lists(command: Command, name: str) -> None:
    assert command(name, name)


@pytest.mark.parametrize("model", sorted(checkpoint.bundled()))
def test_every_command(command: Command, model: str) -> None:
    recipe = 'schema = 1\nextends = "default"\n[options.sensitivity]\nformats = ["int3", "int4", "int8"]\ninputs = 4\n'
    Path("few.toml").write_text(recipe)
    few = ("--recipe", "few.toml", "--samples", "8", "--steps", "8")
    table = command("sensitivity", "sensitivity", model, "-o", "table.json", *few)
    assert table["weights"]
    solution = command("allocation-solution", "allocate", "table.json", "--weights", "4", "-o", "solution.json")
    assert solution["optimal"]
    report = command(
        "compile",
        *("compile", model, "-o", "out.mpq", "--weights", "4", "--sensitivity", "table.json", "--dumps", "dumps", *few),
    )
    assert report["weights"]["average_bits"] <= 4
    layer = report["layers"][0]["name"]
    command("verify", "verify", "out.mpq")
    for path in ("dumps", "out.mpq"):
        command("inspect", "inspect", path)
        layers = command("inspect", "inspect", path, "--layers")["layers"]
        assert {row["name"]: row["weight"] for row in layers} == {
            row["name"]: row["weight"] for row in report["layers"]
        }
        command("inspect", "inspect", path, "--why", layer)
    command("inspect", "inspect", "dumps", "--diff", "bit-allocation")
    assert command("inspect", "inspect", "dumps", "--bisect")
    command("inspect", "inspect", "dumps", "--html", "page.html")
    inputs = denoiser.load(model).random_inputs(2)
    with Path("in.safetensors").open("wb") as stream:
        tensorfile.save(stream, {name: value.numpy() for name, value in inputs.items()})
    command("run", "run", "out.mpq", "--input", "in.safetensors", "--output", "y.safetensors")
    command("generate", "generate", "out.mpq", "-o", "grid.png", "--images", "4", "--steps", "2", "--compare", model)
    command("eval", "eval", "out.mpq", "--images", "8", "--eval-steps", "2")
    times = command("latency", "latency", "out.mpq", "-o", "times.json")
    assert times["kernels"] and json.loads(Path("times.json").read_text()) == times
    found = command("bench", "bench", "out.mpq", "--against", "torch", "--rounds", "2", "--latency-table", "times.json")
    assert found["latency"]["missing"] == 0 and found["latency"]["predicted_ms"] > 0
