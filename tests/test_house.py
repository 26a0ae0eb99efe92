"""Guards of how the house is built: the links, what packages hold, what may be imported from where."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from collections.abc import Iterator
from configparser import ConfigParser
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from tests.harness import tree
from tests.harness.tree import ROOT

LINKS = ("passes", "backends")
PACKAGED = ("mpq_compiler/models/", "mpq_compiler/recipes/", "mpq_compiler/schemas/")


@pytest.fixture(scope="module")
def names(tmp_path_factory) -> dict[str, list[str]]:
    """File names in a copy of the tree, in the sdist built from it, and in the wheel built from that."""
    folder = tmp_path_factory.mktemp("distributions")
    copy = tree.copy(folder / "tree")
    source = [path.relative_to(copy).as_posix() for path in copy.rglob("*") if path.is_file()]
    build(copy, "sdist", folder)
    archive = next(folder.glob("*.tar.gz"))
    with tarfile.open(archive) as file:
        file.extractall(folder / "unpacked", filter="data")
        sdist = [m.name.partition("/")[2] for m in file.getmembers() if not m.isdir()]
    build(next((folder / "unpacked").iterdir()), "wheel", folder)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as file:
        wheel = [info.filename for info in file.infolist() if not info.is_dir()]
    return {"tree": source, "sdist": sdist, "wheel": wheel}


def build(source: Path, kind: str, destination: Path) -> None:
    code = f"import sys; from setuptools import build_meta; build_meta.build_{kind}(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", code, destination], capture_output=True, text=True, cwd=source
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", LINKS)
def test_links_are_links(name):
    link = ROOT / "mpq_compiler" / name
    assert link.is_symlink(), (
        f"{link} was checked out as text: run `git config core.symlinks true && git checkout -- {link}`"
    )
    assert os.readlink(link) == f"../{name}"


@pytest.mark.parametrize("name", LINKS)
def test_links_checked_out_as_text_are_a_clear_error(tmp_path, name):
    copy = tree.copy(tmp_path)
    link = copy / "mpq_compiler" / name
    link.unlink()
    link.write_text(f"../{name}")
    done = subprocess.run(
        [sys.executable, "-c", "import mpq_compiler"], capture_output=True, text=True, cwd=copy
    )
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ImportError: ") and "git config core.symlinks true" in last


def test_wheel_holds_every_module_once_and_nothing_generic(names):
    wheel = names["wheel"]
    assert not [name for name, count in Counter(wheel).items() if count > 1]
    assert {name.split("/")[0].partition("-")[0] for name in wheel} == {"mpq_compiler"}
    modules = {name for name in names["tree"] if name.endswith(".py")}
    expected = {name for name in modules if name.startswith("mpq_compiler/")}
    expected |= {f"mpq_compiler/{name}" for name in modules if name.startswith(LINKS)}
    assert {name for name in wheel if name.endswith(".py")} == expected


def test_sdist_holds_every_module_once(names):
    """Links are stored as what they point to; the folders at the top are not stored a second time."""
    sdist = names["sdist"]
    assert not [name for name, count in Counter(sdist).items() if count > 1]
    assert not [name for name in sdist if name.startswith(tuple(f"{link}/" for link in LINKS))]
    assert {name for name in sdist if name.endswith(".py") and name.startswith("mpq_compiler/")} == {
        name for name in names["wheel"] if name.endswith(".py")
    }


def test_packaged_data_is_in_wheel_and_sdist(names):
    data = {n for n in names["tree"] if n.startswith(PACKAGED) and not n.endswith(".py")} | {
        "mpq_compiler/py.typed"
    }
    assert any(name.endswith("schemas/manifest.json") for name in data)
    for kind in ("sdist", "wheel"):
        assert data <= {*names[kind]}, f"{kind} lacks {sorted(data - {*names[kind]})}"


def test_licenses_are_in_the_wheel(names):
    licenses = {Path(name).name for name in names["wheel"] if ".dist-info/" in name}
    assert {"LICENSE", "NOTICE", "THIRD_PARTY.md"} <= licenses


@pytest.mark.parametrize("line", ["import passes", "from backends.tvm import emit", "import backends.tvm"])
def test_ruff_bans_the_folders_as_modules(line):
    pytest.importorskip("ruff")
    command = [sys.executable, "-m", "ruff", "check", "--select", "TID251", "--stdin-filename", "x.py", "-"]
    done = subprocess.run(command, input=line + "\n", capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1
    assert "import mpq_compiler." in done.stdout


@pytest.fixture(scope="module")
def planted(tmp_path_factory) -> Path:
    """A copy of the tree to plant faults in; every test takes its fault out again."""
    return tree.copy(tmp_path_factory.mktemp("planted"))


@contextmanager
def fault(path: Path, line: str) -> Iterator[None]:
    """The file with a line more at its end, or a new file of that line."""
    before = path.read_text() if path.exists() else None
    path.parent.mkdir(exist_ok=True)
    path.write_text((before or "") + f"\n{line}\n")
    try:
        yield
    finally:
        if before is None:
            path.unlink()
            path.parent.rmdir()
        else:
            path.write_text(before)


def linted(copy: Path, *command: str) -> tuple[int, str]:
    """Exit code and output of a check of `make lint` in the copy, whose modules are imported from there."""
    environment = {**os.environ, "PYTHONPATH": str(copy)}
    program = Path(sys.executable).with_name(command[0])
    done = subprocess.run([program, *command[1:]], capture_output=True, text=True, cwd=copy, env=environment)
    return done.returncode, " ".join((done.stdout + done.stderr).split())


FUNCTION = "def planted() -> None:\n    "
IMPORTS = {
    "against the order": ("ir/aten.py", "from mpq_compiler.driver import options", "ir is not allowed to import"),
    "against the order, in a function": (
        "quantization/gptq.py",
        f"{FUNCTION}from mpq_compiler.pipeline import session",
        "quantization is not allowed to import",
    ),
    "against the order, for a type": (
        "formats/base.py",
        "if TYPE_CHECKING:\n    from mpq_compiler.ir import program",
        "formats is not allowed to import",
    ),
    "torch on a device, in a function": (
        "runtime/memo.py",
        f"{FUNCTION}import torch",
        "runtime is not allowed to import torch",
    ),
    "a pass in a pass": (
        "passes/layout.py",
        f"{FUNCTION}from mpq_compiler.passes import trace",
        "passes.layout is not allowed to import",
    ),
    "a backend in a backend": (
        "backends/onnx/build.py",
        f"{FUNCTION}from mpq_compiler.backends.reference import build",
        "backends.onnx is not allowed to import",
    ),
    "a circle in a function": ("ir/aten.py", f"{FUNCTION}from mpq_compiler.ir import editor", "No cycles are allowed"),
    "a new room without a floor": ("cellar/__init__.py", '"""A room."""', "not listed as layers"),
}
"""Faults in the imports: the file, what is added to it, and what import-linter says."""


def test_the_imports_of_the_house_are_in_order(planted):
    status, said = linted(planted, "lint-imports", "--no-logo", "--no-cache")
    assert status == 0 and "0 broken" in said


@pytest.mark.parametrize("name", IMPORTS)
def test_import_linter_finds(name, planted):
    file, line, sentence = IMPORTS[name]
    with fault(planted / "mpq_compiler" / file, line):
        status, said = linted(planted, "lint-imports", "--no-logo", "--no-cache")
    assert status == 1 and sentence in said.replace("mpq_compiler.", "")


BY_NAME = ("import importlib\nimportlib.import_module('json')", "from importlib import import_module", "import runpy")


@pytest.mark.parametrize("line", BY_NAME)
def test_ruff_bans_imports_by_name_but_in_the_one_door(line, planted):
    with fault(planted / "mpq_compiler" / "ir" / "aten.py", line):
        status, said = linted(planted, "ruff", "check", "--no-cache", "--select", "TID251", ".")
    assert status == 1 and "the one door" in said


def test_nothing_calls_import_by_its_other_name():
    """`__import__` is a builtin, which ruff cannot ban."""
    files = [n for n in tree.files() if n.startswith(("mpq_compiler/", "passes/", "backends/")) and n.endswith(".py")]
    assert len(files) > 200
    assert not [name for name in files if "__import__(" in (ROOT / name).read_text(encoding="utf-8")]


def test_nothing_mentions_a_place_on_somebodys_machine():
    """Absolute paths work on one machine only."""
    private = re.compile(rb"(?<![\w./$}])/(?:home|root|Users|work|opt/venv)/[\w.]")
    found = []
    for name in tree.files():
        content = b"" if (ROOT / name).is_symlink() else (ROOT / name).read_bytes()
        if b"\0" not in content[:1000]:
            found += [f"{name}: {m.group().decode()}" for m in private.finditer(content)]
    assert not found


def test_constraints_pin_every_dependency():
    pinned = {
        line.partition("==")[0].lower().replace("_", "-")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line and not line.startswith("#")
    }
    named = re.findall(r"^    ([A-Za-z][\w.-]*)[<>=]", (ROOT / "setup.cfg").read_text(), re.MULTILINE)
    assert len(named) > 10
    assert {name.lower().replace("_", "-") for name in named} <= pinned


def test_a_wheel_has_every_page_and_no_link_that_leads_nowhere() -> None:
    about = ConfigParser()
    about.read(ROOT / "setup.cfg")
    root = "share/doc/mpq-compiler"
    installed = {
        f"{folder.removeprefix(root)}/{found.name}".lstrip("/"): found
        for folder, patterns in about["options.data_files"].items()
        for pattern in patterns.split()
        for found in ROOT.glob(pattern)
    }
    pages = {path for suffix in ("md", "png", "svg") for path in (ROOT / "docs").rglob(f"*.{suffix}")}
    assert {path.relative_to(ROOT).as_posix(): path for path in pages}.items() <= installed.items()
    assert "](" not in about["metadata"]["long_description"]


def test_what_stands_beside_the_package_names_it_as_it_is() -> None:
    about = ConfigParser()
    about.read(ROOT / "setup.cfg")
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= cited.keys()  # what the format demands
    assert (cited["title"], cited["version"]) == (about["metadata"]["name"], about["metadata"]["version"])
    assert cited["license"] == about["metadata"]["license"]
    (extra,) = re.findall(r"/source\[(\w+)\]", (ROOT / "Dockerfile").read_text(encoding="utf-8"))
    assert extra in about["options.extras_require"]
