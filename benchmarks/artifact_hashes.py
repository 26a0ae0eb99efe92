"""Whether two states of the code compile the same artifacts: SHA-256 of every file, before and after.

Each state compiles the bundled models with several recipes and targets, from a cache of its own. What must be equal
are the bytes of every file but the manifest's, and the manifest without what `CHANGED` names.

    python -m benchmarks.artifact_hashes --before 329b67b
    python -m benchmarks.artifact_hashes --before 329b67b --models fashion-unet --targets native
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results" / "artifact_hashes.json"
MODELS = ("fashion-unet", "fashion-dit", "fashion-text")
TARGETS = ("native", "aarch64-dotprod")
RECIPES = {
    "w8a8": ("--recipe", "w8a8"),
    "default at 3.0 bits": ("--weights", "3.0"),
    "mpq-dmv2 at 2.24 bits": ("--recipe", "mpq-dmv2", "--weights", "2.24"),
    "default at 2.24 bits, trained": ("--weights", "2.24", "--effort", "fast"),
}
TRAINED = ("default at 2.24 bits, trained", "fashion-unet", "native")
"""Training is compared once: it takes its time, and no part of it depends on the model's family or the target."""
LEAST = {
    ("fashion-dit", "mpq-dmv2 at 2.24 bits"): ("--recipe", "mpq-dmv2", "--weights", "2.5"),
    ("fashion-text", "mpq-dmv2 at 2.24 bits"): ("--recipe", "mpq-dmv2", "--weights", "2.3"),
}
"""Where 2.24 bits cannot be met: the formats of MPQ-DMv2 take 2.456 bits of fashion-dit, 2.269 of fashion-text."""
MANIFEST = "manifest.json"
CHANGED: dict[str, Callable[[Any], object]] = {
    "pipeline": lambda text: text.partition(" -> ")[0],
    "calibration": lambda entry: {key: value for key, value in entry.items() if key != "ranges"},
}
"""Keys of the manifest that a change of the code is meant to change, and the part of their values that stays:
``pipeline`` names the lowering stages now, behind ``->``, and ``calibration`` has the ranges of inputs."""
DERIVED = ("artifact_sha256",)
"""Keys that differ because another one does."""


def cells(models: list[str], targets: list[str]) -> Iterator[tuple[str, str, str]]:
    for model in models:
        for recipe in RECIPES:
            for target in targets:
                if recipe != TRAINED[0] or (recipe, model, target) == TRAINED:
                    yield model, recipe, target


@contextmanager
def checkout(revision: str) -> Iterator[Path]:
    """A work tree of the revision, which goes again."""
    with tempfile.TemporaryDirectory(prefix="mpq-before-") as scratch:
        tree = Path(scratch) / "tree"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(tree), revision], check=True)
        try:
            yield tree
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True)


def compiled(tree: Path, cell: tuple[str, str, str], cache: Path) -> dict[str, Any]:
    """SHA-256 by file name, and the manifest, of what the code in `tree` compiles."""
    model, recipe, target = cell
    with tempfile.TemporaryDirectory(prefix="mpq-hashes-") as scratch:
        out = Path(scratch) / "out.mpq"
        command = [sys.executable, "-m", "mpq_compiler", "compile", model, "-o", str(out), "--target", target]
        environment = {**os.environ, "MPQ_CACHE": str(cache), "PYTHONPATH": str(tree)}
        options = LEAST.get((model, recipe), RECIPES[recipe])
        subprocess.run([*command, *options], cwd=tree, env=environment, check=True, stdout=subprocess.DEVNULL)
        files = {file.name: file.read_bytes() for file in sorted(out.iterdir())}
    manifest = json.loads(files.pop(MANIFEST))
    kept = {key: value for key, value in manifest.items() if key not in DERIVED}
    kept |= {key: part(kept[key]) for key, part in CHANGED.items()}
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    hashes[MANIFEST] = hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()
    return hashes


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--before", required=True, metavar="REVISION")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--targets", nargs="+", default=list(TARGETS))
    parser.add_argument("--kept", type=Path, metavar="FILE", help="hashes of REVISION: read if there, else written")
    arguments = parser.parse_args()

    wanted = list(cells(arguments.models, arguments.targets))
    kept = {}
    if arguments.kept is not None and arguments.kept.exists():
        kept = json.loads(arguments.kept.read_text())
    before: dict[str, dict[str, Any]] = {" / ".join(cell): kept.get(" / ".join(cell)) for cell in wanted}
    with tempfile.TemporaryDirectory(prefix="mpq-cache-") as caches:
        if any(hashes is None for hashes in before.values()):
            with checkout(arguments.before) as tree:
                for cell in wanted:
                    if before[" / ".join(cell)] is None:
                        print(f"before: {' / '.join(cell)}", file=sys.stderr, flush=True)
                        before[" / ".join(cell)] = compiled(tree, cell, Path(caches) / "before")
        if arguments.kept is not None:
            arguments.kept.write_text(json.dumps({**kept, **before}, indent=1))
        rows = []
        for cell in wanted:
            name = " / ".join(cell)
            after = compiled(ROOT, cell, Path(caches) / "after")
            for file in sorted(before[name].keys() | after.keys()):
                old, new = before[name].get(file, "none"), after.get(file, "none")
                rows.append({"cell": name, "file": file, "before": old, "after": new, "equal": old == new})
                print(f"{'equal ' if old == new else 'DIFFERS'}  {old[:16]}  {new[:16]}  {name}  {file}", flush=True)
    from benchmarks.machine import provenance

    differing = [row for row in rows if not row["equal"]]
    print(f"{len(rows) - len(differing)} of {len(rows)} files are equal; but for {', '.join(CHANGED)} in the manifest")
    document = {**provenance(), "before": arguments.before, "changed_keys": list(CHANGED), "files": rows}
    RESULTS.write_text(json.dumps(document, indent=1) + "\n")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
