"""Wrong command lines: one sentence with the nearest name, where the help is, and exit code 2."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mpq_compiler import schemas
from mpq_compiler.cli import completion, mpqc


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("compile x --weigths 3", "there is no option '--weigths': did you mean '--weights'? (`mpqc compile --help`)"),
        ("compile x --weigths=3", "there is no option '--weigths': did you mean '--weights'? (`mpqc compile --help`)"),
        ("generate x --ouput y", "there is no option '--ouput': did you mean '--output'? (`mpqc generate --help`)"),
        ("sensitivity x -o y --weights 3", "there is no option '--weights' (`mpqc sensitivity --help`)"),
        ("compile x -Z", "there is no option '-Z' (`mpqc compile --help`)"),
        ("--vresion", "there is no option '--vresion': did you mean '--version'? (`mpqc --help`)"),
        ("-q compile x", "there is no option '-q': did you mean it for a command? Its options stand"),
        ("comple x", "there is no command 'comple': did you mean 'compile'? (`mpqc --help`)"),
        ("compile x --effort bst", "--effort 'bst' is not known: did you mean 'best'? (`mpqc compile --help`)"),
        ("compile x --effort slow", "--effort 'slow' is not known: there is: balanced, best, fast, none"),
        ("passes a b", "'b' is too much: no argument is left that takes it (`mpqc passes --help`)"),
        ("compile x --steps y", "argument --steps: invalid int value: 'y' (`mpqc compile --help`)"),
        ("generate x", "the following arguments are required: -o/--output (`mpqc generate --help`)"),
    ],
)
def test_a_wrong_command_line_is_one_sentence(capsys: pytest.CaptureFixture[str], line: str, sentence: str) -> None:
    with pytest.raises(SystemExit) as raised:
        mpqc.main(line.split())
    assert raised.value.code == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"mpqc: {sentence}") and printed.err.count("\n") == 1 and not printed.out


def test_the_command_line_of_the_process_is_one_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["mpqc", "--quiet", "compile", "x"])
    with pytest.raises(SystemExit):
        mpqc.main()
    assert capsys.readouterr().err.startswith("mpqc: there is no option '--quiet': did you mean it for a command?")


def test_beginnings_of_options_and_values_with_a_minus_are_taken() -> None:
    args = mpqc.parser().parse_args(["compile", "x", "-oy", "--wei", "3", "--seed", "-3", "--effort=best"])
    assert (args.output, args.weights, args.seed, args.effort) == ("y", "3", -3, "best")


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_is_a_script_of_every_command(capsys: pytest.CaptureFixture[str], shell: str) -> None:
    pytest.importorskip("shtab")
    if (program := shutil.which(shell)) is None:
        pytest.skip(f"needs {shell}")
    top = mpqc.parser()
    found = completion.run(top, top.parse_args(["completion", shell]))
    assert schemas.check(found, "completion") is None
    script = capsys.readouterr().out
    assert all(name in script for name in ("compile", "--weights", "balanced", "completion"))
    assert subprocess.run([program, "-n"], input=script, text=True, capture_output=True).stderr == ""


def test_bash_completes_commands_options_choices_and_files(tmp_path: Path) -> None:
    pytest.importorskip("shtab")
    top = mpqc.parser()
    script = completion.run(top, top.parse_args(["completion", "bash"]))["script"]
    (tmp_path / "model.mpq").touch()

    def completed(*words: str) -> set[str]:
        line = " ".join(f"'{word}'" for word in ("mpqc", *words))
        ask = f"COMP_WORDS=({line}); COMP_CWORD={len(words)}; _shtab_mpqc; printf '%s\\n' \"${{COMPREPLY[@]}}\""
        done = subprocess.run(["bash"], input=f"{script}\n{ask}", text=True, capture_output=True, cwd=tmp_path)
        return {*done.stdout.split()}

    assert completed("comp") == {"compile", "completion"}
    assert "--weights" in completed("compile", "--wei")
    assert completed("compile", "--effort", "b") == {"balanced", "best"}
    assert completed("inspect", "mod") == {"model.mpq"}
