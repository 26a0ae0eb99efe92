"""What an artifact costs, as its manifest has it."""

from __future__ import annotations

from typing import Any

from mpq_compiler.artifact.manifest import cost


def test_the_peak_of_a_call_is_the_largest_of_its_functions_on_one_thread() -> None:
    manifest: Any = {
        "weights": {"payload_bytes": 700, "average_bits": 5.6},
        "model": {"parameters": 1000},
        "memory": {
            "prepared_bytes": 500,
            "activation_bytes": {"batch_1": 30, "batch_4": 110, "part": 7},
            "workspace_bytes": {"batch_1": 9, "batch_4": 4},
        },
        "plan": {"bops": 64, "float_bops": 1024},
    }
    assert cost(manifest) == {"bytes": 700, "float_bytes": 4000, "peak_bytes": 619, "bops": 64, "float_bops": 1024}
    del manifest["memory"], manifest["plan"]  # of another target, and of an earlier release
    assert cost(manifest) == {"bytes": 700, "float_bytes": 4000, "peak_bytes": None, "bops": None, "float_bops": None}
