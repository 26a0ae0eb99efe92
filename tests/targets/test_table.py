from __future__ import annotations

import dataclasses
import json
import platform
import re
import subprocess
import sys

import pytest

from mpq_compiler.cli import mpqc
from mpq_compiler.support.errors import UserError
from mpq_compiler.targets import nvidia, streaming, tiles
from mpq_compiler.targets import table as targets
from tests.harness.tree import ROOT

ARM = ("aarch64-neon", "aarch64-dotprod", "aarch64-i8mm")
NAMES = [
    *("x86-64-avx2", "x86-64-avxvnni", "x86-64-avx512", "x86-64-avx512vnni", "x86-64-amx"),
    *ARM,
    "aarch64-sme2",
    *("cuda-sm80", "cuda-sm87", "cuda-sm89", "cuda-sm90", "cuda-sm100", "cuda-sm110", "cuda-sm120", "cuda-sm121"),
    *("cuda-sm90-aarch64", "cuda", "cuda-aarch64"),
    *("cuda12-sm80", "cuda12-sm87", "cuda12-sm89", "cuda12-sm90", "onnx", "reference"),
]


@pytest.fixture
def host(monkeypatch):
    """Pretends to be a machine of the given architecture whose CPU has the given flags."""

    def pretend(machine: str, flags: tuple[str, ...], refusal: str | None = None) -> None:
        monkeypatch.setattr(platform, "machine", lambda: machine)
        monkeypatch.setattr(targets, "host_features", lambda: frozenset(flags))
        monkeypatch.setattr(tiles, "refusal", lambda: refusal)
        monkeypatch.setattr(streaming, "refusal", lambda: refusal)

    return pretend


def test_the_table_holds_every_documented_name():
    assert list(targets.TARGETS) == NAMES


def test_what_never_ran_on_silicon_says_so():
    said = {name for name, target in targets.TARGETS.items() if "never on silicon" in target.status}
    assert said == {n for n in NAMES if n.startswith(("aarch64", "cuda")) and n != "cuda-sm90"}


def test_a_gpu_has_the_processor_that_is_beside_it():
    beside_arm = {name for name, target in targets.TARGETS.items() if target.is_cuda and target.arch == "aarch64"}
    jetsons = {"cuda-sm87", "cuda12-sm87", "cuda-sm110", "cuda-sm121"}
    assert beside_arm == {*jetsons, "cuda-sm90-aarch64", "cuda-aarch64"}


@pytest.mark.parametrize(
    ("code", "level", "runs"),
    [
        ([80], 80, True), ([80], 86, True), ([80, 89], 89, True), ([87], 86, False), ([80], 90, False),
        ([90], 89, False), ([80, 87], 87, True), ([80], 87, False), ([87], 89, False),
        ([100], 103, True), ([120], 121, True), ([100], 110, False), ([110], 120, False), ([121], 120, False),
    ],
)  # fmt: skip
def test_machine_code_runs_within_its_generation(code, level, runs):
    assert nvidia.runs(code, level) == runs


def test_a_gpu_is_asked_for_by_what_there_is_code_for(monkeypatch):
    target = targets.TARGETS["cuda"]
    monkeypatch.setattr(platform, "machine", lambda: target.arch)
    second = "(it has sm_75 and sm_86, and the first is used: choose by CUDA_VISIBLE_DEVICES)"
    monkeypatch.setattr(nvidia, "driver_version", lambda: 13010)
    for levels, lacking in (((), "or sm_90"), ((75,), "or sm_90 (it has sm_75)"), ((86, 75), None), ((75, 86), second)):
        monkeypatch.setattr(nvidia, "levels", lambda levels=levels: levels)
        found = targets.missing_features(target)
        assert bool(found) == (lacking is not None)
        assert not found or found[0].endswith(lacking)
    monkeypatch.setattr(nvidia, "levels", lambda: (86,))
    monkeypatch.setattr(nvidia, "driver_version", lambda: 12060)
    assert targets.missing_features(target) == ["an NVIDIA driver of CUDA 13.0 (it has 12.6)"]
    assert targets.missing(target.arch, target.features, cuda=12060) == []


@pytest.mark.parametrize(
    ("machine", "best"),
    [
        ("x86_64", "x86-64-avx2"),
        ("x86_64", "x86-64-avxvnni"),
        ("x86_64", "x86-64-avx512vnni"),
        ("x86_64", "x86-64-amx"),
        *(("aarch64", name) for name in ARM),
    ],
)
def test_native_is_the_best_this_cpu_has(host, machine, best):
    host(machine, targets.TARGETS[best].features)
    assert targets.resolve("native").name == best


@pytest.mark.parametrize(
    ("machine", "name", "other", "refusal", "lacking"),
    [
        (
            *("x86_64", "x86-64-amx", "x86-64-avx512vnni", "Operation not supported"),
            "the system's permission for tiles (Operation not supported)",
        ),
        (
            *("aarch64", "aarch64-sme2", "aarch64-i8mm", "the longest that it gives are of 256"),
            "streaming vectors of 512 bits (the longest that it gives are of 256)",
        ),
    ],
)
def test_matrix_engines_take_the_permission_of_the_system(host, machine, name, other, refusal, lacking):
    features = targets.TARGETS[name].features
    host(machine, features)
    targets.require_runnable(targets.TARGETS[name])
    host(machine, features, refusal)
    with pytest.raises(UserError, match=re.escape(f"lacks {lacking}")):
        targets.require_runnable(targets.TARGETS[name])
    targets.require_runnable(targets.TARGETS[other])
    assert targets.resolve("native").name == other


