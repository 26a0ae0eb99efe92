"""What a result must say of where it comes from."""

from __future__ import annotations

import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from mpq_compiler.support.host import cpu, cpus


def provenance() -> dict[str, Any]:
    """The command, the CPU, the system and the versions that a benchmark ran with."""
    return {
        "command": " ".join(["python -m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]]),
        "cpu": cpu(),
        "cores": len(cpus()),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "versions": {name: version(name) for name in ("mpq-compiler", "apache-tvm", "torch", "numpy")},
    }
