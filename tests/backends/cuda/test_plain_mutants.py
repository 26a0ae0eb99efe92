"""Plain kernels with a mistake in them: what they are tested on has to tell them from those that are right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tvm")
from tvm_ffi import structural_equal

from mpq_compiler.backends.tvm.kernels.common import dequantize, stored, tokens, vmath
from mpq_compiler.backends.tvm.kernels.cuda import (
    float_units,
    movement,
    norms,
    pointwise,
    quantize,
    rows,
    templates,
    threads,
    weights,
)
from mpq_compiler.backends.tvm.kernels.cuda.gemm import kernel as gemm
from mpq_compiler.backends.tvm.kernels.problems.movement import Gather, Movement, TokenRow
from mpq_compiler.backends.tvm.kernels.problems.norms import GroupNorm, LayerNorm, RmsNorm
from mpq_compiler.backends.tvm.kernels.problems.quant_matmul import QuantMatmul
from mpq_compiler.backends.tvm.kernels.problems.quantize import DynamicQuantize, Quantize, TimeGroup
from tests.harness.cuda import emulator
from tests.harness.cuda.cases import CASES, FORMATS, IMAGE, SEGMENTS, Case, check, inputs, workspaces
from tests.harness.cuda.kernels import Library, empty
from tests.harness.cuda.mutants import Mutants, mutated, with_mutated
from tests.harness.shapes import make_case, reference, seed

QUANTIZE: Mutants = {
    "the quantizer of the first sample": (
        "quantizer(buffers, tirx.truncdiv(row, size // width))",
        "quantizer(buffers, tirx.truncdiv(row, size))",
    ),
    "the quantizer of the row": ("tirx.truncdiv(row, size // width))\n", "tirx.truncdiv(row, width))\n"),
    "tensors over one another": ("first += count", "first += 0"),
    "rows as short as a tensor's": ("row * width + (first + channel)", "row * count + (first + channel)"),
    "rows as long as the result's": ("unravel(i, count)", "unravel(i, width)"),
    "codes of 8 bits": ("*quant, problem.bits)", "*quant, 8)"),
    "codes of a bit less": (
        "*quant, problem.bits)",
        "*quant, problem.bits - 1)",
    ),
    "no zero point": ("*quant,", "quant[0], T.int32(0),"),
    "times the scale": ("*quant,", "vmath.reciprocal(quant[0]), quant[1],"),
    "a sample too few": ("each(batch * (size // width * count))", "each((batch - 1) * (size // width * count))"),
    "a value too few": ("each(batch * (size // width * count))", "each(batch * (size // width * count) - 1)"),
    "a value too many": ("each(batch * (size // width * count))", "each(batch * (size // width * count) + 1)"),
    "the first tensor": ('f"x{number}" if', '"x0" if'),
    "values of another row": ("value_of(x, i),", "value_of(x, channel),"),
}
DYNAMIC: Mutants = {
    "a range without zero": ("store(ends, vmath.f32(0.0, 1), end)", "store(ends, x[row * width], end)"),
    "the range of the last step": (
        "store(ends, tirx.Select(is_beyond(value, ends[end]), value, ends[end]), end)",
        "store(ends, value, end)",
    ),
    "the greatest is the least": ("beyond = operator.lt, operator.gt", "beyond = operator.lt, operator.lt"),
    "NaN counts": (
        "tirx.Select(is_beyond(value, ends[end]), value, ends[end])",
        "tirx.Select(is_beyond(ends[end], value), ends[end], value)",
    ),
    "nobody writes the scale": (
        "T.If(thread == 0), T.Then():\n            store(scales",
        "T.If(thread == threads), T.Then():\n            store(scales",
    ),
    "the scale of the first row": ("store(scales, scale, row)", "store(scales, scale, 0)"),
    "the zero point of the row before": ("store(zeros, point, row)", "store(zeros, point, T.max(row - 1, 0))"),
    "a sample too few": ("grid(batch * problem.rows, threads)", "grid((batch - 1) * problem.rows, threads)"),
    "the range of the first row": ("vmath.keep(value_of(x, row * width + c))", "vmath.keep(value_of(x, c))"),
    "values of the first row": ("vmath.quantize(value_of(x, row * width + c)", "vmath.quantize(value_of(x, c)"),
    "codes of the first row": ("store(out, code, row * width + c)", "store(out, code, c)"),
    "no zero point": ('T.bind(T.cast(point, "int32"))', "T.int32(0)"),
    "a scale of 8 bits": ("dynamic_scale(low, high, problem.bits)", "dynamic_scale(low, high, 8)"),
    "codes of 8 bits": ("code_of_zero, problem.bits)", "code_of_zero, 8)"),
    "the last value is not in the range": (
        "strided(thread, width, threads) as c:\n            value",
        "strided(thread, width - 1, threads) as c:\n            value",
    ),
    "the wrong one of two": ("tirx.Select(is_beyond(b, a), b, a)", "tirx.Select(is_beyond(b, a), a, b)"),
    "the least twice": ("combined([ends[end]],", "combined([ends[0]],"),
}
TIME_GROUP: Mutants = {
    "a sample too few": ("with each(batch) as sample", "with each(batch - 1) as sample"),
    "a sample too many": ("with each(batch) as sample", "with each(batch + 1) as sample"),
    "the time of the first sample": (
        "group_of(problem, buffers, sample), sample)",
        "group_of(problem, buffers, 0), sample)",
    ),
    "into the first sample": ("group_of(problem, buffers, sample), sample)", "group_of(problem, buffers, sample), 0)"),
}
MOVE: Mutants = {
    "one sample": ("samples = batch if problem.shape[:1] == (BATCH,) else 1", "samples = 1"),
    "fills one sample": ("each(samples * size)", "each(size)"),
    "fills with zero": ("constant(problem.fill,", "constant(0.0,"),
    "fills too little": ("each(samples * size)", "each(samples * size - 1)"),
    "fills too much": ("each(samples * size)", "each(samples * size + 1)"),
    "from the start": ("origin + copy.source_offset", "origin"),
    "to the start": ("start + copy.target_offset", "start"),
    "strides of the target where it reads": ("zip(place, source, strict", "zip(place, target, strict"),
    "strides of the source where it writes": ("zip(place, target, strict", "zip(place, source, strict"),
    "the first tensor": ('buffers[f"x{copy.source}"]', 'buffers["x0"]'),
    "samples as long as the first tensor's": ("problem.inputs[copy.source], sample)", "problem.inputs[0], sample)"),
    "from the first sample": ("problem.inputs[copy.source], sample)", "problem.inputs[copy.source], 0)"),
    "to the first sample": ("problem.shape, sample)", "problem.shape, 0)"),
    "an element too few": ("each(samples * math.prod(extents))", "each(samples * math.prod(extents) - 1)"),
    "an element too many": ("each(samples * math.prod(extents))", "each(samples * math.prod(extents) + 1)"),
    "only the first copy": ("for copy in problem.copies:", "for copy in problem.copies[:1]:"),
    "loops turned": ("unravel(i, *extents)", "unravel(i, *extents[::-1])"),
}
GATHER: Mutants = {
    "rows before the first": ("T.max(T.min(row, problem.rows - 1), 0)", "T.min(row, problem.rows - 1)"),
    "rows behind the last": ("T.max(T.min(row, problem.rows - 1), 0)", "T.max(row, 0)"),
    "a row behind the last": ("T.min(row, problem.rows - 1)", "T.min(row, problem.rows)"),
    "never the last row": ("T.min(row, problem.rows - 1)", "T.min(row, problem.rows - 2)"),
    "never the first row": ("problem.rows - 1), 0)", "problem.rows - 1), 1)"),
    "indices without a sign": ('T.cast(index[position], "int32")', 'T.cast(T.cast(index[position], "uint8"), "int32")'),
    "indices of the first sample": ("index[position]", "index[position % count]"),
    "the index of the column": ("index[position]", "index[T.min(column, count - 1)]"),
    "columns turned": ("0), column]", "0), problem.width - 1 - column]"),
    "as many columns as rows": ("unravel(i, problem.width)", "unravel(i, problem.rows)"),
    "one sample": ("each(batch * (count * problem.width))", "each(count * problem.width)"),
    "an element too few": ("each(batch * (count * problem.width))", "each(batch * (count * problem.width) - 1)"),
    "an element too many": ("each(batch * (count * problem.width))", "each(batch * (count * problem.width) + 1)"),
}
TOKEN_ROW: Mutants = {
    "the first row": ("origin + row * problem.width + column", "origin + column"),
    "rows of the first sample": ("x[origin + row * problem.width", "x[row * problem.width"),
    "tokens of the first sample": ("place_of_token(problem, tokens, first,", "place_of_token(problem, tokens, 0,"),
    "columns turned": ("problem.width + column], i)", "problem.width + problem.width - 1 - column], i)"),
    "as many columns as rows": (
        "sample, column = unravel(i, problem.width)",
        "sample, column = unravel(i, problem.rows)",
    ),
    "one sample": ("each(batch * problem.width)", "each(problem.width)"),
    "an element too few": ("each(batch * problem.width)", "each(batch * problem.width - 1)"),
}
PLACE_OF_TOKEN: Mutants = {
    "the last of equal ones": ("here >= tokens[first + place[0]]", "here > tokens[first + place[0]]"),
    "the smallest": ("here >= tokens", "here <= tokens"),
    "another token": ("problem.token))", "problem.token + 1))"),
    "a token too few": ("T.serial(0, problem.rows)", "T.serial(0, problem.rows - 1)"),
    "from the front": ("problem.rows - 1 - step", "step"),
    "the last row without the token": ("0 if problem.token", "problem.rows - 1 if problem.token"),
}
POINTWISE: Mutants = {
    "one sample": ("samples = batch if program.shape[:1] == (BATCH,) else 1", "samples = 1"),
    "an element too few": ("each(samples * math.prod(sizes))", "each(samples * math.prod(sizes) - 1)"),
    "an element too many": ("each(samples * math.prod(sizes))", "each(samples * math.prod(sizes) + 1)"),
    "inputs of the first sample": (
        "sample_view(buffers[n], access.shape, sample)",
        'sample_view(buffers[n], access.shape, sample if n == "y" else 0)',
    ),
    "the quantizer of the first sample": ("quantizer(buffers, sample)", "quantizer(buffers, 0)"),
    "windows from the start": ("views[number][1] + accesses[number].offset", "views[number][1]"),
    "strides of the first input": ("zip(place, strides[number], strict", "zip(place, strides[0], strict"),
    "strides of the result": ("zip(place, strides[number], strict", "zip(place, strides[-1], strict"),
    "loops turned": ("unravel(i, *sizes)", "unravel(i, *sizes[::-1])"),
    "the sign of the partner": ("vmath.f32(-1.0, 1), vmath.f32(1.0, 1)", "vmath.f32(1.0, 1), vmath.f32(-1.0, 1)"),
    "the next one's partner": ("place[-1] + 1 - 2 * odd", "place[-1] + 1"),
    "no partner": ("place[-1] + 1 - 2 * odd", "place[-1]"),
    "the partner in the first input": ("views[read.index][0]", "views[0][0]"),
    "the partner where the first input lies": ("[at(read.index,", "[at(0,"),
    "written where the first input lies": ("T.bind(at(-1, place))", "T.bind(at(0, place))"),
    "no loop but the last": ("[at(number, place)]", "[at(number, [*(0 for _ in place[1:]), place[-1]])]"),
}
HADAMARD: Mutants = {
    "a sample too few": (
        "with grid(batch * problem.positions, threads) as (number, thread):\n            sample",
        "with grid((batch - 1) * problem.positions, threads) as (number, thread):\n            sample",
    ),
    "a row too many": (
        "with grid(batch * problem.positions, threads) as (number, thread):\n            sample",
        "with grid(batch * problem.positions + 1, threads) as (number, thread):\n            sample",
    ),
    "the first sample": ("lambda c: value_of(x, sample, row, c), sample", "lambda c: value_of(x, 0, row, c), sample"),
    "the first row": ("lambda c: value_of(x, sample, row, c), sample", "lambda c: value_of(x, sample, 0, c), sample"),
    "channels turned": (
        "lambda c: value_of(x, sample, row, c), sample",
        "lambda c: value_of(x, sample, row, problem.channels - 1 - c), sample",
    ),
    "into the first sample": ("row, c), sample, row, problem", "row, c), 0, row, problem"),
    "into the first row": ("row, c), sample, row, problem", "row, c), sample, 0, problem"),
    "blocks of half the size": (
        "buffers, problem.block, None, late=True)",
        "buffers, problem.block // 2, None, late=True)",
    ),
    "no rotation": ("buffers, problem.block, None, late=True)", "buffers, 0, None, late=True)"),
    "steps before the rotation": ("None, late=True)", "None)"),
    "a position too many": (
        "unravel(number, problem.positions)\n            rows",
        "unravel(number, problem.positions + 1)\n            rows",
    ),
}
ROWS: Mutants = {
    "no barrier before steps": ("        barrier()\n        step = 1", "        step = 1"),
    "no barrier behind a step": ("            barrier()\n            step *= 2", "            step *= 2"),
    "signs of the channel": ("_is_negative(c % block)", "_is_negative(c)"),
    "no signs": ("_is_negative(c % block)", "_is_negative(c * 0)"),
    "signs of bits apart": ("index & (index >> 1)", "index & (index >> 2)"),
    "signs turned": ("tirx.EQ(pairs & 1, 1)", "tirx.EQ(pairs & 1, 0)"),
    "signs of one pair of bits": ("tirx.EQ(pairs & 1, 1)", "tirx.EQ(pairs, 1)"),
    "pairs side by side": ("tirx.truncdiv(pair, step) * (2 * step)", "tirx.truncdiv(pair, step) * step"),
    "always the first of a step": (" + tirx.truncmod(pair, step))", ")"),
    "differences turned": ("store(waiting, a - b, low + step)", "store(waiting, b - a, low + step)"),
    "sums where differences go": ("store(waiting, a - b, low + step)", "store(waiting, a + b, low + step)"),
    "unscaled": ("vmath.f32(block**-0.5, 1)", "vmath.f32(1.0, 1)"),
    "the scale of all channels": ("vmath.f32(block**-0.5, 1)", "vmath.f32(count**-0.5, 1)"),
    "a step too few": ("while step < block:", "while step < block // 2:"),
    "a step too many": ("while step < block:", "while step < 2 * block:"),
    "a pair too few": ("strided(thread, count // 2, threads)", "strided(thread, count // 2 - 1, threads)"),
    "the first run again": ("value(start + c)", "value(c)"),
    "the first run's place": ("sample, row, start + c, rows", "sample, row, c, rows"),
    "runs as long as the first": ("count = min(together, channels - start)", "count = together"),
    "the quantizer of the first sample": ("self.finish.quantizer(sample)", "self.finish.quantizer(0)"),
    "operands of the first row": (
        "values, quant, at, sample * channels",
        "values, quant, at - row * channels, sample * channels",
    ),
    "steps before the rotation": ("if block and not late else 0", "if block else 0"),
    "no steps before the rotation": ("first = len(steps) - (epilogue.bits is not None) if", "first = 0 if"),
    "into the start of a row": ("(channel + offset)", "channel"),
    "rows side by side": ("row * step + (channel", "row * self.block + (channel"),
    "into the first sample": (
        "at = sample * size + row",
        "at = row",
    ),
    "a channel too few": (
        "with strided(thread, channels, threads) as c:\n                self",
        "with strided(thread, channels - 1, threads) as c:\n                self",
    ),
    "a channel too many": (
        "with strided(thread, channels, threads) as c:\n                self",
        "with strided(thread, channels + 1, threads) as c:\n                self",
    ),
}
# No mutants: how many threads `power` gives, and which elements `strided` gives a thread, which choose no bit; nor the
# last barrier of `combined`: only a program that combined in a loop, into the same memory, would be wrong without it.
THREADS: Mutants = {
    "half of a warp": ("distance = 16", "distance = 8"),
    "neighbours turned where they are read": ("tirx.Shuffle([vector], [i])", "tirx.Shuffle([vector], [count - 1 - i])"),
    "neighbours turned where they are stored": ("T.uint32(8 * i)", "T.uint32(8 * (count - 1 - i))"),
    "the place of the first": ("count)[T.bind(at // count)])", "count)[T.bind(at // count // 2)])"),
    "an element too many": (
        "T.If(i < count), T.Then():\n            yield",
        "T.If(i <= count), T.Then():\n            yield",
    ),
    "no last block": ("(count + (threads - 1)) // threads", "count // threads"),
    "blocks apart": ("T.bind(block * threads + thread)", "T.bind(block * (threads + 1) + thread)"),
    "no last step": ("T.serial(0, -(-count // threads))", "T.serial(0, count // threads)"),
    "steps that overlap": ("T.bind(step * threads + begin)", "T.bind(step * (threads - 1) + begin)"),
    "no end of the last step": ("if count % threads:", "if False:"),
    "a step too long": (
        "T.If(i < count), T.Then():\n                yield i",
        "T.If(i <= count), T.Then():\n                yield i",
    ),
    "no barrier before pairs": (
        "        store(place, value, thread)\n    barrier()",
        "        store(place, value, thread)",
    ),
    "no barrier behind pairs": ("        barrier()\n        step //= 2", "        step //= 2"),
    "half of the threads": ("step = threads // 2", "step = threads // 4"),
    "a pair too many": ("T.If(thread < step)", "T.If(thread <= step)"),
    "a pair too few": ("T.If(thread < step)", "T.If(thread + 1 < step)"),
    "neighbours in every step": ("place[thread + step]", "place[thread + 1]"),
    "the last step left out": ("    while step:", "    while step > 1:"),
    "what a thread has found": ("vmath.keep(place[0])", "vmath.keep(place[thread])"),
}
GROUP_NORM: Mutants = {
    "tensors over one another": ("before -= n", "before = 0"),
    "rows as long as the result's": ("(sample * positions + row) * width", "(sample * positions + row) * channels"),
    "the first sample": ("(own, (sample * positions + row) * width", "(own, row * width"),
    "the channels of the first group": ("read(sample, row, unit * v, v)", "read(sample, row, 0 * unit, v)"),
    "the mean of the first sample": ("store(mean_of, mean, number)", "store(mean_of, mean, group)"),
    "the factor of another group": (
        "eps, 1)), number)",
        "eps, 1)), sample * problem.groups + (group + 1) % problem.groups)",
    ),
    "the groups of the first sample": ("T.bind(sample * problem.groups + tirx", "T.bind(tirx"),
    "the group of the channel": ("tirx.truncdiv(c, size))", "tirx.truncmod(c, problem.groups))"),
    "no epsilon": (
        "vmath.rsqrt(variance + f32(problem.eps, 1))",
        "vmath.rsqrt(variance)",
    ),
    "no mean in the squares": ("keep(value - joined[group])", "keep(value)"),
    "no mean": ("keep(fma(value - mean, mul(gammas", "keep(fma(value, mul(gammas"),
    "another count": ("f32(1.0 / (positions * size), 1)", "f32(1.0 / (positions * size + 1), 1)"),
    "the last row is not in the sum": ("T.min(positions - first, chunk)", "T.min(positions - first - 1, chunk)"),
    "a block too few": ("grid(batch * chunks)", "grid(batch * chunks - 1)"),
    "the rows of the first block": ("first = T.bind(own * chunk)", "first = T.bind(own * 0)"),
    "blocks alike": ("off = keep(means[at] - mean)", "off = keep(mean - mean)"),
    "no squares of blocks": ("so_far + squares[at])", "so_far)"),
    "no barrier before groups are summed": (
        "start * units + unit)\n            barrier()",
        "start * units + unit)",
    ),
    "no barrier behind means": (
        "store(means, mean, number * groups + group)\n        barrier()",
        "store(means, mean, number * groups + group)",
    ),
    "the mean of rows that are not there": (
        "T.cast(T.min(positions - own * chunk, chunk) * size",
        "T.cast(chunk * size",
    ),
    "gamma of the first": ("values_of(buffers[n], c, count)", "values_of(buffers[n], 0 * c, count)"),
    "no beta": (
        "betas[e] if betas else f32(0.0, 1)))\n            for e",
        "f32(0.0, 1)))\n            for e",
    ),
    "raw codes of the first group of time": (
        'buffers["group"][sample], "int32"))\n            scale',
        'buffers["group"][0], "int32"))\n            scale',
    ),
    "raw codes without zero point": ('buffers["raw_zero"][group]', "T.int32(0)"),
    "raw codes of 8 bits": ("scale, zero, problem.raw)", "scale, zero, 8)"),
    "a group too few": ("grid(batch * groups, WARP)", "grid(batch * groups - 1, WARP)"),
    "an element too few": (
        "each(batch * (positions * channels // v))",
        "each(batch * (positions * channels // v) - 1)",
    ),
    "an element too many": (
        "each(batch * (positions * channels // v))",
        "each(batch * (positions * channels // v) + 1)",
    ),
    "a rotated row too few": ("grid(batch * positions, threads)", "grid(batch * positions - 1, threads)"),
}
MATMUL: Mutants = {
    "one sample": ("samples = batch if p.result.batched else 1", "samples = 1"),
    "operands of the first sample": ("(sample * access.size if access.batched else 0)", "0"),
    "all operands have samples": ("(sample * access.size if access.batched else 0)", "sample * access.size"),
    "operands from the start": ("start = access.offset +", "start ="),
    "heads turned": ("*head, row, column = place", "*head, row, column = (*place[-3::-1], *place[-2:])"),
    "an output too few": ("* p.rows * p.columns)) as i", "* p.rows * p.columns) - 1) as i"),
    "an output too many": ("* p.rows * p.columns)) as i", "* p.rows * p.columns) + 1) as i"),
    "the first terms twice": ("term = block * matmul.TERMS + k", "term = k"),
    "terms from the last to the first": (
        "term = block * matmul.TERMS + k",
        "term = T.min(p.terms, (block + 1) * matmul.TERMS) - 1 - k",
    ),
    "no last block of terms": ("-(-p.terms // matmul.TERMS)", "p.terms // matmul.TERMS"),
    "blocks of the same length": ("T.min(p.terms - block * matmul.TERMS, matmul.TERMS)", "matmul.TERMS"),
    "one block of terms": ("-(-p.terms // matmul.TERMS)) as block", "1) as block"),
    "a sum over all blocks": (
        "            store(total, f32(0.0, 1), 0)\n            with T.serial(0, T.min",
        "            store(total, whole[0], 0)\n            store(whole, f32(0.0, 1), 0)\n"
        "            with T.serial(0, T.min",
    ),
    "blocks of 128 terms": ("matmul.TERMS, matmul.TERMS)) as k", "matmul.TERMS, matmul.TERMS // 2)) as k"),
    "products round": ("fma(*product, total[0])", "product[0] * product[1] + total[0]"),
    "the right operand turned": ("at(p.right, term, column)", "at(p.right, column, term)"),
    "rows and columns turned": ("at(p.result, row, column)", "at(p.result, column, row)"),
}
PACK: Mutants = {
    "a weight too few": ("each(vectors * terms * lanes)", "each(vectors * terms * lanes - 1)"),
    "a weight too many": ("each(vectors * terms * lanes)", "each(vectors * terms * lanes + 1)"),
    "a vector too few": ("each(vectors * terms * lanes)", "each((vectors - 1) * terms * lanes)"),
    "terms and lanes turned": (
        "vector, term, lane = unravel(number, terms, lanes)",
        "vector, lane, term = unravel(number, lanes, terms)",
    ),
    "rows as long as a vector": ("+ lane) * terms + term]", "+ lane) * lanes + term]"),
    "vectors side by side": ("(first_output(problem, vector) + lane)", "(vector * lanes + lane)"),
    "the first vector": ("first_output(problem, vector)", "first_output(problem, 0)"),
    "the first lane": ("vector) + lane) * terms", "vector)) * terms"),
    "lanes turned": ("vector) + lane) * terms", "vector) + (lanes - 1 - lane)) * terms"),
    "the first term": ("* terms + term]", "* terms]"),
    "terms turned": ("* terms + term]", "* terms + (terms - 1 - term)]"),
    "the first vector over and over": ("+ term], number)", "+ term], number % (terms * lanes))"),
}
DEQUANTIZE: Mutants = {
    "a row too few": ("each(problem.rows, 32)", "each(problem.rows - 1, 32)"),
    "a row too many": ("each(problem.rows, 32)", "each(problem.rows + 1, 32)"),
    "the stream from its start": (
        "stored_rows(problem, buffers, i), i)",
        "stored_rows(problem, buffers, 0), i)",
    ),
    "the stream of the row before": (
        "stored_rows(problem, buffers, i), i)",
        "stored_rows(problem, buffers, T.max(i - 1, 0)), i)",
    ),
}
# What the CPU's kernel of it is made of, too, and is held against the definition there: here that the cases tell.
DEQUANTIZE_ROW: Mutants = {
    "the offset of the first row": ('b["offset"][i]', 'b["offset"][0]'),
    "no offset": ("value if offset is None else value + offset", "value"),
    "the class of the first rows": ("// TILE_ROWS], ", "// problem.rows], "),
    "the first table": ('tables"][table, code]', 'tables"][0, code]'),
    "the scale of the first segment": ('b["scale"][i, j]', 'b["scale"][i, 0]'),
    "the scale of the first row": ('b["scale"][i, j]', 'b["scale"][0, j]'),
    "segments over one another": ("first += size", "first += 0"),
    "the first tap": ("tap * channels + first + k", "first + k"),
    "a tap too few": ("T.serial(0, p.columns // channels)", "T.serial(0, p.columns // channels - 1)"),
    "a segment too short": ("T.serial(0, size)", "T.serial(0, size - 1)"),
}
STORED_ROWS: Mutants = {
    "the upper bit from the start": ("low * count + index, 1) << low", "low * count, 1) << low"),
    "no upper bit": (" | _field(codes, low * count + index, 1) << low", ""),
    "codes within a byte turned": (">> (bit % 8)", ">> (7 - bit % 8)"),
    "codes without a sign": (
        'T.cast(tirx.reinterpret("int8", codes[index]), "int32")',
        'T.cast(codes[index], "int32")',
    ),
    "extra bits of the row itself": ("i < begin), 1, 0)", "i <= begin), 1, 0)"),
    "extra bits behind the lowest class": ("T.min(own, c - 1) +", ""),
    "extra bits where there are none": ("T.if_then_else(own >= c, more, 0)", "more"),
    "extra bits a bit too low": ("<< (self.bits + c - 1)", "<< (self.bits + c - 2)"),
    "classes of 4 rows": ("(i % 4 * 2) & 3", "0 & 3"),
    "codes of the first row": ("i * self.columns + column, self.bits", "column, self.bits"),
}
FLOAT8: Mutants = {
    "a code too few": ("each(problem.rows * problem.columns)", "each(problem.rows * problem.columns - 1)"),
    "a code too many": ("each(problem.rows * problem.columns)", "each(problem.rows * problem.columns + 1)"),
    "a row too few": ("each(problem.rows * problem.columns)", "each((problem.rows - 1) * problem.columns)"),
    "as many columns as rows": ("unravel(number, problem.columns)", "unravel(number, problem.rows)"),
    "the codes of the first row": ('buffers["codes"][i, k]', 'buffers["codes"][0, k]'),
    "the first code": ('buffers["codes"][i, k]', 'buffers["codes"][i, 0]'),
    "codes with a sign": (
        'T.cast(buffers["codes"][i, k], "int32")',
        'T.cast(tirx.reinterpret("int8", buffers["codes"][i, k]), "int32") & 127',
    ),
    "the scale of the first row": ('buffers["scale"][i]', 'buffers["scale"][0]'),
    "no scale": ("problem.exponent, 1), factor)", "problem.exponent, 1), vmath.f32(1.0, 1))"),
    "a bit of the exponent too many": ("decode(code, problem.exponent, 1)", "decode(code, problem.exponent + 1, 1)"),
    "always E4M3": ("decode(code, problem.exponent, 1)", "decode(code, 4, 1)"),
    "columns turned": ("factor), i, k)", "factor), i, problem.columns - 1 - k)"),
}


PREPARE: dict[str, tuple[tuple[int, QuantMatmul], Mutants]] = {
    "classes": (
        FORMATS[1],
        {
            "the table of the first channels": ("T.min(own, p.row_classes - 1)", "T.min(own, 0)"),
            "bytes of a word of a table turned": ("entry << T.uint32(8 * byte)", "entry << T.uint32(8 * (3 - byte))"),
            "words of a table over one another": ("word * 4 + byte]", "word * 2 + byte]"),
            "sums by the table of other channels": ("[i // CHANNELS], ", "[i // BLOCK], "),
            "nibbles turned": ("code, 16 * kk + 4 * e)", "code, 16 * kk + 4 * (3 - e))"),
            "no fragments of the last channels": (
                "each(w.outputs // CHANNELS * (w.steps * 32)",
                "each((w.outputs // CHANNELS - 2) * (w.steps * 32)",
            ),
        },
    ),
    "integers": (
        FORMATS[5],
        {
            "integers without their sign": ("T.bitwise_xor(code, T.uint32(8))", "code"),
            "halves of bytes over one another": ("8 * e + 4 * kk)", "8 * e)"),
            "halves of bytes turned": ("8 * e + 4 * kk)", "8 * e + 4 * (1 - kk))"),
            "bytes of integers turned": ("8 * e + 4 * kk)", "8 * (3 - e) + 4 * kk)"),
        },
    ),
    "three bits": (
        FORMATS[2],
        {
            "upper bits of the other unit": ("code >> T.uint32(2), 16 * ks +", "code >> T.uint32(2), 16 * (1 - ks) +"),
            "lower bits of the other unit": (
                "put(ks, code & T.uint32(3), 16 * h",
                "put(1 - ks, code & T.uint32(3), 16 * h",
            ),
            "halves of a fragment turned": ("(8 * h + lane // 4))", "(8 * (1 - h) + lane // 4))"),
            "words of the next lane": ("w.place(word, lane))", "w.place(word, lane ^ 1))"),
            "a channel too few": ("with each(p.outputs, 32) as i:", "with each(p.outputs - 1, 32) as i:"),
        },
    ),
    "widths": (
        FORMATS[7],
        {
            "codes for places": ("kept = place[code]", "kept = code"),
        },
    ),
    "five bits": (
        FORMATS[8],
        {
            "codes for values": ("kept = value if p.bits == 8 else code", "kept = code"),
        },
    ),
    "uneven segments": (
        SEGMENTS[-2],
        {
            "the scale of the first segment": ('b["scale"][inside, j]', 'b["scale"][inside, 0]'),
            "the scale of the first channel": ('b["scale"][inside, j]', 'b["scale"][0, j]'),
            "sums of the first of segments": (
                "(p.segments, self.w.first_channels))",
                "(p.segments, self.w.first_units))",
            ),
            "sums over those of the first segment": ("total[0], j, 0, column)", "total[0], 0, 0, column)"),
            "the offset of the first channel": ('b["stored_offset"][inside]', 'b["stored_offset"][0]'),
            "the bias of the first channel": ('b["stored_bias"][inside]', 'b["stored_bias"][0]'),
            "segments from the first unit on": ("(own - (0 if w.even else first))", "own"),
            "segments from the first channel": ("tap * p.channels + before + c", "tap * p.channels + c"),
        },
    ),
    "late zero points": (
        SEGMENTS[5],
        {
            "sums of the first of even segments": ("first: Any = j * size", "first: Any = 0"),
            "sums of dynamic rows negated": (
                'store(b["start"], total[0], j, 0, column)',
                'store(b["start"], 0 - total[0], j, 0, column)',
            ),
            "late sums of the first scale": (
                'self.b["weight_scale"][j, column], total[0]',
                'self.b["weight_scale"][0, column], total[0]',
            ),
            "the first of even segments": ("segment * p.segments[0]", "0"),
        },
    ),
    "taps": (
        SEGMENTS[-1],
        {
            "sums of taps over one another": ("tap * p.channels + first + k]", "tap * size + first + k]"),
            "sums of a tap too few": ("T.serial(0, self.w.taps) as tap,", "T.serial(0, self.w.taps - 1) as tap,"),
            "sums of a channel too few": ("tap, T.serial(0, size) as k", "tap, T.serial(0, size - 1) as k"),
            "the first tap": ("tap * p.channels + before + c", "before + c"),
            "pairs of bits of the other half": (
                "put(ks, code, 16 * h + 2 * kk + 4 * e)",
                "put(ks, code, 16 * kk + 2 * h + 4 * e)",
            ),
            "chunks of a unit turned": ("else first)) * 2 + kk)", "else first)) * 2 + 1 - kk)"),
            "the first unit of a step twice": ("unit = T.bind(step * 2 + ks)", "unit = T.bind(step * 2)"),
        },
    ),
    "border": (
        IMAGE,
        {
            "sums of weights doubled": ("total[0], j, 0, column)", "2 * total[0], j, 0, column)"),
            "bytes turned": ("kk + h, code, 8 * e)", "kk + h, code, 8 * (3 - e))"),
            "a chunk of a tap": ("(chunk - tap * chunks) * CHUNK", "chunk * CHUNK"),
            "values of a lane apart": ("lane % 4 * 4 + e))", "lane % 4 + 4 * e))"),
            "channels of a lane apart": ("8 * h + lane // 4))", "8 * h + lane % 8))"),
        },
    ),
}
"""By what is special about a problem: its batch and itself; and what has to be noticed there."""
# No mutants: what stands where there is no weight (`there` in `_fragment`, `or_zero`): activations are zero there, or
# nobody reads the channel; nor the multiply-add of late sums: a sum of weights below 2^13 times a float16 is exact.


@dataclass(frozen=True)
class Subject:
    """Mutants of the kernels of some cases.

    users: the modules by which the mutated one comes to the kernels, in order
    """

    module: Any
    mutants: Mutants
    cases: list[Case]
    users: tuple[Any, ...] = ()


def _cases(*names: str, of: Callable[[Any], bool] = lambda problem: True) -> list[Case]:
    return [case for case in CASES if case.template in names and of(case.problem)]


def _is(*kinds: type) -> Callable[[Any], bool]:
    return lambda problem: isinstance(problem, kinds)


BUILDERS = {name: template.build for name, template in templates.TEMPLATES.items()} | {"pack": weights.build_pack}
PROGRAMS = _cases("pointwise")[len(vmath.UNARY) - 1 :]
ROWS_OF_CHANNELS = [
    *_cases("hadamard")[:1],
    *_cases("hadamard")[-1:],
    *_cases("norms", of=lambda p: isinstance(p, GroupNorm) and p.block),
    *_cases("norms", of=_is(LayerNorm)),
]
SHARED = [
    *_cases("hadamard")[1:2],
    *_cases("norms", of=_is(LayerNorm, RmsNorm)),
    *_cases("quantize", of=_is(DynamicQuantize)),
]

SUBJECTS = {
    "quantize": Subject(quantize, QUANTIZE, _cases("quantize", of=_is(Quantize))),
    "dynamic quantize": Subject(quantize, DYNAMIC, _cases("quantize", of=_is(DynamicQuantize))),
    "time group": Subject(quantize, TIME_GROUP, _cases("quantize", of=_is(TimeGroup))),
    "move": Subject(movement, MOVE, _cases("movement", of=_is(Movement))),
    "gather": Subject(movement, GATHER, _cases("movement", of=_is(Gather))),
    "token row": Subject(movement, TOKEN_ROW, _cases("movement", of=_is(TokenRow))),
    "place of a token": Subject(tokens, PLACE_OF_TOKEN, _cases("movement", of=_is(TokenRow)), (movement,)),
    "pointwise": Subject(pointwise, POINTWISE, PROGRAMS),
    "hadamard": Subject(norms, HADAMARD, _cases("hadamard")[:2]),
    "rows": Subject(rows, ROWS, ROWS_OF_CHANNELS, (norms,)),
    "threads": Subject(threads, THREADS, [*PROGRAMS[2:3], *SHARED], (rows, norms, quantize, pointwise)),
    "group norm": Subject(norms, GROUP_NORM, _cases("norms", of=_is(GroupNorm))[1:]),
    "matmul": Subject(float_units, MATMUL, _cases("matmul")),
    "pack": Subject(weights, PACK, _cases("pack")),
    "dequantize": Subject(weights, DEQUANTIZE, _cases("dequantize")),
    "dequantize row": Subject(dequantize, DEQUANTIZE_ROW, _cases("dequantize"), (weights,)),
    "stored rows": Subject(stored, STORED_ROWS, _cases("dequantize"), (dequantize, weights)),
    "float8": Subject(weights, FLOAT8, _cases("float8")),
}


def noticed(subject: Subject) -> set[str]:
    """The subject's mutants with which some case comes out otherwise, or at which the emulator stops."""
    given = {case: inputs(case) for case in subject.cases}
    right = {case: BUILDERS[case.template](case.problem, f"right{i}") for i, case in enumerate(given)}
    functions = {f"right{i}": kernel for i, kernel in enumerate(right.values())}
    asked: list[tuple[str, Case]] = []
    for what, texts in subject.mutants.items():
        modules = with_mutated(subject.module, *texts, subject.users)
        for case in subject.cases:
            build, key = BUILDERS[case.template], f"mutant{len(asked)}"
            kernel = getattr(modules[build.__module__], build.__name__)(case.problem, key)
            if not structural_equal(kernel.body, right[case].body, map_free_vars=True):
                functions[key] = kernel
                asked.append((what, case))
    cases = [*given, *(case for _, case in asked)]
    calls = [(key, [*given[case][0], *workspaces(case)]) for key, case in zip(functions, cases, strict=True)]
    found = Library(functions).tried(calls)
    expected = dict(zip(given, found, strict=False))
    noticed: set[str] = set()
    for (what, case), result in zip(asked, found[len(given) :], strict=True):
        arrays, first = given[case]
        results = slice(first, len(arrays))
        try:
            assert result is not None
            check(case, expected[case][results], result[results])
        except AssertionError:
            noticed.add(what)
    return noticed


