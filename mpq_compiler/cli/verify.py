"""`mpqc verify`: every byte of an artifact checked, who signed it, and what this machine lacks to run it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpq_compiler.cli.options import Commands, add_key
from mpq_compiler.support import terminal

if TYPE_CHECKING:
    from mpq_compiler.artifact.bundle import Artifact
    from mpq_compiler.artifact.signature import Trust


def add(commands: Commands) -> None:
    """Add the command and its options to the command line."""
    parser = commands.add("verify", run, "check every byte of an artifact, and whether this machine can run it")
    parser.add_argument("artifact", metavar="ARTIFACT")
    add_key(parser)


def run(args: argparse.Namespace) -> Any:
    """Check the digests of an artifact's files or of a pipeline's parts; the SHA-256, and what is missing here."""
    from mpq_compiler.artifact import pipeline

    if not pipeline.is_pipeline(args.artifact):
        found, missing = _verified(args.artifact, args.key)
        signature = _signature(args.artifact, found.is_signed, args.key)
        return {
            "intact": True,
            "sha256": found.manifest["artifact_sha256"],
            "missing_features": missing,
            "signature": signature,
        }
    whole = pipeline.read(args.artifact, args.key)
    lacking: set[str] = set()
    for name in whole.document["parts"]:
        part, missing = _verified(whole.part(name), whole.signed_part(name))
        whole.require_part(name, part.manifest["artifact_sha256"])
        lacking |= {*missing}
    sha256 = whole.document["pipeline_sha256"]
    terminal.say(f"{args.artifact} is intact: {len(whole.document['parts'])} parts, sha256 {sha256[:16]}")
    signature = _signature(args.artifact, whole.is_signed, args.key)
    return {"intact": True, "sha256": sha256, "missing_features": sorted(lacking), "signature": signature}


def _verified(path: str | Path, key: Trust | None) -> tuple[Artifact, list[str]]:
    """Check an artifact, say so, and return it and the features that are missing here."""
    from mpq_compiler.artifact import bundle
    from mpq_compiler.targets import table

    found = bundle.read(path, key)
    manifest, target = found.manifest, found.manifest["target"]
    missing = sorted(table.missing(target["arch"], target["features"], target.get("cuda", 0)))
    terminal.say(
        f"{path} is intact: {len(manifest['files'])} files for {target['name']}, "
        f"sha256 {manifest['artifact_sha256'][:16]}"
        + (f"; this machine cannot run it: it lacks {', '.join(missing)}" if missing else "")
    )
    return found, missing


def _signature(path: str, is_signed: bool, key: str | None) -> str:
    """Say what is known of the signature, in a word of schemas/verify.json too."""
    if key is not None:
        terminal.say(f"{path} is signed by the owner of {key}")
        return "right"
    if is_signed:
        terminal.say(f"{path} has a signature, which was not checked: add --key PUBLIC.pem")
        return "not checked"
    return "none"
