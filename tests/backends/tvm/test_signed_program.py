"""The C program refuses what the owner of a key did not sign, with the signatures that Python makes."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from mpq_compiler.artifact import bundle, pipeline, signature
from mpq_compiler.backends.tvm import standalone
from mpq_compiler.driver.check import check
from mpq_compiler.driver.options import Options
from mpq_compiler.driver.pipeline import KNOWN, compile_pipeline
from mpq_compiler.runtime import tokens_file
from mpq_compiler.support.errors import UserError
from tests.harness import compiled_pipeline, packed, qemu, signatures, tiny_pipelines
from tests.harness.signatures import Pair, signed

ARM = "aarch64-dotprod"
PROMPT = "a red fox"
HOST = pytest.param("native", id="native")


@pytest.fixture
def keys() -> tuple[Pair, Pair]:
    return signatures.keys()


def run(program: Path, target: str, *arguments: object, cwd: Path | None = None) -> str:
    """What the program says, with "error: " before a sentence that it ends with."""
    command = [str(program), *map(str, arguments)]
    if target == ARM and platform.machine() != "aarch64":
        if absent := qemu.missing():
            pytest.skip(absent)
        command = [*qemu.command("cortex-a76"), *command]
    environment = {"PATH": os.environ["PATH"]}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, cwd=cwd)
    assert done.returncode in (0, 1) and done.stderr.startswith("error: ") == bool(done.returncode), done
    assert done.stderr.count("\n") == done.returncode, done.stderr
    return done.stderr if done.returncode else done.stdout


@pytest.fixture
def artifact(tmp_path: Path, keys: tuple[Pair, Pair], request: pytest.FixtureRequest) -> Path:
    """A signed artifact with its program; of no pipeline."""
    part = compiled_pipeline.path(target=getattr(request, "param", "native")) / "vae"
    return signed(Path(shutil.copytree(part, tmp_path / "a.mpq")), keys[0])


def with_equal_sum(file: Path) -> None:
    """Changes two words of the weights so that the sum of the build stays: sums keep nobody away."""
    data = bytearray(file.read_bytes())
    words = np.frombuffer(data, "<u8", len(data) // 8)
    first, second = len(words) // 2, len(words) // 2 + 1
    words[first] += np.uint64(2 * second + 1)
    words[second] -= np.uint64(2 * first + 1)
    file.write_bytes(data)


@pytest.mark.parametrize("artifact, target", [("native", "native"), (ARM, ARM)], indirect=["artifact"])
def test_the_program_takes_what_python_signs(artifact: Path, target: str, keys: tuple[Pair, Pair]) -> None:
    """And no more: what is refused with a key is refused in one sentence, and taken without one."""
    own, other = keys
    weights, text = artifact / bundle.WEIGHTS, (artifact / signature.FILE).read_bytes()

    def said(*options: object) -> str:
        return run(artifact / bundle.PROGRAM, target, "--weights", weights, *options)

    (artifact / "key.txt").write_text(f"{own.hex.upper()}\n")
    for key in (own.hex, own.hex.upper(), own.public, artifact / "key.txt"):
        assert "calls: median" in said("--key", key)
    assert "calls: median" in run(artifact / bundle.PROGRAM, target, "--key", own.hex, cwd=artifact)
    assert f"is of another key, {own.hex}, than whoever" in said("--key", other.hex)
    with_equal_sum(weights)
    assert "calls: median" in said()
    assert "weights.safetensors is not the file that was signed" in said("--key", own.hex)
    shutil.copy(weights, artifact / "w")
    assert "is none of the files that" in run(
        artifact / bundle.PROGRAM, target, "--weights", artifact / "w", "--key", own.hex
    )
    (artifact / signature.FILE).write_bytes(text.replace(own.hex.encode(), other.hex.encode()))
    assert "is altered: the owner of the key did not make it" in said("--key", other.hex)
    (artifact / signature.FILE).write_bytes(text * 3000)
    assert "signature.txt is too large" in said("--key", own.hex)
    (artifact / signature.FILE).unlink()
    assert "has no signature, and has to be signed by the owner of the key" in said("--key", own.hex)


def test_the_signature_of_another_artifact(artifact: Path, tmp_path: Path, keys: tuple[Pair, Pair]) -> None:
    other = signed(Path(shutil.copytree(compiled_pipeline.path() / "unet", tmp_path / "b.mpq")), keys[0])
    shutil.copy(other / signature.FILE, artifact)
    given = ("--weights", artifact / bundle.WEIGHTS, "--key", keys[0].hex)
    assert "is not the file that was signed" in run(artifact / bundle.PROGRAM, "native", *given)


@pytest.mark.parametrize(
    "artifact, target, count", [("native", "native", 300), (ARM, ARM, 20)], indirect=["artifact"]
)
def test_no_mutant_of_a_signature_is_taken(
    artifact: Path, target: str, count: int, keys: tuple[Pair, Pair]
) -> None:
    text, tried = (artifact / signature.FILE).read_bytes(), 0
    for each in signatures.mutants(text, count):
        if each == text:
            continue
        tried += 1
        (artifact / signature.FILE).write_bytes(each)
        given = ("--weights", artifact / bundle.WEIGHTS, "--key", keys[0].hex)
        said = run(artifact / bundle.PROGRAM, target, *given)
        assert any(part in said for part in ("is no signature, or only", "is altered", "is of another key")), said
    assert tried > count * 0.8


def test_files_that_are_no_keys(artifact: Path, tmp_path: Path, keys: tuple[Pair, Pair]) -> None:
    for name in (*signatures.no_keys(tmp_path), "none", "."):
        said = run(artifact / bundle.PROGRAM, "native", "--key", tmp_path / name)
        assert "holds no public key of Ed25519" in said or "cannot read the key" in said
    assert "holds no public key" in run(artifact / bundle.PROGRAM, "native", "--key", keys[0].private)
    pem = keys[0].public.read_text()
    wrong = (pem.replace("MC", "NC"), pem.replace("BEGIN", "END"), pem[:-30], pem.replace("=", "A"))
    for number, text in enumerate(wrong):
        (tmp_path / f"{number}").write_text(text)
        assert "holds no public key" in run(artifact / bundle.PROGRAM, "native", "--key", tmp_path / f"{number}"), text
    (tmp_path / "crlf").write_text("# of the board\r\n" + pem.replace("\n", "\r\n"), newline="")
    given = ("--weights", artifact / bundle.WEIGHTS, "--key", tmp_path / "crlf")
    assert "calls: median" in run(artifact / bundle.PROGRAM, "native", *given)


@pytest.mark.parametrize("target", [HOST, ARM])
def test_the_program_of_a_pipeline(target: str, tmp_path: Path, keys: tuple[Pair, Pair]) -> None:
    """Its parts, and each part's own program, are held against the one signature of the pipeline."""
    folder = signed(Path(shutil.copytree(compiled_pipeline.path(target=target), tmp_path / "a.mpq")), keys[0])
    tokens_file.write(folder, tmp_path / "ids", PROMPT, steps=1)

    def drawn(*options: object) -> str:
        given = ("--tokens", tmp_path / "ids", "-o", tmp_path / "x.png")
        return run(folder / bundle.PROGRAM, target, *given, *options)

    assert "wrote" in drawn("--key", keys[0].public)
    given = ("--weights", bundle.WEIGHTS, "--key", keys[0].hex)
    assert "calls: median" in run(folder / "vae" / bundle.PROGRAM, target, *given, cwd=folder / "vae")
    assert "is of another key" in drawn("--key", keys[1].public)
    with_equal_sum(folder / "unet" / bundle.WEIGHTS)
    (tmp_path / "x.png").unlink()
    assert "unet/weights.safetensors is not the file that was signed" in drawn("--key", keys[0].hex)
    assert not (tmp_path / "x.png").exists() and "wrote" in drawn()
    (folder / signature.FILE).unlink()
    assert "has no signature" in drawn("--key", keys[0].hex)


