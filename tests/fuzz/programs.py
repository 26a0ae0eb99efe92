"""Attacks on C programs, which are compiled with sanitizers: their inputs, weights, signatures and tokens."""

from __future__ import annotations

import json
import os
import random
import resource
import subprocess
from pathlib import Path
from unittest import mock

from mpq_compiler.artifact import bundle
from tests.fuzz.attack import REFUSED, RIGHT, TAKEN
from tests.harness import mutants, tiny
from tests.harness.damage import ODD, damaged

SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g", "-O1", "-std=c11")
SANITIZED = {"ASAN_OPTIONS": "detect_leaks=0"}
"""The environment of such a program: its end is what frees its memory."""


def program(folder: Path) -> None:
    _program(folder, tiny.PIPELINE)


def coded_program(folder: Path) -> None:
    """The same with entropy-coded weights, which it decodes when it opens them."""
    _program(folder, tiny.PIPELINE.replace("uniform=int4", "uniform=ec2"))


def _program(folder: Path, pipeline: str) -> None:
    """A program whose C is compiled again with sanitizers, with inputs, a signature and what it gives."""
    from mpq_compiler.artifact import signing
    from mpq_compiler.driver.compile import compile_denoiser
    from mpq_compiler.frontend import denoiser
    from mpq_compiler.latency.timing import random_inputs
    from mpq_compiler.support import tensorfile

    made = compile_denoiser(
        *(denoiser.wrap(tiny.model("dit"), name="dit"), folder / "a.mpq"), emit="c", pipeline=pipeline,
    )  # fmt: skip
    assert made.artifact
    names = ("mpq.c", "mpq_run.c", "mpq_model.c", "libkernels.a", "monocypher.c", "monocypher-ed25519.c")
    sources = [str(folder / "a.mpq" / name) for name in names]
    command = ["gcc", *SANITIZE, *sources, "-lpthread", "-lm", "-o", str(folder / "run")]
    subprocess.run(command, check=True, capture_output=True)
    manifest = bundle.read_manifest(folder / "a.mpq")
    with (folder / "inputs").open("wb") as stream:
        tensorfile.save(stream, random_inputs(manifest, manifest["functions"][0]["batch"]))
    signing.new_key(folder / "k.pem")
    signing.sign(folder / "a.mpq", signing.private_key(folder / "k.pem"))
    (folder / "key").write_text(signing.private_key(folder / "k.pem").public_key().public_bytes_raw().hex())
    assert _runs(folder, folder, {}, folder / "right") == RIGHT


def programs(base: Path, scratch: Path, chance: random.Random) -> str:
    """Inputs, weights or the signature damaged; all but inputs have to be right to be taken."""
    name = chance.choice(["inputs", "inputs", "weights.safetensors", "signature.txt"])
    whole = (base if name == "inputs" else base / "a.mpq") / name
    content = whole.read_bytes()
    if name == "signature.txt" or chance.random() < 0.3:
        mutant = damaged(content, chance)
    else:
        ((_, mutant),) = mutants.mutants(chance.randrange(2**32), 1, content)
    how = _runs(base, scratch, {name: mutant}, scratch / "output")
    if how == REFUSED:
        return how
    same = (scratch / "output").read_bytes() == (base / "right").read_bytes()
    assert same or name == "inputs", f"{name} was altered, and the output is another"
    return RIGHT if same else TAKEN


