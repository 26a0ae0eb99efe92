"""What is attacked, and how: each kind of file that strangers may hand over, or that may have been damaged.

An attack says of each mutant how it ended: ``refused`` with one sentence, ``right`` where it gave what the whole thing
gives, ``taken`` where it was accepted and what it gives is its own. Everything else is an error that it raises.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import resource
import shutil
import subprocess
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from mpq_compiler.artifact import bundle
from mpq_compiler.runtime import compiled_denoiser
from mpq_compiler.support import cache
from mpq_compiler.support.errors import UserError
from tests.harness import mutants, relax_artifact, tiny
from tests.harness.damage import ODD, changed, damaged, text_of, words

REFUSED, RIGHT, TAKEN = "refused", "right", "taken"
INPUTS = {
    "sample": np.linspace(-2, 2, 2 * 3 * relax_artifact.WIDTH, dtype=np.float32).reshape(2, 3, relax_artifact.WIDTH),
    "timestep": np.array([3, 900]),
    "class_labels": np.array([0, 9]),
}


@dataclass(frozen=True)
class Attack:
    """An attack by its name."""

    base: Callable[[Path], None]
    """Makes in a folder what is attacked."""
    mutant: Callable[[Path, Path, random.Random], str]
    """Makes one from the base in an empty folder, tries it, and says how that ended."""
    share: float = 1.0
    """How many are tried of each that is asked for: fewer where one takes seconds."""


def base_of(name: str, folder: Path) -> Path:
    """The folder of the base of an attack, which is made where it is not there; attacks of one base share it."""
    make = ATTACKS[name].base
    place = folder / make.__name__
    if not place.exists():
        place.mkdir(parents=True)
        make(place)
    return place


def sentence(error: UserError) -> str:
    """``refused``. AssertionError: what is said is no sentence."""
    said = str(error)
    assert said and "\n" not in said and len(said) < 2000, said
    return REFUSED


def ran(path: Path, base: Path, strict: bool) -> str:
    """How an artifact that may be a mutant ends. AssertionError: it gives something else, where that is wrong."""
    try:
        found = compiled_denoiser.load(path, threads=1).run(INPUTS)
    except UserError as error:
        return sentence(error)
    if np.array_equal(found, np.load(base / "right.npy")):
        return RIGHT
    assert not strict, "another result, and no word"
    return TAKEN


# ------------------------------------------------------------------------------------------------- artifacts


def artifact(folder: Path) -> None:
    relax_artifact.build(folder / "a.mpq")
    np.save(folder / "right.npy", compiled_denoiser.load(folder / "a.mpq").run(INPUTS))


def damaged_folder(base: Path, scratch: Path, chance: random.Random) -> str:
    path = Path(shutil.copytree(base / "a.mpq", scratch / "a.mpq"))
    files = sorted(path.iterdir())
    one, other = chance.choice(files), chance.choice(files)
    kind = chance.randrange(6)
    if kind == 0:
        one.unlink()
    elif kind == 1:
        one.write_bytes(other.read_bytes())
    elif kind == 2:
        (path / chance.choice(["x", ".x", "signature.txt", "kernels.so.1"])).write_bytes(chance.randbytes(20))
    elif kind == 3:
        one.unlink()
        one.symlink_to(base / "a.mpq" / one.name)
    else:
        one.write_bytes(damaged(one.read_bytes(), chance))
    return ran(path, base, strict=True)


def damaged_zip(base: Path, scratch: Path, chance: random.Random) -> str:
    """Bytes of a zip changed, of each way to compress that there is."""
    ways = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
    path = scratch / "a.zip"
    with zipfile.ZipFile(path, "w", chance.choice(ways)) as made:
        for file in sorted((base / "a.mpq").iterdir()):
            made.write(file, file.name)
    path.write_bytes(damaged(path.read_bytes(), chance))
    return ran(path, base, strict=True)


def odd_zip(base: Path, scratch: Path, chance: random.Random) -> str:
    """A sound zip of other files than an artifact's: twice, elsewhere, a bomb."""
    path = scratch / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as made:
        prefix = chance.choice(["", "", "a/", "../", "/", "a/b/"])
        for file in sorted((base / "a.mpq").iterdir()):
            if chance.random() < 0.05:
                continue
            content = file.read_bytes()
            if file.name == bundle.MANIFEST and chance.random() < 0.5:
                part = chance.choice([b"[],", b"{},", b"0,", b'"x",', b"[[[[]]]],"])
                content = b'{"format":"mpq-artifact","x":[' + part * chance.choice([10, 10**5, 3 * 10**6]) + b"0]}"
            with contextlib.suppress(UserWarning):
                made.writestr(prefix + file.name, content)
        if chance.random() < 0.3:
            made.writestr(chance.choice(["x", "signature.txt", "weights.safetensors/", "é", "a" * 300]), b"\0" * 10**7)
    return ran(path, base, strict=True)


