"""Compiles CUDA C++ to machine code for drivers of CUDA 12, by NVRTC, NVIDIA's compiler library of that release.

The wheels' nvcc is of CUDA 13, and a driver of CUDA 12 need not load the code of a later major release.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
from typing import Any

from mpq_compiler.support.errors import UserError
from mpq_compiler.targets import nvidia

OPTIONS = ("-std=c++17", "--fmad=false", "-diag-suppress=177,550")
"""The compiler's options: IEEE arithmetic (no --use_fast_math), and only the multiply-adds that the source asks for."""

_HALF = "cuda_runtime/include/cuda_fp16.h"
"""The only header of CUDA that kernels include, by its place in NVIDIA's wheels."""

# What TVM's source asks of CCCL, another wheel: types by their names. No kernel uses those that are declared only, and
# one that did would not compile.
_HEADERS = {
    "cuda/std/cstdint": """
namespace cuda { namespace std {
typedef signed char int8_t; typedef short int16_t; typedef int int32_t; typedef long int64_t;
typedef unsigned char uint8_t; typedef unsigned short uint16_t; typedef unsigned uint32_t;
typedef unsigned long uint64_t;
} }
""",
    "cuda/std/type_traits": """
namespace cuda { namespace std {
template <class T, class U> struct is_same { static constexpr bool value = false; };
template <class T> struct is_same<T, T> { static constexpr bool value = true; };
template <class T, class U> constexpr bool is_same_v = is_same<T, U>::value;
template <class T> struct is_integral;
template <class T> struct is_signed;
template <class T> struct is_unsigned;
template <class T> struct is_floating_point;
template <bool b, class T = void> struct enable_if;
template <bool b, class T, class U> struct conditional;
} }
""",
}


@functools.cache
def library() -> ctypes.CDLL:
    """Loads NVRTC, once. UserError: it is not installed, or CUDA's headers are not."""
    found, header = nvidia.from_wheels("cuda_nvrtc/lib/libnvrtc.so.12"), nvidia.from_wheels(_HALF)
    if not found or not header:
        raise UserError(
            "NVRTC of CUDA 12.6 is not installed, which compiles kernels for drivers of CUDA 12: "
            "pip install 'mpq-compiler[cuda12]'"
        )
    return ctypes.CDLL(str(found))


def version() -> str:
    """The versions of NVRTC and of CUDA's headers, for the keys of the cache."""
    return " ".join(map(importlib.metadata.version, ("nvidia-cuda-nvrtc-cu12", "nvidia-cuda-runtime-cu12")))


def cubin(source: str, architecture: str) -> bytes:
    """Compiles CUDA source to machine code for one architecture, such as "87".

    Raises:
        UserError: NVRTC is not installed.
        RuntimeError: it refuses the source.
    """
    nvrtc, header = library(), nvidia.from_wheels(_HALF)
    assert header
    program = ctypes.c_void_p()
    names, texts = _strings(_HEADERS), _strings(_HEADERS.values())
    _require(nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernels.cu", len(names), texts, names))
    try:
        options = _strings([*OPTIONS, f"-arch=sm_{architecture}", f"-I{header.parent}"])
        if nvrtc.nvrtcCompileProgram(program, len(options), options):
            log = _read(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program).decode(errors="replace")
            lines = [line for line in log.splitlines() if "error" in line.lower()] or ["it says nothing"]
            raise RuntimeError(f"NVRTC refuses a kernel: {lines[0].strip()}")
        return _read(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program)
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _read(size_of: Any, read: Any, program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    _require(size_of(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _require(read(program, buffer))
    return buffer.raw


def _strings(texts: Any) -> Any:
    encoded = [text.encode() for text in texts]
    return (ctypes.c_char_p * len(encoded))(*encoded)


def _require(code: int) -> None:
    if code:
        raise RuntimeError(f"NVRTC fails with code {code}")
