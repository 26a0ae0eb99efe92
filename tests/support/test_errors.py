"""Sentences of errors, in Python and on the command line."""

from __future__ import annotations

import pytest

from mpq_compiler.support import errors
from mpq_compiler.support.errors import UserError


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("--weights 'lots' is no budget", "weights='lots' is no budget"),
        ("about 4.1GB with --jobs 1; give --memory-limit 4.1GB", "about 4.1GB with jobs=1; give memory_limit=4.1GB"),
        ("add --rpc HOST:PORT of one (--key)", "add rpc=HOST:PORT of one (key)"),
        ("leave --lora-rank out", "leave lora_rank out"),
        ("`mpqc sign --new-key FILE` makes one", "`mpqc sign --new-key FILE` makes one"),
        ("a dash -- as here, or well--known", "a dash -- as here, or well--known"),
    ],
)
def test_options_are_arguments_in_python(monkeypatch: pytest.MonkeyPatch, written: str, read: str) -> None:
    assert str(UserError(written)) == read
    monkeypatch.setattr(UserError, "command_line", True)
    assert str(UserError(written)) == written


def test_hints_name_the_nearest_or_some() -> None:
    assert errors.nearest("wieght", ["weights", "seed"]) == "did you mean 'weights'?"
    assert errors.nearest("x", ["b", "a"]) == "there is: a, b"
    assert errors.nearest("x", []) == "there is none"
    assert errors.nearest("x", [f"tensor{i:03}" for i in range(120)]).endswith("tensor023 and 96 more")


@pytest.mark.parametrize("name", ["x" * 100_000, "\n" * 100_000])
def test_what_is_quoted_does_not_flood(name: str) -> None:
    said = str(UserError(f"a.safetensors holds '{name}'; get the file again"))
    assert len(said) < errors.MOST_SAID + 10 and "\n" not in said
    assert said.startswith("a.safetensors holds '") and said.endswith("'; get the file again") and " ... " in said
