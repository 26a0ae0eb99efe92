"""TVM's small runtime for an architecture: its two libraries, licences and notices, taken from its wheels."""

from __future__ import annotations

import importlib.metadata
import platform
import zipfile
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

from mpq_compiler.support.errors import UserError
from mpq_compiler.targets.table import Target

WANTED = {
    "apache-tvm": ("tvm/lib/libtvm_runtime.so", "tvm/NOTICE", "*/licenses/LICENSE", "*/LICENSE.builtin_fp16.txt"),
    "apache-tvm-ffi": ("tvm_ffi/lib/libtvm_ffi.so", "*/licenses/LICENSE", "*/licenses/NOTICE"),
}
"""The files taken from each wheel, as patterns of their paths."""


def files(target: Target, folder: Path | None = None) -> dict[str, bytes]:
    """The runtime's files, about 5 MB, by their names in an artifact.

    Args:
        target: its architecture decides the wheels.
        folder: holds the wheels; None takes the installed packages.

    Raises:
        UserError: there are no wheels of this version of TVM for the architecture.
    """
    found: dict[str, bytes] = {}
    for package, patterns in WANTED.items():
        names, read = _wheel(package, target, folder)
        for pattern in patterns:
            name = next((name for name in names if fnmatch(name, pattern)), None)
            if name is None:
                raise UserError(f"{package} has no {pattern}: install the wheel of PyPI")
            short = Path(name).name
            found[short if short.endswith(".so") else f"{package}-{short}"] = read(name)
    return found


def _wheel(package: str, target: Target, folder: Path | None) -> tuple[list[str], Callable[[str], bytes]]:
    """The names of a wheel's files, and a function that reads one of them."""
    version = importlib.metadata.version(package)
    if folder is None and platform.machine() == target.arch:
        installed = importlib.metadata.distribution(package)
        names = [str(file) for file in installed.files or ()]
        return names, lambda name: Path(str(installed.locate_file(name))).read_bytes()
    wheel = f"{package.replace('-', '_')}-{version}-*{target.arch}.whl"
    if folder and (paths := sorted(folder.glob(wheel))):
        archive = zipfile.ZipFile(paths[0])
        return archive.namelist(), archive.read
    get = " ".join(f"{name}=={importlib.metadata.version(name)}" for name in WANTED)
    raise UserError(
        f"there is no {wheel}{f' in {folder}' if folder else ''}: get TVM's runtime for {target.arch} by `pip download "
        f"--no-deps --only-binary=:all: --platform manylinux_2_28_{target.arch} -d wheels {get}`, and add "
        "--wheels wheels"
    )
