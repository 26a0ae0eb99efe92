"""Old dotted names: each leads where `moved.toml` says, with a warning, and code written against them works."""

from __future__ import annotations

import importlib
import operator
import re
import subprocess
import sys
import tomllib
import warnings

import pytest

from mpq_compiler import _moved
from mpq_compiler.pipeline import passes
from mpq_compiler.pipeline.session import Session
from tests.harness import moved, programs
from tests.harness.tree import ROOT

IMPORTED_BY_THE_DOCS = {
    "aten": ("aten",),
    "artifact": ("read", "write"),
    "backends.onnx.build": ("export_float",),
    "costs": ("macs",),
    "decisions": ("PROGRAM", "note"),
    "denoiser": ("load", "wrap"),
    "formats": ("Format", "QuantizedWeight"),
    "formats.base": ("nearest_codes", "output_error", "stored_scale"),
    "formats.table": ("TableFormat",),
    "pass_manager": ("Contract", "Pass", "Session", "parse", "run_pipeline"),
    "program": ("Program", "Stage", "TensorStore", "operand", "run"),
    "runtime": ("load",),
    "tensorfile": ("load",),
}
"""Modules and names that the documentation imported before the rooms."""

STILL_THERE = {
    *("backends.onnx.build.export_float", "formats.Format", "formats.QuantizedWeight"),
    *("formats.base.output_error", "formats.base.stored_scale"),
}
"""Those of them that have not moved, and warn of nothing."""


def split(dotted: str) -> tuple[str, list[str]]:
    """The longest module of that dotted name, and the attributes behind it."""
    parts = dotted.split(".")
    for end in range(len(parts), 0, -1):
        try:
            importlib.import_module(name := ".".join(["mpq_compiler", *parts[:end]]))
        except ModuleNotFoundError as error:
            if not f"mpq_compiler.{dotted}".startswith(error.name or "-"):
                raise
        else:
            return name, parts[end:]
    raise AssertionError(f"there is no module of {dotted}")


def test_every_line_of_the_table_leads_somewhere():
    table = tomllib.loads((ROOT / "mpq_compiler" / "moved.toml").read_text(encoding="utf-8"))
    assert len(table) > 100
    astray = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # an old name does not lead to another old one
        for old, new in table.items():
            name, attributes = split(new)
            found = sys.modules[name]
            for attribute in attributes:
                found = getattr(found, attribute, None)
            if found is None:
                astray.append(f"{old} = {new}")
    assert not astray


@pytest.mark.parametrize(
    "dotted", [f"{module}.{name}" for module, names in IMPORTED_BY_THE_DOCS.items() for name in names]
)
def test_what_the_docs_imported_is_there_and_says_where_it_went(dotted):
    module, _, name = dotted.rpartition(".")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = getattr(importlib.import_module(f"mpq_compiler.{module}"), name)
    said = [str(w.message) for w in caught if w.category is DeprecationWarning and "mpq_compiler" in str(w.message)]
    if dotted in STILL_THERE:
        assert not said
        return
    (said,) = said
    match = re.fullmatch(rf"mpq_compiler\.{dotted} is now (mpq_compiler\S+)\.(\w+); the old name goes .*", said)
    assert match, said
    assert getattr(importlib.import_module(match[1]), match[2]) is found


def test_no_such_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match=r"module 'mpq_compiler\.pass_manager' has no attribute 'nothing'"):
        operator.attrgetter("nothing")(importlib.import_module("mpq_compiler.pass_manager"))
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("mpq_compiler.no_such_module")


def test_a_module_of_a_room_is_no_old_name():
    """`from mpq_compiler.targets import nvidia` is the module, not what another module calls by that name."""
    code = (
        "import warnings; warnings.simplefilter('error')\n"
        "import mpq_compiler.targets.table\nfrom mpq_compiler.targets import numerics, nvidia\n"
        "from mpq_compiler.bench import show\nprint(nvidia.__name__, show.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.split() == ["mpq_compiler.targets.nvidia", "mpq_compiler.bench.show"], done.stderr


def test_a_pass_written_against_old_names_runs():
    """As packages have it that were written before the rooms."""
    with pytest.warns(DeprecationWarning):
        old = importlib.import_module("mpq_compiler.pass_manager")
        base, contract, session = old.Pass, old.Contract, old.Session
        program = importlib.import_module("mpq_compiler.program").Program

    class Nothing(base):
        contract = passes.Contract.IDENTICAL

        def run(self, program, session):
            return program.fork()

    assert issubclass(Nothing, passes.Pass) and base is passes.Pass
    assert contract is passes.Contract and session is Session
    before = programs.empty()
    assert isinstance(before, program)
    assert isinstance(Nothing().run(before, Session()), program)


def test_modules_of_the_package_use_no_old_name():
    """Every module, imported with old names as errors."""
    code = (
        "import importlib, pkgutil, warnings, mpq_compiler\n"
        "warnings.filterwarnings('error', message='mpq_compiler')\n"
        "for m in pkgutil.walk_packages(mpq_compiler.__path__, 'mpq_compiler.'):\n"
        "    m.name.endswith('__main__') or importlib.import_module(m.name)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_page_is_in_step_with_the_table():
    assert moved.PAGE.read_text(encoding="utf-8") == moved.page(), "python -m tests.harness.moved"


def test_the_table_of_the_finder_is_the_file():
    assert _moved.table()["pass_manager"] == "pipeline.manager"
