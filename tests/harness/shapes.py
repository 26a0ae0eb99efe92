"""The shapes, formats and data that the integer kernels are tested on, and what they must return, in numpy.

The reference follows the definition of the packed dialect word by word with int64 sums and exactly emulated
fused multiply-adds; it shares no code with the kernels but `QuantMatmul`, the description of the problem.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace

import numpy as np

from mpq_compiler.backends.tvm.kernels.problems.quant_matmul import QuantMatmul, of_sibling
from mpq_compiler.formats.packing import pack_codes, pack_rows, packed_bytes

ROWS = (1, 2, 5, 6, 7, 63, 64, 65, 1000)
OUTPUTS = (1, 3, 16, 48, 63, 64, 65, 320)
REDUCTIONS = (1, 3, 27, 36, 63, 64, 432, 1000)

FORMATS: dict[str, dict] = {
    "w8": {"bits": 8},
    "w8-offset": {"bits": 8, "has_offset": True, "has_bias": False},
    "w4": {"bits": 4},
    "w4-classes-groups": {"bits": 4, "classes": 2, "groups": 3, "has_offset": True},
    "w3": {"bits": 3},
    "w3-classes": {"bits": 3, "classes": 2, "has_bias": False},
    "w2": {"bits": 2},
    "w2-offset-groups": {"bits": 2, "has_offset": True, "groups": 2},
}
"""Every stored width, with and without bias and offset, one and two row classes, one and more time groups."""

# (batch, problem)
CONVOLUTIONS: dict[str, tuple[int, QuantMatmul]] = {
    "1x1": (2, QuantMatmul(5, 7, 36, 48)),
    "1x1-strided": (1, QuantMatmul(7, 9, 20, 33, stride=(2, 2))),
    "3x3": (3, QuantMatmul(9, 11, 48, 64, (3, 3), padding=(1, 1, 1, 1))),
    "3x3-large": (1, QuantMatmul(40, 33, 256, 24, (3, 3), padding=(1, 1, 1, 1))),
    "3x3-stride-2": (2, QuantMatmul(13, 10, 33, 65, (3, 3), (2, 2), (1, 1, 1, 1))),
    "3x3-asymmetric": (2, QuantMatmul(14, 14, 48, 48, (3, 3), (2, 2), (0, 1, 0, 1))),
    "3x3-one-channel": (2, QuantMatmul(28, 28, 1, 48, (3, 3), padding=(1, 1, 1, 1))),
    "3x3-one-output": (1, QuantMatmul(17, 23, 27, 1, (3, 3), padding=(1, 1, 1, 1))),
    "3x3-of-1x1": (4, QuantMatmul(1, 1, 16, 20, (3, 3), padding=(1, 1, 1, 1))),
    "3x3-of-2x1": (2, QuantMatmul(2, 1, 5, 3, (3, 3), (2, 2), (1, 1, 1, 1))),
    "5x3-of-3x2": (2, QuantMatmul(3, 2, 7, 18, (5, 3), padding=(3, 2, 2, 2))),
    "patches": (2, QuantMatmul(16, 12, 3, 40, (4, 4), (4, 4))),
    "patches-2x2": (1, QuantMatmul(6, 10, 4, 66, (2, 2), (2, 2))),
    "3x3-unread-edge": (1, QuantMatmul(12, 8, 8, 16, (3, 3), (3, 3))),
}


@dataclass(frozen=True)
class Case:
    """Data of one call, in the stored form, under the names of the kernels' arguments."""

    problem: QuantMatmul
    batch: int
    data: dict[str, np.ndarray]

    def stored(self) -> dict[str, np.ndarray]:
        """The arguments of `prepare`."""
        p, codes, row_class = self.problem, self.data["codes"], self.data["row_class"]
        if not p.widths:
            return {**self.data, "codes": pack_codes(codes, p.bits)}
        return {**self.data, "codes": pack_rows(codes, row_class, p.widths[0]), "row_class": pack_codes(row_class, 2)}


def concrete(shape: tuple[int | str, ...], batch: int) -> tuple[int, ...]:
    """The shape of an argument at a batch size."""
    return tuple(batch if isinstance(n, str) else n for n in shape)


def seed(*what: object) -> int:
    """A seed that depends on its arguments alone."""
    return zlib.crc32(repr(what).encode())


