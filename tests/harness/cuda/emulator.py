"""CUDA kernels on the CPU: their source as TVM writes it, compiled for the emulator of emulator.h.

TVM's own CUDA runtime launches them, in a process of its own, on a driver that is none (driver.c). What kernels call is
compiled once (emulator.cpp).
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import re
import subprocess
import tempfile
from pathlib import Path

import pytest
from safetensors.numpy import load

from mpq_compiler.backends.tvm.compile.objects import KIND
from mpq_compiler.backends.tvm.toolchain import machine_code
from mpq_compiler.support import cache as caches
from tests.harness.cuda import silicon

HERE = Path(__file__).parent
CACHE = Path(tempfile.gettempdir(), f"mpq-emulator-{os.getuid()}")
_HELPER = re.compile(
    r"__forceinline__ __device__ (?:void|unsigned int|uint32_t|float) "
    r"(tvm_builtin\w+|mpq_\w+)\(([^)]*)\) \{\n.*?\n\}\n",
    re.S,
)
_KERNEL = re.compile(r'extern "C" __global__ void __launch_bounds__\(\d+(?:, \d+)?\) (\w+)\(([^)]*)\) \{')


def missing() -> str | None:
    """Why nothing can be emulated here; None where it can."""
    return None if platform.machine() == "x86_64" else "the emulator's fibers are written for x86-64"


def translated(source: str) -> str:
    """The CUDA source as C++ for the host: kernels as they are, what stands for instructions by the emulator's."""
    begins = [at for mark in ("__forceinline__ __device__", 'extern "C" __global__') if (at := source.find(mark)) >= 0]
    text = _HELPER.sub(_helper, source[min(begins) :])
    asked = rf"alignas(\1) static {SECTION} \2 \3[{SHARED}];"
    text = re.sub(r"extern __shared__ __align__\((\d+)\) (\w+) (\w+)\[\];", asked, text)
    text = re.sub(r"__shared__ (alignas\(\d+\))", rf"\1 static {SECTION}", text)
    launches = []
    for match in _KERNEL.finditer(text):
        name, parameters = match.groups()
        types = [p.replace("__restrict__", "").rsplit(" ", 1)[0].strip() for p in parameters.split(",")]
        given = ", ".join(f"*({kind} *)given[{i}]" for i, kind in enumerate(types))
        following = _KERNEL.search(text, match.end())
        body = text[match.end() : following.start() if following else None]
        fibers = str("sync" in body or "mma" in body).lower()
        launches.append(
            f"static void launch_{name}(const unsigned *grid, unsigned threads, void **given) {{\n"
            f"  emulator::launch([](void **given) {{ {name}({given}); }}, grid, threads, given, {fibers});\n}}\n"
            f'extern "C" const emulator::Kernel kernel_{name} = {{launch_{name}, {len(types)}}};\n'
        )
    return "".join(['#include "emulator.h"\n', text, *launches])


def _helper(match: re.Match[str]) -> str:
    """A function that stands for an instruction."""
    name, parameters = match.groups()
    own = [p.strip().rsplit(" ", 1)[-1].lstrip("*&") for p in parameters.split(",") if p.strip()]
    arguments = ", ".join(own)
    if "cvta_generic_to_shared" in name:
        return ""
    if name.startswith("mpq_copy_or_fill"):
        size, (target, source, word, inside, count) = name.rsplit("_", 1)[1], own
        address = f"tvm_builtin_cuda_cvta_generic_to_shared({target})"
        body = f"emulator::copy_or_fill({size}, {address}, {source}, {word}, {inside}, {count});"
    elif name.startswith("mpq_settled_"):
        return f"static inline {name.removeprefix('mpq_settled_')} {name}({parameters}) {{ return x; }}\n"
    elif name == "mpq_exp2":
        return f"static inline float {name}({parameters}) {{ return emulator::exp2(x); }}\n"
    elif "wgmma" in name and "s32_s8_u8" in name:
        sums = ", ".join(f"&{own_name}" for own_name in own[:-6])
        body = f"emulator::wgmma_s8_u8({{{sums}}}, {', '.join(own[-6:])});"
    elif "wgmma" in name and "f32_bf16_bf16" in name:
        sums = ", ".join(f"&{own_name}" for own_name in own[:-6])
        turned = str(name.endswith("_1_1_1")).lower()
        body = f"emulator::wgmma_bf16({{{sums}}}, {', '.join(own[-6:])}, {turned});"
    elif "wgmma_fence" in name:
        body = "emulator::wgmma_fence();"
    elif "wgmma_commit" in name:
        body = "emulator::wgmma_commit();"
    elif "wgmma_wait" in name:
        body = f"emulator::wgmma_wait({name.rsplit('_', 1)[1]});"
    elif "fence_proxy_proxy_async" in name:
        body = "emulator::fence_async();"
    elif "mma" in name and "m16n8k32" in name and "u8_s8" in name:
        body = f"emulator::mma_u8_s8({arguments});"
    elif "mma" in name and "m16n8k16" in name and "f32_bf16_bf16_f32" in name:
        body = f"emulator::mma_bf16({arguments});"
    elif "cvt" in name and "rn_bf16x2_f32" in name:
        body = f"emulator::cvt_bf16x2({arguments});"
    elif "cvt" in name and "rn_satfinite_f16x2_f32" in name:
        body = f"emulator::cvt_f16x2({arguments});"
    elif "ldmatrix" in name and "x4" in name:
        body = f"emulator::ldmatrix_x4{'_trans' if 'trans' in name else ''}({arguments});"
    elif "commit_group" in name:
        body = "emulator::commit();"
    elif "wait_group" in name:
        body = f"emulator::wait_group({name.rsplit('_', 1)[1]});"
    elif "cp_async" in name:
        size = name.rsplit("_", 1)[1]
        body = f"emulator::copy_async({size}, {own[0]}, {own[1]}, {own[2] if len(own) > 2 else size});"
    elif "cta_sync" in name:
        body = "emulator::barrier();"
    else:
        raise NotImplementedError(f"the emulator knows no {name}")
    return f"static inline void {name}({parameters}) {{ {body} }}\n"


