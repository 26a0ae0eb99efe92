"""No test is lost: the ids of an earlier commit, moved by moved.toml, are among those of this tree.

    python -m tests.moved --before 329b67b     # prints what is missing, and exits with 1 if anything is
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

from tests.harness.tree import ROOT

TABLE = Path(__file__).with_suffix(".toml")


def collected(tree: Path) -> list[str]:
    """The ids of all tests of a checkout, by its own pytest configuration."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    environment = {**os.environ, "PYTHONPATH": str(tree), "COLUMNS": "200"}
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"the tests of {tree} cannot be collected:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    return re.findall(r"^tests/.*$", done.stdout, re.MULTILINE)


def collected_at(commit: str) -> list[str]:
    """The ids of all tests of a commit, checked out beside this tree and removed again."""
    git = ["git", "-c", "safe.directory=*", "-C", str(ROOT), "worktree"]
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder, "before").resolve()
        subprocess.run([*git, "add", "--quiet", "--detach", str(tree), commit], check=True)
        try:
            return collected(tree)
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True)


def moved(test: str, files: Mapping[str, str], ids: Mapping[str, str]) -> str:
    """The id of a test where it is now.

    files: new files by old ones. ids: new ids by old ones, both in the new files; those of a function, without
    brackets, stand for all of its parameters.
    """
    file, _, rest = test.partition("::")
    test = f"{files.get(file, file)}::{rest}"
    function, bracket, parameters = test.partition("[")
    return ids.get(test) or ids.get(function, function) + bracket + parameters


def lost(before: Iterable[str], now: Iterable[str], table: Mapping[str, Mapping[str, str]]) -> list[str]:
    """The earlier ids that no test has now, as they would be now.

    Parameters without an id of their own are numbered by pytest: a new one among them changes the numbers behind it.
    """
    wanted = {moved(test, table["files"], table["ids"]) for test in before}
    new = Counter(map(unnumbered, {*now} - wanted))
    missing = []
    for test in sorted(wanted - {*now}):
        new[unnumbered(test)] -= 1
        missing += [test] if new[unnumbered(test)] < 0 else []
    return missing


def unnumbered(test: str) -> str:
    """The id without the numbers of unnamed parameters."""
    return re.sub(r"(?<=[\[-])([a-z_]+)\d+(?=[]-])", r"\1", test)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--before", required=True, help="a commit")
    before, now = collected_at(parser.parse_args().before), collected(ROOT)
    missing = lost(before, now, tomllib.loads(TABLE.read_text(encoding="utf-8")))
    print(*missing, f"{len(before)} tests before, {len(now)} now, {len(missing)} lost", sep="\n")
    raise SystemExit(bool(missing))


if __name__ == "__main__":
    main()
