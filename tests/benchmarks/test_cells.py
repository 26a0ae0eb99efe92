"""Cells: what a watched process took, why it failed, and results that are kept beside others."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks import cells, peers, scale, scale_peers, scale_steps

FOUND = {"parameters": 81, "checkpoint_bytes": 2**30, "peak_bytes": 2**31, "cpu": "a CPU", "cores": 2}


@pytest.fixture
def ran(tmp_path, monkeypatch):
    """Runs a program as a module."""

    def run(code: str, **options: int) -> cells.Ended:
        (tmp_path / "program.py").write_text(code)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        return cells.run("program", folder=tmp_path, **options)

    return run


def test_a_process_is_watched_to_its_end(ran):
    ended = ran("import time; block = bytearray(200 << 20); time.sleep(0.5)")
    assert ended.error is None and ended.seconds > 0.5 and 200 << 20 < ended.peak_bytes < 400 << 20


def test_a_process_that_needs_too_much_is_ended_and_children_with_it(ran):
    child = "import time; block = bytearray(300 << 20); time.sleep(60)"
    ended = ran(f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])", limit=200 << 20)
    assert ended.error == "needs more than 0.2 GiB of memory" and ended.seconds < 30


def test_a_process_ends_with_its_watcher(tmp_path, monkeypatch):
    """A limit that nobody watches is none."""
    (tmp_path / "program.py").write_text("import os, time; open('pid', 'w').write(str(os.getpid())); time.sleep(60)")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{cells.ROOT}")
    code = f"from pathlib import Path; from benchmarks.cells import run; run('program', folder=Path({str(tmp_path)!r}))"
    watcher = subprocess.Popen([sys.executable, "-c", code])
    until = time.monotonic() + 60
    while not (written := tmp_path / "pid").exists() or not written.read_text():
        assert time.monotonic() < until
        time.sleep(0.05)
    watcher.kill()
    watcher.wait()
    status = Path(f"/proc/{written.read_text()}/status")
    while status.exists() and "State:\tZ" not in status.read_text():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_an_error_is_its_last_line_without_places(ran):
    ended = ran("raise ValueError('no model in /some/where/of/mine/model.onnx | it said')")
    assert ended.error == "ValueError: no model in model.onnx / it said"
    assert ran("import os; os.abort()").error == "ends with signal 6"


def test_a_cell_takes_the_place_of_the_one_that_it_measures_anew(tmp_path):
    path, order = tmp_path / "results.json", {"peer": ("one", "two")}
    for peer, size, value in (("two", 1, 0), ("one", 2, 1), ("one", 1, 2), ("two", 1, 3)):
        cells.keep(path, {"peer": peer, "parameters": size, "value": value}, ("peer", "parameters"), order)
    assert [cell["value"] for cell in cells.read(path)] == [2, 1, 3]


def test_powers_are_those_of_power_laws():
    assert scale.power([(size, 3 * size**1.1) for size in (70.0, 420.0, 860.0, 2600.0)]) == pytest.approx(1.1)
    assert scale.power([(70.0, 1.0), (420.0, 2.0)]) is None


def test_every_row_has_all_columns():
    peer = FOUND | {"model": "sd15", "peer": "openvino"}
    rows = [peer | {"error": "not installed"}]
    rows += [peer | {"seconds": 60, "cpu_seconds": 60, "error": "needs more than 2 GiB"}]
    rows += [peer | {"seconds": 60, "cpu_seconds": 60, "artifact_bytes": 2**20, "sqnr_db": 12.0}]
    steps = [FOUND | {"model": "sd15", "subject": "mpq-w8a8", "threads": 1, "error": "ends with signal 6"}]
    done = dict.fromkeys(("load_seconds", "first_seconds", "later_seconds", "mapped_bytes", "sqnr_db"), 1.0)
    steps += [{key: value for key, value in steps[0].items() if key != "error"} | done]
    for text in (scale_peers.table(rows), scale_steps.table(steps)):
        lines = [line for line in text.splitlines() if line.startswith("|")]
        assert len({len(re.findall(r"\|", line)) for line in lines}) == 1
        assert text.endswith("Measured on a CPU, 2 cores.")


def test_every_peer_has_packages_and_a_way_to_be_loaded():
    assert all(peer.split("-")[0] in peers.PACKAGES for peer in peers.PEERS)
    assert scale_peers.missing("torch-bf16") is None


def test_a_squeeze_that_does_nothing_is_no_reason_to_refuse_a_model(tmp_path):
    """Of axes of 1 and of 4, in two calls: the first stays."""
    import onnx
    import onnxruntime

    node, value = onnx.helper.make_node, onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [node("Relu", ["x"], ["r"]), node("Squeeze", ["r", "first"], ["s"]), node("Squeeze", ["s", "first"], ["y"])],
        "two",
        [value("x", onnx.TensorProto.FLOAT, [1, 4, 8])],
        [value("y", onnx.TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(np.array([0]), "first")],
        value_info=[value("r", onnx.TensorProto.FLOAT, [1, 4, 8]), value("s", onnx.TensorProto.FLOAT, [4, 8])],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)
    path = tmp_path / "model.onnx"
    onnx.save(model, str(path))
    with pytest.raises(Exception, match="Dimension of input 0 must be 1"):
        onnxruntime.InferenceSession(str(path))
    peers._without_idle_squeezes(path)
    assert [n.op_type for n in onnx.load(str(path)).graph.node] == ["Relu", "Squeeze", "Identity"]
    x = np.ones((1, 4, 8), np.float32)
    assert np.array_equal(onnxruntime.InferenceSession(str(path)).run(None, {"x": x})[0], x[0])


def test_the_machine_of_a_cell_is_told_where_it_is_not_that_of_the_others() -> None:
    first = {"cpu": "A", "cores": 2, "model": "unet", "setting": "w8a8"}
    second = {**first, "model": "sdxl", "isa": "x86-64-avx2"}
    third = {**second, "model": "unet", "setting": "4 bits"}
    assert cells.machines([first, second, first]) == "Measured on A, 2 cores; on A (x86-64-avx2), 2 cores: sdxl."
    assert cells.machines([first, first, third]).endswith("on A (x86-64-avx2), 2 cores: unet 4 bits.")
    assert cells.machines([second]) == "Measured on A (x86-64-avx2), 2 cores."