SECTION = '__attribute__((section("mpq_shared,\\"aw\\",@nobits#")))'
"""Where shared memory is, as emulator.cpp finds it; it takes no room in a file."""
SHARED = 227 << 10
"""Bytes that a block may ask for when it is launched."""
FLAGS = ("-fPIC", "-w", "-std=c++20", "-ffp-contract=off", "-fno-strict-aliasing", f"-I{HERE}")


def compiled(source: str) -> bytes:
    """The emulated kernels of a CUDA source, as a library."""
    text = translated(source)
    path = CACHE / f"{version()}-{_digest(text.encode())}.so"
    if not path.is_file():
        operations = CACHE / f"{version()}.o"
        if not operations.is_file():
            _make(operations, "g++", *FLAGS, "-O2", "-c", HERE / "emulator.cpp")
        # not optimized: kernels run a few times at most, and take as long to compile
        source = path.with_suffix(f".{os.getpid()}.o")
        _make(source, "g++", *FLAGS, "-fsanitize=thread", "-c", "-x", "c++", "-", text=text)
        _make(path, "g++", "-shared", source, operations)
        source.unlink()
    return path.read_bytes()


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _make(path: Path, *command: str | Path, text: str | None = None) -> None:
    """Runs a compiler whose result is there as a whole or not at all. text: what it reads."""
    path.parent.mkdir(exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    done = subprocess.run([*command, "-o", partial], input=text, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    os.replace(partial, path)


@functools.cache
def driver(release: int = 13) -> Path:
    """The folder of libcuda and libcudart, of a release of CUDA."""
    source, cudart = HERE / "driver.c", f"libcudart.so.{release}"
    folder = CACHE / f"driver-{_digest(source.read_bytes())}-{release}"
    if not (folder / cudart).is_file():
        folder.mkdir(parents=True, exist_ok=True)
        version = folder / "version"
        version.write_text(f"{cudart} {{ global: cuda*; }};\n")
        for name in ("libcuda.so.1", cudart):
            link = (f"-Wl,-soname,{name}", f"-Wl,--version-script={version}")
            _make(folder / name, "gcc", "-O1", "-shared", "-fPIC", *link, source, "-ldl")
    return folder


@functools.cache
def version() -> str:
    """Changes with the emulator."""
    return _digest(b"".join(Path(HERE, f"emulator.{kind}").read_bytes() for kind in ("h", "cpp", "py")))


def code_of(module: Path) -> bytes:
    """The machine code in the bytes of a module for the runtime, which begin with its kind and end with it."""
    data = module.read_bytes()
    begin = {b"fatbin": b"\x50\xed\x55\xba", b"cubin": b"\x7fELF"}[data[8 : 8 + data[0]]]
    return data[data.rindex(begin) :]


def modules(cache: Path) -> list[Path]:
    """The kernels' modules that a compilation has left in its cache, unpacked, with their sources beside them."""
    unpacked, found = cache / "unpacked", []
    unpacked.mkdir(exist_ok=True)
    for file in sorted(path for path in (cache / KIND).iterdir() if path.is_file()):
        content = caches.read(file)
        assert content is not None
        for suffix, data in load(content).items():
            (unpacked / f"{file.name}{suffix}").write_bytes(data.tobytes())
        found.append(unpacked / f"{file.name}{machine_code.DEVICE}")
    return found


def emulate(cache: Path, folder: Path) -> None:
    """Fills a folder for MPQ_EMULATED: emulated kernels for all that a compilation has left in its cache."""
    for module in modules(cache):
        code = code_of(module)
        source = module.with_suffix(machine_code.SOURCE).read_text()
        (folder / f"{_fnv1a(code):016x}.so").write_bytes(compiled(source))


def _fnv1a(data: bytes) -> int:
    """As in driver.c."""
    found = 0xCBF29CE484222325
    for byte in data:
        found = (found ^ byte) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return found


def environment(release: int = 13, **variables: str) -> dict[str, str]:
    """Of a process in which TVM's CUDA runtime finds the driver, with a runtime of that release of CUDA alone."""
    emulated = {"LD_LIBRARY_PATH": str(driver(release)), "MPQ_EMULATED_DRIVER": {12: "12060", 13: "13000"}[release]}
    return {**os.environ, **emulated, **variables}


def needs() -> None:
    """Skips a test of what only the emulator knows, where nothing can be emulated or a GPU is asked for."""
    if silicon.asked():
        pytest.skip("for the emulator alone, and --gpu asks for a GPU")
    if reason := missing():
        pytest.skip(reason)
