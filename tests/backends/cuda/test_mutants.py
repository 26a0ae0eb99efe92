"""Kernels with a mistake in them: the emulator has to notice, or its agreement says nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tvm")
from mpq_compiler.backends.tvm.kernels.cuda import attention as cuda_attention
from mpq_compiler.backends.tvm.kernels.cuda import (
    fast_attention,
    float_products,
    float_units,
    norms,
    rounding,
    weight_only,
    weights,
    wgmma,
    wgmma_attention,
)
from mpq_compiler.backends.tvm.kernels.cuda.gemm import kernel as gemm
from mpq_compiler.backends.tvm.kernels.problems import attention, float_gemm
from mpq_compiler.backends.tvm.kernels.problems import norms as norms_problems
from mpq_compiler.backends.tvm.kernels.problems import rounding as rounding_problems
from mpq_compiler.backends.tvm.kernels.problems.argument import ROUNDED
from mpq_compiler.backends.tvm.kernels.problems.attention import Attention
from mpq_compiler.backends.tvm.kernels.problems.dequantize import DequantizeTable, WeightOnly
from mpq_compiler.backends.tvm.kernels.problems.epilogue import Epilogue, Step
from mpq_compiler.backends.tvm.kernels.problems.fast_attention import FastAttention
from mpq_compiler.backends.tvm.kernels.problems.quant_matmul import QuantMatmul
from mpq_compiler.backends.tvm.kernels.problems.rounding import Rounding
from mpq_compiler.targets.numerics import BF16
from tests.harness.cuda import emulator
from tests.harness.cuda.kernels import Library, empty
from tests.harness.cuda.mutants import Mutants, mutated
from tests.harness.float_kernels import bfloat16
from tests.harness.shapes import make_case, seed, stored_together

GEMM: Mutants = {
    "no barrier before a step": ("            barrier()\n\n            def load_ahead", "            def load_ahead"),
    "a turn too many": ("T.Select(stage < t.stages - 1, stage + 1, 0)", "T.Select(stage < t.stages, stage + 1, 0)"),
    "waits for a step less": ("_land(ahead_by - 1)", "_land(ahead_by)"),
    "chunks not swapped where they are read": (", row // 2 % 4)\n            at =", ", 0)\n            at ="),
    "rows of another fragment": ("i * 16 + lane % 16)", "i * 16 + lane % 8)"),
    "weights of the next lane": ("w.place(number, lane)]", "w.place(number, T.bitwise_xor(lane, 1))]"),
    "copies into the stage that is read": (
        "load(begin + ahead, vmath.keep(T.Select(stage >= behind, stage - behind, stage + ahead_by)))",
        "load(begin + ahead, stage)",
    ),
    "writes a row too many": (
        "tirx.all(row < self.total, column < p.results * p.products)",
        "tirx.all(row <= self.total, column < p.results * p.products)",
    ),
    "writes columns too many": (
        "tirx.all(row < self.total, column < p.results * p.products)",
        "tirx.all(row < self.total, column <= p.results * p.products)",
    ),
    "the border of the first group": ("segment * self.p.groups + self.row_group[i]]", "segment * self.p.groups]"),
    "a border of three bytes": ('"uint32") * T.uint32(ONES)', '"uint32") * T.uint32(ONES >> 8)'),
    "the border of the first row copied": ("else self.border[i]", "else self.border[0]"),
    "a line too many": ("first + d < size)", "first + d <= size)"),
    "another tap": ("dy, dx = divmod(tap, p.kernel[1])", "dx, dy = divmod(tap, p.kernel[1])"),
    "the border of the first row": ("bits, place = self.inside[i], T", "bits, place = self.inside[0], T"),
    "the zero point of the first group": (
        "at = row if self.p.dynamic else segment * self.p.groups + self._group(row)",
        "at = row if self.p.dynamic else segment * self.p.groups",
    ),
    "tables over weights that are read": (
        "        barrier()\n        with strided(self.thread, t.rows",
        "        with strided(self.thread, t.rows",
    ),
    "tables of other rows": ("T.min(self.first_row + i, self.total", "T.min(self.first_row + i + 40, self.total"),
    "the scale of the first group": (
        "else segment * self.p.groups + self._group(row)]",
        "else segment * self.p.groups]",
    ),
    "sums of the next row": ("i * 8 + self.lane // 4", "i * 8 + (self.lane // 4 + 1) % 8"),
    "columns turned": ("column = T.bind(first + lane % 4 * 2 + e)", "column = T.bind(first + lane % 4 * 2 + 1 - e)"),
    "half of a selector": ("return found >> T.uint32(16) if kk else found", "return found"),
    "no barrier before results": ("            barrier()\n            self._each", "            self._each"),
    "no barrier behind results": (
        "            barrier()\n            n = self._together",
        "            n = self._together",
    ),
    "results of the next row": ("own = own - self.warp_row +", "own = own + 1 - self.warp_row +"),
    "the last chunk too long": ("T.min(size - channel, CHUNK), 0)", "T.min(size - channel + 3, CHUNK), 0)"),
}
SIBLINGS: Mutants = {
    "results of the first sibling alone": ("tirx.EQ(product, i)", "tirx.EQ(product, 0)"),
    "columns from the first sibling on": ("own = T.bind(column - product * p.results)", "own = T.bind(column)"),
    "the epilogue of the first sibling": ("row, own, epilogue, self", "row, own, self.epilogue, self"),
}
SPLIT: Mutants = {
    "a part too few": ("T.serial(1, self.splits)", "T.serial(1, self.splits - 1)"),
    "a step twice": ("begin = T.bind(self.split * self.w.steps // self.splits)", "begin = T.bind(self.split)"),
    "a step too few": (
        "T.bind((self.split + 1) * self.w.steps // self.splits - begin)",
        "T.bind((self.split + 1) * self.w.steps // self.splits - begin - 1)",
    ),
    "parts over one another": ("(self.split * self.total + row) * outputs + column)", "row * outputs + column)"),
    "sums of rows over one another": (
        "self._row_sum(i), self.split * self.total + row)",
        "self._row_sum(i), row)",
    ),
    "sums of rows by no one": ("return tirx.EQ(self.warp_column + ", "return tirx.EQ(1 + self.warp_column + "),
}
WGMMA: Mutants = {
    "registers not in order": ("T.evaluate(T.ptx.wgmma.fence.sync.aligned())", "pass"),
    "copies not seen": ('T.evaluate(T.ptx["fence.proxy.async.shared::cta"]())', "pass"),
    "waits for a product less": ("wait_group.sync.aligned(0)", "wait_group.sync.aligned(1)"),
    "over what is multiplied": ("wait_group.sync.aligned(1)", "wait_group.sync.aligned(2)"),
    "rows twice as close": ("LAYOUT = PERIOD >> 4", "LAYOUT = PERIOD >> 5"),
    "chunks not swapped": ("2 << 30", "3 << 30"),
    "the first half of a step again": (" + ks * (UNIT // 16)", ""),
    "registers turned": ("for kk in range(2) for h in range(2)", "for h in range(2) for kk in range(2)"),
    "channels turned": ("+ h * 8 + lane // 4)", "+ (1 - h) * 8 + lane // 4)"),
    "rows turned": ("lane % 4 * 2 + e)", "lane % 4 * 2 + 1 - e)"),
    "half of the weights": ("self.decoded[first + j", "self.decoded[j"),
    "the zero point of another row": ("self.first_row + self._row_of_thread()", "self.first_row + self.lane"),
    "a word too few": ("for e in range(CHUNK // 4):", "for e in range(CHUNK // 4 - 1):"),
    "sums of another row": ("// 4 * 8 + self.lane % 4 * 2 + at % 2)", "// 4 * 8 + self.lane % 4 * 2)"),
    "no barrier before sums": ("            barrier()\n        with T.If", "            pass\n        with T.If"),
    "sums by two threads": ("with T.If(self._first_of_row())", "with T.If(self.thread >= 0)"),
}
SPLIT_WGMMA: Mutants = {"sums of rows by no one": ("return self.thread < self.t.rows", "return self.thread < 0")}
ATTENTION: Mutants = {
    "no barrier before keys": ("            barrier()\n            load(key", "            load(key"),
    "no barrier behind keys": (
        "None)\n            barrier()\n            with strided",
        "None)\n            with strided",
    ),
    "no barrier behind scores": ("            barrier()\n            new = local(1)", "            new = local(1)"),
    "keys from the start": ("T.min(start + token, tokens - 1)", "T.min(token, tokens - 1)"),
    "values that are not there": ("T.min(p.keys - begin, keys)", "keys"),
    "no rescaling of outputs": ("store(out, mul(out[d], rescale), d)", "store(out, out[d], d)"),
    "no rescaling of the sum": ("store(total, mul(total[0], rescale), 0)", "store(total, total[0], 0)"),
    "a query too many": ("T.If(first + row < p.queries)", "T.If(first + row <= p.queries)"),
    "the next head": ("+ head * p.dim + d\n", "+ (head + 1) % p.heads * p.dim + d\n"),
    "the maximum of old": ("store(highest, new[0], 0)", "store(highest, highest[0], 0)"),
    "dimensions of the neighbour": (
        "T.min(part + d * row_threads, p.dim - 1)",
        "T.min(part + 1 + d * row_threads, p.dim - 1)",
    ),
    "unscaled queries": ("scale * vmath.LOG2_E)", "vmath.LOG2_E)"),
}
FAST_ATTENTION: Mutants = {
    "no barrier before a step": ("            barrier()\n            if steps", "            if steps"),
    "waits for a step less": ("wait_group(0)", "wait_group(1)"),
    "copies into the stage that is read": ("T.bind((step + 1) % STAGES)", "T.bind(step % STAGES)"),
    "eight keys twice": ("lane // 16 * 8 + lane % 8)", "lane % 8)"),
    "eight terms twice": ("+ lane // 8 % 2 * 4)", "+ lane // 16 % 2 * 4)"),
    "eight values twice": ("+ matrix % 2 * 8 + self.lane", "+ self.lane"),
    "eight dimensions twice": ("+ matrix // 2 * (", "+ 0 * matrix * ("),
    "lanes of another column": ("T.bind(self.lane % 4)", "T.bind(self.lane % 4 ^ 1)"),
    "weights turned": ("return bfloat16.pair(low, high)", "return bfloat16.pair(high, low)"),
    "rows turned": ("row // 2 * 4 + 2 * half + row % 2)", "row // 2 * 4 + 2 * half + 1 - row % 2)"),
    "a key too many": ("tirx.Select(key < p.keys,", "tirx.Select(key <= p.keys,"),
    "keys that are not there": ("tirx.EQ(step, p.keys // t.keys)", "tirx.EQ(step, p.keys // t.keys + 1)"),
    "keys from the start": ("key, word = step * t.keys + row,", "key, word = row + 0,"),
    "a query too many": ("T.If(query < p.queries)", "T.If(query <= p.queries)"),
    "a dimension too many": ("T.If(d < p.dim)", "T.If(d <= p.dim)"),
    "no rescaling of outputs": (
        "store(self.out, mul(self.out[at], rescale[row]), at)",
        "store(self.out, self.out[at], at)",
    ),
    "no rescaling of the sum": ("mul(self.total[row], rescale[row]), row)", "self.total[row], row)"),
    "the maximum of old": ("store(self.highest, new[row], row)", "store(self.highest, self.highest[row], row)"),
    "the maximum of two lanes": (
        "for distance in (1, 2):\n                store(new",
        "for distance in (1,):\n                store(new",
    ),
    "the sum of two lanes": (
        "for distance in (1, 2):\n                store(self",
        "for distance in (1,):\n                store(self",
    ),
    "the first query": ("T.min(self._row(i), p.queries - 1)))", "0 * self._row(i)))"),
    "the next head": ("self.p.heads + self.head) *", "self.p.heads + (self.head + 1) % self.p.heads) *"),
    "the first sample": ("((self.sample * rows + row) *", "((0 * self.sample + row) *"),
    "half of a query": ("first = 8 * step + 4 * half", "first = 8 * step"),
    "columns for rows": ("T.ptx[TURNED]", "T.ptx[LDMATRIX]"),
    "a mask for the first query": ("self.head, query, inside)", "self.head, 0, inside)"),
    "an unscaled mask": ("fma(added, f32(vmath.LOG2_E, 1), self", "fma(added, f32(1.0, 1), self"),
}
PRODUCTS: Mutants = {
    "no barrier behind copies": (
        "            barrier()\n            with T.serial(0, TERMS)",
        "            with T.serial(0, TERMS)",
    ),
    "no barrier before copies": ("            barrier()\n        for i in range(OWN):", "        for i in range(OWN):"),
    "a term twice": ("term = T.bind(step * TERMS + k)", "term = T.bind(step * (TERMS - 1) + k)"),
    "a row too many": ("own_row(i) < rows, own_column", "own_row(i) <= rows, own_column"),
    "a column too many": ("own_column(j) < columns)", "own_column(j) <= columns)"),
    "no start": (
        "store(sums, start(T.min(own_column(j), columns - 1)), i * OWN + j)",
        "store(sums, f32(0.0, 1), i * OWN + j)",
    ),
    "rows turned": ("return first_row + row * OWN + i", "return first_row + row * OWN + (OWN - 1 - i)"),
    "no border": ("inside = tirx.all(top >= 0, top < p.height", "inside = tirx.all(top >= -1, top < p.height"),
    "the first channel": ("p.channels + group * depth + c", "p.channels + group * depth"),
    "without stride": ("i * p.stride[0] + dy", "i + dy"),
}
WHOLE_STEPS: Mutants = {
    "the border of the first tap": ("self.inside[i] >> T.uint32(1), i)", "self.inside[i], i)"),
    "stays in its line": ("(p.width - p.kernel[1]) * p.channels", "0 * p.channels"),
    "a tap too long": ('IntImm("int32", p.channels // STEP)', 'IntImm("int32", p.channels // STEP + 1)'),
    "a line too long": ('IntImm("int32", p.kernel[1])', 'IntImm("int32", p.kernel[1] + 1)'),
    "the same step again": ("self.moved[0] + STEP, 0)", "self.moved[0], 0)"),
    "the first row": ("self.pixel[i] + self.moved[0]", "self.pixel[0] + self.moved[0]"),
    "the first chunk": ("first + self.chunk * CHUNK", "first"),
}
SHARED_STEPS: Mutants = {
    "begins at the first tap": ("(dy * p.width + dx) * p.channels + within * STEP", "within * STEP"),
    "begins with a tap": ("p.channels + within * STEP", "p.channels"),
    "a first tap too long": ("store(self.left, steps - within, 0)", "store(self.left, steps, 0)"),
    "a first line too long": ("p.kernel[1] - dx, 1)", "p.kernel[1], 1)"),
    "begins with the border of the first tap": ('>> T.cast(tap, "uint32")', ">> T.uint32(0)"),
}
SEGMENTS: Mutants = {
    "half of the zero points": ("value * factor)", "value // 2 * factor)"),
    "zero points of the first segment": ("T.min(segment, len(self.p.segments) - 1)", "T.min(segment, 0)"),
    "zero points for codes": ("-16 if self.p.integers", "-1 if self.p.integers"),
    "an eighth": ("vmath.f32(1 / 16, 1)", "vmath.f32(1 / 8, 1)"),
    "the group of the first sample": ("T.bind(tirx.truncdiv(self.first_row, p.rows))", "T.bind(0 * self.first_row)"),
    "zero points of the segment before": ("self._clear_sums(own + 1)", "self._clear_sums(own)"),
}
WGMMA_SEGMENTS: Mutants = {
    "activations of the last segment": ("segment * self.t.rows + self._row", "self._row"),
    "activations of the first segment": ("segment * self.t.rows + (at", "(at"),
}
FLOAT_PRODUCTS: Mutants = {
    "sums of the neighbour": ("return self.sums[at]", "return self.sums[at // 2 * 2]"),
    "no bias": ("p.padding, has_bias=p.bias", "p.padding, has_bias=False"),
    "the bias alone": ("return y + total", "return y"),
    "channels of one byte": ("p.height, p.width, BYTES * p.channels", "p.height, p.width, p.channels"),
}
HOPPER_FLOATS: Mutants = {
    "sums of the neighbour": ("return self.sums[at]", "return self.sums[at // 2 * 2]"),
    "parts of the first": ("return y + total", "return total"),
}
WEIGHT_ONLY: Mutants = {
    "the first table": ("tables[number * size + word]", "tables[word]"),
    "the table of the first fragment": ("[self.entries[j * size + word]", "[self.entries[word]"),
    "codes of the first stage": ("stage * (self.t.columns // CHANNELS)", "0 * (self.t.columns // CHANNELS)"),
    "codes of the first unit": ("T.bind(ks * 32 + self.lane)", "T.bind(self.lane)"),
    "half of a selector": ("codes[0] >> T.uint32(16 * h)", "codes[0]"),
    "levels without a sign": ("word], T.uint32(BIASED))", "word], T.uint32(0))"),
    "a byte off by one": ("2.0**15 + 128", "2.0**15 + 127"),
    "bytes turned": ("0x5404 + 16 * i)", "0x5404 + 16 * (3 - i))"),
    "one scale for two chunks": ("(2 * self.step + ks) * 2 + kk)", "(2 * self.step + ks) * 2)"),
    "scales of the first step": ("(2 * self.step + ks) * 2 + kk)", "ks * 2 + kk)"),
    "the scale of another channel": ("8 * h + self.lane // 4)", "self.lane // 4)"),
    "no offset": ("return weight if self.offsets is None", "return weight if True"),
    "the offset of another channel": ("self.offsets[own]", "self.offsets[own // 2 * 2]"),
    "registers turned": ("first + 4 * j + 2 * h + kk)", "first + 4 * j + 2 * kk + h)"),
}
INTEGERS: Mutants = {
    "the first level of the first table": ('self.b["tables"][number * 16]', 'self.b["tables"][0]'),
    "halves turned": ("codes[0] >> T.uint32(4) if h else", "codes[0] >> T.uint32(4) if not h else"),
    "codes turned": ("0x5044 + 256 * i", "0x5044 + 256 * (3 - i)"),
    "half of 128": ("first - vmath.f32(128.0, 1)", "first - vmath.f32(64.0, 1)"),
}
GROUPS: Mutants = {
    "the scales of the first group": ("T.bind(self.step * (STEP // CHUNK))", "T.bind(self.step * 0)"),
    "groups twice as long": ("segments[0] // float_products.VALUES\n", "segments[0] // float_products.VALUES * 2\n"),
    "no scales where another block ended": ("tirx.any(begins, tirx.EQ(self.step, self.first_step))", "begins"),
}
HOPPER_WEIGHT_ONLY: Mutants = {
    "bytes without a sign": ("codes[h], T.uint32(BIASED)", "codes[h], T.uint32(0)"),
    "registers of the first unit": ("first + 4 * j + 2 * h + kk)", "4 * j + 2 * h + kk)"),
    "one scale for all channels": ("self._set_scale(2 * j + h, b[", "self._set_scale(0 * j, b["),
    "codes of the first lane": ("place * self.count + word]", "place // 2 * self.count + word]"),
}
NORMS: Mutants = {
    "no mean": ("else value_of(x, sample, row, c) - mean", "else value_of(x, sample, row, c)"),
    "no epsilon": (
        "rstd = keep(vmath.rsqrt(mul(squares, inverse) + f32(problem.eps, 1)))",
        "rstd = keep(vmath.rsqrt(mul(squares, inverse)))",
    ),
    "no shift": ('buffers["beta"][c] if problem.shift', "f32(0.0, 1) if problem.shift"),
    "gamma of the next": ('mul(rstd, buffers["gamma"][c])', 'mul(rstd, buffers["gamma"][(c + 1) % channels])'),
    "an element twice": (
        "with strided(thread, count, threads) as i:",
        "with strided(thread * 1 // 2, count, threads) as i:",
    ),
    "sum from the row before": ("return combined([total[0]], thread, threads)[0]", "return total[0]"),
    "squares by half": (
        "return fma(own, own, total)\n\n        squares = _sum(thread, threads",
        "return fma(own, f32(0.5, 1), total)\n\n        squares = _sum(thread, threads",
    ),
    "the first row": (
        "sample, row = unravel(number, problem.positions)\n        mean = None",
        "sample, row = unravel(number, problem.positions)\n        mean, row = None, row * 0",
    ),
    "another width": ("inverse = f32(1.0 / channels, 1)", "inverse = f32(1.0 / (channels + 1), 1)"),
    "a thread too few": (
        'channels, x, threads = problem.channels, buffers["x"], power(problem.channels)',
        'channels, x, threads = problem.channels - 1, buffers["x"], power(problem.channels)',
    ),
}
PACK_FLOATS: Mutants = {
    "a word too few": ("(w.steps * 32 * w.words)) as number", "(w.steps * 32 * w.words) - 1) as number"),
    "a word too many": ("(w.steps * 32 * w.words)) as number", "(w.steps * 32 * w.words) + 1) as number"),
    "channels of a lane apart": ("(8 * h + lane // 4))\n            chunk", "(8 * h + lane % 8))\n            chunk"),
    "halves of a fragment turned": ("(8 * h + lane // 4))\n            c", "(8 * (1 - h) + lane // 4))\n            c"),
    "chunks of a unit turned": ("* 2 + kk)\n            tap", "* 2 + 1 - kk)\n            tap"),
    "the first unit of a step twice": ("T.bind((step * 2 + ks) * 2", "T.bind((step * 2) * 2"),
    "the first tap": ("(output * w.taps + tap) * depth", "output * w.taps * depth"),
    "the first channel": ("(output * w.taps + tap) * depth", "tap * depth"),
    "a chunk of a tap": ("(chunk - tap * w.chunks[0]) * VALUES", "chunk * VALUES"),
    "values of a lane apart": ("lane % 4 * BYTES)", "lane % 4)"),
    "a value twice": ("value(first + 1))", "value(first))"),
    "values turned": ("pair(value(first), value(first + 1))", "pair(value(first + 1), value(first))"),
    "channels that are not there": ("output < w.problem.outputs, tap <", "tap <"),
    "taps that are not there": (
        "tap < w.taps, channel < depth)\n                at",
        "channel < depth)\n                at",
    ),
    "values that are not there": ("channel < depth)\n                at", "channel <= depth)\n                at"),
    "zeros are ones": ("weight[at], vmath.f32(0.0, 1))", "weight[at], vmath.f32(1.0, 1))"),
}
PACK_CODES: Mutants = {
    "a lane too few": ("* w.steps * LANES) as number", "* w.steps * LANES - 1) as number"),
    "a lane too many": ("* w.steps * LANES) as number", "* w.steps * LANES + 1) as number"),
    "codes over one another": ("packed[word] | moved", "moved"),
    "words not empty": ("store(packed, T.uint32(0), word)", "store(packed, T.uint32(1), word)"),
    "channels of a lane apart": (
        "(8 * h + lane // 4))\n                for",
        "(8 * h + lane % 8))\n                for",
    ),
    "halves of a fragment turned": (
        "(8 * h + lane // 4))\n                for",
        "(8 * (1 - h) + lane // 4))\n                for",
    ),
    "chunks of a unit turned": ("* 2 + kk)\n                    tap", "* 2 + 1 - kk)\n                    tap"),
    "the first unit of a step twice": ("T.bind((step * 2 + ks) * 2", "T.bind((step * 2) * 2"),
    "a chunk of a tap": ("T.bind((chunk - tap * w.chunks[0]) * float", "T.bind(chunk * float"),
    "values of a lane apart": ("+ lane % 4 * 2 + e)", "+ lane % 4 + 4 * e)"),
    "the first tap": ("table.columns + tap * channels + c", "table.columns + c"),
    "the first channel": ("output * table.columns + tap", "tap"),
    "channels that are not there": ("output < table.rows, tap < w.taps", "tap < w.taps"),
    "taps that are not there": ("tap < w.taps, c < channels", "c < channels"),
    "values that are not there": ("c < channels)", "c <= channels)"),
    "codes of one row": ("table.bits, table.rows * table.columns)", "table.bits, table.columns)"),
    "a bit too few": ("T.uint32(2**table.bits - 1)", "T.uint32(2**table.bits // 2 - 1)"),
    "chunks of a lane over one another": ("_place(table, h, 2 * kk + e)", "_place(table, h, e)"),
    "codes of a lane turned": ("_place(table, h, 2 * kk + e)", "_place(table, h, 2 * kk + 1 - e)"),
}
PACK_2_BITS: Mutants = {
    "halves over one another": ("4 * i + 2 * h if table.bits == 2", "4 * i if table.bits == 2"),
    "halves turned": ("4 * i + 2 * h if table.bits == 2", "4 * i + 2 - 2 * h if table.bits == 2"),
}
PACK_8_BITS: Mutants = {
    "halves in one word": ("return h, 8 * i", "return 0, 8 * i"),
    "bytes turned": ("return h, 8 * i", "return h, 24 - 8 * i"),
    "codes with their sign": ("& T.uint32(2**table.bits - 1)", "& T.uint32(2**32 - 1)"),
    "the first word of a lane": ("number * count + word)\n", "number * count)\n"),
    "words of a lane apart": ("number * count + word)\n", "number + word)\n"),
}
ROUNDING: Mutants = {
    "not multiplied": ("vmath.f32(p.factor, 1)", "vmath.f32(1.0, 1)"),
    "four values twice": ("i * together + first, size", "i * together, size"),
    "values of the neighbour": ("for value in values], i * together)", "for value in values], i // 2 * together)"),
    "a thread too few": ("(p.rows * p.width // together)) as i", "(p.rows * p.width // together) - 1) as i"),
    "a thread too many": ("(p.rows * p.width // together)) as i", "(p.rows * p.width // together) + 1) as i"),
    "the first sample": ("batch * (p.rows * p.width // together)", "p.rows * p.width // together"),
}
PADDED_ROUNDING: Mutants = {
    "no zero behind a row": ("tirx.Select(column < p.width", "tirx.Select(column <= p.width"),
    "a zero too many": ("tirx.Select(column < p.width", "tirx.Select(column < p.width - 1"),
    "zeros are ones": ("value, vmath.f32(0.0, 1))", "value, vmath.f32(1.0, 1))"),
    "the row before": ("value_of(x, row * p.width", "value_of(x, T.max(row - 1, 0) * p.width"),
    "the first column": ("T.min(column, p.width - 1)", "T.min(column, 0)"),
    "a value too few": ("(p.rows * p.pitch)) as i", "(p.rows * p.pitch) - 1) as i"),
    "a value too many": ("(p.rows * p.pitch)) as i", "(p.rows * p.pitch) + 1) as i"),
    "not multiplied": ("vmath.f32(p.factor, 1)", "vmath.f32(1.0, 1)"),
}
WHOLE_ROWS: Mutants = {
    "the same row again": ("T.bind(first + i * together), chunk", "T.bind(first), chunk"),
    "the first part of a row": ("T.bind(first + i * together), chunk", "T.bind(first + i * together), 0 * chunk"),
    "rows of half of the threads": ("self.threads // chunks\n", "self.threads // chunks // 2\n"),
}
WGMMA_ATTENTION: Mutants = {
    "registers not in order": ("T.evaluate(T.ptx.wgmma.fence.sync.aligned())", "pass"),
    "copies not seen": ('T.evaluate(T.ptx["fence.proxy.async.shared::cta"]())', "pass"),
    "does not wait for scores": ("weigh(step, 1)", "weigh(step, 2)"),
    "does not wait for the first scores": ("weigh(0, 0)", "weigh(0, 1)"),
    "does not wait for sums": ("wait_group.sync.aligned(0)", "wait_group.sync.aligned(1)"),
    "no barrier before a step": ("                barrier()\n                score", "                score"),
    "no barrier before the last values": ("        barrier()\n        sum_values", "        sum_values"),
    "keys into the stage that is read": ("1, T.bind((step + 1) % STAGES))", "1, T.bind(step % STAGES))"),
    "values into the stage that is read": ("(step, T.bind(step % STAGES))", "(step, T.bind((step + 1) % STAGES))"),
    "scores on scores": ("at, k > 0, turned", "at, True, turned"),
    "the first dimensions again": (" + k * 16 // PACKED[BF16] % ROW", ""),
    "the first keys again": (" + 16 * pair * ROW", ""),
    "values of the first stage": ("(stage * t.value_words +", "(0 * stage +"),
    "values not turned": ("True, turned=True)", "True, turned=False)"),
    "keys turned": ("k > 0, turned=False)", "k > 0, turned=True)"),
    "rows of another pitch": ("row * ROW + chunk", "row * (ROW - GROUP) + chunk"),
    "chunks in order": ("row % (ROW // GROUP))", "0 * row)"),
    "matrices twice as close": ("(8 * ROW // GROUP) << 32", "(4 * ROW // GROUP) << 32"),
    "keys for values": ("operand(self.values,", "operand(self.keys,"),
    "weights of the first row": ("self._weight(row, tile), 2 * tile + row)", "self._weight(0, tile), 2 * tile + row)"),
    "half of the threads copy": ("return 32 * WARPS * self.t.groups", "return 32 * WARPS"),
}
WIDE_HEADS: Mutants = {
    "the first block of a key": ("k * 16 // (PACKED[BF16] * ROW) * t.keys * ROW +", "0 +"),
    "blocks over one another": ("word // ROW * (self.t.keys * ROW)", "0 * word"),
    "blocks twice as close": ("(t.keys * ROW // GROUP) << 16", "(t.keys * ROW // GROUP // 2) << 16"),
}
OF_WARPS_NORM: Mutants = {
    "no mean": (
        "keep(value - mean)\n            return fma(own, own, so_far)",
        "value\n            return fma(own, own, so_far)",
    ),
    "the mean stays in": ("fma(value - mean, factor, betas", "fma(value, factor, betas"),
    "no epsilon": ("mul(total(square), inverse) + f32(problem.eps, 1)", "mul(total(square), inverse)"),
    "gamma of the first": ('values_of(buffers["gamma"], channel, v)', 'values_of(buffers["gamma"], 0 * channel, v)'),
    "the values of the first step": ("store(held, value, first + e)", "store(held, value, e)"),
    "a warp has the row of another": (
        "THREADS // WARP) + thread // WARP, b",
        "THREADS // WARP) + thread // WARP // 2, b",
    ),
    "sums of what is behind a row": ("tirx.Select(there, added, found[0])", "added"),
    "a row behind the last": (
        "batch * positions - 1))\n        sample, row",
        "batch * positions))\n        sample, row",
    ),
    "another width": ('flat(buffers["x"]), f32(1.0 / channels, 1)', 'flat(buffers["x"]), f32(1.0 / (channels + 1), 1)'),
    "a block too few": ("+ (THREADS // WARP - 1)) // (THREADS // WARP)", ") // (THREADS // WARP)"),
    "lanes by themselves": (
        "return of_warp(found[0])\n\n        mean = None",
        "return found[0]\n\n        mean = None",
    ),
}
RMS_NORM: Mutants = {
    "no gamma": ('return mul(found, buffers["gamma"][c]) if problem.scale else found', "return found"),
    "gamma of the next": ('mul(found, buffers["gamma"][c])', 'mul(found, buffers["gamma"][(c + 1) % channels])'),
    "not divided": ("found = mul(centred(c), rstd)", "found = centred(c)"),
    "a mean": ("if isinstance(problem, LayerNorm):\n            total", "if True:\n            total"),
    "no epsilon": (
        "mul(squares, inverse) + f32(problem.eps, 1)))\n\n        def value",
        "mul(squares, inverse)))\n\n        def value",
    ),
    "epsilon of the sum": (
        "mul(squares, inverse) + f32(problem.eps, 1)))\n\n        def value",
        "mul(squares + f32(problem.eps, 1), inverse)))\n\n        def value",
    ),
    "squares by half": (
        "return fma(own, own, total)\n\n        squares = _sum(thread, threads, channels",
        "return fma(own, f32(0.5, 1), total)\n\n        squares = _sum(thread, threads, channels",
    ),
    "squares of a channel too few": (
        "_sum(thread, threads, channels, square)",
        "_sum(thread, threads, channels - 1, square)",
    ),
    "squares of one thread": ("return combined([total[0]], thread, threads)[0]", "return total[0]"),
    "sums not from zero": ("store(total, f32(0.0, 1), 0)", "store(total, f32(1.0, 1), 0)"),
    "the first row": ("return value_of(x, sample, row, c) if mean", "return value_of(x, sample, 0, c) if mean"),
    "the first sample": ("return value_of(x, sample, row, c) if mean", "return value_of(x, 0, row, c) if mean"),
    "another width": ("inverse = f32(1.0 / channels, 1)", "inverse = f32(1.0 / (channels + 1), 1)"),
    "written in the first row": ("rows.write(value, sample, row, problem", "rows.write(value, sample, 0, problem"),
}


@dataclass(frozen=True)
class Subject:
    """A kernel with its mutants: build(module, name) makes it, inputs are its arguments but the results."""

    module: Any
    mutants: Mutants
    build: Callable[[Any, str], Any]
    arrays: Callable[[], list[np.ndarray]]


def _draw(arguments: Any, batch: int, made: int = 1) -> list[np.ndarray]:
    """made: how many of the last are results."""
    draw = np.random.default_rng(0)
    arrays = [empty(a, batch) for a in arguments]

    def drawn(array: np.ndarray) -> np.ndarray:
        values = draw.standard_normal(array.shape)
        return bfloat16(values.astype(np.float32)) if array.dtype == ROUNDED else values.astype(array.dtype)

    return [*map(drawn, arrays[:-made]), *arrays[-made:]]


CONV = QuantMatmul(9, 11, 36, 60, (3, 3), padding=(1, 1, 1, 1), bits=4, groups=3)  # its last step as well
STEADY = QuantMatmul(9, 11, 128, 60, (3, 3), (1, 2), (1, 1, 1, 1), bits=4, groups=3)  # whole steps, two of a tap
DEEP = QuantMatmul(3, 4, 192, 60, (3, 3), padding=(1, 1, 1, 1), bits=4, groups=3)  # its second half begins in a tap
SEGMENTED = QuantMatmul.linear(
    (64,), 96, 64, segments=(32,) * 3, bits=4, groups=3, has_offset=True, integers=True
)  # a tile is of one sample
WIDE = QuantMatmul.linear((130,), 362, 120, bits=4, groups=3, has_offset=True)  # the last step is in the first stage
LONG = QuantMatmul.linear((5,), 1612, 60, bits=4, groups=3, has_offset=True)
ROWS = norms_problems.LayerNorm(7, 2100, eps=1e-2)  # by a block of threads each
HEADS = Attention(36, 75, 2, 20)  # whose result ends where nothing may be written
FAST = FastAttention(133, 75, 2, 36, scale=0.3, mask=("B", 1, 133, 75))
FLOATS = float_gemm.Conv2d(9, 8, 12, 70, stride=(2, 1))
BFLOAT16 = replace(FLOATS, packed=True, numerics=BF16)
FEW = replace(BFLOAT16, channels=10, outputs=20)
SHARED = float_gemm.Linear(3, 1600, 70, packed=True, numerics=BF16)  # by two blocks of threads
SCALED = Rounding(5, 24, 24, 0.3)
PADDED = Rounding(10, 5, 6, 0.3)
ROWS_OF_64 = FastAttention(70, 80, 2, 64)
STEPS = FastAttention(133, 200, 2, 40, scale=0.3, mask=("B", 1, 133, 200))
OF_72 = FastAttention(70, 75, 1, 72)
SQUARES = norms_problems.RmsNorm(7, 2100, eps=1e-2)
OF_WARPS = norms_problems.LayerNorm(11, 300, eps=1e-2)
CODES = WeightOnly(replace(BFLOAT16, channels=24), DequantizeTable(70, 9 * 24, (8, 8, 8), 4, 2, "float16"))


TWINS = QuantMatmul.linear((70,), 64, 128, siblings=(Epilogue((Step("neg"),)),))
WHOLES = WeightOnly(SHARED, DequantizeTable(70, 1600, (1600,), 4, 2, integers=True))
GROUPED = WeightOnly(SHARED, DequantizeTable(70, 1600, (320,) * 5, 4))
STORED = WeightOnly(SHARED, DequantizeTable(70, 1600, (1600,), 8))


def _stored(bits: int) -> WeightOnly:
    return WeightOnly(FEW, DequantizeTable(FEW.outputs, 9 * FEW.channels, (FEW.channels,), bits))


def _bytes(problem: WeightOnly) -> list[np.ndarray]:
    codes, panel = (empty(a, 1) for a in weight_only.pack_arguments(problem))
    return [np.random.default_rng(0).integers(0, 256, codes.shape).astype(codes.dtype), panel]


def _product(problem: QuantMatmul) -> list[np.ndarray]:
    case = make_case(problem, 2, seed("mutants"))
    data, (inputs, made) = stored_together(case), weights.arguments(problem)
    data["group"] = np.array([2, 1])
    prepared = [*(data[a.name] for a in inputs), *(empty(a, 2) for a in made)]
    (results,) = Library({"prepare": weights.build(problem, "prepare")}).run([("prepare", prepared)])
    data |= {a.name: value for a, value in zip(made, results[len(inputs) :], strict=True)}
    arguments = gemm.parameters(problem)
    return [data[a.name] if a.name in data else empty(a, 2) for a in arguments]


def _bfloat16(problem: float_gemm.Linear | float_gemm.Conv2d) -> list[np.ndarray]:
    weight, panel = _draw(float_products.pack_arguments(problem), 1)
    packed = Library({"pack": float_products.build_pack(problem, "pack")}).run([("pack", [weight, panel])])[0][1]
    x, _, *rest = _draw(float_products.arguments(problem), 2)
    return [x, packed, *rest, *(empty(a, 2) for a in float_products.workspaces(problem))]


def _codes(problem: WeightOnly) -> list[np.ndarray]:
    draw, named = np.random.default_rng(0), {a.name: a for a in weight_only.arguments(problem)}
    whole = {"weight": (0, 2**32), "tables": (-128, 128)}
    arrays = dict(zip(named, _draw(named.values(), 2), strict=True))
    for name, limits in whole.items():
        if name in named:
            arrays[name] = draw.integers(*limits, arrays[name].shape).astype(named[name].dtype)
    if problem.table.integers:
        arrays["tables"] = np.array([[-8], [3]], np.int8) + np.arange(16, dtype=np.int8)
    if "row_class" in arrays:
        arrays["row_class"] = np.resize([0, 1], arrays["row_class"].shape).astype(np.uint8)
    return [*arrays.values(), *(empty(a, 2) for a in weight_only.workspaces(problem))]


def _of_attention(module: Any, mutants: Mutants, problem: FastAttention) -> Subject:
    return Subject(
        module, mutants, lambda m, n: m.build(problem, n), lambda: _draw(fast_attention.arguments(problem), 2)
    )


SUBJECTS = {
    "gemm": Subject(gemm, GEMM, lambda m, n: m.build(CONV, n), lambda: _product(CONV)),
    "whole steps": Subject(gemm, WHOLE_STEPS, lambda m, n: m.build(STEADY, n), lambda: _product(STEADY)),
    "shared steps": Subject(gemm, SHARED_STEPS, lambda m, n: m.build(DEEP, n), lambda: _product(DEEP)),
    "segments": Subject(gemm, SEGMENTS, lambda m, n: m.build(SEGMENTED, n), lambda: _product(SEGMENTED)),
    "segments on wgmma": Subject(
        wgmma, WGMMA_SEGMENTS, lambda m, n: m.build(SEGMENTED, n), lambda: _product(SEGMENTED)
    ),
    "wgmma": Subject(wgmma, WGMMA, lambda m, n: m.build(WIDE, n), lambda: _product(WIDE)),
    "split wgmma": Subject(wgmma, SPLIT_WGMMA, lambda m, n: m.build(LONG, n), lambda: _product(LONG)),
    "siblings": Subject(gemm, SIBLINGS, lambda m, n: m.build(TWINS, n), lambda: _product(TWINS)),
    "split gemm": Subject(gemm, SPLIT, lambda m, n: m.build(LONG, n), lambda: _product(LONG)),
    "attention": Subject(
        cuda_attention, ATTENTION, lambda m, n: m.build(HEADS, n), lambda: _draw(attention.arguments(HEADS), 2)
    ),
    "fast_attention": _of_attention(fast_attention, FAST_ATTENTION, FAST),
    "whole rows": _of_attention(fast_attention, WHOLE_ROWS, ROWS_OF_64),
    "products": Subject(
        float_units, PRODUCTS, lambda m, n: m.build(FLOATS, n), lambda: _draw(float_gemm.arguments(FLOATS), 2)
    ),
    "float products": Subject(
        float_products, FLOAT_PRODUCTS, lambda m, n: m.build(BFLOAT16, n), lambda: _bfloat16(BFLOAT16)
    ),
    "floats on Hopper": Subject(
        float_products, HOPPER_FLOATS, lambda m, n: m.build_on_hopper(SHARED, n), lambda: _bfloat16(SHARED)
    ),
    "weight only": Subject(weight_only, WEIGHT_ONLY, lambda m, n: m.build(CODES, n), lambda: _codes(CODES)),
    "weight only on Hopper": Subject(
        weight_only,
        HOPPER_WEIGHT_ONLY,
        lambda m, n: m.build_on_hopper(STORED, n),
        lambda: _codes(STORED),
    ),
    "groups": Subject(weight_only, GROUPS, lambda m, n: m.build_on_hopper(GROUPED, n), lambda: _codes(GROUPED)),
    "integers": Subject(weight_only, INTEGERS, lambda m, n: m.build(WHOLES, n), lambda: _codes(WHOLES)),
    "pack floats": Subject(
        float_products,
        PACK_FLOATS,
        lambda m, n: m.build_pack(FEW, n),
        lambda: _draw(float_products.pack_arguments(FEW), 1),
    ),
    **{
        f"pack codes of {bits} bits": Subject(
            weight_only,
            mutants,
            lambda m, n, bits=bits: m.build_pack(_stored(bits), n),
            lambda bits=bits: _bytes(_stored(bits)),
        )
        for bits, mutants in {2: PACK_2_BITS, 3: PACK_CODES, 8: PACK_8_BITS}.items()
    },
    **{
        name: Subject(
            rounding,
            mutants,
            lambda m, n, problem=problem: m.build(problem, n),
            lambda problem=problem: _draw(rounding_problems.arguments(problem), 2),
        )
        for name, mutants, problem in (("rounding", ROUNDING, SCALED), ("padded", PADDED_ROUNDING, PADDED))
    },
    "wgmma attention": _of_attention(wgmma_attention, WGMMA_ATTENTION, STEPS),
    "wide heads on wgmma": _of_attention(wgmma_attention, WIDE_HEADS, OF_72),
    "rms norm": Subject(
        norms, RMS_NORM, lambda m, n: m.build(SQUARES, n), lambda: _draw(norms_problems.arguments(SQUARES), 2)
    ),
    "norms of warps": Subject(
        norms,
        OF_WARPS_NORM,
        lambda m, n: m.build(OF_WARPS, n),
        lambda: _draw(norms_problems.arguments(OF_WARPS), 2),
    ),
    "norms": Subject(norms, NORMS, lambda m, n: m.build(ROWS, n), lambda: _draw(norms_problems.arguments(ROWS), 2)),
}


@pytest.mark.parametrize("name", SUBJECTS)
def test_mistakes_are_noticed(name):
    emulator.needs()
    subject = SUBJECTS[name]
    numbered = {f"mutant{i}": what for i, what in enumerate(subject.mutants)}
    functions = {"right": subject.build(subject.module, "right")}
    for key, what in numbered.items():
        functions[key] = subject.build(mutated(subject.module, *subject.mutants[what]), key)
    library, arrays = Library(functions), subject.arrays()
    calls = [(key, arrays) for key in functions]
    noticed = set()
    for early in (False, True):
        right, *others = library.tried(calls, early)
        assert right is not None
        for what, result in zip(numbered.values(), others, strict=True):
            same = result is not None and all(
                np.array_equal(a.view(np.uint8), b.view(np.uint8)) for a, b in zip(right, result, strict=True)
            )
            if not same:
                noticed.add(what)
    assert sum(len(other.mutants) for other in SUBJECTS.values() if other.module is subject.module) >= 10
    assert noticed == set(subject.mutants)
