"""The table of targets: what each can do, which CPU features it needs, and which of them this machine has.

Nothing here imports torch or TVM: the runtime reads the table on devices that have neither.
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mpq_compiler.support import plugins
from mpq_compiler.support.errors import UserError, nearest
from mpq_compiler.targets import nvidia, streaming, tiles
from mpq_compiler.targets.numerics import BF16, F16, INT8, features_of

# Flags as /proc/cpuinfo spells them. LLVM may use every instruction of the level named by `mcpu`, not only
# those our kernels ask for, so a target needs the whole level (x86-64 psABI).
_X86_64_V3 = (
    *("cx16", "lahf_lm", "popcnt", "pni", "ssse3", "sse4_1", "sse4_2"),
    *("avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"),
)
_X86_64_V4 = (*_X86_64_V3, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl")
_ARMV8 = ("fp", "asimd")
# What LLVM assumes of cortex-a55 beyond the base level: half-precision arithmetic, dot products, v8.1 atomics
# and rounding multiplies, CRC, weakly ordered loads (the cryptography extension is switched off below).
_ARMV8_2 = (*_ARMV8, "asimdhp", "fphp", "asimddp", "atomics", "asimdrdm", "crc32", "lrcpc")


@dataclass(frozen=True)
class Target:
    """One row of the table.

    Attributes:
        arch: the host's machine, as `platform.machine()` spells it ("x86_64", "aarch64"), or "any".
        isa: the instruction family by which kernel templates choose their inner loop.
        backend: the backend that builds for it: "tvm", "reference", "onnx", or that of an installed package.
        features: the /proc/cpuinfo flags without which its kernels would end in an illegal instruction. A GPU target
            lists the compute capabilities that it has code for; a GPU needs one of them (`nvidia`).
        tvm: the dictionary for `tvm.target.Target`; empty where TVM takes no part.
        status: where its kernels have run, if not on silicon.
        numerics: besides float32, of its attentions, float layers and what lies between kernels, under ``--numerics
            fast`` (`targets.numerics`).
        cuda: the oldest release of CUDA that the GPU's driver may support, as drivers count: 12060 for 12.6.
    """

    name: str
    arch: str
    isa: str
    backend: str
    features: tuple[str, ...] = ()
    tvm: Mapping[str, Any] = field(default_factory=dict, hash=False)
    status: str = ""
    numerics: tuple[str, ...] = ()
    cuda: int = 0

    @property
    def is_cuda(self) -> bool:
        """Whether its kernels run on an NVIDIA GPU."""
        return self.isa == "cuda"

    @property
    def is_cuda12(self) -> bool:
        """Whether drivers of CUDA 12 run it: code of that compiler, and TVM's runtime through `bundle.CUDART`."""
        return self.is_cuda and self.cuda < nvidia.CUDA_13

    @property
    def levels(self) -> list[int]:
        """The compute capabilities that it has code for, times 10; none on a CPU."""
        return nvidia.stated(self.features)

    @property
    def host(self) -> Mapping[str, Any]:
        """The dictionary for `tvm.target.Target` of its code on the CPU: all of it, or what launches the kernels."""
        return _HOSTS[self.arch] if self.is_cuda else self.tvm


_ATTRIBUTES = {"avx512_bf16": "+avx512bf16", "avx512_vnni": "+avx512vnni", "bf16": "+bf16"}
"""LLVM's names of the features that kernels may need beyond their target's, by their names in /proc/cpuinfo."""


def with_features(target: Target, features: Iterable[str]) -> Target:
    """The target restricted to CPUs that also have these features (`numerics.features_of`)."""
    added = tuple(f for f in features if f not in target.features)
    if not added:
        return target
    attributes = [*target.tvm.get("mattr", ()), *(_ATTRIBUTES[f] for f in added)]
    return replace(target, features=(*target.features, *added), tvm={**target.tvm, "mattr": attributes})


# Kernels are written in vectors. LLVM 22's own loop vectoriser adds nothing to them, and turns a load at
# c * 16 + v % 16 in a loop over v into a contiguous one, with wrong values and reads out of bounds.
_LLVM: dict[str, Any] = {"kind": "llvm", "cl-opt": ["-vectorize-loops=false"]}


def _x86(
    name: str,
    isa: str,
    mcpu: str,
    mattr: list[str],
    features: tuple[str, ...],
    numerics: tuple[str, ...] = (),
    status: str = "",
) -> Target:
    options: dict[str, Any] = {**_LLVM, "mtriple": "x86_64-linux-gnu", "mcpu": mcpu}
    if mattr:
        options["mattr"] = mattr
    return Target(name, "x86_64", isa, "tvm", features, options, status, numerics)


