"""What is attacked, and how: each kind of file that strangers may hand over, or that may have been damaged."""

from __future__ import annotations

from pathlib import Path

from tests.fuzz import artifacts, disks, documents, loras, programs, requests
from tests.fuzz.attack import Attack, nothing


def base_of(name: str, folder: Path) -> Path:
    """The folder of the base of an attack, which is made where it is not there; attacks of one base share it."""
    make = ATTACKS[name].base
    place = folder / make.__name__
    if not place.exists():
        place.mkdir(parents=True)
        make(place)
    return place


ATTACKS = {
    "artifact, a folder": Attack(artifacts.artifact, artifacts.damaged_folder),
    "artifact, a zip": Attack(artifacts.artifact, artifacts.damaged_zip),
    "artifact, an odd zip": Attack(artifacts.artifact, artifacts.odd_zip),
    "manifest, hashes right": Attack(artifacts.artifact, artifacts.resealed_manifest),
    "weights, hashes right": Attack(artifacts.artifact, artifacts.resealed_weights),
    "cache": Attack(nothing, documents.cached),
    "allocation problem": Attack(documents.problem, documents.allocation),
    "sensitivity table, plan": Attack(documents.table, documents.tables, 0.5),
    "recipe": Attack(documents.recipe, documents.recipes_),
    "pipeline text": Attack(nothing, documents.pipelines),
    "model folder": Attack(documents.model, documents.models, 0.2),
    "calibration file": Attack(documents.model, documents.calibrations, 0.2),
    "LoRA": Attack(loras.branched, loras.loras),
    "dumps": Attack(documents.dumped, documents.dumps, 0.2),
    "C program, sanitized": Attack(programs.program, programs.programs, 0.5),
    "C program, coded weights": Attack(programs.coded_program, programs.streams, 0.5),
    "C program, tokens": Attack(programs.drawing, programs.tokens, 0.5),
    "full disk": Attack(disks.compiled, disks.full, 0.1),
    "requests to a device": Attack(requests.device, requests.requests, 0.5),
}
