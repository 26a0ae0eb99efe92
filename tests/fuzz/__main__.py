"""Attacks for as long as one likes, with seeds that nobody tried before; what ends badly is printed with its seed.

    python -m tests.fuzz --minutes 60                   # all attacks, turn by turn
    python -m tests.fuzz --attack "dumps" --first 7 --mutants 1    # one mutant again
    python -m tests.fuzz --mutants 2000 --soak 100000 --write      # figures of docs/trust.md
    python -m tests.fuzz --mutants 0 --kills 200 --write            # the others
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import documents
from mpq_compiler.support import host
from tests.fuzz import campaign, kills, soak
from tests.fuzz.attacks import ATTACKS, base_of
from tests.harness.tree import ROOT

RESULTS = ROOT / "benchmarks" / "results" / "trust.json"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--attack", nargs="*", choices=ATTACKS, default=[*ATTACKS], help="those alone")
    parser.add_argument("--minutes", type=float, help="how long at most; without --mutants all of it")
    parser.add_argument("--mutants", type=int, help="of each attack (100, again and again with --minutes)")
    parser.add_argument("--first", type=int, default=0, help="seed of the first mutant (0)")
    parser.add_argument("--kills", type=int, default=0, help="of compilations, afterwards (0)")
    parser.add_argument("--soak", type=int, default=0, help="calls from four threads, afterwards (0)")
    parser.add_argument("--write", action="store_true", help=f"figures to {RESULTS.relative_to(ROOT)}")
    args = parser.parse_args()
    os.environ.setdefault("MPQ_TEST_BEGIN", str(time.time()))  # as in a run of tests, for what bases have in common
    until = None if args.minutes is None else time.monotonic() + 60 * args.minutes
    document: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    about = {"cpu": host.cpu(), "command": "python -m tests.fuzz " + " ".join(sys.argv[1:])}
    bad = 0
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch:
        if args.mutants != 0:
            found = attack(args.attack, args.first, args.mutants, until, Path(scratch))
            document["attacks"] = about | {"of": {name: _figures(outcome) for name, outcome in found.items()}}
            bad += sum(len(outcome.bad) for outcome in found.values())
        if args.soak:
            wrong, memory = soak.soak(base_of("artifact, a folder", Path(scratch)) / "a.mpq", args.soak)
            document["soak"] = about | {"calls": args.soak, "threads": 4, "wrong": wrong, "bytes": memory}
            print(f"{args.soak} calls from four threads: {wrong} wrong, memory {memory} bytes", flush=True)
            bad += wrong
        if args.kills:
            killed = kills.campaign(Path(scratch, "kills"), args.kills, args.first, until=until)
            document["kills"] = about | dict(killed)
            print("kills of compilations:", dict(killed), flush=True)
    if args.write:
        RESULTS.write_text(json.dumps(document, indent=1) + "\n")
        documents.insert(ROOT / "docs" / "trust.md", "trust", table(document))
    return 1 if bad else 0


def attack(
    names: Sequence[str], first: int, mutants: int | None, until: float | None, folder: Path
) -> dict[str, campaign.Outcome]:
    """Tries mutants of attacks, turn by turn: as many of each, or until the time is over."""
    found = {name: campaign.Outcome() for name in names}
    each = mutants or 100
    while True:
        for name in names:
            count = max(1, round(each * ATTACKS[name].share))
            _add(found[name], campaign.run(name, range(first, first + count), folder, until))
            _say(name, found[name])
        first += each
        if mutants is not None or until is None or time.monotonic() > until:
            return found


def table(document: dict[str, Any]) -> str:
    """The figures of docs/trust.md."""
    kinds = ("refused", "right", "taken", *campaign.BAD)
    of = document["attacks"]["of"]
    rows = [(name, own["mutants"], *(own.get(kind, 0) for kind in kinds)) for name, own in of.items()]
    rows.append(("all", *(sum(row[i] for row in rows) for i in range(1, len(kinds) + 2))))
    head = ("attack", "mutants", "refused", "right", "accepted", *campaign.BAD)
    lines = ["| " + " | ".join(head) + " |", "|---" + "|---:" * (len(head) - 1) + "|"]
    for row in rows:
        lines.append("| " + " | ".join(f"{cell:,}" if isinstance(cell, int) else cell for cell in row) + " |")
    said = [f"`{document['attacks']['command']}`, {document['attacks']['cpu']}."]
    if soak_ := document.get("soak"):
        grown = (soak_["bytes"][-1] - soak_["bytes"][1]) / 2**20
        said.append(
            f"{soak_['calls']:,} calls of one artifact from four threads: {soak_['wrong']} had other bits; memory "
            f"at the end {grown:+.1f} MiB from what it was after a tenth."
        )
    if killed := document.get("kills"):
        by = ", ".join(f"{killed[name]} {name}" for name in ("SIGKILL", "SIGTERM", "SIGINT") if name in killed)
        said.append(
            f"{killed['killed']} kills of compilations, two at a time on one cache ({by}): every artifact was whole, "
            f"and {killed.get('compiled with what was left', 0)} compilations with what the killed ones had left gave "
            "the bytes of a fresh one."
        )
    return "\n".join(["", *lines, "", *said, ""])


def _add(all_: campaign.Outcome, more: campaign.Outcome) -> None:
    all_.counts += more.counts
    all_.bad += more.bad
    all_.slowest = max(all_.slowest, more.slowest)
    for seed, how, what in more.bad:
        print(f"  seed {seed}: {how} {what}")


def _say(name: str, outcome: campaign.Outcome) -> None:
    counts = ", ".join(f"{count} {how}" for how, count in sorted(outcome.counts.items()))
    print(f"{name}: {sum(outcome.counts.values())} mutants: {counts}; {outcome.slowest:.1f} s at most", flush=True)


def _figures(outcome: campaign.Outcome) -> dict[str, object]:
    counts: Counter[str] = outcome.counts
    return {"mutants": sum(counts.values()), **dict(sorted(counts.items())), "slowest_s": round(outcome.slowest, 1)}


if __name__ == "__main__":
    sys.exit(main())
