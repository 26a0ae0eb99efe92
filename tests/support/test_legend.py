"""The legend of tables: what stands in them is told of, and nothing else."""

from __future__ import annotations

import pytest

from mpq_compiler import formats
from mpq_compiler.support.legend import legend


def test_what_stands_in_the_table_is_told_of() -> None:
    told = legend(["int2+b", "u8/t4", "loss"], 80)
    assert all(word in told for word in ("int2: 2 bits", "+b: and a binary branch", "/t4: with scales", "loss: noise"))
    assert legend(["ec2.5", "ec3+r16", "u6/t12"], 200).startswith("ec2.5: integers, entropy-coded in 2.5 bits; +r16: ")
    assert not any(word in told for word in ("k-means", "entropy", "float", "token"))
    assert max(map(len, told.splitlines())) <= 80
    assert legend(["float"], 80) == ""


@pytest.mark.parametrize("name", [*formats.names(), "ec2.5", "int4+r16", "nf4g64"])
def test_every_format_has_a_meaning(name: str) -> None:
    assert legend([name], 200)
