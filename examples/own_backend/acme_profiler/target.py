"""The target: a name for --target, what it needs of a machine, and the backend that builds for it."""

from __future__ import annotations

from mpq_compiler.targets.table import Target

TARGET = Target("profiler", arch="any", isa="torch", backend="acme-profiler")
