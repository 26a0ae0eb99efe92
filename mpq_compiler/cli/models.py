"""`mpqc models`: the models that ship with the package."""

from __future__ import annotations

import argparse
import json
from typing import Any

from mpq_compiler.cli.options import Commands
from mpq_compiler.support import terminal


def add(commands: Commands) -> None:
    """Add the command and its options to the command line."""
    commands.add("models", run, "the models that ship with the package")


def run(args: argparse.Namespace) -> Any:
    """List the bundled models and pipelines with their classes and bytes."""
    from mpq_compiler.frontend import checkpoint

    described = []
    for name, folder in (checkpoint.bundled() | checkpoint.bundled_pipelines()).items():
        index = folder / "model_index.json"
        config = index if index.is_file() else next(folder.glob("*/config.json"))
        size = sum(f.stat().st_size for f in folder.rglob("*.safetensors"))
        kind = json.loads(config.read_text(encoding="utf-8"))["_class_name"]
        described.append({"name": name, "class": kind, "bytes": size, "folder": str(folder)})
    rows = [(d["name"], d["class"], terminal.size(d["bytes"])) for d in described]
    terminal.table("bundled models", ("model", "class", "weights"), rows, numeric=(2,))
    return described
