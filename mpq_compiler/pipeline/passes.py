"""The base of passes: frozen dataclasses with a contract, required and provided properties, and typed options."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, ClassVar

from mpq_compiler.pipeline.demand import Asked, Demand
from mpq_compiler.pipeline.session import Session
from mpq_compiler.quantization.requests import Requests
from mpq_compiler.quantization.statistics import Statistic
from mpq_compiler.support.errors import UserError

if TYPE_CHECKING:
    from mpq_compiler.ir.program import Program


class Contract(StrEnum):
    """The contract of a pass: what holds for its output against the program before it (docs/ir.md)."""

    IDENTICAL = "identical"
    """All bits are equal."""
    REWRITE = "rewrite"
    """Values are equal to 1e-5 of the output's largest magnitude, in f32."""
    SIMULATION = "simulation"
    """A quantization error is introduced, which is measured and printed."""
    EXACT = "exact"
    """All bits are equal to those of the program before in exact mode."""
    LOWERED = "lowered"
    """Each node gives the same integers on the inputs of the program before, and floats to 1e-5 of the largest.

    Codes of such floats may differ by one at ties. It is the contract of the kernels that a backend selects.
    """


class Role(StrEnum):
    """The role of a pass in a pipeline; the driver asks for roles, never for names."""

    REWRITES = "rewrites"
    """Changes how the float program is written."""
    CALIBRATES = "calibrates"
    """Records inputs, and the statistics that the pipeline requests."""
    GROUPS_TIME = "groups time"
    """Decides on the time groups, or on how much times count."""
    MEASURES = "measures"
    """Says what each format costs; its option ``formats`` names those to choose from."""
    ALLOCATES = "allocates"
    """Chooses a format for every layer and edge, under budgets; ``uniform`` and ``dynamic`` are among its options."""
    CHOOSES_NUMERICS = "chooses numerics"
    """Chooses the arithmetic of attentions and float layers; its options are ``mode`` and ``kinds``."""
    SIMULATES = "simulates"
    """Inserts quantizers and branches."""
    ROUNDS = "rounds"
    """Chooses the codes of weights."""
    TRAINS = "trains"
    """Moves stored values away from the float model's, on purpose; held-out inputs judge it."""
    PACKS = "packs"
    """Writes the program on codes."""


@dataclass(frozen=True)
class Pass(ABC):
    """A step of the compiler; its docstring states its purpose, its source and a before/after excerpt."""

    contract: ClassVar[Contract]
    requires: ClassVar[frozenset[str]] = frozenset()
    """The properties that an earlier pass must provide."""
    provides: ClassVar[frozenset[str]] = frozenset()
    """The properties that later passes may rely on."""
    statistics: ClassVar[frozenset[Statistic]] = frozenset()
    """The calibration statistics that it reads; the requests of the whole pipeline are collected in one run."""
    role: ClassVar[Role | None] = None
    """Its role in the pipeline; None where nobody asks for it."""
    decides_kernels: ClassVar[bool] = False
    """Whether it decides on which kernels are called, not only on their values; latency tables are measured with it."""
    settings: ClassVar[Mapping[str, str]] = {}
    """Options by the setting of a compilation that sets them: ``{"numerics": "mode"}``. A recipe without the pass
    refuses the setting. One that is no option reaches the pass by the session."""
    capped: ClassVar[frozenset[str]] = frozenset()
    """Options that a compilation's setting of the same name lowers and never raises."""
    width: ClassVar[str | None] = None
    """The option with the width of activations to decide for, or a tuple of widths; a budget of activations sets it
    where the recipe leaves the default."""
    efforts: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    """Options by the name of an effort, where the recipe states none."""

    @classmethod
    def name(cls) -> str:
        """Its name in pipelines and recipes: the name of its module, with dashes."""
        return cls.__module__.rsplit(".", 1)[-1].replace("_", "-")

    @abstractmethod
    def run(self, program: Program, session: Session) -> Program:
        """Runs the pass and returns the new program; the given one is left as it is."""

    def demand(self, asked: Asked) -> Demand:
        """What the pass demands of the machine, reckoned before it runs; nothing that counts, unless it says so."""
        return Demand()

    def requests(self) -> Requests:
        """The requests of the pass, with its options, to other passes."""
        return Requests(self.statistics)

    def options(self) -> dict[str, Any]:
        """The values of its options by name, in the order of declaration."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    def require(self, option: str, least: float, most: float = math.inf) -> None:
        """Raises a UserError unless an option, or each of its values, lies in a range; None passes."""
        value = getattr(self, option)
        items = value if isinstance(value, tuple) else () if value is None else (value,)
        wanted = f"{least:g} or more" if most == math.inf else f"{least:g} to {most:g}"
        if value == () or not all(least <= item <= most and item != math.inf for item in items):
            given = "empty" if value == () else _print_value(value)
            raise UserError(f"option '{option}' of pass '{self.name()}' must be {wanted}, not {given}")

    def changed(self) -> dict[str, Any]:
        """The options that differ from their defaults."""
        return {f.name: value for f in dataclasses.fields(self) if (value := getattr(self, f.name)) != f.default}

    def text(self) -> str:
        """The pass as pipelines spell it: ``name{option=value,...}``, with the options that differ from defaults."""
        changed = [f"{name}={_print_value(value)}" for name, value in self.changed().items()]
        return self.name() + ("{" + ",".join(changed) + "}" if changed else "")


def _print_value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return "/".join(_print_value(v) for v in value)  # "+" stands in names of formats
    return "none" if value is None else str(value)
