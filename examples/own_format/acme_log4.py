"""A weight format of your own: 4 bits whose levels are zero and powers of two.

    mpqc compile fashion-unet -o out.mpq --pipeline "trace,layout,calibrate,time-groups,\
bit-allocation{uniform=log4},insert-fake-quant,round-weights{method=gptq},fold-fake-quant,fuse-epilogues"

A table of int8 levels is all that the kernels need: they look codes up in it, so a new table costs no new kernel. The
format fits a scale for every row by itself. docs/formats.md has one that fits its own way.
"""

from __future__ import annotations

from mpq_compiler.formats.fixed_table import TableFormat

# 2^4 levels between -127 and 127. Sixteen levels leave one over: -96 lies between -64 and the largest magnitude.
LEVELS = (-96, -64, -32, -16, -8, -4, -2, -1, 0, 1, 2, 4, 8, 16, 32, 64)

LOG4 = TableFormat("log4", bits=4, table=LEVELS)
