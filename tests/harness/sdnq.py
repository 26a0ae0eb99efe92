"""SD.Next's quantizer, which diffusers loads its folders with."""

from __future__ import annotations

import os
from types import ModuleType

import pytest


def sdnq() -> ModuleType:
    """Imports the package, which then unpacks weights without compiling that for a minute. Skips where it is not there.

    The environment is read once, by the first import.
    """
    os.environ["SDNQ_USE_TORCH_COMPILE"] = "0"
    return pytest.importorskip("sdnq", reason="not installed: sdnq (pip install sdnq)")
