"""Builds the kit for a machine with a GPU, on one without.

    python -m benchmarks.gpu_kit --build DIR            # then, there: python3 DIR/run.py --step 1 --out RESULTS
    python -m benchmarks.gpu_kit --build DIR --models sd15=W8A8:/tmp/sd15.mpq sdxl=W8A8:/tmp/sdxl.mpq

Step by step the folder holds `bits`, what the tests of kernels call and find on the emulator; `tables`, kernels of
latent diffusion models at their full size, with what they must return; `models`, whole denoisers, the large ones
without their weights, which are drawn there; and `lib`, what a bare machine lacks.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from benchmarks.gpu_kit import cases, models
from mpq_compiler.runtime import tvm
from mpq_compiler.support import terminal
from mpq_compiler.support.errors import UserError
from tests.harness.cuda import recorder

ROOT = Path(__file__).resolve().parents[2]
TESTS = ("test_gemm.py", "test_kernels.py", "test_fast_attention.py", "test_rounding.py", "test_halves.py")
PYTHONS = ("3.11", "3.12")
NO_HEADERS = shutil.ignore_patterns("__pycache__", "include", "share", "3rdparty", "licenses", "*.pyi", "cmake")
MOST = 40_000_000
"""Bytes of a kit that is carried along."""
COUNTED = {
    "linear sdxl 4096x640->5120, batch 1": ("W8A8", "W4A8", "W4A16"),
    "linear sdxl 1024x1280->1280, batch 1": ("W8A8",),
    "conv3x3 sdxl 64x64x640->640, batch 1": ("W8A8", "W4A8"),
    "attention sdxl 10x64 4096x4096, batch 1": ("attention bf16",),
}
"""The kernels that step 4 counts."""


def bits(folder: Path, levels: list[int], tests: tuple[str, ...], jobs: int) -> None:
    """The calls of the tests of kernels, which are run. UserError: one fails."""
    folder.mkdir()
    asked = {recorder.FOLDER: str(folder), recorder.LEVELS: " ".join(map(str, levels))}
    places = [str(ROOT / "tests" / "backends" / "cuda" / test) for test in tests]
    command = [sys.executable, "-m", "pytest", "-q", "-k", "not machine_code", "-p", "no:cacheprovider"]
    command += ["-n", str(jobs), "--dist", "loadfile"]
    done = subprocess.run(
        [*command, *places], cwd=ROOT, env={**os.environ, **asked}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise UserError(f"the tests of kernels fail: {' '.join(command[2:] + places)}\n{done.stdout[-2000:]}")


def tables(folder: Path, levels: list[int], batches: list[int], only: str, size: float) -> None:
    """The kernels of `cases.CASES` with what they are given and must return."""
    folder.mkdir()
    found: list[dict[str, Any]] = []
    chosen = [case if size == 1 else case.scaled(size) for case in cases.CASES if only in case.name]
    with terminal.progress("kernels", len(chosen) * len(levels)) as advance:
        for level in levels:
            for number, case in enumerate(chosen):
                library = cases.library(case, level, folder)
                for batch in batches:
                    told, stored = cases.described(case, batch, level)
                    arrays = f"{number}-{batch}-sm{level}.npz"
                    np.savez_compressed(folder / arrays, **stored)  # type: ignore[arg-type]
                    counted = COUNTED.get(told["name"], ())
                    found.append({**told, "library": library.name, "arrays": arrays, "counted": counted})
                advance(1)
    (folder / "cases.json").write_text(json.dumps(found) + "\n")


def carried(folder: Path, pythons: list[str]) -> None:
    """What a bare machine lacks: TVM's runtime, tvm-ffi for each Python, this project's own runtime, diffusers."""
    folder.mkdir()
    library = tvm.library_path()
    for name in (library.name, "libtvm_runtime_cuda.so"):
        shutil.copy2(library.with_name(name), folder / name)
    pin = f"apache-tvm-ffi=={importlib.metadata.version('apache-tvm-ffi')}"
    for python in pythons:
        own = folder / f"cp{python.replace('.', '')}"
        if python == "{}.{}".format(*sys.version_info[:2]):
            shutil.copytree(_package("tvm_ffi"), own / "tvm_ffi", ignore=NO_HEADERS)
            continue
        with tempfile.TemporaryDirectory(prefix="mpq-kit-") as wheels:
            platforms = [word for n in (17, 24, 28) for word in ("--platform", f"manylinux_2_{n}_x86_64")]
            command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", *platforms]
            done = subprocess.run(
                [*command, "--implementation", "cp", "--python-version", python, "-d", wheels, pin],
                capture_output=True, text=True, check=False,
            )  # fmt: skip
            if done.returncode:
                raise UserError(f"{pin} for Python {python} cannot be downloaded: {done.stderr.strip()[-300:]}")
            (wheel,) = Path(wheels).glob("*.whl")
            shutil.unpack_archive(wheel, Path(wheels, "all"), "zip")
            shutil.copytree(Path(wheels, "all", "tvm_ffi"), own / "tvm_ffi", ignore=NO_HEADERS)
    python_alone = shutil.ignore_patterns("__pycache__", "*.so", "*.safetensors", "passes", "backends")
    shutil.copytree(ROOT / "mpq_compiler", folder / "mpq_compiler", symlinks=False, ignore=python_alone)
    for package in ("importlib_metadata", "zipp"):
        shutil.copytree(_package(package), folder / package, ignore=python_alone)
    diffusers = _package("diffusers")
    with zipfile.ZipFile(folder / "diffusers.zip", "w", zipfile.ZIP_LZMA) as archive:
        for file in sorted(diffusers.rglob("*.py")):
            archive.write(file, file.relative_to(diffusers.parent))


def _package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"{name} is not installed, which the kit carries: pip install -e '.[dev]'")
    return Path(spec.submodule_search_locations[0])


def packed(folder: Path) -> int:
    """The bytes of the folder as a tar.xz, as which it may travel."""
    with tempfile.TemporaryFile() as stream:
        with tarfile.open(fileobj=stream, mode="w:xz") as archive:
            archive.add(folder, folder.name)
        return stream.tell()


def build(options: argparse.Namespace) -> None:
    """Builds the kit beside its place, where it then is as a whole."""
    folder: Path = options.build
    if folder.exists():
        raise UserError(f"{folder} exists; remove it, or choose another folder")
    denoisers = models.asked(options.models)
    with tempfile.TemporaryDirectory(prefix=".kit-", dir=folder.resolve().parent) as scratch:
        made = Path(scratch, "kit")
        made.mkdir()
        there = Path(__file__).parent / "there"
        shutil.copytree(there, made / "there", ignore=shutil.ignore_patterns("__pycache__", "run.py"))
        shutil.copy2(there / "run.py", made / "run.py")
        carried(made / "lib", options.pythons)
        terminal.say("lib: what a bare machine lacks")
        tables(made / "tables", options.levels, options.batch, options.only, options.size)
        models.put(made / "models", denoisers, options.levels, options.jobs)
        terminal.say("models: whole denoisers")
        bits(made / "bits", options.levels, tuple(options.tests), options.jobs)
        made.rename(folder)
    size = packed(folder)
    print(f"{folder}: {size / 1e6:.1f} MB packed, {len(list((folder / 'bits').glob('*.json')))} libraries of step 1")
    if size > MOST:
        raise UserError(f"{folder} is more than the {MOST / 1e6:.0f} MB that a kit may be: build it of fewer levels")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_kit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--build", type=Path, metavar="DIR", required=True, help="the folder to build")
    parser.add_argument("--levels", type=int, nargs="*", default=[90], help="compute capabilities of the machine (90)")
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 2], help="batch sizes of step 3 (1 2)")
    parser.add_argument("--only", default="", help="of step 3: cases whose names contain this")
    parser.add_argument("--size", type=float, default=1, help="scales the shapes of step 3 (1)")
    parser.add_argument("--models", nargs="*", default=["fashion-unet"], metavar="MODEL[=NAME:ARTIFACT]",
                        help="of step 5: bundled models, or shapes with their artifact (fashion-unet)")  # fmt: skip
    parser.add_argument("--tests", nargs="*", default=list(TESTS), help="of step 1: suites of tests/backends/cuda")
    parser.add_argument("--pythons", nargs="*", choices=PYTHONS, default=list(PYTHONS), help="of the machine (both)")
    parser.add_argument("--jobs", type=int, default=2, help="processes (2)")
    UserError.command_line = True
    try:
        build(parser.parse_args())
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
