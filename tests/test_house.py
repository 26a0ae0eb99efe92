"""Guards of how the house is built: the links, what packages hold, what may be imported from where."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import pytest

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


def imports(path: Path) -> set[str]:
    """The modules that a file imports when it is imported itself, that is, not within functions."""
    found = set()
    pending: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            pending += ast.iter_child_nodes(node)
    return found


def test_the_ground_floor_imports_no_pass_and_no_backend():
    floor = [n for n in tree.files() if n.startswith("mpq_compiler/") and n.endswith(".py")]
    assert floor
    above = {
        name: module
        for name in floor
        for module in imports(ROOT / name)
        if re.match(r"mpq_compiler\.(passes|backends)\b", module)
    }
    assert not above


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
