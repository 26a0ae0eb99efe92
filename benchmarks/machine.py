"""What a result must say of where it comes from."""

from __future__ import annotations

import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mpq_compiler.support.host import cpu, cpus
from mpq_compiler.targets.table import resolve


def provenance() -> dict[str, Any]:
    """The command, the CPU and what it can do, the system and the versions that a benchmark ran with.

    Of a path that works on this machine only, the command has the last part.
    """
    arguments = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    return {
        "command": " ".join(["python -m", f"benchmarks.{Path(sys.argv[0]).stem}", *arguments]),
        "cpu": cpu(),
        "isa": resolve("native").name,
        "cores": len(cpus()),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "versions": {name: version(name) for name in ("mpq-compiler", "apache-tvm", "torch", "numpy")},
    }