def make_case(problem: QuantMatmul, batch: int, seed_: int, zero_points: tuple[int, ...] = ()) -> Case:
    """Random data of a problem. Codes hold both extremes; zero points are drawn unless given (cycled)."""
    p, draw = problem, np.random.default_rng(seed_)
    segments = len(p.segments)
    x = draw.integers(0, 256, concrete(p.input_shape(), batch)).astype(np.uint8)
    corner = draw.random()
    if corner < 0.3:  # the largest sums there can be
        x[...] = 255 if corner < 0.15 else 0
    shape = (p.outputs, p.reduction)
    if p.widths:
        codes = draw.integers(0, 2 ** np.take(p.widths, classes_in_turn(p))[:, None], shape).astype(np.uint8)
    elif p.bits == 8:
        codes = draw.integers(-127, 128, shape).astype(np.int8)
        codes[draw.integers(p.outputs)] = draw.choice([-127, 127])
    else:
        codes = draw.integers(0, p.entries, shape).astype(np.uint8)
        codes[draw.integers(p.outputs)] = draw.choice([0, p.entries - 1])
    tables = (batch, p.rows) if p.dynamic else (segments, p.groups)
    zeros = draw.integers(0, 256, tables)
    if zero_points:
        zeros = np.resize(zero_points, zeros.shape)
    luts = draw.integers(-127, 128, (p.classes, p.entries)).astype(np.int8)
    luts[:, 0], luts[:, -1] = -127, 127
    if p.widths:  # each table within the last
        last = np.sort(draw.permutation(np.arange(-127, 128))[: p.entries]).astype(np.int8)
        luts = np.concatenate([draw.choice(last, (len(p.widths) - 1, p.entries)), last[None]])
    if p.integers:
        luts[...] = np.arange(-8, 8)
    data: dict[str, np.ndarray] = {
        "x": x,
        "group": draw.integers(0, p.groups, batch),
        "codes": codes,
        "scale": (draw.random((p.outputs, segments)) * 0.02 + 1e-4).astype(np.float16),
        "stored_offset": (draw.standard_normal(p.outputs) * 0.1).astype(np.float16),
        "tables": luts,
        "row_class": (classes_in_turn(p) if p.widths else draw.integers(0, p.classes, p.row_classes)).astype(np.uint8),
        "act_scale": (draw.random(tables) * 0.1 + 1e-3).astype(np.float32),
        "act_zero": zeros.astype(np.uint8),
        "stored_bias": draw.standard_normal(p.outputs).astype(np.float16),
    }
    if p.epilogue is not None:
        out = concrete(p.output_shape(), batch)
        size = {"full": out, "sample": (batch, p.results), "channel": (p.results,), "scalar": (1,)}
        for i, operand in enumerate(p.epilogue.operands):
            data[f"operand{i}"] = draw.standard_normal(size[operand.kind]).astype(np.float32)
        data["qscale"] = (draw.random(p.groups) + 0.5).astype(np.float32)
        data["qzero"] = draw.integers(0, 2 ** (p.epilogue.bits or 8), p.groups).astype(np.int32)
    return Case(p, batch, data)


def of_products(case: Case) -> list[Case]:
    """A case of each product of a problem, with weights and tables of their own, on the same activations."""
    if not case.problem.siblings:
        return [case]
    shared = {name: case.data[name] for name in ("x", "group", "act_scale", "act_zero")}
    alone = [make_case(case.problem.alone, case.batch, seed("sibling", i)) for i in range(case.problem.products)]
    return [replace(each, data=each.data | shared) for each in alone]


def stored_together(case: Case) -> dict[str, np.ndarray]:
    """The arguments of `prepare`, those of siblings too."""
    stored = [product.stored() for product in of_products(case)]
    return {of_sibling(name, i): value for i, data in enumerate(stored) for name, value in data.items()}


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """float32 a * b + c rounded once: the float64 product is exact, its sum is rounded to odd first."""
    product, addend = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
    total = product + addend
    part = total - product
    error = (product - (total - part)) + (addend - part)
    even = total.view(np.int64) & 1 == 0
    odd = np.where((error != 0) & even, np.nextafter(total, np.copysign(np.inf, error)), total)
    return odd.astype(np.float32)


def _columns(x: np.ndarray, problem: QuantMatmul) -> np.ndarray:
    """[B, OH, OW, kh, kw, C] of the padded x [B, H, W, C]."""
    p = problem
    (kh, kw), (sh, sw) = p.kernel, p.stride
    windows = np.lib.stride_tricks.sliding_window_view(x, (kh, kw), axis=(1, 2))[:, ::sh, ::sw]
    return windows.transpose(0, 1, 2, 4, 5, 3)


