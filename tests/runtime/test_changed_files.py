"""Files of an artifact that change behind its verification: the bits of before, or a sentence; never a signal."""

from __future__ import annotations

import gc
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mpq_compiler.artifact import bundle
from mpq_compiler.runtime import compiled_denoiser, tvm
from mpq_compiler.support.errors import UserError
from mpq_compiler.targets import table as targets

pytest.importorskip("tvm")
from mpq_compiler.backends.tvm.build import build
from tests.harness import once, packed, relax_artifact


def artifact(folder: Path) -> Path:
    """A copy of the bundled denoiser, compiled for this machine."""

    def make(path: Path) -> None:
        case, row = packed.program(packed.BUNDLED), targets.resolve("native")
        packed.write(path, case.program, row, build(case.program, row, (1,), jobs=2, cache=packed.kernel_cache()))

    return Path(shutil.copytree(once.made("changed.mpq", make), folder / "a.mpq"))


def given() -> dict[str, np.ndarray]:
    sample = np.random.default_rng(5).standard_normal((1, 4, 14, 14)).astype(np.float32)
    return {"sample": sample, "timestep": np.array([500.0], np.float32), "class_labels": np.array([3])}


CHANGED = """
import os, sys
import numpy as np
from mpq_compiler.runtime import compiled_denoiser
from mpq_compiler.support.errors import UserError

folder, change = sys.argv[1:]
given = dict(np.load(folder + "/../given.npz"))
loaded = compiled_denoiser.load(folder, threads=2)
expected = loaded.run(given)
for name in sorted(os.listdir(folder)):
    path = os.path.join(folder, name)
    if change == "overwritten":
        with open(path, "rb+") as file:
            file.write(os.urandom(os.path.getsize(path)))
    elif change == "cut":
        os.truncate(path, 0)
    else:
        os.unlink(path)
    loaded.forget()
    assert np.array_equal(loaded.run(given), expected), name
try:
    loaded.executor.replace({})
    raise AssertionError("weights were prepared from another file")
except UserError as error:
    print(error)
assert np.array_equal(loaded.run(given), expected)
maps = open("/proc/self/maps").read()
assert folder not in maps, maps
"""


@pytest.mark.parametrize(
    ("change", "sentence"),
    [("overwritten", "was altered after it was written"), ("cut", "was altered"), ("removed", "cannot read")],
)
def test_files_that_change_under_a_loaded_artifact(change, sentence, tmp_path):
    """Of all of them; what is read again, for a LoRA, is verified again."""
    folder = artifact(tmp_path)
    np.savez(tmp_path / "given.npz", **given())
    done = subprocess.run([sys.executable, "-c", CHANGED, folder, change], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"{folder}/{bundle.WEIGHTS}" in done.stdout and sentence in done.stdout


@pytest.mark.parametrize("name", [bundle.WEIGHTS, bundle.KERNELS])
@pytest.mark.parametrize("change", ["a byte", "cut"])
def test_files_that_change_between_verification_and_use(name, change, tmp_path):
    read = bundle.read(artifact(tmp_path))
    path = read.file(name)
    with path.open("rb+") as file:
        if change == "cut":
            file.truncate(100)
        else:
            file.seek(-1, os.SEEK_END)
            last = file.read(1)
            file.seek(-1, os.SEEK_END)
            file.write(bytes([last[0] ^ 1]))
    with pytest.raises(UserError, match=rf"{name} was altered after it was written; copy or compile it again"):
        tvm.VirtualMachine(read, 1)


def _maps() -> int:
    return Path("/proc/self/maps").read_text().count("memfd:kernels.so")


def test_kernels_of_several_artifacts(tmp_path):
    """One twice, and another; their copies go with them."""
    path, before = artifact(tmp_path), _maps()
    relax_artifact.build(tmp_path / "b.mpq")
    loaded = [compiled_denoiser.load(path, threads=1) for _ in range(2)]
    other = compiled_denoiser.load(tmp_path / "b.mpq", threads=1)
    expected, small = loaded[0].run(given()), {
        "sample": np.ones((1, 3, 16), np.float32), "timestep": np.array([7]), "class_labels": np.array([2])
    }
    for _ in range(3):
        assert np.array_equal(loaded[1].run(given()), expected)
        assert np.array_equal(other.run(small), relax_artifact.expected(**small))
        loaded[0] = compiled_denoiser.load(path, threads=1)
    assert _maps() > before
    del loaded, other
    gc.collect()
    assert _maps() == before


def _nothing(content: bytes, sha256: str) -> None:
    return None


def _not_executable(content: bytes, sha256: str) -> io.FileIO:
    return io.FileIO("/proc/self/cmdline")


@pytest.mark.parametrize("sealed", [_nothing, _not_executable])
def test_systems_without_sealed_files(sealed, tmp_path, monkeypatch):
    """A copy in a folder that only this user can read, which goes at once."""
    path = artifact(tmp_path)
    expected = compiled_denoiser.load(path, threads=1).run(given())
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tvm, "_sealed", sealed)
    monkeypatch.setattr(tvm.tempfile, "tempdir", str(tmp_path / "scratch"))
    loaded = compiled_denoiser.load(path, threads=1)
    assert not [*(tmp_path / "scratch").iterdir()]
    shutil.rmtree(path)
    assert np.array_equal(loaded.run(given()), expected)


def test_a_sealed_file_cannot_be_written_to():
    file = tvm._sealed(content := os.urandom(5000), "its hash")
    assert file is not None and tvm._sealed(content, "its hash") is file
    path = f"/proc/self/fd/{file.fileno()}"
    assert Path(path).read_bytes() == content
    with pytest.raises(PermissionError), open(path, "r+b", buffering=0) as again:
        again.write(b"x")
    with pytest.raises(PermissionError):
        os.truncate(path, 0)
    del file
    assert "its hash" not in tvm._SEALED
