"""`mpqc sign`, and `--key` of the commands that open artifacts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from mpq_compiler import schemas
from mpq_compiler.artifact import bundle, signature
from mpq_compiler.cli import mpqc
from mpq_compiler.support import tensorfile
from tests.harness import once, tiny

QUICK = ("--recipe", "w8a8", "--samples", "2", "--steps", "2")


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    """A tiny artifact for this machine, which nobody has signed."""

    def make(path: Path) -> None:
        model = tiny.save("unet2d", path.with_name("unet2d-native.model"))
        assert mpqc.main(["compile", str(model), "-o", str(path), *QUICK]) == 0

    return Path(shutil.copytree(once.made("unet2d-native.mpq", make), tmp_path / "a.mpq"))


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs `mpqc` in an empty folder: its JSON, checked against the schema; or the sentence of its error."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> dict | str:
        words = [str(word) for word in arguments]
        capsys.readouterr()
        code, path = mpqc.main([*words, "--json", "said.json"]), Path("said.json")
        if code:
            error = capsys.readouterr().err.splitlines()[-1]  # behind what the command was about to do
            assert code == 1 and error.startswith("mpqc: ") and "internal error" not in error and not path.exists()
            return error
        result = json.loads(path.read_text())
        path.unlink()
        assert schemas.check(result, words[0]) is None
        return result

    return run


def test_from_a_new_key_to_a_verified_artifact(command, artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key = command("sign", "--new-key", "k.pem")
    assert key == {"private": "k.pem", "public": "k.pub.pem", "key": signature.public_key("k.pub.pem").hex()}
    assert command("verify", artifact)["signature"] == "none"
    assert "is not signed, and a key is given" in command("verify", artifact, "--key", "k.pub.pem")
    files = len(bundle.read(artifact).manifest["files"]) + 1
    assert command("sign", artifact, "--key", "k.pem") == {"artifact": str(artifact), "files": files, "key": key["key"]}
    assert command("verify", artifact)["signature"] == "not checked"
    assert "has a signature, which was not checked: add --key" in " ".join(capsys.readouterr().out.split())
    for given in ("k.pub.pem", key["key"]):
        assert command("verify", artifact, "--key", given)["signature"] == "right"
    assert "exists" in command("sign", "--new-key", "k.pem")
    Path("pass").write_text("secret\n")
    command("sign", "--new-key", "hidden.pem", "--passphrase-file", "pass")
    assert "give its passphrase with --passphrase-file" in command("sign", artifact, "--key", "hidden.pem")
    command("sign", artifact, "--key", "hidden.pem", "--passphrase-file", "pass")
    assert command("verify", artifact, "--key", "hidden.pub.pem")["signature"] == "right"
    assert "is signed with another key" in command("verify", artifact, "--key", "k.pub.pem")


def test_commands_that_open_artifacts_take_a_key(command, artifact: Path) -> None:
    command("sign", "--new-key", "k.pem")
    command("sign", artifact, "--key", "k.pem")
    with Path("in").open("wb") as stream:
        rows = {name: value.numpy() for name, value in tiny.inputs("unet2d", batch=1).items()}
        tensorfile.save(stream, {name: np.ascontiguousarray(value) for name, value in rows.items()})
    model = str(tiny.save("unet2d", Path("model")))
    calls = (
        ("run", artifact, "--input", "in", "--output", "out"),
        ("generate", artifact, "-o", "x.png", "--images", "1", "--steps", "1"),
        ("eval", artifact, "--against", model, "--images", "2", "--eval-steps", "1"),
        ("bench", artifact, "--rounds", "1"),
    )
    for call in calls:
        result = command(*call, "--key", "k.pub.pem")
        assert isinstance(result, dict), result
        if call[0] == "bench":
            assert result["rows"][0]["peak_bytes"]
    for name in ("out", "x.png"):
        Path(name).unlink()
    manifest = json.loads((artifact / bundle.MANIFEST).read_bytes()) | {"name": "evil"}
    manifest["artifact_sha256"] = bundle.digest(manifest)
    (artifact / bundle.MANIFEST).write_bytes(bundle.canonical(manifest))
    for call in calls:
        assert "manifest.json is not the file that was signed" in command(*call, "--key", "k.pub.pem")
        assert not Path("out").exists() and not Path("x.png").exists()
    assert isinstance(command(*calls[0]), dict)
    assert "--key is of an artifact that is signed, and" in command("eval", model, "--key", "k.pub.pem")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "name what is signed and the private key"),
        (("a.mpq",), "name what is signed and the private key"),
        (("--key", "k.pem"), "name what is signed and the private key"),
        (("a.mpq", "--new-key", "n.pem"), "makes a key and signs nothing"),
        (("--key", "k.pem", "--new-key", "n.pem"), "makes a key and signs nothing"),
        (("--new-key", "no/n.pem"), "there is no folder no"),
        (("--new-key", "a.mpq/n.pem"), "is an artifact, which another file would damage"),
        (("--new-key", "n.pem", "--passphrase-file", "none"), "cannot read the passphrase none"),
        (("a.mpq", "--key", "none.pem"), "cannot read the key none.pem"),
        (("a.mpq", "--key", "a.mpq/ir.txt"), "holds no private key in PEM|holds no key"),
        (("none.mpq", "--key", "k.pem"), "there is no artifact none.mpq"),
        (("in.txt", "--key", "k.pem"), "is not an artifact"),
    ],
)
def test_what_cannot_be_signed(command, artifact: Path, arguments: tuple[str, ...], said: str) -> None:
    command("sign", "--new-key", "k.pem")
    Path("in.txt").write_text("x")
    before = {*Path.cwd().iterdir(), *artifact.iterdir()}
    sentence = command("sign", *arguments)
    assert isinstance(sentence, str) and any(part in sentence for part in said.split("|")), sentence
    assert {*Path.cwd().iterdir(), *artifact.iterdir()} == before


def test_what_is_damaged_is_not_signed(command, artifact: Path) -> None:
    command("sign", "--new-key", "k.pem")
    (artifact / bundle.IR).write_text("")
    assert "ir.txt is truncated" in command("sign", artifact, "--key", "k.pem")
    assert not (artifact / signature.FILE).exists()