def resealed(path: Path, manifest: dict[str, Any]) -> None:
    """Writes a manifest as one who knows how hashes are computed."""
    with contextlib.suppress(ValueError, TypeError, AttributeError):
        manifest["artifact_sha256"] = bundle.digest(manifest)
    (path / bundle.MANIFEST).write_bytes(bundle.canonical(manifest))


def _manifest(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((path / bundle.MANIFEST).read_bytes())
    return found


def resealed_manifest(base: Path, scratch: Path, chance: random.Random) -> str:
    path = Path(shutil.copytree(base / "a.mpq", scratch / "a.mpq"))
    mutant = changed(_manifest(path), chance)
    if not isinstance(mutant, dict):
        return RIGHT
    try:
        resealed(path, mutant)
    except (ValueError, RecursionError):
        return RIGHT  # no text, so that there is nothing to read
    return ran(path, base, strict=True)


def resealed_weights(base: Path, scratch: Path, chance: random.Random) -> str:
    path = Path(shutil.copytree(base / "a.mpq", scratch / "a.mpq"))
    (path / bundle.MANIFEST).chmod(0o644)
    file = path / bundle.WEIGHTS
    ((_, content),) = mutants.mutants(chance.randrange(2**32), 1, file.read_bytes())
    file.write_bytes(content)
    manifest = _manifest(path)
    manifest["files"][bundle.WEIGHTS] = bundle.described(file)
    resealed(path, manifest)
    return ran(path, base, strict=False)


# ----------------------------------------------------------------------------------------------- what is read


def said(*arguments: object) -> str:
    """How a command ends: AssertionError where it is neither done nor refused with one sentence."""
    from mpq_compiler.cli import mpqc

    errors, output = io.StringIO(), io.StringIO()
    with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(output):
        code = mpqc.main([*map(str, arguments)])
    sentences = [line for line in errors.getvalue().splitlines() if line.startswith("mpqc: ")]
    assert "internal error" not in errors.getvalue() and "Traceback" not in errors.getvalue(), errors.getvalue()[-500:]
    assert code == 0 or (code == 1 and len(sentences) == 1), (code, errors.getvalue()[-500:])
    return REFUSED if code else TAKEN


def tried(read: Callable[[], object]) -> str:
    """How reading a file ends."""
    try:
        read()
    except UserError as error:
        return sentence(error)
    return TAKEN


def problem(folder: Path) -> None:
    layers = [
        {"name": f"layer{i}", "choices": [
            {"name": f"int{b}", "costs": {"bytes": b * (i + 1)}, "loss": 4.0 ** -b * (i + 1)} for b in (2, 4, 8)]}
        for i in range(4)
    ]  # fmt: skip
    document = {"version": 1, "layers": layers, "budgets": [{"cost": "bytes", "max": 40}]}
    (folder / "problem.json").write_text(json.dumps(document | {"ties": [["layer1", "layer2"]]}))


def allocation(base: Path, scratch: Path, chance: random.Random) -> str:
    text = (base / "problem.json").read_bytes()
    mutant = text_of(json.loads(text), chance) if chance.random() < 0.8 else damaged(text, chance)
    (scratch / "problem.json").write_bytes(mutant)
    return said("allocate", scratch / "problem.json", "--time-limit", "2")


def table(folder: Path) -> None:
    """A sensitivity table, and a plan of it."""
    path, pipeline = tiny.save("dit", folder), "trace,layout,calibrate{samples=2,steps=2},time-groups,sensitivity"
    measured = folder / "table.json"
    assert said("sensitivity", path, "-o", measured, "--pipeline", f"{pipeline}{{inputs=2}}") == TAKEN
    assert said("allocate", measured, "--weights", "4", "-o", folder / "plan.json") == TAKEN


def tables(base: Path, scratch: Path, chance: random.Random) -> str:
    from mpq_compiler.allocation.problem import load_plan

    name = chance.choice(["table.json", "table.json", "plan.json"])
    (scratch / name).write_bytes(_mutant_of(base / name, chance))
    if name == "plan.json":
        return tried(lambda: load_plan(scratch / name))
    return said("allocate", scratch / name, "--weights", "4", "--activations", "8", "--time-limit", "2")


def recipe(folder: Path) -> None:
    from mpq_compiler.pipeline import recipes

    for name in recipes.names():
        shutil.copy(Path(recipes.__file__).parents[1] / "recipes" / f"{name}.toml", folder)


def recipes_(base: Path, scratch: Path, chance: random.Random) -> str:
    from mpq_compiler.pipeline import recipes

    text = chance.choice(sorted(base.glob("*.toml"))).read_bytes()
    (scratch / "r.toml").write_bytes(chance.choice([words, damaged])(text, chance))
    return tried(lambda: recipes.load(scratch / "r.toml"))


def pipelines(base: Path, scratch: Path, chance: random.Random) -> str:
    from mpq_compiler.pipeline import parser, recipes

    text = ",".join(recipes.load(chance.choice(recipes.names())).pipeline)
    mutant = words(text.encode(), chance).decode()
    return tried(lambda: parser.parse(mutant))


def model(folder: Path) -> None:
    from mpq_compiler.frontend import denoiser, trajectories
    from mpq_compiler.support import tensorfile

    path = tiny.save("unet2d", folder)
    path.rename(folder / "model")
    inputs = trajectories.record_calibration(denoiser.load(folder / "model"), 2, 2, 0)
    with (folder / "calibration.safetensors").open("wb") as stream:
        tensorfile.save(stream, {name: tensor.numpy() for name, tensor in inputs.items()})


def models(base: Path, scratch: Path, chance: random.Random) -> str:
    from mpq_compiler.frontend import denoiser

    path = Path(shutil.copytree(base / "model", scratch / "model"))
    file = chance.choice(sorted(each for each in path.rglob("*") if each.is_file()))
    file.write_bytes(_mutant_of(file, chance))
    return tried(lambda: denoiser.load(path))


def calibrations(base: Path, scratch: Path, chance: random.Random) -> str:
    from mpq_compiler.frontend import calibration_file, denoiser

    file = scratch / "calibration.safetensors"
    file.write_bytes(_mutant_of(base / "calibration.safetensors", chance))
    loaded = denoiser.load(base / "model")
    return tried(lambda: calibration_file.load(loaded, file))


def _mutant_of(file: Path, chance: random.Random) -> bytes:
    """By what the file is."""
    content = file.read_bytes()
    if file.suffix == ".json" and chance.random() < 0.8:
        return text_of(json.loads(content), chance)
    if file.suffix == ".safetensors" and chance.random() < 0.8:
        ((_, mutant),) = mutants.mutants(chance.randrange(2**32), 1, content)
        return mutant
    return damaged(content, chance)


def dumped(folder: Path) -> None:
    from mpq_compiler.driver.compile import compile_denoiser
    from mpq_compiler.frontend import denoiser

    loaded = denoiser.wrap(tiny.model("dit"), name="dit")
    compile_denoiser(loaded, folder / "out", target="reference", pipeline=tiny.PIPELINE, dumps=folder / "dumps")


def dumps(base: Path, scratch: Path, chance: random.Random) -> str:
    path = Path(shutil.copytree(base / "dumps", scratch / "dumps"))
    file = chance.choice(sorted(each for each in path.rglob("*") if each.is_file()))
    file.write_bytes(_mutant_of(file, chance))
    return said("inspect", path, *chance.choice([(), ("--layers",), ("--html", scratch / "page.html")]))


# --------------------------------------------------------------------------------------------- the C program

SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g", "-O1", "-std=c11")


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
    from mpq_compiler.support import tensorfile

    made = compile_denoiser(
        *(denoiser.wrap(tiny.model("dit"), name="dit"), folder / "a.mpq"), emit="c", pipeline=pipeline,
    )  # fmt: skip
    assert made.artifact
    names = ("mpq.c", "mpq_run.c", "mpq_model.c", "libkernels.a", "monocypher.c", "monocypher-ed25519.c")
    sources = [str(folder / "a.mpq" / name) for name in names]
    command = ["gcc", *SANITIZE, *sources, "-lpthread", "-lm", "-o", str(folder / "run")]
    subprocess.run(command, check=True, capture_output=True)
    function = bundle.read_manifest(folder / "a.mpq")["functions"][0]
    source = np.random.default_rng(0)
    inputs = {
        value["name"]: (source.standard_normal(value["shape"]) if value["dtype"] == "float32" else
                        np.ones(value["shape"])).astype(value["dtype"])
        for value in function["inputs"]
    }  # fmt: skip
    with (folder / "inputs").open("wb") as stream:
        tensorfile.save(stream, inputs)
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
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}  # its end is what frees its memory
    done = subprocess.run(
        [*map(str, command)], capture_output=True, env=environment, timeout=60, preexec_fn=_no_limit
    )  # fmt: skip
    said = done.stderr.decode(errors="replace")
    assert done.returncode in (0, 1), (done.returncode, said[:600])
    if done.returncode:
        assert said.startswith("error: ") and said.count("\n") == 1, said[:300]
    return REFUSED if done.returncode else RIGHT


