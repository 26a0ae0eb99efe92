"""Random configurations of a denoiser (a format for every weight), and the noise of each at the output."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from mpq_compiler import formats
from mpq_compiler.analysis.noise_power import noise_power
from mpq_compiler.formats.base import output_error
from mpq_compiler.ir import parcels
from mpq_compiler.ir.costs import weight_path
from mpq_compiler.ir.graph import weight_of
from mpq_compiler.ir.interpreter import Interpreter
from mpq_compiler.ir.program import Program
from mpq_compiler.pipeline.session import Session
from mpq_compiler.quantization.fitting import Wanted, bias_of, corrected_bias, moments, rows_of
from mpq_compiler.quantization.statistics import CALIBRATION, Calibration
from mpq_compiler.support.execution import batches

Configuration = Mapping[str, str]
"""The format of each weight, by its path."""


def drawn(paths: Sequence[str], names: Sequence[str], count: int, seed: int) -> list[Configuration]:
    """Draws configurations whose average bits spread evenly (Qua2SeDiMo, arXiv 2412.14628, section 3.1).

    A configuration draws the shares of the widths uniformly from the simplex. Each weight then draws its width by these
    shares, and its format uniformly among those of the width.

    Args:
        paths: the weights.
        names: the formats.
        count: the number of configurations.
        seed: decides them.
    """
    generator = torch.Generator().manual_seed(seed)
    of_width: dict[int, list[str]] = {}
    for name in names:
        of_width.setdefault(formats.get(name).bits, []).append(name)
    widths = list(of_width)
    found: list[Configuration] = []
    for _ in range(count):
        shares = -torch.rand(len(widths), generator=generator, dtype=torch.float64).clamp_min(1e-12).log()
        chosen = torch.multinomial(shares, len(paths), replacement=True, generator=generator).tolist()
        which = torch.rand(len(paths), generator=generator, dtype=torch.float64).tolist()
        kinds = [of_width[widths[width]] for width in chosen]
        found.append({p: k[int(r * len(k))] for p, k, r in zip(paths, kinds, which, strict=True)})
    return found


def method(name: str) -> str:
    """A format's name without its width: "km4" becomes "km", "km4t" becomes "kmt"."""
    return re.sub(r"\d+", "", name, count=1)


class Fits:
    """The weights of a program in several formats, by path and format."""

    def __init__(self, program: Program, names: Sequence[str], session: Session) -> None:
        self.program = program
        self.calls: dict[str, list[fx.Node]] = {}
        for node in program.quantizable:
            self.calls.setdefault(str(weight_path(node)), []).append(node)
        rounding = session.requests.rounding.quick
        keys = [(path, name) for path in self.calls for name in names]
        wanted = [
            Wanted(call, str(weight_of(call)), name, rounding) for path, name in keys for call in self.calls[path][:1]
        ]
        self.fits = dict(zip(keys, session.fits.fit_all(program, wanted, session, "fitting formats"), strict=True))

    def values(self, path: str, name: str) -> dict[str, Tensor]:
        """The quantized weight and the corrected biases of its calls, by the store names that they replace."""
        fit = self.fits[path, name]
        found: dict[str, Tensor] = {}
        for call in self.calls[path]:
            weight, bias = str(weight_of(call)), bias_of(call)
            found[weight] = fit.dequantize().reshape(self.program.tensors[weight].shape)
            corrected = corrected_bias(self.program, call, weight, fit)
            if bias is not None and corrected is not None:
                found[str(bias.target)] = corrected
        return found

    def error(self, path: str, name: str) -> float:
        """The output error of the weight's first call over the calibration's rows, relative to the output's power."""
        call = self.calls[path][0]
        rows, gram = rows_of(self.program, str(weight_of(call))), moments(self.program, call)
        error, power = (output_error(x, gram).sum() for x in (self.fits[path, name].dequantize() - rows, rows))
        return float(error.clamp_min(0) / power.clamp_min(1e-30))

    def noise(self, configuration: Configuration, inputs: dict[str, Tensor], reference: Tensor) -> float:
        """The relative noise power of the program's output with all weights in the configuration's formats."""
        values: dict[str, Tensor] = {}
        for path, name in configuration.items():
            values |= self.values(path, name)
        return noise_power(run_with(self.program, values, inputs), reference)


@dataclass(frozen=True)
class Measured:
    """What the tasks share that measure configurations."""

    fits: Fits
    inputs: dict[str, Tensor]
    reference: Tensor
    """The output of the float program on the inputs."""

    def __reduce__(self) -> tuple[Callable[..., Measured], tuple[object, ...]]:
        """Takes along what `Fits.noise` reads."""
        fits, program = copy.copy(self.fits), parcels.lean(self.fits.program)
        program.facts[CALIBRATION] = Calibration({}, means=self.fits.program.facts[CALIBRATION].means)
        fits.program = program
        return Measured, (fits, self.inputs, self.reference)


def measure(shared: Measured, item: tuple[int, Configuration]) -> float:
    """The relative noise power of the output in a numbered configuration."""
    return shared.fits.noise(item[1], shared.inputs, shared.reference)


class _With(Interpreter):
    def __init__(self, program: Program, values: Mapping[str, Tensor]) -> None:
        super().__init__(program)
        self.values = values

    def attribute(self, name: str) -> Any:
        return self.values[name] if name in self.values else super().attribute(name)


@torch.no_grad()
def run_with(program: Program, values: Mapping[str, Tensor], inputs: dict[str, Tensor]) -> Tensor:
    """Runs the program on the inputs with some stored tensors replaced by ``values``; returns its output."""
    interpreter = _With(program, values)
    return torch.cat([interpreter.run(batch) for batch in batches(inputs)])
