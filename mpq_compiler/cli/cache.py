"""`mpqc cache`: what the cache holds, or clear it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mpq_compiler.cli.options import Commands
from mpq_compiler.support import terminal


def add(commands: Commands) -> None:
    """Add the command and its options to the command line."""
    parser = commands.add("cache", run, "what the cache holds, or: clear it")
    parser.add_argument("action", nargs="?", choices=("list", "clear"), default="list")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="cache folder (default: the user's)")


def run(args: argparse.Namespace) -> Any:
    """List the entries of the cache by kind, or clear it; return bytes by kind, or the bytes freed."""
    from mpq_compiler.support import cache

    where = str(cache.folder(args.cache))
    if args.action == "clear":
        freed = cache.clear(args.cache)
        terminal.say(f"freed {terminal.size(freed)} in {where}")
        return {"freed": freed}
    kinds: dict[str, list[int]] = {}
    for kind, _, size in cache.entries(args.cache):
        kinds.setdefault(kind, []).append(size)
    rows = [(kind, len(sizes), terminal.size(sum(sizes))) for kind, sizes in sorted(kinds.items())]
    terminal.table(where, ("kind", "entries", "size"), rows, numeric=(1, 2))
    return {"folder": where, "kinds": {kind: sum(sizes) for kind, sizes in kinds.items()}}
