"""An attack on LoRA files: their bytes, tensors, names and settings, loaded into an artifact with branches."""

from __future__ import annotations

import json
import random
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from mpq_compiler.latency.timing import random_inputs
from mpq_compiler.runtime import compiled_denoiser, lora_file
from mpq_compiler.support.errors import UserError
from tests.fuzz.attack import RIGHT, TAKEN, mutant_of, sentence
from tests.harness import tiny
from tests.harness.damage import changed, text_of

RANK = 2
SETTINGS = {"lora_alpha": 6, "r": RANK, "use_rslora": True, "use_dora": False, "alpha_pattern": {"proj": 3}}
LAYERS = 4
"""As many of the artifact's layers a LoRA changes."""


def branched(folder: Path) -> None:
    """An artifact with branches, and a LoRA as kohya's scripts, diffusers and PEFT write it."""
    from mpq_compiler.driver.compile import compile_denoiser
    from mpq_compiler.frontend import denoiser

    how = {"target": "reference", "pipeline": tiny.PIPELINE, "lora_rank": RANK, "lora_layers": "*"}
    compile_denoiser(denoiser.wrap(tiny.model("dit"), name="dit"), folder / "a.mpq", **how)
    source = np.random.default_rng(0)
    kohya, diffusers = {}, {}
    layers = compiled_denoiser.load(folder / "a.mpq").manifest["lora"]["layers"]
    for layer in layers[:: len(layers) // LAYERS][:LAYERS]:
        outputs, *rest = layer["shape"]
        down = source.standard_normal((RANK, *rest)).astype(np.float16)
        up = source.standard_normal((outputs, RANK, *[1] * (len(rest) - 1))).astype(np.float16)
        name = "lora_unet_" + layer["name"].replace(".", "_")
        kohya |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": np.ones((), "f4")}
        name = "transformer." + layer["name"]
        diffusers |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}
    save_file(kohya, folder / "kohya.safetensors")
    settings = {f"transformer.{name}": value for name, value in SETTINGS.items()}
    save_file(diffusers, folder / "diffusers.safetensors", {lora_file.METADATA: json.dumps(settings)})
    peft = {name.replace("transformer.", "base_model.model."): value for name, value in diffusers.items()}
    save_file(peft, folder / "peft.safetensors")
    (folder / lora_file.ADAPTER).write_text(json.dumps(SETTINGS))
    for kind in (None, "kohya", "diffusers", "peft"):
        np.save(folder / f"{kind}.npy", _drawn(folder, kind and folder / f"{kind}.safetensors"))


def loras(base: Path, scratch: Path, chance: random.Random) -> str:
    kind = chance.choice(["kohya", "diffusers", "peft"])
    file = Path(shutil.copy(base / f"{kind}.safetensors", scratch))
    beside = Path(shutil.copy(base / lora_file.ADAPTER, scratch))
    if chance.random() < 0.4:
        file.write_bytes(mutant_of(file, chance))
    elif kind == "kohya" or chance.random() < 0.5:
        save_file(_changed(load_file(file), chance), file)
    elif kind == "peft":
        beside.write_bytes(mutant_of(beside, chance))
    else:
        settings = text_of({f"transformer.{name}": value for name, value in SETTINGS.items()}, chance)
        save_file(load_file(file), file, {lora_file.METADATA: settings.decode(errors="replace")})
    found, how = _drawn(base, file), TAKEN
    if isinstance(found, UserError):
        how, found, kind = sentence(found), _drawn(base, None), "None"
    assert isinstance(found, np.ndarray) and np.isfinite(found).all(), "what it draws is not finite"
    same = np.array_equal(found, np.load(base / f"{kind}.npy"))
    assert same or how == TAKEN, "it was refused and has changed what is drawn"
    return RIGHT if same and how == TAKEN else how


def _changed(tensors: Mapping[str, np.ndarray], chance: random.Random) -> dict[str, np.ndarray]:
    """Tensors of which one to three have another name, shape, type or values, or are gone."""
    found = dict(tensors)
    for _ in range(chance.choice([1, 1, 2, 3])):
        name = chance.choice([*found])
        value = found.pop(name)
        kind = chance.randrange(8)
        if kind == 0:
            value = np.full_like(value, chance.choice([0, 1e-8, 6e4, -6e4, float("inf"), float("nan")]))
        elif kind == 1:
            value = value[chance.choice([slice(0), slice(1), slice(None, None, 2)])] if value.ndim else value[None][:0]
        elif kind == 2:
            value = np.swapaxes(value, 0, -1) if value.ndim else value[None, None]
        elif kind == 3:
            value = value.astype(chance.choice(["f4", "f8", "i1", "u1", "i8", "?"]))
        elif kind == 4:
            value = chance.choice([value[None], value.reshape(-1), found.get(chance.choice([name, *found]), value)])
        elif kind == 5:
            value = value.astype("f8") * chance.choice([1e-300, 1e20, 1e38, 1e300])
        elif kind == 6:
            name = str(changed([name], chance))
        else:
            continue
        found[name] = np.ascontiguousarray(value)
    return found


_opened: dict[Path, compiled_denoiser.CompiledDenoiser] = {}
"""Artifacts, each loaded once a process."""


def _drawn(base: Path, lora: Path | None) -> np.ndarray | UserError:
    """What the artifact gives with a LoRA, or why it was refused; None: as the last one that was refused left it."""
    if base not in _opened:
        _opened[base] = compiled_denoiser.load(base / "a.mpq", threads=1)
    artifact = _opened[base]
    if lora is not None:
        artifact.unload_lora()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                artifact.load_lora(lora)
        except UserError as error:
            return error
    return artifact.run(random_inputs(artifact.manifest, 2))
