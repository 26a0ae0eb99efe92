"""Measuring artifacts beside the float model: what is told, and what is refused."""

from __future__ import annotations

import json
import platform
import re
from pathlib import Path

import pytest

from mpq_compiler import schemas
from mpq_compiler.api import compile
from mpq_compiler.artifact import bundle
from mpq_compiler.bench import run, show, subject
from mpq_compiler.bench.rows import rows
from mpq_compiler.cli import mpqc
from mpq_compiler.latency import timing
from mpq_compiler.runtime import compiled_denoiser
from mpq_compiler.support import tensorfile
from mpq_compiler.support.errors import UserError
from mpq_compiler.targets import table as targets
from tests.harness import once, relax_artifact, tiny


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact of three operators, compiled for this machine."""
    path = tmp_path_factory.mktemp("bench") / "plain.mpq"
    relax_artifact.build(path)
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("pixart", tmp_path_factory.mktemp("bench") / "model")


@pytest.fixture(scope="module")
def interpreted(model: Path) -> Path:
    """An artifact of a tiny transformer for the interpreter."""
    calibration = model.parent / "inputs.safetensors"
    with calibration.open("wb") as stream:
        tensorfile.save(stream, {name: value.numpy() for name, value in tiny.inputs("pixart", batch=8).items()})
    options = {"recipe": "w8a8", "target": "reference", "calibration": calibration}
    return once.made("pixart-reference.mpq", lambda path: compile.compile(model, path, **options))


def checked(found: dict) -> dict:
    assert schemas.check(json.loads(json.dumps(found)), "bench") is None
    return found


def test_rows_ratios_and_their_spread(plain):
    found = checked(run.bench([plain], rounds=5, memory=False))
    assert [row["name"] for row in found["rows"]] == ["mpq", "mpq control"]
    ours = found["rows"][0]
    assert ours["ms_min"] <= ours["ms"] <= ours["ms_max"] and ours["ms"] == ours["cpu_ms"]
    low, high = ours["spread"]["mpq control"]
    assert 0 < low <= ours["speedup"]["mpq control"] <= high
    assert ours["bytes"] == compiled_denoiser.load(plain).manifest["weights"]["payload_bytes"]
    assert found["clock"] == "cpu" and found["cpu"] and found["kernels"] is None
    assert found["peak"]["gbytes"] > 0.1 and found["peak"]["gmacs"] > 0.1 and found["peak"]["float_gmacs"] > 0.1


def test_ratios_are_taken_within_rounds():
    times = {"a": timing.Times([1.0, 2.0, 4.0]), "b": timing.Times([3.0, 6.0, 8.0])}
    entries = [subject.Subject(name, lambda: None) for name in times]
    for each in times.values():
        each.wall.extend(each.cpu)
    first, second = rows(entries, times, "cpu", {}, {})
    assert first["speedup"] == {"b": 3.0} and second["speedup"]["a"] == pytest.approx(1 / 3)
    assert first["ms"] == 2000 and first["ms_max"] == 4000


def test_more_threads_go_by_the_wall(plain):
    found = checked(run.bench([plain], threads=2, batch=2, rounds=2, memory=False))
    assert (found["clock"], found["threads"], found["batch"]) == ("wall", 2, 2)
    assert found["rows"][0]["ms"] == found["rows"][0]["wall_ms"]


def test_several_artifacts_of_one_model(plain, tmp_path):
    other = tmp_path / "other.mpq"
    relax_artifact.build(other)
    found = checked(run.bench([plain, other], rounds=2, memory=False))
    assert [row["name"] for row in found["rows"]] == ["mpq", "mpq control", "mpq other"]


def test_rows_have_names_of_their_own():
    assert subject.names_of(["a.mpq", "b.mpq"]) == ["mpq", "mpq b"]
    assert subject.names_of(["a.mpq", "4/m.mpq", "8/m.mpq"]) == ["mpq", "mpq 4/m.mpq", "mpq 8/m.mpq"]
    assert subject.names_of(["a.mpq", "control.mpq", "a.mpq"]) == ["mpq", "mpq control.mpq", "mpq a"]
    with pytest.raises(UserError, match=r"'b\.mpq' is given twice; 'mpq control' is the first artifact once more"):
        subject.names_of(["a.mpq", "b.mpq", "b.mpq"])


def test_memory_is_that_of_a_process_of_its_own(plain):
    found = checked(run.bench([plain], rounds=1))
    ours, control = found["rows"]
    assert 10e6 < ours["peak_bytes"] < 500e6 and control["peak_bytes"] is None


def test_against_torch_and_onnxruntime(interpreted, model):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    found = checked(
        run.bench([interpreted], ["torch", "onnxruntime", "openvino-fp32"], str(model), rounds=2, memory=False)
    )
    names = [row["name"] for row in found["rows"]]
    names = [name for name in names if "bf16" not in name]
    assert names[:5] == ["mpq", "mpq control", "torch-fp32", "onnxruntime-fp32", "onnxruntime-int8"]
    torch_row = found["rows"][2]
    quality = {row["name"]: row["sqnr_db"] for row in found["rows"]}
    assert quality["torch-fp32"] > 120 and quality["onnxruntime-fp32"] > 80  # it is the reference, or computes the same
    # Without these instructions onnxruntime adds pairs of products in 16 bits, where they saturate.
    least = 15 if targets.host_features() & {"avx512_vnni", "avx_vnni"} else 10
    assert least < quality["onnxruntime-int8"] < 60 and quality["mpq"] > 10 and quality["mpq control"] is None
    assert torch_row["bytes"] == 4 * compiled_denoiser.load(interpreted).manifest["model"]["parameters"]
    assert {*torch_row["speedup"]} == {row["name"] for row in found["rows"]} - {"torch-fp32"}
    told = {name: reason for name, reason in found["skipped"].items() if "bf16" not in name}
    assert "openvino-fp32" in names or told == {"openvino-fp32": "openvino is not installed"}
    assert found["peak"]["gmacs"] is None and "another runtime" in found["peak"]["reason"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"against": ["tflite"]}, "against='tflite' is no peer: there is: onnxruntime, onnxruntime-fp32, "),
        ({"against": ["troch"]}, "did you mean 'torch'?"),
        ({"rounds": 0}, "rounds=0 must be 1 or more"),
        ({"threads": 0}, "threads=0 must be 1 or more"),
        ({"batch": -1}, "batch=-1 must be 1 or more"),
        ({"against": ["torch"], "batch": 17}, "batch=17 must be 16 or less with against"),
        ({"against": ["torch"]}, "'tiny' is no bundled model: name the float model with model"),
        ({"against": ["torch"], "model": "fashion-unet"}, "'fashion-unet' takes sample[4, 14, 14], timestep, class_la"),
        ({"kernels": True}, "has no kernels that could be timed"),
    ],
)
def test_what_cannot_be_measured(plain, arguments, message):
    with pytest.raises(UserError) as raised:
        run.bench([plain], **{"rounds": 1, "memory": False, **arguments})
    assert message in str(raised.value)


def test_an_artifact_of_another_machine(plain, tmp_path):
    other = "aarch64-dotprod" if platform.machine() == "x86_64" else "x86-64-avx2"
    path, made = tmp_path / "other.mpq", bundle.read(plain)
    row = targets.TARGETS[other]
    changed = {"name": other, "arch": row.arch, "features": list(row.features), "backend": row.backend}
    filled = ("format", "format_version", "weights", "files", "artifact_sha256")
    manifest = {key: value for key, value in made.manifest.items() if key not in filled}
    bundle.write(
        path,
        {**manifest, "target": changed},
        {name: made.file(name) for name in made.manifest["files"] if name != bundle.WEIGHTS},
        made.tensors(),
    )
    with pytest.raises(UserError, match=other):
        run.bench([path], rounds=1)


def test_the_plot_is_svg_and_not_overwritten(plain, tmp_path, capsys):
    assert mpqc.main(["bench", str(plain), "--plot", str(tmp_path / "roof.png")]) == 1
    assert "name it roof.svg" in capsys.readouterr().err
    (tmp_path / "roof.svg").write_text("mine")
    assert mpqc.main(["bench", str(plain), "--plot", str(tmp_path / "roof.svg")]) == 1
    assert (tmp_path / "roof.svg").read_text() == "mine"


def test_kernels_are_sorted_and_the_first_are_shown(capsys):
    rest = {"node": "n", "share": 0.1, "part": "step", "bytes": 10, "gmacs": None, "reached": None, "template": "gemm"}
    rows = [{"layer": f"layer{i}.weight", "ms": ms, "weights": "int2+b", **rest} for i, ms in enumerate((0.5, 2, 1))]
    show._show_kernels(rows, "ms", 2)
    printed = capsys.readouterr().out
    assert printed.startswith("kernels, 2 of 3\n") and "+b: and a binary branch" in printed
    assert re.findall(r"│ (layer\d) ", printed) == ["layer1", "layer2"]
    assert "GMAC/s" not in printed and "3.500 ms in all" in printed


@pytest.mark.parametrize("arguments", [["--sort", "ms"], ["--top", "3"]])
def test_an_order_is_of_kernels(plain, arguments, capsys):
    assert mpqc.main(["bench", str(plain), *arguments]) == 1
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith("mpqc: --sort and --top are of the table of --kernels")


def test_peaks_are_those_of_a_core():
    """Integers are faster than floats where the CPU has dot products."""
    from mpq_compiler.backends.tvm.compile import peak
    from mpq_compiler.backends.tvm.kernels.cpu.isa import isa
    from mpq_compiler.targets.table import resolve

    target = resolve("native")
    made = {make: make(isa(target.name)) for make in (peak.integer, peak.floating)}
    times = {make: timing.Times() for make in made}
    for _ in range(9):  # in turns: what else runs on this machine slows both
        for make, (call, _) in made.items():
            timing.turn(call, 20, times[make])
    integer, floating = (macs / min(times[make].cpu) / 1e9 for make, (_, macs) in made.items())
    assert 1 < floating < 10000 and 1 < integer < 10000
    if "vnni" in target.name or "dotprod" in target.name:
        assert floating < integer
