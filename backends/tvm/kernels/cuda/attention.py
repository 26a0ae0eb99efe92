"""Attention in float32, in one pass over the keys (Dao et al. 2022, "FlashAttention").

A block of threads has some queries of one head; keys and values come by blocks into shared memory. Scores, their
maximum and their sum stand in shared memory, the outputs in registers: a thread has some dimensions of one query.
"""

from __future__ import annotations

import math
from typing import Any

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import PrimFunc

from mpq_compiler.backends.tvm.kernels.common import vmath
from mpq_compiler.backends.tvm.kernels.common.epilogue import Finish
from mpq_compiler.backends.tvm.kernels.common.template import Buffers, flat, store, unravel
from mpq_compiler.backends.tvm.kernels.common.vmath import f32, fma, keep, mul
from mpq_compiler.backends.tvm.kernels.cuda.threads import barrier, grid, local, primfunc, put_values, shared, strided
from mpq_compiler.backends.tvm.kernels.problems.argument import BATCH
from mpq_compiler.backends.tvm.kernels.problems.attention import LOWEST, Attention, arguments
from mpq_compiler.support.errors import UserError

THREADS = 128
ROOM = 40 * 1024
"""Bytes of shared memory for queries, keys and values."""


def build(problem: Attention, name: str) -> PrimFunc:
    """The kernel ``name(*problems.attention.arguments(problem))``."""
    return primfunc(name, arguments(problem), lambda batch, buffers: _body(problem, batch, buffers))


def _tile(dim: int) -> tuple[int, int]:
    """Queries and keys that a block has in shared memory at once, powers of two."""
    queries = keys = 32
    while (queries + 2 * keys) * (dim + 1) * 4 > ROOM:
        if queries == keys == 1:
            raise UserError(f"no CUDA kernel computes attention in float32 of heads with {dim} dimensions")
        if keys > 4 or (queries <= 4 and keys > 1):
            keys //= 2
        else:
            queries //= 2
    return queries, keys


def _body(problem: Attention, batch: Any, buffers: Buffers) -> None:
    p, finish = problem, Finish(problem.epilogue, buffers)
    queries, keys = _tile(p.dim)
    row_threads = THREADS // queries  # of a query
    own = -(-p.dim // row_threads)  # dimensions of a thread
    blocks, wide = -(-p.queries // queries), p.dim + 1  # rows apart by an odd number of banks, mostly
    q, k, v, y = (flat(buffers[name]) for name in ("q", "k", "v", "y"))
    scale = p.scale if p.scale is not None else 1.0 / math.sqrt(p.dim)
    with grid(batch * (p.heads * blocks), THREADS) as (number, thread):
        sample, head, block = unravel(number, p.heads, blocks)
        first = T.bind(block * queries)
        row, part = T.bind(thread // row_threads), T.bind(thread % row_threads)
        query, key, value = shared(queries * wide), shared(keys * wide), shared(keys * wide)
        scores = shared(queries * (keys + 1))
        out, highest, total = local(own), local(1), local(1)

        def load(target: Any, source: Any, start: Any, count: int, tokens: int, factor: float | None) -> None:
            with strided(thread, count * p.dim, THREADS) as i:
                token, d = unravel(i, p.dim)
                at = (sample * tokens + T.min(start + token, tokens - 1)) * p.channels + head * p.dim + d
                found = source[at]
                store(target, found if factor is None else mul(found, f32(factor, 1)), token * wide + d)

        load(query, q, first, queries, p.queries, scale * vmath.LOG2_E)
        for d in range(own):
            store(out, f32(0.0, 1), d)
        store(highest, f32(LOWEST, 1), 0)
        store(total, f32(0.0, 1), 0)

        with T.serial(0, -(-p.keys // keys)) as step:
            begin = T.bind(step * keys)
            barrier()
            load(key, k, begin, keys, p.keys, None)
            load(value, v, begin, keys, p.keys, None)
            barrier()
            with strided(thread, queries * keys, THREADS) as i:
                a, b = unravel(i, keys)
                score = local(1)
                store(score, f32(0.0, 1), 0)
                with T.serial(0, p.dim) as d:
                    store(score, fma(query[a * wide + d], key[b * wide + d], score[0]), 0)
                if p.mask is not None:
                    added = mask_at(
                        p, buffers, sample, head, T.min(first + a, p.queries - 1), T.min(begin + b, p.keys - 1)
                    )
                    masked = fma(added, f32(vmath.LOG2_E, 1), score[0])
                    store(score, vmath.at_least(masked, f32(LOWEST, 1)), 0)
                store(scores, score[0], a * (keys + 1) + b)  # behind the last key it is the last one's
            barrier()
            new = local(1)
            store(new, highest[0], 0)
            with T.serial(0, keys) as b:
                found = keep(scores[row * (keys + 1) + b])
                store(new, tirx.Select(new[0] > found, new[0], found), 0)
            rescale = keep(vmath.exp2_nonpositive(highest[0] - new[0]))
            store(highest, new[0], 0)
            store(total, mul(total[0], rescale), 0)
            for d in range(own):
                store(out, mul(out[d], rescale), d)
            with T.serial(0, T.min(p.keys - begin, keys)) as b:
                weight = keep(vmath.exp2_nonpositive(scores[row * (keys + 1) + b] - highest[0]))
                store(total, total[0] + weight, 0)
                for d in range(own):
                    at = b * wide + T.min(part + d * row_threads, p.dim - 1)
                    store(out, fma(weight, value[at], out[d]), d)

        inverse = keep(vmath.reciprocal(total[0]))
        with T.If(first + row < p.queries), T.Then():
            for d in range(own):
                place = T.bind(part + d * row_threads)

                def write(place: Any = place, d: int = d) -> None:
                    channel = T.bind(head * p.dim + place)
                    result = keep(mul(out[d], inverse))
                    done = finish(result, sample, (first + row,), channel, finish.quantizer(sample))
                    put_values(y, [done], (sample * p.queries + first + row) * p.channels + channel)

                if (d + 1) * row_threads <= p.dim:
                    write()
                else:
                    with T.If(place < p.dim), T.Then():
                        write()


def mask_at(problem: Attention, buffers: Buffers, sample: Any, head: Any, query: Any, key: Any) -> Expr:
    """What the mask adds to a score."""
    shape = problem.mask
    assert shape is not None
    where = (sample if shape[0] == BATCH else 0, head if shape[1] != 1 else 0, query if shape[2] != 1 else 0, key)
    return buffers["mask"][where]