def streams(base: Path, scratch: Path, chance: random.Random) -> str:
    """Entropy-coded weights and zero points damaged, and a float so that the file's checksum is that of the build."""
    from mpq_compiler.backends.tvm import standalone

    place = scratch / "weights.safetensors"
    content = bytearray((base / "a.mpq" / place.name).read_bytes())
    begin = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:begin])
    places: dict[bool, list[tuple[int, int]]] = {True: [], False: []}
    for about in header.values():
        if "data_offsets" in about:
            first, end = about["data_offsets"]
            places[about["dtype"].startswith("F")].append((begin + first, begin + end))
    for _ in range(chance.choice([1, 1, 4, 100])):
        at = chance.randrange(*chance.choice(places[False]))
        content[at] ^= 1 << chance.randrange(8)
    word = 8 * chance.choice([i for first, end in places[True] for i in range(-(-first // 8), end // 8)])
    place.write_bytes(content)
    missing = standalone.describe(base / "a.mpq" / place.name).sum - standalone.describe(place).sum
    missing *= pow(word // 4 + 1, -1, 1 << 64)
    value = int.from_bytes(content[word : word + 8], "little") + missing
    content[word : word + 8] = (value % (1 << 64)).to_bytes(8, "little")
    how = _runs(base, scratch, {place.name: bytes(content)}, scratch / "output", owned=False)
    return TAKEN if how == RIGHT else how


def drawing(folder: Path) -> None:
    """A pipeline whose program is compiled with sanitizers, and a file of tokens that it draws."""
    from mpq_compiler.backends.tvm.standalone import join
    from mpq_compiler.driver.pipeline import KNOWN, compile_pipeline
    from mpq_compiler.runtime import tokens_file
    from tests.harness import tiny_pipelines

    said = {"recipe": "w8a8", "samples": 2, "steps": 4, "emit": "c"}
    with mock.patch.object(join, "OPTIONS", SANITIZE):
        compile_pipeline(tiny_pipelines.pipeline("stable-diffusion"), folder / "a.mpq", parts=KNOWN, **said)
    tokens_file.write(folder / "a.mpq", folder / "ids", "a red fox in the sea", steps=1)
    assert _ended(folder / "a.mpq" / bundle.PROGRAM, "--tokens", folder / "ids", "-o", folder / "a.png") == RIGHT


def tokens(base: Path, scratch: Path, chance: random.Random) -> str:
    """Its bytes, its tensors, or numbers of its instructions and buffers are others."""
    from mpq_compiler.support import tensorfile

    content, place, kind = (base / "ids").read_bytes(), scratch / "ids", chance.randrange(3)
    if kind == 0:
        place.write_bytes(damaged(content, chance))
    elif kind == 1:
        ((_, mutant),) = mutants.mutants(chance.randrange(2**32), 1, content)
        place.write_bytes(mutant)
    else:
        arrays = {name: value.copy() for name, value in tensorfile.load(base / "ids").items()}
        for _ in range(chance.randint(1, 3)):
            table = arrays[chance.choice(["instructions", "buffers"])]
            table[tuple(chance.randrange(size) for size in table.shape)] = chance.choice(ODD)
        with place.open("wb") as stream:
            tensorfile.save(stream, arrays)
    picture = scratch / "x.png"
    how = _ended(base / "a.mpq" / bundle.PROGRAM, "--tokens", place, "-o", picture)
    assert picture.exists() == (how == RIGHT)
    return TAKEN if how == RIGHT and picture.read_bytes() != (base / "a.png").read_bytes() else how


def _runs(base: Path, scratch: Path, instead: dict[str, bytes], output: Path, owned: bool = True) -> str:
    """Runs the program on its files, some of them others."""
    files = {name: base / "a.mpq" / name for name in ("weights.safetensors", "signature.txt")}
    files["inputs"] = base / "inputs"
    place = scratch / "files"
    place.mkdir(exist_ok=True)
    for name, path in files.items():
        (place / name).write_bytes(instead.get(name, path.read_bytes()))
    command = [base / "run", "--weights", place / "weights.safetensors", "--inputs", place / "inputs"]
    return _ended(*command, "--output", output, *(("--key", base / "key") if owned else ()))


def _ended(*command: object) -> str:
    """How a program with sanitizers ends. AssertionError: it crashed, or said no sentence."""
    done = subprocess.run(
        [*map(str, command)], capture_output=True, env=os.environ | SANITIZED, timeout=60, preexec_fn=free_of_limits
    )  # fmt: skip
    said = done.stderr.decode(errors="replace")
    assert done.returncode in (0, 1), (done.returncode, said[:600])
    if done.returncode:
        assert said.startswith("error: ") and said.count("\n") == 1, said[:300]
    return REFUSED if done.returncode else RIGHT


def free_of_limits() -> None:
    """Sanitizers reserve a large part of the address space, which the process of the campaign bounds."""
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
