"""Kernels that the cache holds: damaged ones are compiled again, and wrong ones do not get into an artifact."""

from __future__ import annotations

import re
import subprocess
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load, save

from mpq_compiler.backends.tvm.compile.objects import KIND, OBJECT
from mpq_compiler.driver.compile import compile_denoiser
from mpq_compiler.driver.report import Report
from mpq_compiler.frontend import denoiser
from mpq_compiler.support import cache
from mpq_compiler.support.errors import Notice
from mpq_compiler.targets import table as targets
from tests.harness import tiny


def compiled(folder: Path) -> tuple[dict[str, bytes], Report]:
    """The files of an artifact, compiled with the cache of the folder."""
    model = denoiser.wrap(tiny.model("dit"), name="dit")
    report = compile_denoiser(
        *(model, folder / "out"), pipeline=tiny.PIPELINE, target="native", cache=folder / "cache",
        overwrite=True,
    )  # fmt: skip
    return {path.name: path.read_bytes() for path in (folder / "out").iterdir()}, report


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """A folder with a cache, and the artifact that was compiled with it."""
    folder = tmp_path_factory.mktemp("reference")
    return folder, compiled(folder)[0]


def kernels(folder: Path) -> list[Path]:
    return sorted((folder / "cache" / KIND).iterdir())


def times(folder: Path) -> list[int]:
    """When each kernel was written, in nanoseconds."""
    return [path.stat().st_mtime_ns for path in kernels(folder)]


@pytest.mark.parametrize("relative", [False, True])
def test_all_come_from_the_cache(
    reference: tuple[Path, dict[str, bytes]], relative: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, expected = reference
    before = times(folder)
    monkeypatch.chdir(folder)
    files, report = compiled(Path() if relative else folder)
    assert files == expected and times(folder) == before
    (note,) = [note for note in report.notes if "cache" in note]
    count = len(kernels(folder))
    assert f"{count} of {count} kernels" in note and "anew" not in note


def flipped(content: bytes) -> bytes:
    at = len(content) // 2
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


@pytest.mark.parametrize(
    "damage", [flipped, lambda content: b"", lambda content: content[:-100]], ids=["a bit", "empty", "cut short"]
)
def test_damaged_ones_are_compiled_again(
    damage: Callable[[bytes], bytes], reference: tuple[Path, dict[str, bytes]]
) -> None:
    folder, expected = reference
    for path in kernels(folder):
        path.write_bytes(damage(path.read_bytes()))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        files, _ = compiled(folder)
    assert files == expected
    notices = [str(each.message) for each in said if issubclass(each.category, Notice)]
    assert sum("was damaged" in each for each in notices) == len(kernels(folder))


@pytest.mark.parametrize(
    ("body", "says"), [("return 0;", "compute something else"), ("__builtin_trap();", "SIGILL|SIGTRAP")]
)
def test_wrong_ones_do_not_get_into_an_artifact(
    body: str, says: str, reference: tuple[Path, dict[str, bytes]], tmp_path: Path
) -> None:
    """Sealed as if they were right: one leaves its result as it was, one ends the process."""
    folder, expected = reference
    for path in kernels(folder):
        content = cache.read(path)
        assert content is not None
        files = load(content)
        (tmp_path / "was.o").write_bytes(files[OBJECT].tobytes())
        listed = subprocess.run(["nm", tmp_path / "was.o"], capture_output=True, text=True, check=True).stdout
        (name,) = [line.split()[-1] for line in listed.splitlines() if " T __tvm_ffi_" in line]
        (tmp_path / "x.c").write_text(f"int {name}(void *a, void *b, int c, void *d) {{ {body} }}")
        subprocess.run(["cc", "-fPIC", "-c", "x.c", "-o", "x.o"], cwd=tmp_path, check=True)
        files[OBJECT] = np.frombuffer((tmp_path / "x.o").read_bytes(), np.uint8)
        cache.write(path, save(files))
    files, report = compiled(folder)
    assert files == expected
    assert any("thrown away and compiled anew" in note for note in report.notes)
    assert re.search(says, " ".join(report.notes))
    before = times(folder)
    files, report = compiled(folder)
    assert files == expected and times(folder) == before
    assert not any("anew" in note for note in report.notes)


pytestmark = pytest.mark.skipif(bool(targets.missing_features(targets.resolve("native"))), reason="native runs here")