def _arm(
    name: str, isa: str, mcpu: str, mattr: list[str], features: tuple[str, ...], numerics: tuple[str, ...] = ()
) -> Target:
    """A target of AArch64, whose code is scheduled for in-order cores, since the others reorder it themselves.

    Loads are not paired: a pair takes an in-order core as long as six single loads, the others as long as two.
    """
    options: dict[str, Any] = {**_LLVM, "mtriple": "aarch64-linux-gnu", "mattr": [*mattr, "+disable-ldp"]}
    if mcpu:
        options |= {"mcpu": mcpu, "mattr": [*options["mattr"], "-aes", "-sha2"]}
    return Target(name, "aarch64", isa, "tvm", features, options, "run under qemu, never on silicon", numerics)


_HOSTS: dict[str, dict[str, Any]] = {
    "x86_64": {**_LLVM, "mtriple": "x86_64-linux-gnu", "mcpu": "x86-64"},
    "aarch64": {**_LLVM, "mtriple": "aarch64-linux-gnu"},
}
"""TVM's targets of the host's code, which launches kernels on a GPU: any CPU of the architecture runs it."""


def _cuda(name: str, arch: str, *levels: int, release: int = nvidia.CUDA_13) -> Target:
    """A target for GPUs of these levels.

    The source of the kernels is the same for all levels and releases of CUDA, since tensor cores multiply integers
    alike; Hopper's alone differ.
    """
    options = {"kind": "cuda", "arch": f"sm_{levels[0]}"}
    features = tuple(map(nvidia.feature, levels))
    on_silicon = (name, release) == (f"cuda-sm{nvidia.HOPPER}", nvidia.CUDA_13)
    status = "run on an H200" if on_silicon else "run on an emulator, never on silicon"
    return Target(name, arch, "cuda", "tvm", features, options, status, (BF16, F16), release)


def _single(name: str, *levels: int, release: int = nvidia.CUDA_13) -> Iterator[Target]:
    """One target for each level, with the CPU that is beside it in most machines."""
    for level in levels:
        yield _cuda(f"{name}-sm{level}", "aarch64" if level in _BESIDE_ARM else "x86_64", level, release=release)


_BESIDE_ARM = (87, 110, 121)
"""The levels of Jetson Orin, of Jetson Thor and of DGX Spark."""


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        _x86("x86-64-avx2", "avx2", "x86-64-v3", [], _X86_64_V3),
        _x86("x86-64-avxvnni", "avxvnni", "x86-64-v3", ["+avxvnni"], (*_X86_64_V3, "avx_vnni"), numerics=(INT8,)),
        _x86("x86-64-avx512", "avx512", "x86-64-v4", [], _X86_64_V4, numerics=(BF16,)),
        # x86-64-v4 has no VNNI of its own: without the attribute LLVM cannot select vpdpbusd and aborts.
        _x86(
            *("x86-64-avx512vnni", "avx512vnni", "x86-64-v4", ["+avx512vnni"]),
            (*_X86_64_V4, "avx512_vnni"),
            numerics=(BF16, INT8),
        ),
        _x86(
            *("x86-64-amx", "amx", "x86-64-v4", ["+avx512vnni", "+amx-tile", "+amx-int8", "+amx-bf16"]),
            (*_X86_64_V4, "avx512_vnni", "amx_tile", "amx_int8", "amx_bf16"),
            numerics=(BF16, INT8),
        ),
        _arm("aarch64-neon", "neon", "cortex-a53", ["+neon", "-crc"], _ARMV8),
        _arm("aarch64-dotprod", "dotprod", "cortex-a55", ["+neon", "+dotprod"], _ARMV8_2, (INT8,)),
        _arm("aarch64-i8mm", "i8mm", "", ["+neon", "+dotprod", "+i8mm"], (*_ARMV8, "asimddp", "i8mm"), (BF16, INT8)),
        _arm(
            *("aarch64-sme2", "sme2", "", ["+neon", "+dotprod", "+i8mm", "+sme2"]),
            (*_ARMV8, "asimddp", "i8mm", "bf16", "sme", "sme2", "smei8i32"),
            (BF16, INT8),
        ),
        *_single("cuda", 80, 87, 89, 90, 100, 110, 120, 121),
        _cuda("cuda-sm90-aarch64", "aarch64", 90),
        _cuda("cuda", "x86_64", 80, 87, 89, 90),
        _cuda("cuda-aarch64", "aarch64", 80, 87, 89, 90),
        *_single("cuda12", 80, 87, 89, 90, release=12060),
        Target("onnx", "any", "onnx", "onnx"),
        Target("reference", "any", "reference", "reference"),
    )
}

# What `native` means, best first. Not yet with outer products, whose kernels no CPU that has them has run.
_NATIVE = (
    *("x86-64-amx", "x86-64-avx512vnni", "x86-64-avxvnni", "x86-64-avx512", "x86-64-avx2"),
    *("aarch64-i8mm", "aarch64-dotprod", "aarch64-neon"),
)


ENTRY_POINTS = "mpq_compiler.targets"
"""Targets of installed packages; the built-in ones are rows of `TARGETS`, which need no import."""