@pytest.mark.parametrize("name", SUBJECTS)
def test_mistakes_are_noticed(name):
    emulator.needs()
    assert noticed(SUBJECTS[name]) == set(SUBJECTS[name].mutants)


def test_mistakes_in_prepared_weights_are_noticed():
    """By the products of what the GPU has prepared."""
    emulator.needs()
    functions, given, prepares = {}, [], []
    for i, ((batch, problem), mutants) in enumerate(PREPARE.values()):
        case = make_case(problem, batch, seed(i, batch))
        x = case.data["x"]  # of some cases all alike, so that the order of weights makes no difference
        x[...] = np.random.default_rng(i).integers(0, 256, x.shape)
        functions[f"product{i}"] = gemm.build(problem, f"product{i}")
        stored, made = weights.arguments(problem)
        given.append((case, case.stored(), stored, made))
        arrays = [*(given[i][1][a.name] for a in stored), *(empty(a, batch) for a in made)]
        for what, module in {"": weights, **{w: mutated(weights, *texts) for w, texts in mutants.items()}}.items():
            key = f"prepare{len(prepares)}"
            functions[key] = module.build(problem, key)
            prepares.append((what, i, (key, arrays)))
    library, calls, multiplied = Library(functions), [], []
    noticed = set()
    for (what, i, _), arrays in zip(prepares, library.tried([call for *_, call in prepares]), strict=True):
        if arrays is None:
            noticed.add(what)
            continue
        case, data, stored, made = given[i]
        found = data | {a.name: array for a, array in zip(made, arrays[len(stored) :], strict=True)}
        arguments = gemm.parameters(case.problem)
        calls.append((f"product{i}", [found[a.name] if a.name in found else empty(a, case.batch) for a in arguments]))
        multiplied.append((what, case, [a.name for a in arguments].index("out")))
    for (what, case, out), arrays in zip(multiplied, library.tried(calls), strict=True):
        if arrays is None or not np.array_equal(arrays[out].view(np.uint32), reference(case).view(np.uint32)):
            noticed.add(what)
    assert noticed == {what for _, mutants in PREPARE.values() for what in mutants}
