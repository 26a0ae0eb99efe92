"""Every command on a real model: what it prints, its JSON under the schema that ships, its exit code."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import mpq_compiler
from mpq_compiler import schemas
from mpq_compiler.backends.tvm import lowering
from mpq_compiler.cli import mpqc
from mpq_compiler.pipeline import parser, recipes
from mpq_compiler.sampling.text_encoder import TextEncoder
from mpq_compiler.support import terminal
from mpq_compiler.targets import table as targets
from tests.harness import browser, tiny

QUICK = ("--samples", "2", "--steps", "2")
SCHEMAS = {"allocate": "allocation-solution"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cli")


@pytest.fixture(scope="module")
def model(folder: Path) -> Path:
    return tiny.save("unet2d-class", folder / "model")


def command(folder: Path, *arguments: str | Path) -> Any:
    """Runs the command and returns its JSON, checked against its schema."""
    output = folder / "result.json"
    assert mpqc.main([*(str(a) for a in arguments), "--json", str(output)]) == 0
    result = json.loads(output.read_text())
    name = str(arguments[0])
    assert schemas.check(result, SCHEMAS.get(name, name)) is None
    return result


@pytest.fixture(scope="module")
def artifact(folder: Path, model: Path) -> Path:
    output = folder / "tiny.mpq"
    report = command(
        folder, "compile", model, "-o", output, "--weights", "5", "--dumps", folder / "dumps", "--jobs", "2", *QUICK
    )
    assert report["weights"]["average_bits"] <= 5
    assert report["quality"]["executed_by"] == "artifact"
    assert report["cost"]["bytes"] == report["weights"]["bytes"]
    assert report["additivity"]["inputs"] == 4 and abs(report["additivity"]["difference_db"]) < 3
    assert [p["name"] for p in report["passes"]] == [p.name() for p in parser.parse(report["pipeline"])]
    assert sum(layer["bytes"] for layer in report["layers"]) < report["weights"]["bytes"]
    return output


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], *([name] for name in ("compile", "inspect", "allocate", "demo"))):
        with pytest.raises(SystemExit) as raised:
            mpqc.main([*arguments, "--help"])
        assert raised.value.code == 0
        assert "usage: mpqc" in capsys.readouterr().out


def test_the_lists(folder: Path) -> None:
    assert [p["name"] for p in command(folder, "passes")][:2] == ["trace", "layout"]
    described = command(folder, "passes", "time-groups")
    assert {o["name"] for o in described["options"]} == {"groups", "bits", "places"}
    assert all(o["meaning"] for o in described["options"])
    assert {r["name"] for r in command(folder, "recipes")} >= {"default", "w8a8"}
    (native,) = [t for t in command(folder, "targets") if t["native"]]
    assert native["implemented"]
    assert {m["name"] for m in command(folder, "models")} == {"emoji", "fashion-dit", "fashion-text", "fashion-unet"}


def test_generate_beside_the_float_model(folder: Path, model: Path, artifact: Path) -> None:
    picture = folder / "grid.png"
    result = command(
        folder, "generate", artifact, "-o", picture, "--compare", model, "--images", "4", "--steps", "2", "--class", "3"
    )
    assert result["psnr_db"] > 15
    width, height = Image.open(picture).size
    assert width > 2 * 8 * 2
    assert height > 8


def test_eval_has_every_metric(folder: Path, model: Path, artifact: Path) -> None:
    result = command(folder, "eval", artifact, "--against", model, "--images", "6", "--eval-steps", "2")
    assert result["sqnr_db"] > 10
    assert result["psnr_db"]["low"] <= result["psnr_db"]["value"] <= result["psnr_db"]["high"]
    assert result["calls"] == 12
    assert result["frechet_to_data"] is None
    assert "extractor" in result["reasons"]["frechet_to_data"]
    assert result["cost"]["bytes"] < 5 / 32 * result["cost"]["float_bytes"] * 1.01
    assert 0 < result["cost"]["bops"] < result["cost"]["float_bops"] and result["cost"]["peak_bytes"] > 0


def prompted(folder: Path) -> Path:
    """A text-conditioned model with its own text encoder."""
    root = tiny.save("sd15", folder, sample_size=8)
    rows = np.random.default_rng(0).standard_normal((10, 32)).astype(np.float32)
    encoder = TextEncoder(
        ("<bos>", "<eos>", "<pad>", "old", "new", "boat", "tree", "town"),
        {"age": ("old", "new"), "class": ("boat", "tree", "town")},
        rows[:8],
        np.tile(rows[8:9], (tiny.TOKENS, 1)),
    )
    encoder.save(root / "table.safetensors")
    about = {"codec": "identity", "tokens": tiny.TOKENS, "text": {"tables": "table.safetensors", **encoder.to_json()}}
    (root / "harness.json").write_text(json.dumps(about))
    return root


def test_prompts_from_compiling_to_drawing(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The artifact encodes prompts by itself; guidance is that of the calibration, and of the evaluation."""
    monkeypatch.setattr(terminal.output, "width", terminal.WIDTH)  # a worker's may be 80, in which cells are wrapped
    model, output = prompted(folder / "text"), folder / "text.mpq"
    quick = ("--samples", "8", "--steps", "3", "--recipe", "w8a8", "--target", "reference", "--guidance", "2")
    report = command(folder, "compile", model, "-o", output, *quick)
    assert report["calibration"]["guidance"] == 2
    assert report["calibration"]["inputs"] == 8 * 3 * 2  # both calls of every step
    assert "8 trajectories of 3 steps (DDIMScheduler), guidance 2, seed 0" in capsys.readouterr().out
    draw = ("generate", output, "-o", folder / "boat.png", "--compare", model, "--images", "3", "--steps", "2")
    drawn = command(folder, *draw, "--prompt", "old boat", "--guidance", "2")
    assert (drawn["prompt"], drawn["guidance"]) == ("old boat", 2)
    other = command(folder, *draw, "--prompt", "new town", "--overwrite")
    assert other["guidance"] == 1 and other["psnr_db"] != drawn["psnr_db"]
    assert mpqc.main([*map(str, draw), "--prompt", "old boot", "--overwrite"]) == 1
    assert "did you mean 'boat'" in capsys.readouterr().err
    few = ("--images", "4", "--eval-steps", "2", "--guidance", "2")
    judged = command(folder, "eval", output, "--against", model, *few)
    assert judged["guidance"] == 2 and judged["sqnr_db"] > 10
    difference = judged["conditional_difference"]
    assert difference["images"] == 4 and len(difference["steps"]) == 2 and difference["cosine"] > 0.9
    assert difference["compiled"] == pytest.approx(difference["float"], rel=0.2)
    told = capsys.readouterr().out
    assert "what the condition changes in the output" in told and f"{difference['cosine']:.4f}" in told
    assert mpqc.main([*map(str, ("eval", output, "--against", model, *few)), "--features", "os.path:exists"]) == 1
    assert "--features is of images, and '" in capsys.readouterr().err
    command(folder, "verify", output)
    (output / "text.safetensors").write_bytes(b"")
    assert mpqc.main(["verify", str(output)]) == 1
    assert "text.safetensors is truncated" in capsys.readouterr().err


