"""Runs a step of the kit on this machine's first GPU; results are written at once, and what is there is not redone.

    python3 run.py --step 1 --out DIR     every kernel's bits, twice, in poisoned memory
    python3 run.py --step 2 --out DIR     compute-sanitizer: memory, races, uninitialised reads, barriers
    python3 run.py --step 3 --out DIR     ceilings, and kernels beside torch's, in turns
    python3 run.py --step 4 --out DIR     ncu's counters of some kernels
    python3 run.py --step 5 --out DIR     whole denoisers beside torch's

It needs python3 (3.11 or 3.12) and NumPy; what is compared with torch needs the machine's torch.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE / "lib"), str(HERE / "lib" / "cp{}{}".format(*sys.version_info[:2]))]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--step", type=int, choices=range(1, 6), help="the step to run")
    parser.add_argument("--out", type=Path, default=Path("results"), help="the folder of results")
    parser.add_argument("--only", default="", help="of steps 3 and 5: cases whose names contain this")
    parser.add_argument("--no-compile", action="store_true", help="of step 5: no torch.compile, which takes minutes")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if platform.machine() != "x86_64" or sys.version_info[:2] not in ((3, 11), (3, 12)):
        print("error: the kit carries libraries for Python 3.11 and 3.12 on x86-64; run it with one of those")
        return 1
    from there import bits, counters, machine, sanitizers, tables, whole

    if options.child:
        kind, first, second = options.child
        {
            "bits": lambda: bits.child(Path(first), int(second)),
            "all": sanitizers.child,
            "launch": lambda: counters.child(first, second),
        }[kind]()
        return 0
    if options.step is None:
        parser.error("name a step: --step 1 to 5")
    options.out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    machine.say(str(machine.facts()))
    wrong = {
        1: lambda: bits.run(options.out),
        2: lambda: sanitizers.run(options.out),
        3: lambda: tables.run(options.out, options.only),
        4: lambda: counters.run(options.out),
        5: lambda: whole.run(options.out, options.only, not options.no_compile),
    }[options.step]()
    for line in wrong:
        machine.say(f"WRONG {line}")
    machine.say(f"step {options.step}: {len(wrong)} wrong, {time.perf_counter() - start:.0f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    # Not by `exit`: where CUDA's runtime was loaded before torch, its end calls torch's profiler, which has ended by
    # then and frees what is not its own, in one run of five.
    os._exit(code)
