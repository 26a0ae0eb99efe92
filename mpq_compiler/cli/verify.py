"""`mpqc verify`: every byte of an artifact checked, and what this machine lacks to run it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mpq_compiler.cli.options import Commands
from mpq_compiler.support import terminal


def add(commands: Commands) -> None:
    """Add the command and its options to the command line."""
    parser = commands.add("verify", run, "check every byte of an artifact, and whether this machine can run it")
    parser.add_argument("artifact", metavar="ARTIFACT")


def run(args: argparse.Namespace) -> Any:
    """Check the digests of an artifact's files or of a pipeline's parts; the SHA-256, and what is missing here."""
    from mpq_compiler.artifact import pipeline

    if not pipeline.is_pipeline(args.artifact):
        sha256, missing = _verified(args.artifact)
        return {"intact": True, "sha256": sha256, "missing_features": missing}
    found = pipeline.read(args.artifact)
    lacking: set[str] = set()
    for name in found.document["parts"]:
        sha256, missing = _verified(found.part(name))
        found.require_part(name, sha256)
        lacking |= {*missing}
    sha256 = found.document["pipeline_sha256"]
    terminal.say(f"{args.artifact} is intact: {len(found.document['parts'])} parts, sha256 {sha256[:16]}")
    return {"intact": True, "sha256": sha256, "missing_features": sorted(lacking)}


def _verified(path: str | Path) -> tuple[str, list[str]]:
    """Check an artifact, say so, and return its SHA-256 and the features that are missing here."""
    from mpq_compiler.artifact import bundle
    from mpq_compiler.targets import table

    manifest = bundle.read(path).manifest
    target = manifest["target"]
    missing = sorted(table.missing(target["arch"], target["features"], target.get("cuda", 0)))
    terminal.say(
        f"{path} is intact: {len(manifest['files'])} files for {target['name']}, "
        f"sha256 {manifest['artifact_sha256'][:16]}"
        + (f"; this machine cannot run it: it lacks {', '.join(missing)}" if missing else "")
    )
    return manifest["artifact_sha256"], missing
