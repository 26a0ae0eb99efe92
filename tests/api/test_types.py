"""The public functions as type checkers and completion see them, and what they say of wrong arguments."""

from __future__ import annotations

import inspect
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import mpq_compiler
from mpq_compiler.driver.options import Options
from tests.harness import stub
from tests.harness.tree import ROOT

MYPY = """\
[mypy]
ignore_missing_imports = true
[mypy-torch.*,diffusers.*,transformers.*,numpy.*,onnx.*,onnxruntime.*,ray.*,scipy.*,rich.*]
follow_imports = skip
"""
"""Without the types of other packages, which take a minute."""

USE = """\
import mpq_compiler
reveal_type(mpq_compiler.load("x"))
reveal_type(mpq_compiler.compile("a", "b", weights=3, effort="best"))
reveal_type(mpq_compiler.__version__)
mpq_compiler.compile("a", "b", wieghts=3)
mpq_compiler.estimate("a", seed="b")
"""


def test_the_stub_is_that_of_the_functions() -> None:
    assert stub.STUB.read_text(encoding="utf-8") == stub.stub(), "run python -m tests.harness.stub"


def test_mypy_sees_classes_and_options(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    use, config = tmp_path / "use.py", tmp_path / "mypy.ini"
    use.write_text(USE)
    config.write_text(MYPY)
    command = [sys.executable, "-m", "mypy", "--config-file", str(config), "--cache-dir", str(tmp_path / "cache")]
    command += ["--follow-imports", "silent", "--no-pretty", str(use)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    said: dict[int, str] = {}
    for line in done.stdout.splitlines():
        if line.startswith(f"{use}:"):
            number, _, text = line.removeprefix(f"{use}:").partition(": ")
            said.setdefault(int(number), text)
    assert said[2] == 'note: Revealed type is "mpq_compiler.runtime.compiled_denoiser.CompiledDenoiser"', done.stderr
    assert said[3] == 'note: Revealed type is "mpq_compiler.driver.report.Report"'
    assert said[4] in ('note: Revealed type is "str"', 'note: Revealed type is "builtins.str"')
    assert said[5].startswith('error: Unexpected keyword argument "wieghts"')
    assert said[6].startswith('error: Argument "seed" to "estimate" has incompatible type "str"; expected "int"')
    assert said.keys() == {2, 3, 4, 5, 6}


def test_names_are_listed_and_imports_stay_light() -> None:
    assert {*mpq_compiler.__all__, "__version__"} <= {*dir(mpq_compiler)}
    assert all(name.startswith("__") for name in {*dir(mpq_compiler)} - {*mpq_compiler.__all__})
    code = "import sys, mpq_compiler; print(sorted({'torch', 'numpy', 'tvm', 'rich'} & sys.modules.keys()))"
    command = [sys.executable, "-c", f"{code}; print(mpq_compiler.__version__)"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["[]", mpq_compiler.__version__]


@pytest.mark.parametrize("name", ["compile", "estimate", "measure_sensitivity", "measure_latency"])
def test_every_option_is_a_parameter_with_its_meaning_and_default(name: str) -> None:
    function = getattr(mpq_compiler, name)
    parameters, doc = inspect.signature(function).parameters, " ".join(function.__doc__.split())
    for field in fields(Options):
        assert parameters[field.name].default == field.default
        meaning = doc.partition(f" {field.name}: ")[2].partition(" Default: ")
        assert len(meaning[0]) > 10 and meaning[2].startswith(f"{field.default!r}.")


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"wieghts": 3}, "there is no option 'wieghts': did you mean 'weights'?"),
        ({"exmaple": {}}, "there is no option 'exmaple': did you mean 'example'?"),
        ({"calls": ["a fox"]}, "calls are those of a diffusers pipeline in memory: give that, or leave them out"),
        ({"weights": "lots"}, "weights='lots' is neither bits (3.7) nor bytes (40MB, 800kB)"),
        ({"weights": -1}, "weights=-1 leaves no room at all: a budget is more than 0 bits (3.7), or bytes (40MB)"),
        ({"effort": "bset"}, "effort='bset' is not known: did you mean 'best'?"),
    ],
)
def test_wrong_arguments_are_named_as_python_does(tmp_path: Path, wrong: dict[str, object], sentence: str) -> None:
    with pytest.raises(mpq_compiler.UserError) as refused:
        mpq_compiler.compile("fashion-unet", tmp_path / "x.mpq", **wrong)
    assert str(refused.value) == sentence