def reference(case: Case) -> np.ndarray:
    """What the kernel returns, before gate and epilogue: float32 [B, ..., O]."""
    p, d = case.problem, case.data
    batch, kh, kw = case.batch, *p.kernel
    x = d["x"].reshape(batch, p.height, p.width, p.channels).astype(np.int64)
    weights = d["codes"].astype(np.int64)
    if p.has_tables:
        row_class = d["row_class"] if p.widths else d["row_class"][np.arange(p.outputs) // 16]
        weights = d["tables"].astype(np.int64)[row_class[:, None], d["codes"]]
    weights = weights.reshape(p.outputs, kh, kw, p.channels)
    group, top = d["group"], p.padding
    y = np.zeros((batch * p.rows, p.outputs), np.float32)
    if p.has_bias:
        y += d["stored_bias"].astype(np.float32)
    sums, begin = [], 0
    late = p.dynamic and len(p.segments) > 2  # zero points and scales of rows count once for all segments
    total, weight_sums = np.zeros_like(y), np.zeros(p.outputs, np.float32)
    for j, channels in enumerate(p.segments):
        part = slice(begin, begin + channels)
        begin += channels
        zero = d["act_zero"].reshape(x.shape[:-1]) if p.dynamic else d["act_zero"][j][group][:, None, None]
        centred = x[..., part] - zero.astype(np.int64)[..., None]
        centred = np.pad(centred, ((0, 0), (top[0], top[1]), (top[2], top[3]), (0, 0)))  # padding is q == z
        columns = _columns(centred, p).reshape(batch * p.rows, -1)
        # Products of floats are exact here: |sum| < 2^53.
        product = columns.astype(np.float64) @ weights[..., part].reshape(p.outputs, -1).T.astype(np.float64)
        assert np.abs(product).max() < 2**31
        scale = (d["act_scale"].reshape(-1) if p.dynamic else np.repeat(d["act_scale"][j][group], p.rows))[:, None]
        own = d["scale"][:, j].astype(np.float32)
        if late:
            weight = weights[..., part].reshape(p.outputs, -1).sum(1)
            weight_sums = fma(weight.astype(np.float32), own, weight_sums)
            zeros = d["act_zero"].reshape(-1, 1).astype(np.float64)
            total = fma((product + zeros * weight).astype(np.float32), own, total)
        else:
            y = fma(product.astype(np.float32), scale * own, y)
        sums.append((columns.sum(1)[:, None].astype(np.float32), scale))
    if late:
        minus_zero = -d["act_zero"].reshape(-1, 1).astype(np.float32)
        y = fma(scale, fma(minus_zero, weight_sums, total), y)
    if p.has_offset:
        for total, scale in sums:
            y = fma(total, scale * d["stored_offset"].astype(np.float32), y)
    return y.reshape(*concrete(p.output_shape(), batch)[:-1], p.outputs)


def quantize(x: np.ndarray, scale: np.ndarray, zero: np.ndarray, group: np.ndarray, bits: int) -> np.ndarray:
    """u8 codes of x [B, ...]; scale f32, zero point [G]; group [B]."""
    shape = (-1,) + (1,) * (x.ndim - 1)
    inverse = (np.float32(1) / scale.astype(np.float32))[group].reshape(shape)
    z = zero.astype(np.float32)[group].reshape(shape)
    with np.errstate(over="ignore"):  # infinity clamps like any large value
        y = x * inverse
    clamped = np.clip(y, -z, np.float32(2**bits - 1) - z)
    return (np.rint(clamped).astype(np.int64) + zero.astype(np.int64)[group].reshape(shape)).astype(np.uint8)


def dynamic_quantize(x: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes u8 of x [B, ..., K] with scale f32 and zero point u8 [B, ...] of the range of each row."""
    top, zero = np.float32(2**bits - 1), np.float32(0)
    low, high = np.minimum(x.min(-1), zero), np.maximum(x.max(-1), zero)
    scale = np.maximum((high - low) / top, np.float32(2.0**-24))
    point = np.clip(np.rint(-low / scale), 0, top).astype(np.uint8)
    rows = np.arange(scale.size)
    flat = quantize(x.reshape(scale.size, -1), scale.reshape(-1), point.reshape(-1), rows, bits)
    return flat.reshape(x.shape), scale, point


def random_problem(draw: np.random.Generator) -> tuple[int, QuantMatmul]:
    """A random batch and problem: linear layers and convolutions of all formats, small enough to be quick."""
    options = dict(FORMATS[str(draw.choice(list(FORMATS)))])
    channels, outputs = int(draw.integers(1, 70)), int(draw.integers(1, 90))
    if channels > 1 and draw.random() < 0.3:
        first = int(draw.integers(1, channels))
        options["segments"] = (first, channels - first)
    batch = int(draw.integers(1, 5))
    if draw.random() < 0.4:
        leading = tuple(int(n) for n in draw.integers(1, 12, int(draw.integers(0, 3))))
        return batch, QuantMatmul.linear(leading, channels, outputs, **options)
    kernel = (int(draw.integers(1, 4)), int(draw.integers(1, 4)))
    stride = (int(draw.integers(1, 3)), int(draw.integers(1, 3)))
    top, bottom, left, right = (int(draw.integers(0, kernel[side])) for side in (0, 0, 1, 1))
    height = int(draw.integers(max(1, kernel[0] - top - bottom), 10))
    width = int(draw.integers(max(1, kernel[1] - left - right), 10))
    padding = (top, bottom, left, right)
    return batch, QuantMatmul(height, width, channels, outputs, kernel, stride, padding, **options)


def with_format(problem: QuantMatmul, name: str) -> QuantMatmul:
    """The problem in another format of `FORMATS`."""
    return replace(problem, **FORMATS[name])


def classes_in_turn(problem: QuantMatmul) -> np.ndarray:
    """The class of each row in `make_case`, where rows have several widths."""
    return np.arange(problem.outputs) * 7 // 3 % len(problem.widths)


def with_widths(problem: QuantMatmul, *widths: int) -> QuantMatmul:
    """The problem with rows of so many classes, whose stored codes have these bits."""
    problem = replace(problem, bits=widths[-1] if widths[-1] <= 4 else 8, widths=widths)
    bits = int(np.take(widths, classes_in_turn(problem)).sum())
    return replace(problem, code_bytes=packed_bytes(bits * problem.reduction, 1))
