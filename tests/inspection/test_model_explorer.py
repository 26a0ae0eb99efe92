"""Google's Model Explorer opens the files that are written for it."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mpq_compiler.cli import mpqc
from mpq_compiler.inspection import explorer, model_explorer
from mpq_compiler.inspection.dumps import read_dumps
from tests.harness import programs
from tests.harness.browser import chromium
from tests.inspection.test_bisect import clean

STAGE = "fuse-epilogues"


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("explorer") / "files"
    assert mpqc.main(["inspect", str(clean("pixart", programs.MIXED)[0]), "--model-explorer", str(folder)]) == 0
    return folder


def test_every_stage_is_a_graph_with_overlays(written):
    folder = clean("pixart", programs.MIXED)[0]
    gathered = explorer.gather(folder, read_dumps(folder))
    files = {file.name: json.loads(file.read_text()) for file in written.iterdir()}
    assert files == model_explorer.files(gathered)
    layers = {layer["name"]: layer for layer in gathered["layers"]}
    for index, stage in enumerate(gathered["stages"]):
        name = f"{index:03d}-{stage['name']}"
        (graph,) = files[f"{name}.json"]["graphs"]
        ids = {node["id"] for node in graph["nodes"]}
        assert len(ids) == len(graph["nodes"]) == len(stage["nodes"])
        assert all(edge["sourceNodeId"] in ids for node in graph["nodes"] for edge in node["incomingEdges"])
        for kind in ("bits", "loss", "bytes"):
            results = files[f"{name}.{kind}.json"][graph["id"]]["results"]
            assert {stage["nodes"][int(node)]["layer"] for node in results} == {*layers}
            assert all(v["value"] == layers[stage["nodes"][int(n)]["layer"]][kind] for n, v in results.items())
        assert f"{name}.ms.json" not in files  # nothing was timed


def test_the_folder_has_to_be_new(written, tmp_path, capsys):
    dumps = str(clean("pixart", programs.MIXED)[0])
    (tmp_path / "file").write_text("mine")
    bad = {written: "is not empty", tmp_path / "file": "is a file", tmp_path / "a" / "b": "there is no folder"}
    for folder, sentence in bad.items():
        assert mpqc.main(["inspect", dumps, "--model-explorer", str(folder)]) == 1
        assert sentence in " ".join(capsys.readouterr().err.split())
    assert mpqc.main(["inspect", dumps, "--model-explorer", str(written), "--overwrite"]) == 0


def test_model_explorer_opens_them(written):
    if importlib.util.find_spec("model_explorer") is None:
        pytest.skip("not installed: ai-edge-model-explorer (pip install 'mpq-compiler[test]')")
    graph = next(written.glob(f"*-{STAGE}.json"))
    overlays = [str(graph.with_suffix(f".{kind}.json")) for kind in ("bits", "loss")]
    command = [sys.executable, "-m", "model_explorer", str(graph), "--node_data_paths", ",".join(overlays)]
    server = subprocess.Popen(
        [*command, "--no_open_in_browser", "--skip_health_check", "--port", "8123"],
        stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    try:
        assert server.stdout is not None
        address = next(line.strip() for line in server.stdout if line.startswith("http://"))
        with chromium() as browser:
            page = browser.new_page(viewport={"width": 1280, "height": 800})
            page.goto(address)
            page.wait_for_function("document.body.innerText.includes('Root-level nodes stats')", timeout=120_000)
            said = page.inner_text("body")
    finally:
        server.terminate()
        server.wait()
    values = json.loads(Path(overlays[0]).read_text())[STAGE]["results"]
    largest = str(max(value["value"] for value in values.values())).removesuffix(".0")  # as JavaScript writes it
    assert re.search(rf"Max\s+{re.escape(largest)}\s", said)
    assert "transformer_blocks.0" in said and STAGE in said