def test_inspect_dumps_and_artifact(folder: Path, artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dumps = folder / "dumps"
    rows = command(folder, "inspect", dumps)
    names = [row["pass"] for row in rows]
    passes, stages = names[: names.index("fuse-epilogues") + 1], names[names.index("fuse-epilogues") + 1 :]
    assert passes[0] == "trace" and stages == [*lowering.names(targets.resolve("native"))]
    fused = command(folder, "inspect", dumps, "--diff", "fuse-quantizers")
    assert fused["from"] == "fuse-sibling-quantizers"
    assert any(line.startswith("-") and "= quantize(" in line for line in fused["diff"].splitlines())
    assert rows[-1]["sqnr_db"] == rows[-2]["sqnr_db"] and rows[-1]["nodes"] > 20
    assert rows[0]["sqnr_db"] is None or rows[0]["sqnr_db"] > 100
    assert rows[-1]["sqnr_db"] < 60
    capsys.readouterr()
    packed = command(folder, "inspect", dumps, "--pass", "fold-fake-quant")["text"]
    assert "mpq::quant_conv2d" in packed
    assert packed in capsys.readouterr().out
    changed = command(folder, "inspect", dumps, "--diff", "layout")
    assert changed["from"] == "trace"
    assert any(line.startswith("+") and "mpq::conv2d" in line for line in changed["diff"].splitlines())
    unchanged = command(folder, "inspect", dumps, "--diff", "calibrate", "time-groups")["diff"]
    assert all("//" in line for line in unchanged.splitlines() if line.startswith(("+", "-")))
    layers = command(folder, "inspect", artifact, "--layers")["layers"]
    assert {row["weight"] for row in layers} <= {*recipes.load("default").options["sensitivity"]["formats"]}


def test_inspect_looks_for_faults_and_reasons(
    folder: Path, artifact: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dumps = folder / "dumps"
    verdict = command(folder, "inspect", dumps, "--bisect")
    assert verdict["clean"] and len(verdict["passes"]) == len(command(folder, "inspect", dumps))
    assert "nothing is wrong" in capsys.readouterr().out
    from_dumps = command(folder, "inspect", dumps, "--why", "mid_block.attentions.0.to_q")
    from_artifact = command(folder, "inspect", artifact, "--why", "mid_block_attentions_0_to_q")
    assert from_artifact == {**from_dumps, "noise": []} and from_dumps["noise"]
    assert from_dumps["passes"]["backend"]["kernels"][0]["template"] == "gemm"
    assert mpqc.main(["inspect", str(dumps), "--why", "mid_block.attentions.0.to_p"]) == 1
    assert "did you mean 'mid_block.attentions.0.to_" in capsys.readouterr().err
    page = folder / "page.html"
    assert command(folder, "inspect", dumps, "--html", page) == {"output": str(page)}
    assert page.read_text().count('id="stage-0-') == len(verdict["passes"])
    assert mpqc.main(["inspect", str(dumps), "--html", str(page)]) == 1
    assert command(folder, "inspect", artifact, "--html", page, "--overwrite") == {"output": str(page)}
    assert mpqc.main(["inspect", str(artifact), "--compare", "x"]) == 1 and "add --html" in capsys.readouterr().err
    assert mpqc.main(["inspect", str(artifact), "--bisect"]) == 1
    assert "--bisect needs the folder of a compilation's --dumps" in capsys.readouterr().err


def test_a_page_draws_weights_kernels_and_samples(folder: Path, model: Path, artifact: Path) -> None:
    bench = folder / "bench-of-page.json"
    timed = command(folder, "bench", artifact, "--kernels", "--rounds", "2", "--no-memory")
    bench.write_text(json.dumps(timed))
    page = folder / "samples.html"
    command(folder, "inspect", artifact, "--html", page, "--bench", bench, "--compare", model)
    with browser.opened(page) as opened:
        opened.wait_for_selector("html[data-opened]", state="attached", timeout=60_000)
        opened.click("#tab-samples")
        drawn = opened.eval_on_selector_all("#view-samples img", "all => all.map(i => [i.alt, i.naturalWidth > 20])")
        assert drawn == [[kind, True] for kind in ("float", "compiled", "difference")]
        assert "PSNR" in opened.inner_text("#view-samples")
        opened.click("#tab-layers")
        layers = opened.evaluate("versions[0].layers.map(l => [l.name, l.weights, l.histogram, l.ms])")
        for name, weights, histogram, ms in layers:
            assert sum(histogram["counts"]) == sum(histogram["float"]) == weights, name
            rows = [row["ms"] for row in timed["kernels"] if row["layer"] == f"{name}.weight"]
            assert ms == pytest.approx(sum(rows)) and rows
        opened.click(f"[data-layer='{layers[0][0]}']")
        assert opened.eval_on_selector_all("#why .bar", "all => all.length") == len(layers[0][2]["counts"])
        assert opened.eval_on_selector_all("#why .level", "all => all.length") == len(layers[0][2]["levels"])
        line = opened.get_attribute("#why svg:has(.bar) polyline", "points")
        assert line is not None and len(line.split()) == 2 + 2 * len(layers[0][2]["float"])
        assert "line: in the float model" in opened.inner_text("#why")
    both = folder / "both.html"
    command(folder, "inspect", artifact, artifact, "--html", both, "--bench", bench, "--bench", bench)
    with browser.opened(both) as opened:
        opened.wait_for_selector("html[data-opened]", state="attached", timeout=60_000)
        opened.click("#tab-kernels")
        assert len(opened.query_selector_all("#view-kernels svg")) == 2


def test_bench_times_every_kernel_call(folder: Path, artifact: Path) -> None:
    plot = folder / "roof.svg"
    found = command(folder, "bench", artifact, "--rounds", "2", "--no-memory", "--kernels", "--plot", plot)
    schedule = json.loads((artifact / "schedule.json").read_text())
    assert schemas.check(schedule, "schedule") is None
    assert [row["node"] for row in found["kernels"]] == [row["node"] for row in schedule]
    assert sum(row["share"] for row in found["kernels"]) == pytest.approx(1)
    layers = {row["layer"] for row in found["kernels"] if row["macs"]}
    manifest = json.loads((artifact / "manifest.json").read_text())
    assert {row["name"] for row in manifest["plan"]["layers"] if row["weight"] != "float"} <= layers
    assert 0 < found["peak"]["reached"] < 1 and plot.read_text().startswith("<svg")
    assert mpqc.main(["bench", str(artifact), "--kernels", "--batch", "3"]) == 1


def test_timing_kernels_changes_no_result(artifact: Path) -> None:
    from mpq_compiler.latency import timing
    from mpq_compiler.runtime import compiled_denoiser

    compiled = compiled_denoiser.load(artifact, 1)
    inputs = timing.random_inputs(compiled.manifest, 2)
    before = compiled.run(inputs)
    calls = timing.profile(compiled, inputs)
    assert [name for name, *_ in calls] == [row["kernel"] for row in timing.kernel_calls(compiled)]
    assert all(seconds >= 0 and size > 0 for _, seconds, _, size in calls)
    assert np.array_equal(compiled.run(inputs), before)


def test_verify_and_run(folder: Path, artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mpq_compiler.runtime import compiled_denoiser
    from mpq_compiler.support import tensorfile

    assert command(folder, "verify", artifact) == {
        "intact": True,
        "sha256": compiled_denoiser.load(artifact).manifest["artifact_sha256"],
        "missing_features": [],
        "signature": "none",
    }
    inputs = {name: value.numpy() for name, value in tiny.inputs("unet2d-class", batch=3).items()}
    with (folder / "in.safetensors").open("wb") as stream:
        tensorfile.save(stream, inputs)
    output = folder / "out.safetensors"
    result = command(folder, "run", artifact, "--input", folder / "in.safetensors", "--output", output)
    assert result["shape"] == [3, 4, 8, 8]
    assert np.array_equal(tensorfile.load(output)["output"], mpq_compiler.load(artifact).run(inputs))
    assert result["saturated"]["sample"] == 0 and "lie outside" not in capsys.readouterr().err
    with (folder / "loud.safetensors").open("wb") as stream:
        tensorfile.save(stream, inputs | {"sample": 100 * inputs["sample"]})
    loud = command(
        folder, "run", artifact, "--input", folder / "loud.safetensors", "--output", folder / "loud.output"
    )
    count = loud["saturated"]["sample"]
    assert count > inputs["sample"].size / 2
    told = " ".join(capsys.readouterr().err.split())
    assert f"note: {count} of {inputs['sample'].size} values of input 'sample' lie outside the range " in told


def test_measure_once_allocate_often(folder: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The table alone gives the allocation that compiling with it gives, without importing torch."""
    table = folder / "table.json"
    measured = command(folder, "sensitivity", model, "-o", table, *QUICK)
    assert measured == json.loads(table.read_text())
    solution = folder / "solution.json"
    script = (
        "import sys; from mpq_compiler.cli import mpqc as cli;"
        f"code = cli.main(['allocate', {str(table)!r}, '--weights', '4', '-o', {str(solution)!r}]);"
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
    chosen = json.loads(solution.read_text())
    assert schemas.check(chosen, "allocation-solution") is None
    assert chosen["optimal"]
    capsys.readouterr()
    report = command(
        folder,
        *("compile", model, "-o", folder / "tabled.mpq", "--weights", "4", "--sensitivity", table),
        *("--target", "reference", *QUICK),
    )
    told = re.sub(r"[│\s]+", " ", capsys.readouterr().out)
    assert f"measured together, {chosen['objective']:.2e} by the sum of its losses (" in told
    assert report["additivity"]["expected"] == pytest.approx(chosen["objective"])
    assert {row["name"]: f"{row['weight']} u8" for row in report["layers"]} == chosen["choices"]
    given = command(
        folder,
        *("compile", model, "-o", folder / "given.mpq", "--plan", solution, "--target", "reference", *QUICK),
    )
    assert [row | {"loss": None} for row in report["layers"]] == given["layers"]
    assert {row["name"] for row in report["passes"]} - {row["name"] for row in given["passes"]} == {"sensitivity"}
    fewer = command(folder, "allocate", table, "--weights", "3.2")
    assert fewer["objective"] > chosen["objective"]
    decibels = command(folder, "allocate", table, "--weights", "4", "--objective", "paper-db")
    assert decibels["objective"] < 0 and decibels["choices"] != chosen["choices"]
    less = command(folder, "allocate", table, "--weights", "4", "--bops", f"{0.9 * chosen['costs']['bops']:.0f}")
    assert less["costs"]["bops"] <= 0.9 * chosen["costs"]["bops"] and less["objective"] >= chosen["objective"]


def test_a_problem_anybody_can_write(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    problem = folder / "problem.json"
    choices = [
        {"name": "int4", "loss": 0.31, "costs": {"bits": 1152}},
        {"name": "int8", "loss": 0.01, "costs": {"bits": 2304}},
    ]
    layers = [{"name": name, "choices": choices} for name in ("conv_in", "conv_out")]
    problem.write_text(json.dumps({"version": 1, "layers": layers, "budgets": [{"cost": "bits", "max": 3500}]}))
    solution = command(folder, "allocate", problem)
    assert sorted(solution["choices"].values()) == ["int4", "int8"]
    assert solution["costs"]["bits"] == 3456
    assert re.search(r"bits +│ +3,456 │ +3,500 │", capsys.readouterr().out)


def test_the_cache_is_listed_and_cleared(folder: Path, model: Path) -> None:
    cache = folder / "own-cache"
    command(folder, "sensitivity", model, "-o", folder / "again.json", "--cache", cache, *QUICK)
    assert command(folder, "cache", "--cache", cache)["kinds"]["sensitivity"] > 0
    (cache / "notes.txt").write_text("somebody's")
    assert command(folder, "cache", "clear", "--cache", cache)["freed"] > 0
    assert [path.name for path in cache.iterdir()] == ["notes.txt"]
    assert command(folder, "cache", "--cache", cache)["kinds"] == {}


def test_more_and_less_of_a_compilation(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``-v`` and ``--log`` have the time of every pass and what the cache had, ``-q`` nothing beside the result."""
    model = tiny.save("dit", folder / "dit")
    given = ["compile", str(model), "--recipe", "w8a8", "--cache", str(folder / "cache"), "--jobs", "2", *QUICK]
    assert mpqc.main([*given, "-o", str(folder / "loud.mpq"), "-v"]) == 0
    said = capsys.readouterr().err
    passes = re.findall(r"^pass (\d+) of (\d+): (\S+) took", said, re.MULTILINE)
    assert [name for _, _, name in passes] == [p.name() for p in recipes.load("w8a8").passes()]
    assert [(int(i), int(count)) for i, count, _ in passes] == [(i, len(passes)) for i in range(1, len(passes) + 1)]
    assert re.search(r"^kernels: the cache has 0 of \d+$", said, re.MULTILINE)
    assert re.search(r"^kernels took .*\n(.*\n)*judging took", said, re.MULTILINE)
    log = folder / "quiet.log"
    assert mpqc.main([*given, "-o", str(folder / "quiet.mpq"), "-q", "--log", str(log)]) == 0
    printed = capsys.readouterr()
    assert printed.err == "" and "true average bits" in printed.out
    kept = log.read_text(encoding="utf-8")
    assert re.search(r" kernels: the cache has (\d+) of \1$", kept, re.MULTILINE)
    assert kept.count(" took ") >= len(passes) and "true average bits" in kept


def test_json_to_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    assert mpqc.main(["models", "--json", "-"]) == 0
    assert schemas.check(json.loads(capsys.readouterr().out), "models") is None


def test_the_command_is_installed() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mpq_compiler", "recipes", "--json", "-"], capture_output=True, text=True, check=True
    )
    assert schemas.check(json.loads(done.stdout), "recipes") is None


def test_no_command_is_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert mpqc.main([]) == 2
    assert "mpqc demo" in capsys.readouterr().err


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        mpqc.main(["--version"])
    assert raised.value.code == 0
    assert capsys.readouterr().out.startswith("mpqc ")


@pytest.mark.parametrize(
    ("arguments", "package"),
    [
        (["compile", "fashion-unet", "-o", "x.mpq"], "mpq-compiler[compile]"),
        (["passes", "trace"], "mpq-compiler[compile]"),
        (["generate", "x.mpq", "-o", "x.png"], "pillow"),
    ],
)
def test_a_missing_package_is_named_with_what_brings_it(arguments: list[str], package: str) -> None:
    """As in an installation without the extra: a None in sys.modules is how Python marks what cannot be imported."""
    script = (
        "import sys; sys.modules.update(torch=None, PIL=None);"
        f"from mpq_compiler.cli import mpqc as cli; sys.exit(cli.main({arguments!r}))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.endswith(f"which is not installed: pip install '{package}'\n")
    assert sum(line.startswith("mpqc: ") for line in done.stderr.splitlines()) == 1
    assert "Traceback" not in done.stderr


def test_results_can_be_piped(folder: Path) -> None:
    """They are on standard output, whole lines; a reader that has seen enough ends the command quietly."""
    done = subprocess.run(
        f"{sys.executable} -m mpq_compiler passes | head -1", shell=True, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("passes")
    assert done.stderr == ""


def test_every_command_has_a_python_name() -> None:
    for name in (*mpq_compiler.__all__, *mpq_compiler.__all__):  # the second time, its module has been imported
        assert callable(getattr(mpq_compiler, name))
    with pytest.raises(AttributeError):
        mpq_compiler.nothing  # noqa: B018


def test_an_interrupt_that_a_library_swallows_still_ends_the_command(capsys, monkeypatch):
    """As imports of C extensions do: what fails afterwards is no defect."""

    def swallowing(args):
        with contextlib.suppress(BaseException):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
        raise ImportError("cannot load module more than once per process")

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(mpqc.usage, "with_room", lambda function: swallowing)
    assert mpqc.main(["models"]) == 143
    assert capsys.readouterr().err == "mpqc: terminated\n"
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_interrupt_inside_of_exec_ends_the_command_with_its_exit_code(tmp_path):
    """CPython keeps in mind that one went through an `exec` of text, and ends the run of a module by SIGINT."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, time\n"
        "from mpq_compiler.cli import usage\n"
        "def terminated(args):\n"
        "    exec('os.kill(os.getpid(), signal.SIGTERM); time.sleep(5)')\n"
        "usage.with_room = lambda function: terminated\n"
    )
    paths = os.pathsep.join([str(tmp_path), str(Path(mpqc.__file__).parents[2])])
    command = [sys.executable, "-m", "mpq_compiler", "models"]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (143, "mpqc: terminated\n")