def names() -> list[str]:
    """The built-in names, then those of installed packages, each once."""
    return list(dict.fromkeys([*TARGETS, *(entry.name for entry in plugins.of(ENTRY_POINTS))]))


def resolve(name: str) -> Target:
    """The target called `name`; `native` is the best one whose features this CPU has.

    UserError: an unknown name, one that is defined twice, a package that fails to import; `native` on a CPU that no
    target covers.
    """
    if name != "native":
        return _find(name)
    for candidate in _NATIVE:
        if not missing_features(TARGETS[candidate]):
            return TARGETS[candidate]
    raise UserError(
        f"no target fits this {platform.machine()} CPU (x86-64 needs AVX2): "
        "name one with --target, or use --target reference, which runs anywhere on torch"
    )


def _find(name: str) -> Target:
    """The target of that name: a built-in one, or that of an installed package."""
    entries = [entry for entry in plugins.of(ENTRY_POINTS) if entry.name == name]
    if len(entries) + (name in TARGETS) > 1:
        owners = ", ".join(entry.value for entry in entries)
        raise UserError(f"target '{name}' is defined more than once ({owners}); uninstall one of the packages")
    if name in TARGETS:
        return TARGETS[name]
    if not entries:
        raise UserError(f"there is no target '{name}': {nearest(name, ['native', *names()])}")
    try:
        target = entries[0].load()
    except Exception as error:
        raise UserError(f"target '{name}' ({entries[0].value}) fails to import: {error}") from error
    if not isinstance(target, Target) or target.name != name:
        raise UserError(f"target '{name}' ({entries[0].value}) is no instance of Target with that name")
    return target


def numerics_of(name: str) -> tuple[str, ...]:
    """The `Target.numerics` of a target; for `native` only those whose features this CPU has."""
    target = resolve(name)
    if name != "native":
        return target.numerics
    return tuple(kind for kind in target.numerics if not missing(target.arch, features_of(kind, target.arch)))


@functools.cache
def host_features() -> frozenset[str]:
    """The flags that every core of this machine has, as /proc/cpuinfo spells them; empty if unreadable."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return frozenset()
    return _common_flags(text)


def _common_flags(cpuinfo: str) -> frozenset[str]:
    """The flags that all listed processors share (cores of one chip can differ on AArch64)."""
    cores = [
        frozenset(value.split())
        for key, _, value in (line.partition(":") for line in cpuinfo.splitlines())
        if key.strip() in ("flags", "Features")
    ]
    return frozenset.intersection(*cores) if cores else frozenset()


def missing_features(target: Target) -> list[str]:
    """What this machine lacks to run `target`: CPU flags in the table's order, another architecture, or a driver."""
    return missing(target.arch, target.features, target.cuda)


def missing(arch: str, features: Iterable[str], cuda: int = 0) -> list[str]:
    """What this machine lacks to run code for an architecture, its features and a release of CUDA.

    Args:
        arch: "x86_64", "aarch64" or "any".
        features: CPU flags, or compute capabilities as `nvidia.feature` spells them, of which one is enough.
        cuda: the oldest release that the GPU's driver may support, as drivers count; 0 for any.
    """
    if arch not in ("any", platform.machine()):
        return [f"an {arch} CPU"]
    features = tuple(features)
    levels = nvidia.levels()
    if (code := nvidia.stated(features)) and not any(nvidia.runs(code, level) for level in levels[:1]):
        own = " and ".join(map(nvidia.feature, levels))
        if any(nvidia.runs(code, level) for level in levels):
            own += ", and the first is used: choose by CUDA_VISIBLE_DEVICES"
        wanted = " or ".join(map(nvidia.feature, code))
        return [f"an NVIDIA GPU that runs {wanted}" + (f" (it has {own})" if own else "")]
    if code and (version := nvidia.driver_version()) < cuda:
        return [f"an NVIDIA driver of CUDA {nvidia.spelled(cuda)} (it has {nvidia.spelled(version)})"]
    lacking = [flag for flag in features if not nvidia.stated([flag]) and flag not in host_features()]
    if not lacking and tiles.FEATURE in features and (reason := tiles.refusal()):
        lacking.append(f"the system's permission for tiles ({reason})")
    if not lacking and streaming.FEATURE in features and (reason := streaming.refusal()):
        lacking.append(f"streaming vectors of {8 * streaming.LENGTH} bits ({reason})")
    return lacking


def require_runnable(target: Target) -> None:
    """Raises a UserError that names what this machine lacks; running on would end in an illegal instruction."""
    require_host(target.name, target.arch, target.features)


def require_host(name: str, arch: str, features: Iterable[str]) -> None:
    """`require_runnable` for an artifact compiled for the target `name`, by what its manifest says it needs."""
    if lacking := missing(arch, features):
        raise UserError(
            f"this machine ({platform.machine()}) cannot run '{name}': it lacks {', '.join(lacking)}; "
            "run it on a machine that has all it needs, or compile with --target native"
        )