def test_an_owners_key_is_built_in(tmp_path: Path, keys: tuple[Pair, Pair]) -> None:
    """The programs of a pipeline and of its parts refuse by themselves what is not signed; so do their sources."""
    folder, (own, other) = tmp_path / "a.mpq", keys
    options = {"recipe": "w8a8", "samples": 2, "steps": 4, "emit": "c", "cache": packed.kernel_cache()}
    model = tiny_pipelines.pipeline("stable-diffusion")
    compile_pipeline(model, folder, parts=KNOWN, owner_key=own.public, **options)
    assert f'"{own.hex}"' in (folder / standalone.OWNER).read_text()
    tokens_file.write(folder, tmp_path / "ids", PROMPT, steps=1)

    def said(*more: object) -> list[str]:
        given = ("--tokens", tmp_path / "ids", "-o", tmp_path / "x.png", *more)
        part = ("--weights", folder / "vae" / bundle.WEIGHTS, *more)
        return [run(folder / bundle.PROGRAM, "native", *given), run(folder / "vae" / bundle.PROGRAM, "native", *part)]

    assert all("has no signature, and has to be signed" in each for each in said())
    signed(folder, other)
    assert all("is of another key" in each for each in said())
    assert all("is another key than the one that was built into this" in each for each in said("--key", other.hex))
    signed(folder, own)
    assert pipeline.read(folder, own.hex).signed is not None
    for more in ((), ("--key", own.public)):
        drawn, called = said(*more)
        assert "wrote" in drawn and "calls: median" in called
    made = tmp_path / "build"
    for wrong, sentence in ((other.hex, "is of another key"), ("no key", "was built with an owner's key that is none")):
        flags = f"-DCMAKE_C_FLAGS=-DMPQ_OWNER_KEY='\"{wrong}\"'"
        for command in (("cmake", "-S", str(folder / "vae"), "-B", str(made), flags), ("cmake", "--build", str(made))):
            subprocess.run(command, check=True, capture_output=True)
        assert sentence in run(made / bundle.PROGRAM, "native", "--weights", folder / "vae" / bundle.WEIGHTS)


def test_owners_keys_that_cannot_be(tmp_path: Path, keys: tuple[Pair, Pair]) -> None:
    with pytest.raises(UserError, match="owner_key is built into a C program: add emit c or standalone"):
        check(Options(owner_key=keys[0].hex), tmp_path / "x.mpq")
    with pytest.raises(UserError, match="holds a private key"):
        check(Options(owner_key=keys[0].private, emit="c"), tmp_path / "x.mpq")


@pytest.mark.parametrize("compiler", ["gcc", "aarch64-linux-gnu-gcc"])
def test_it_compiles_without_a_warning(compiler: str, tmp_path: Path) -> None:
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    where = Path(standalone.__file__).parent
    command = [compiler, "-std=c11", "-O2", "-Wall", "-Wextra", "-Werror", "-c"]
    for source in ("mpq.c", "mpq_vm.c", *standalone.CRYPTOGRAPHY):
        done = subprocess.run([*command, where / source, "-o", tmp_path / "x.o"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