@pytest.mark.skipif(platform.machine() != "x86_64", reason="another architecture")
def test_the_system_is_asked_for_tiles():
    """In a process of its own, since nobody takes a permission back: it agrees with what the CPU says that it has."""
    code = "import os; from mpq_compiler.targets import tiles; print(tiles.refusal())\n"
    code += "print(os.waitstatus_to_exitcode(os.waitpid(os.fork() or os._exit(tiles.refusal() is None), 0)[1]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    refusal, of_child = done.stdout.split("\n")[:2]
    assert (refusal == "None") == (tiles.FEATURE in targets.host_features()) == (of_child == "1")


def test_native_on_an_older_cpu_names_the_way_out(host):
    host("x86_64", ("sse4_2",))
    with pytest.raises(UserError, match=r"AVX2.*target reference"):
        targets.resolve("native")


def test_unknown_name_suggests_the_nearest():
    with pytest.raises(UserError, match=r"no target 'x86-64-avx521': did you mean 'x86-64-avx512'\?"):
        targets.resolve("x86-64-avx521")
    with pytest.raises(UserError, match="did you mean 'native'"):
        targets.resolve("natve")


def test_missing_features_are_named(host):
    v3 = targets.TARGETS["x86-64-avx2"].features
    host("x86_64", v3)
    targets.require_runnable(targets.TARGETS["x86-64-avx2"])
    targets.require_runnable(targets.TARGETS["reference"])
    with pytest.raises(UserError, match=r"lacks avx512f, avx512bw, .*avx512_vnni"):
        targets.require_runnable(targets.TARGETS["x86-64-avx512vnni"])
    assert targets.missing_features(targets.TARGETS["aarch64-dotprod"]) == ["an aarch64 CPU"]


def test_flags_are_those_of_every_core():
    little_big = "processor : 0\nFeatures : fp asimd\n\nprocessor : 1\nFeatures : fp asimd asimddp\n"
    assert targets._common_flags(little_big) == {"fp", "asimd"}
    assert targets._common_flags("flags\t\t: fpu avx2\n") == {"fpu", "avx2"}
    assert targets._common_flags("") == frozenset()


def test_targets_are_values():
    target = targets.TARGETS["x86-64-avx2"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        target.name = "other"
    assert len({*targets.TARGETS.values()}) == len(NAMES)


def test_no_torch_and_no_tvm():
    code = "import sys, mpq_compiler.targets.table; print({'torch', 'tvm', 'tvm_ffi'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_tvm_and_llvm_know_every_dictionary():
    """In a process of its own: LLVM aborts on what it does not know."""
    pytest.importorskip("tvm")
    code = (
        "from tvm.target import Target; from mpq_compiler.targets.table import TARGETS\n"
        "for t in TARGETS.values():\n"
        "    if t.tvm: print(Target(dict(t.tvm)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "not a recognized" not in done.stderr


def test_the_c_program_knows_every_feature():
    """It looks for features by the bits of the kernel's words; one without a bit would be lacking everywhere."""
    text = (ROOT / "backends" / "tvm" / "standalone" / "mpq_common.h").read_text(encoding="utf-8")
    asked = {feature for name in (*ARM, "aarch64-sme2") for feature in targets.TARGETS[name].features}
    assert asked and asked <= {*re.findall(r'\{"(\w+)", [\d+ ]+\}', text)}


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Puts a package on the path, as pip leaves it, with that text and these targets as entry points."""

    def install(name: str, text: str, **entries: str) -> None:
        (tmp_path / f"{name}.py").write_text(text)
        info = tmp_path / f"{name}-0.1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1\n")
        lines = "".join(f"{target} = {name}:{attribute}\n" for target, attribute in entries.items())
        (info / "entry_points.txt").write_text(f"[{targets.ENTRY_POINTS}]\n{lines}")
        monkeypatch.syspath_prepend(tmp_path)

    yield install
    sys.modules.pop("acme_board", None)


def test_a_package_brings_a_target(package):
    text = "from mpq_compiler.targets.table import Target\nBOARD = Target('board', 'any', 'acme', 'acme')\n"
    package("acme_board", text, board="BOARD", wrong="BOARD", absent="NONE", reference="BOARD")
    assert targets.names() == [*NAMES, "absent", "board", "wrong"]
    assert targets.resolve("board").backend == "acme"
    for name, said in (
        ("bord", "there is no target 'bord': did you mean 'board'"),
        ("wrong", "target 'wrong' (acme_board:BOARD) is no instance of Target with that name"),
        ("absent", "target 'absent' (acme_board:NONE) fails to import"),
        ("reference", "target 'reference' is defined more than once (acme_board:BOARD)"),
    ):
        with pytest.raises(UserError) as caught:
            targets.resolve(name)
        assert said in str(caught.value)


def test_targets_of_packages_are_listed_and_a_broken_one_stops_no_other(package, capsys):
    text = "from mpq_compiler.targets.table import Target\nBOARD = Target('board', 'any', 'acme', 'acme')\n"
    package("acme_board", text, board="BOARD", absent="NONE")
    assert mpqc.main(["targets", "--json", "-"]) == 0
    captured = capsys.readouterr()
    assert [row["name"] for row in json.loads(captured.out)] == [*NAMES, "board"]
    assert "fails to import" in captured.err
