"""The help of every command, quickly: it imports neither torch nor anything else that is heavy."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from mpq_compiler.cli import mpqc

HEAVY = ("torch", "diffusers", "numpy", "tvm", "tvm_ffi", "onnx", "onnxruntime", "highspy", "scipy", "PIL", "ray")

HELP = """
import contextlib, io, sys
from mpq_compiler.cli import mpqc

for module in mpqc.COMMANDS:
    name = module.__name__.rpartition(".")[2].replace("evaluate", "eval")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
        mpqc.main([name, "--help"])
    assert printed.getvalue().startswith(f"usage: mpqc {name} "), name
print(sorted(set(sys.argv[1:]) & sys.modules.keys()))
"""


def name(command: ModuleType) -> str:
    return command.__name__.rpartition(".")[2].replace("evaluate", "eval")


def test_help_imports_nothing_heavy() -> None:
    command = [sys.executable, "-W", "error::DeprecationWarning", "-c", HELP, *HEAVY]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[]\n"


ANNOUNCED = """
import sys
from mpq_compiler.cli import mpqc

given = mpqc.parser().parse_args
for arguments in (["compile", "a", "--weights", "3"], ["sensitivity", "a", "-o", "b"], ["bench", "a"], ["eval", "a"],
                  ["demo"], ["latency", "a", "-o", "b"]):
    args = given(arguments)
    print(args.announce(args))
print(sorted(set(sys.argv[1:]) & sys.modules.keys()))
"""


def test_what_is_about_to_be_done_is_said_before_anything_heavy_is_imported() -> None:
    done = subprocess.run([sys.executable, "-c", ANNOUNCED, *HEAVY], capture_output=True, text=True)
    *said, heavy = done.stdout.splitlines()
    assert heavy == "[]", done.stderr
    assert re.fullmatch(r"compiling a for \S+ \(native\): recipe default, weights 3", said[0])
    assert said[-1] == "measuring the kernels of a" and len(said) == 6


def test_the_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        mpqc.main(["--help"])
    help = capsys.readouterr().out
    listed = re.findall(r"^ {4}(\w+)", help, re.MULTILINE)
    (pages,) = re.findall("README.md and docs/ are in (.+)", help)
    assert (Path(pages) / "docs" / "calibration.md").is_file()
    assert listed == [name(module) for module in mpqc.COMMANDS]
