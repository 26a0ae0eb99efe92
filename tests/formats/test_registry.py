"""Formats by name: built in, spelled out, of other packages."""

from __future__ import annotations

import sys

import pytest
import torch

from mpq_compiler import formats
from mpq_compiler.formats import low_rank
from mpq_compiler.pipeline.parser import parse
from mpq_compiler.support.errors import UserError


@pytest.mark.parametrize("name", formats.FORMATS)
def test_built_in_formats_are_found_by_their_names(name):
    assert formats.get(name).name == name


@pytest.mark.parametrize(
    "name, bits, segments",
    [("int4g32", 4, (32, 32, 6)), ("int2g128", 2, (70,)), ("nf4g64", 4, (64, 6)), ("fp4g16", 4, (16, 16, 16, 16, 6))],
)
def test_a_name_spells_out_the_size_of_k_groups(name, bits, segments):
    found = formats.get(name)
    assert (found.name, found.bits, found.segments(70)) == (name, bits, segments)


def test_a_named_format_with_groups_is_what_its_name_spells_out():
    for name in ("int2g64", "int3g64", "int4g64"):
        assert formats.FORMATS[name].table == formats.TABLES[name[:4]] and formats.FORMATS[name].size == 64


@pytest.mark.parametrize("base", ["int4", "int2+b", "km3t", "nf4g64", "int8"])
def test_a_name_spells_out_a_low_rank_branch(base):
    found = formats.get(f"{base}+r16")
    assert isinstance(found, low_rank.LowRankFormat)
    assert (found.base, found.rank, found.bits) == (formats.get(base), 16, formats.get(base).bits)


@pytest.mark.parametrize(
    "name, message",
    [
        ("int5", "unknown weight format 'int5'"),
        ("int2+bb", r"did you mean 'int2\+b'"),
        ("int4g0", "unknown weight format 'int4g0'"),
        ("km4g64", "unknown weight format 'km4g64'"),
        ("int5+r4", "unknown weight format 'int5'"),
        ("int4+r0", r"unknown weight format 'int4\+r0'"),
        ("fp8+r4", "stands beside a table; 'fp8' is none"),
        ("int4+r4+r4", r"stands beside a table; 'int4\+r4' is none"),
    ],
)
def test_other_names_are_refused_with_what_is_near(name, message):
    with pytest.raises(UserError, match=message):
        formats.get(name)


def test_options_of_passes_name_formats_before_anything_runs():
    assert parse("sensitivity{formats=int4/int4g32/int4+r16}")[0].formats == ("int4", "int4g32", "int4+r16")
    with pytest.raises(UserError, match="unknown weight format 'int5'"):
        parse("sensitivity{formats=int4/int5}")
    with pytest.raises(UserError, match="unknown weight format 'km5'"):
        parse("bit-allocation{uniform=km5}")


# --- formats of other packages ------------------------------------------------------------------------------

SOURCE = '''
from dataclasses import dataclass
from mpq_compiler.formats.fixed_table import TableFormat

POWERS = TableFormat("pow3", bits=3, table=(-8, -4, -2, -1, 1, 2, 4, 8))
OTHER = 3
'''


@pytest.fixture
def install(tmp_path, monkeypatch):
    def install(entries: str, source: str = SOURCE) -> None:
        info = tmp_path / "acme_formats-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-formats\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[{formats.ENTRY_POINTS}]\n{entries}\n")
        (tmp_path / "acme_formats.py").write_text(source)
        monkeypatch.syspath_prepend(tmp_path)

    yield install
    sys.modules.pop("acme_formats", None)
    formats._find.cache_clear()  # another test's package may have the same entry points


def test_a_format_of_another_package(install):
    install("pow3 = acme_formats:POWERS")
    found = formats.get("pow3")
    w = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    assert found.fit(w).codes.shape == w.shape and "pow3" in formats.names()
    assert formats.get("pow3+r2").base is found
    with pytest.raises(UserError, match="did you mean 'pow3'"):
        formats.get("pow33")


def test_caches_know_the_code_of_a_format_of_another_package(install, tmp_path):
    install("pow3 = acme_formats:POWERS")
    assert formats.version("int4") == formats.version("int4g32") == ""
    first = formats.version("pow3")
    assert first == formats.version("pow3") != ""
    (tmp_path / "acme_formats.py").write_text(SOURCE + "# fits otherwise")
    assert formats.version("pow3") != first and formats.version("pow3+r2") == formats.version("pow3")


def test_a_package_that_fails_to_import_is_named_and_others_go_on(install):
    install("pow3 = acme_formats:POWERS", "import no_such_module\n")
    with pytest.raises(UserError, match=r"'pow3' \(acme_formats:POWERS\) fails to import: No module named"):
        formats.get("pow3")
    assert formats.get("int4").name == "int4"


@pytest.mark.parametrize("entry", ["pow3 = acme_formats:OTHER", "pow4 = acme_formats:POWERS"])
def test_something_else_than_a_format_of_that_name_is_named(install, entry):
    install(entry)
    with pytest.raises(UserError, match="is no instance of Format with that name"):
        formats.get(entry.split(" ")[0])


@pytest.mark.parametrize("name", ["int4", "int4g32"])
def test_a_name_twice_is_an_error(install, name):
    install(f"{name} = acme_formats:POWERS")
    with pytest.raises(UserError, match=rf"'{name}' is defined more than once \(acme_formats:POWERS\)"):
        formats.get(name)
