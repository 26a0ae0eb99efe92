"""Attacks on what is read beside artifacts: problems, tables, recipes, models, calibrations, dumps, the cache."""

from __future__ import annotations

import json
import random
import shutil
import warnings
from pathlib import Path

from mpq_compiler.support import cache
from tests.fuzz.attack import RIGHT, TAKEN, mutant_of, said, tried
from tests.harness import tiny
from tests.harness.damage import damaged, text_of, words


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
    (scratch / name).write_bytes(mutant_of(base / name, chance))
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
    file.write_bytes(mutant_of(file, chance))
    return tried(lambda: denoiser.load(path))


def calibrations(base: Path, scratch: Path, chance: random.Random) -> str:
    from mpq_compiler.frontend import calibration_file, denoiser

    file = scratch / "calibration.safetensors"
    file.write_bytes(mutant_of(base / "calibration.safetensors", chance))
    loaded = denoiser.load(base / "model")
    return tried(lambda: calibration_file.load(loaded, file))


def dumped(folder: Path) -> None:
    from mpq_compiler.driver.compile import compile_denoiser
    from mpq_compiler.frontend import denoiser

    loaded = denoiser.wrap(tiny.model("dit"), name="dit")
    compile_denoiser(loaded, folder / "out", target="reference", pipeline=tiny.PIPELINE, dumps=folder / "dumps")


def dumps(base: Path, scratch: Path, chance: random.Random) -> str:
    path = Path(shutil.copytree(base / "dumps", scratch / "dumps"))
    file = chance.choice(sorted(each for each in path.rglob("*") if each.is_file()))
    file.write_bytes(mutant_of(file, chance))
    return said("inspect", path, *chance.choice([(), ("--layers",), ("--html", scratch / "page.html")]))


def cached(base: Path, scratch: Path, chance: random.Random) -> str:
    """Files and lines of the cache: what is read is what was written, or nothing."""
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
