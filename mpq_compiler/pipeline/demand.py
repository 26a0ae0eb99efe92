"""What a pass demands of a machine, before it runs: work, memory and disk, reckoned from the sizes of the program."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from mpq_compiler import formats
from mpq_compiler.formats.activation import SHRINK
from mpq_compiler.formats.base import Format
from mpq_compiler.ir.sizes import LayerSize, Sizes
from mpq_compiler.quantization.fitting import FEWEST_ROWS, SKETCH, Rounding
from mpq_compiler.quantization.requests import Requests
from mpq_compiler.quantization.statistics import GRAM_COLUMNS

VALUE_PASSES = 8.0
"""How often element-wise operators, norms and softmax read or write the bytes of the values that a run computes."""
WIDENED = 20
"""Bytes of traffic for each number of a weight that a run widens, and orders for its kernel."""
WEIGHT_BYTES = 8
"""Bytes of memory for each number of a weight while it is read: widened, and in the order of its kernel."""
SLOWER = 1.5
"""How much longer a pass takes than its work at the speeds of single operators, by eight large compilations."""
THREAD = 25 << 20
"""Bytes of memory that a thread takes for itself: buffers of kernels, small blocks that are kept."""


@dataclass(frozen=True)
class Demand:
    """What a pass, or a part of it, demands."""

    products: float = 0.0
    """Multiply-accumulates in f32."""
    traffic: float = 0.0
    """Bytes that are read and written one element after the other."""
    steps: float = 0.0
    """Operators that are called on small tensors, whose time is that of the call."""
    calls: float = 0.0
    """Such operators that one interpreter calls for all jobs, which then take turns."""
    seconds: float = 0.0
    """CPU seconds that an option gives, rather than the work."""
    held: float = 0.0
    """Bytes of memory that each job holds."""
    shared: float = 0.0
    """Bytes of memory that the pass holds while no jobs run."""
    disk: float = 0.0
    """Bytes of files that stay until the compilation has ended."""
    serial: bool = False
    """Whether one job does it all."""

    def __add__(self, other: Demand) -> Demand:
        """One after the other: work adds up, and the larger memory counts."""
        return Demand(
            self.products + other.products,
            self.traffic + other.traffic,
            self.steps + other.steps,
            self.calls + other.calls,
            self.seconds + other.seconds,
            max(self.held, other.held),
            max(self.shared, other.shared),
            self.disk + other.disk,
            self.serial and other.serial,
        )

    def __mul__(self, count: float) -> Demand:
        """The work as often as that, one after the other."""
        work = {name: count * getattr(self, name) for name in ("products", "traffic", "steps", "calls", "seconds")}
        return replace(self, **work)

    def cpu_seconds(self, speed: Speed) -> float:
        """The CPU seconds that the work takes at a speed."""
        work = self.products / speed.products + self.traffic / speed.traffic
        return SLOWER * (work + (self.steps + self.calls) / speed.steps) + self.seconds

    def elapsed(self, speed: Speed, jobs: int) -> float:
        """The seconds that it takes in so many jobs."""
        in_turn = SLOWER * self.calls / speed.steps
        return in_turn + (self.cpu_seconds(speed) - in_turn) / (1 if self.serial else jobs)

    def memory(self, jobs: int) -> float:
        """The bytes that it takes beside what there is already, in so many jobs."""
        return max(self.shared, self.held * (1 if self.serial else jobs))


@dataclass(frozen=True)
class Speed:
    """The speed of a core."""

    products: float
    """Multiply-accumulates a second in the convolutions and linear layers of a model, in f32."""
    traffic: float
    """Bytes a second that element-wise operators read and write."""
    steps: float
    """Calls a second of operators on small tensors."""

    @staticmethod
    def measured() -> Speed:
        """The speed of one thread here, measured in about a second."""
        image = torch.randn(4, 320, 32, 32).contiguous(memory_format=torch.channels_last)
        kernel = torch.randn(320, 320, 3, 3).contiguous(memory_format=torch.channels_last)
        column, row = torch.randn(128), torch.randn(1280)
        small = torch.zeros(128, 1280)  # in place: what is allocated anew may cost more than the call
        large = torch.randn(4 << 20)
        products = _seconds(lambda: torch.conv2d(image, kernel, padding=1))
        traffic = _seconds(lambda: torch.nn.functional.silu(large))
        steps = _seconds(lambda: small.addr_(column, row), 50)
        return Speed(4 * 320 * 320 * 9 * 1024 / products, 2 * large.nbytes / traffic, 1 / steps)


def _seconds(call: Callable[[], object], together: int = 1) -> float:
    """The CPU seconds of a call, the least of three times ``together`` calls; the first call of all is not counted."""
    call()
    found = []
    for _ in range(3):
        begin = time.thread_time()
        for _ in range(together):
            call()
        found.append((time.thread_time() - begin) / together)
    return max(min(found), 1e-9)


USUAL = "int4"
"""The format by which the time of a mixed plan is estimated."""
TRIAL = 100
"""Bytes of traffic that stand for a number of a weight being quantized and compared."""
F64 = 2
"""How much longer a product takes in f64."""
ORDERED = 4
"""How much longer second moments take to be factorized where the order of columns is found first, of a thousand."""
PATH = 600
"""Bytes of traffic that stand for a number of a weight being given a code on one of several paths."""
CALLS_OF_COLUMN = 2.5
"""Calls of operators whose time GPTQ takes for a column of a weight in a walk over them, few rows of all formats."""
CALLS_OF_SEARCH = 400
"""Operators that are called to search the step of an entropy-coded weight."""


def searching(values: float) -> Demand:
    """Searching the ranges of quantizers on so many values of activations (`formats.activation.fit`)."""
    return Demand(traffic=12 * 3 * len(SHRINK) * values)


def fitting(layers: Sequence[LayerSize], chosen: Sequence[Format], rounding: Rounding, share: float = 1.0) -> Demand:
    """Fitting a share of the rows of weights, on jobs, in several formats each.

    Whole second moments are sketched, where there are more columns than that saves, and factorized for GPTQ.
    """
    gptq = rounding != Rounding.NEAREST
    trials = sum(f.trials for f in chosen)
    walks, searched = max((f.walks for f in chosen), default=1), sum(f.walks > 1 for f in chosen)
    found = Demand()
    for layer in layers:
        rows = min(layer.rows, max(FEWEST_ROWS, round(share * layer.rows)))
        block = min(layer.columns, GRAM_COLUMNS)
        numbers, blocks = rows * layer.columns, -(-layer.columns // block)
        beside = SKETCH if layer.columns > 2 * SKETCH else layer.columns
        work = Demand(products=numbers * trials * beside if gptq else 0, traffic=numbers * trials * TRIAL)
        if gptq:
            factors = F64 * ORDERED * blocks * block**3 / 3
            walked = len(chosen) * numbers * block * 2.5  # half of the columns behind each, and two errors by moments
            calls = CALLS_OF_COLUMN * walks * layer.columns + CALLS_OF_SEARCH * searched
            along = rounding.of_size(layer.numbers).paths
            paths = numbers * sum(f.walks for f in chosen) * along * PATH if along > 1 else 0
            work += Demand(products=factors + walked, calls=calls, traffic=paths)
        held = 4 * layer.numbers + (10 if gptq else 2) * numbers * (1 if rows == layer.rows else len(chosen))
        found += work + Demand(held=THREAD + held + (5 * 8 * block**2 if gptq else 0))
    return found


@dataclass(frozen=True)
class Asked:
    """What decides on a demand beside a pass's own options."""

    sizes: Sizes
    """The sizes of the laid-out program."""
    rows: int
    """Inputs that are calibrated on."""
    requests: Requests
    """Requests of all passes."""
    uniform: str | None = None
    """The one format of all weights, where the plan has one."""
    draws: bool = True
    """Whether the model can draw, so that passes that judge by images do."""
    rounded: bool = False
    """Whether the allocation rounds the whole plan to measure it, and leaves its fits to those who round."""
    earlier: Sequence[object] = ()
    """The passes before this one."""

    @property
    def coded(self) -> bool:
        """Whether weights may be entropy-coded."""
        measured = [name for step in self.earlier for name in getattr(step, "formats", ())]
        return formats.any_coded(measured if self.uniform is None else [self.uniform])

    def running(self, inputs: int, together: int) -> Demand:
        """Running the program on inputs, so many at a time on each job."""
        sizes, pieces = self.sizes, -(-inputs // together)
        return Demand(
            products=inputs * sizes.products,
            traffic=inputs * VALUE_PASSES * sizes.value_bytes + pieces * WIDENED * sizes.numbers,
            held=THREAD + sizes.held_bytes(min(inputs, together), WEIGHT_BYTES),
        )
