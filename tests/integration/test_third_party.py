"""Passes of other packages, installed as their users would: those of tests/thirdparty, by pip, without network."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mpq_compiler import schemas
from mpq_compiler.cli.mpqc import main
from mpq_compiler.ir import printer
from mpq_compiler.pipeline import manager, parser
from mpq_compiler.pipeline.registry import BUILT_IN as PASSES
from mpq_compiler.pipeline.session import Session
from tests.harness import programs

PACKAGES = Path(__file__).parents[1] / "thirdparty"
ROOT = PACKAGES.parent.parent


def install(target: Path, *names: str) -> Path:
    """Builds copies of the packages and installs them into a folder of their own."""
    copies = []
    for name in names:
        copies.append(shutil.copytree(PACKAGES / name, target.parent / "sources" / name))
    command = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "--quiet"]
    done = subprocess.run(
        [*command, "--disable-pip-version-check", "--target", target, *copies], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return target


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    return install(tmp_path_factory.mktemp("good") / "site", "outliers", "broken")


@pytest.fixture(scope="module")
def doubled(tmp_path_factory, good) -> Path:
    """The same, and a second package with the name of a pass."""
    folder = tmp_path_factory.mktemp("doubled") / "site"
    shutil.copytree(good, folder)
    shutil.copytree(install(folder.parent / "more", "duplicate"), folder, dirs_exist_ok=True)
    return folder


@pytest.fixture
def mpqc(monkeypatch, capsys):
    """Runs the command in this process, with a folder of installed packages on the path."""

    def run(site: Path, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.syspath_prepend(site)
        code = main([*arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    yield run
    for name in [n for n in sys.modules if n.partition(".")[0].startswith("acme")]:
        del sys.modules[name]


def test_installed_packages_are_listed_by_a_process_of_its_own(good):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(good), str(ROOT)])}
    command = [sys.executable, "-m", "mpq_compiler", "passes", "--json", "-"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=good)
    assert done.returncode == 0, done.stderr
    listed = json.loads(done.stdout)
    assert schemas.check(listed, "passes") is None
    assert [p["name"] for p in listed] == [*PASSES, "name-outliers", "quantum"]
    assert listed[-2]["contract"] == "identical" and listed[-2]["options"][0]["name"] == "count"
    assert listed[-1] == {
        "name": "quantum",
        "broken": "pass 'quantum' (acme_broken:Quantum of acme-broken 0.1) fails to import: ModuleNotFoundError: "
        "No module named 'no_such_quantum_library'",
    }


def test_a_package_that_fails_on_import_is_named_and_the_others_go_on(good, mpqc, tmp_path):
    assert "no_such_quantum_library" in mpqc(good, "passes")[1]
    code, _, error = mpqc(good, "passes", "quantum")
    assert code == 1 and "acme-broken 0.1" in error and "Traceback" not in error
    code, out, _ = mpqc(good, "passes", "name-outliers")
    assert code == 0 and "How many tensors to name." in out
    # A pass that misses something asks every pass what it provides: the broken one is passed over.
    code, _, error = mpqc(good, "compile", "none", "-o", str(tmp_path / "x"), "--pipeline", "trace,calibrate")
    assert code == 1 and "pass 'calibrate' needs 'channels-last': put layout before it" in error


def test_it_runs_in_a_pipeline_and_its_notes_reach_the_user(good, mpqc):
    mpqc(good, "passes", "name-outliers")
    passes = parser.parse("name-outliers{count=2}")
    assert parser.to_text(passes) == "name-outliers{count=2}"
    before = programs.after("pixart", "time-groups")
    program, records = manager.run_pipeline(passes, before, Session(), present={"calibration"})
    assert [r.name for r in records] == ["name-outliers"]
    notes = [line for line in printer.text(program).splitlines() if line.startswith("// note: ")]
    assert len(notes) == 2 and "times its mean magnitude" in notes[0]


def test_a_name_of_two_packages_is_an_error_and_the_others_go_on(doubled, mpqc):
    code, out, _ = mpqc(doubled, "passes", "--json", "-")
    listed = {p["name"]: p for p in json.loads(out)}
    assert code == 0 and listed["name-outliers"]["broken"] == (
        "pass 'name-outliers' is defined more than once (acme.name_outliers:NameOutliers of acme-outliers 1.2, "
        "acme_duplicate:NameOutliers of acme-duplicate 0.2); uninstall one of the packages"
    )
    assert [name for name, p in listed.items() if "broken" in p] == ["name-outliers", "quantum"]