def _no_limit() -> None:
    """Sanitizers reserve a large part of the address space, which the process of the campaign bounds."""
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


# ------------------------------------------------------------------------------------------------- the cache


def nothing(folder: Path) -> None:
    """What needs no base."""


def cached(base: Path, scratch: Path, chance: random.Random) -> str:
    """Files and lines of the cache: what is read is what was written, or nothing."""
    import warnings

    content, place = chance.randbytes(200), scratch / "fits" / "x"
    known = cache.Results("sensitivity", "key", scratch)
    values = {str(i): chance.random() for i in range(5)}
    for name, value in values.items():
        known[name] = value
    cache.write(place, content)
    whole = place.read_bytes(), known.path.read_bytes()
    place.write_bytes(damaged(whole[0], chance))
    known.path.write_bytes(damaged(whole[1], chance))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found, read = cache.Results("sensitivity", "key", scratch), cache.read(place)
    assert read in (None, content)
    assert all(found[name] == values[name] for name in found)
    return RIGHT


ATTACKS = {
    "artifact, a folder": Attack(artifact, damaged_folder),
    "artifact, a zip": Attack(artifact, damaged_zip),
    "artifact, an odd zip": Attack(artifact, odd_zip),
    "manifest, hashes right": Attack(artifact, resealed_manifest),
    "weights, hashes right": Attack(artifact, resealed_weights),
    "cache": Attack(nothing, cached),
    "allocation problem": Attack(problem, allocation),
    "sensitivity table, plan": Attack(table, tables, 0.5),
    "recipe": Attack(recipe, recipes_),
    "pipeline text": Attack(nothing, pipelines),
    "model folder": Attack(model, models, 0.2),
    "calibration file": Attack(model, calibrations, 0.2),
    "dumps": Attack(dumped, dumps, 0.2),
    "C program, sanitized": Attack(program, programs, 0.5),
    "C program, coded weights": Attack(coded_program, streams, 0.5),
    "C program, tokens": Attack(drawing, tokens, 0.5),
}
