"""Compiles every denoiser that the tests of diffusers configure, by a recorded call, for a table of docs/models.md.

    git clone --branch v0.42.1 https://github.com/huggingface/diffusers
    python -m benchmarks.diffusers_tests diffusers
    python -m benchmarks.diffusers_tests diffusers --class ZImageTransformer2DModel    # this row anew

The checkout is one of the installed release; its tests say how a tiny model of each class is made and called. Each
gets 12 variations of its latents, is compiled (w8a8) by these calls and nothing else, loaded, and called as the model
is, with 16 variations that calibration has not seen; so is an artifact for the target `reference`, which runs the
packed program node by node. Weights are random, those too that a model leaves uninitialised or starts with zeros, for
of an output of zeros there is nothing to judge: the decibels say what 8 bits and the kernels make of the call, not how
a trained model fares. Where they are fewer than 20, the float model with noise of that power before every layer is
beside them. Their tests need `pip install accelerate parameterized psutil pytest requests-mock`.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import json
import os
import pkgutil
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

from mpq_compiler.support import plugins

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "diffusers_tests.json"
DOCS = ROOT / "docs" / "models.md"
BEGIN, END = "<!-- diffusers tests: begin -->", "<!-- diffusers tests: end -->"
CALLS, UNSEEN = 12, 16
"""Calls that calibrate, and others that judge: with fewer, single ties of rounding are tenths of a decibel."""
LEAST_DB, MOST_DB, LEAST_QUANTIZED = 20.0, 0.1, 0.9
"""What a class must hold: decibels on unseen calls, those by which the reference differs, weights in integers."""
WAYS = ("get_init_dict", "prepare_init_args_and_inputs_for_common")
"""Methods by which a test configures a model."""
COMPILED, REFUSED, FAILS, INTERNAL = "compiled", "refused", "its own forward fails here", "internal error"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="a checkout of huggingface/diffusers at the installed release")
    parser.add_argument("--class", dest="classes", nargs="+", default=[], metavar="NAME", help="only these rows")
    parser.add_argument("--target", default="native")
    parser.add_argument("--extract", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not (options.checkout / "tests" / "models").is_dir():
        sys.exit(f"'{options.checkout}' is no checkout of huggingface/diffusers: it has no folder tests/models")
    if options.extract:
        extract(options.checkout, options.extract)
        return
    with tempfile.TemporaryDirectory() as scratch:
        # In a process of its own: their package is named `tests`, as ours is.
        command = [sys.executable, "-m", "benchmarks.diffusers_tests", str(options.checkout.resolve())]
        subprocess.run([*command, "--extract", scratch], check=True, cwd=ROOT)
        rows = json.loads(RESULTS.read_text())["rows"] if options.classes and RESULTS.exists() else {}
        for name, files in configurations(Path(scratch)):
            if options.classes and name not in options.classes:
                continue
            rows[name] = row(name, files, options.target)
            print(line(name, rows[name]), flush=True)
            write(rows, options.target)


# --- what their tests configure -----------------------------------------------------------------------------------


def extract(checkout: Path, folder: Path) -> None:
    """Writes the class, the configuration and the inputs of every configured denoiser to a file."""
    sys.path.insert(0, str(checkout))
    torch.set_num_threads(1)
    seen: set[str] = set()
    for number, (kind, module, configured) in enumerate(_configured()):
        try:
            torch.manual_seed(0)
            try:
                case = configured()
            except TypeError:  # a unittest
                case = configured("__init__")
            if hasattr(case, "get_init_dict"):
                init, inputs = case.get_init_dict(), case.get_dummy_inputs()
            else:
                init, inputs = case.prepare_init_args_and_inputs_for_common()
        except Exception as error:  # their tests may raise anything
            print(f"{module}: {configured.__name__}: {_one_line(error)}", file=sys.stderr)
            continue
        key = f"{kind} {sorted(init.items(), key=str)}"
        if key not in seen:
            seen.add(key)
            torch.save({"class": kind, "init": init, "inputs": inputs}, folder / f"{kind}-{number:03d}.pt")


def _configured() -> Iterator[tuple[str, str, type]]:
    """The class of a denoiser, the module of its tests, and what configures it there."""
    for kind in ("unets", "transformers"):
        package = plugins.module(f"tests.models.{kind}")
        for found in pkgutil.iter_modules(package.__path__):
            if not found.name.startswith("test_models"):
                continue
            try:
                module = plugins.module(f"{package.__name__}.{found.name}")
            except Exception as error:
                print(f"{found.name}: {_one_line(error)}", file=sys.stderr)
                continue
            own = [c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == module.__name__]
            own = [c for c in own if any(hasattr(c, way) for way in WAYS)]
            for configured in sorted(own, key=lambda c: ("Config" not in c.__name__, c.__name__)):
                model = getattr(configured, "model_class", None)
                model = configured().model_class if isinstance(model, property) else model
                if model is not None:
                    yield model.__name__, found.name, configured


def configurations(folder: Path) -> list[tuple[str, list[Path]]]:
    """The files of each class, in the order of their tests."""
    by_class: dict[str, list[Path]] = {}
    for file in sorted(folder.glob("*.pt")):
        by_class.setdefault(file.stem.rpartition("-")[0], []).append(file)
    return sorted(by_class.items())


# --- a row ----------------------------------------------------------------------------------------------------------


def row(name: str, files: list[Path], target: str) -> dict[str, Any]:
    """What becomes of a class: of the first of its configurations that runs."""
    import diffusers

    if not hasattr(diffusers, name):
        return {"state": FAILS, "sentence": "the installed release has no such class"}
    found: dict[str, Any] = {}
    for file in files:
        begin = time.perf_counter()
        try:
            model, inputs = _model(name, file)
        except Exception as error:
            found = found or {"state": FAILS, "sentence": _one_line(error)}
            continue
        found = _compiled(model, inputs, target)
        return {**found, "seconds": round(time.perf_counter() - begin, 1)}
    return found


def _model(name: str, file: Path) -> tuple[torch.nn.Module, dict[str, Any]]:
    """The model, whose forward was tried, and the arguments of its call."""
    import diffusers

    given = torch.load(file, weights_only=False)
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)  # what is left uninitialised is NaN then
    model: torch.nn.Module = getattr(diffusers, name)(**given["init"]).eval().float()
    torch.use_deterministic_algorithms(False)
    for parameter in model.parameters():
        if not torch.isfinite(parameter).all() or (parameter.ndim > 1 and not parameter.any()):
            torch.nn.init.normal_(parameter.data, std=0.02)
    with torch.no_grad():
        model(**given["inputs"])
    return model, given["inputs"]


def _compiled(model: torch.nn.Module, inputs: dict[str, Any], target: str) -> dict[str, Any]:
    import mpq_compiler
    from mpq_compiler.evaluation.metrics import sqnr_db
    from mpq_compiler.frontend import call_file
    from mpq_compiler.frontend.call_module import variations
    from mpq_compiler.support.errors import UserError

    with tempfile.TemporaryDirectory() as folder:

        def compiled(name: str, target: str) -> Any:
            return mpq_compiler.compile(
                model,
                Path(folder, name),
                calibration=Path(folder, "calls.safetensors"),
                recipe="w8a8",
                target=target,
                cache=Path(folder, "cache"),
            )

        try:
            call_file.write(Path(folder, "calls.safetensors"), model, variations(model, inputs, CALLS, 0))
            report = compiled("x.mpq", target)
            artifact = mpq_compiler.load(Path(folder, "x.mpq"))
            unseen = variations(model, inputs, 1 + UNSEEN, 99)[1:]
            expected, given = _outputs(model, unseen), _outputs(artifact, unseen)
            compiled("reference.mpq", "reference")
            reference = _outputs(mpq_compiler.load(Path(folder, "reference.mpq")), unseen)
        except UserError as error:
            return {"state": REFUSED, "sentence": str(error).replace(f"{folder}/", "")}
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            return {"state": INTERNAL, "sentence": f"{_one_line(error)} ({Path(where.filename).name}:{where.lineno})"}
    unread = [layer for layer, reason in report.fallbacks.items() if "never executed" in reason]
    decibels = sqnr_db(expected, given)
    row = {
        "state": COMPILED,
        "unseen_db": round(decibels, 1),
        "agreement_db": round(decibels - sqnr_db(expected, reference), 4),
        "bits": report.weights["average_bits"],
        "quantized": _in_integers(model, report.layers, unread),
        "fallbacks": len(report.fallbacks) - len(unread),
    }
    if decibels < LEAST_DB:
        with _noise(model):
            row["noise_db"] = round(sqnr_db(expected, _outputs(model, unseen)), 1)
    return row


def _outputs(called: Any, calls: list[dict[str, Any]]) -> np.ndarray:
    """All numbers that a model or an artifact returns for calls."""
    parameters = inspect.signature(getattr(called, "forward", called)).parameters.values()
    named = any(p.name == "return_dict" or p.kind is p.VAR_KEYWORD for p in parameters)
    quiet = {"return_dict": False} if named else {}
    with torch.no_grad():
        return torch.cat([_flat(called(**call, **quiet)) for call in calls]).numpy()


@contextlib.contextmanager
def _noise(model: torch.nn.Module) -> Iterator[None]:
    """Adds to the input of every layer noise as strong as rounding to 8 bits over the range of its values."""
    generator = torch.Generator().manual_seed(0)

    def disturb(_: torch.nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not args or not isinstance(args[0], torch.Tensor) or not args[0].is_floating_point():
            return None
        step = (args[0].amax() - args[0].amin()) / 255
        return (args[0] + step * (torch.rand(args[0].shape, generator=generator) - 0.5), *args[1:])

    kinds = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
    hooks = [m.register_forward_pre_hook(disturb) for m in model.modules() if isinstance(m, kinds)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _in_integers(model: torch.nn.Module, layers: list[dict[str, Any]], unread: Collection[str]) -> float:
    """The part of the matrices that a model's call reads in layers with integer weights and integer inputs."""
    sizes = {n: p.numel() for n, p in model.named_parameters() if p.ndim > 1 and n not in unread}
    rows = [r for r in layers if r["weight"] != "float" and r["activation"] != "float"]
    quantized = {r["name"].split(":")[0].removeprefix("constant.") for r in rows}
    return sum(sizes.get(name, 0) for name in quantized) / sum(sizes.values())


def _flat(output: Any) -> torch.Tensor:
    """All numbers of what a model returns."""
    if isinstance(output, torch.Tensor):
        return output.flatten()
    values = output.values() if isinstance(output, dict) else output
    return torch.cat([_flat(value) for value in values if value is not None])


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]


# --- the table ------------------------------------------------------------------------------------------------------


def line(name: str, found: dict[str, Any]) -> str:
    if found["state"] != COMPILED:
        return f"| `{name}` | {found['state']} | {found['sentence'].replace('|', '/')} | | | | |"
    decibels = f"{found['unseen_db']:.1f} dB" + (f" (noise: {found['noise_db']:.1f})" if "noise_db" in found else "")
    cells = [f"`{name}`", COMPILED, decibels, f"{(found['agreement_db'] or 0.0) + 0.0:+.4f} dB"]
    cells += [f"{100 * found['quantized']:.0f} %", str(found["fallbacks"]), f"{found['seconds']:.0f} s"]
    return "| " + " | ".join(cells) + " |"


def meets(found: dict[str, Any]) -> bool:
    """Whether a class compiles as is asked of each: near the packed program, near the float model, in integers."""
    return (
        found["state"] == COMPILED
        and abs(found["agreement_db"]) <= MOST_DB
        and found["unseen_db"] >= min(LEAST_DB, found.get("noise_db", LEAST_DB))
        and found["quantized"] >= LEAST_QUANTIZED
    )


def write(rows: dict[str, dict[str, Any]], target: str) -> None:
    """Writes the results, and the table in docs/models.md."""
    from benchmarks.machine import provenance

    about = {**provenance(), "target": target}
    about["command"] = " ".join(Path(word).name if Path(word).is_dir() else word for word in about["command"].split())
    RESULTS.write_text(json.dumps({**about, "rows": dict(sorted(rows.items()))}, indent=1) + "\n", encoding="utf-8")
    before, _, rest = DOCS.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    states = [found["state"] for found in rows.values()]
    lines = [
        BEGIN,
        f"{states.count(COMPILED)} of {len(states)} classes compile; of {states.count(FAILS)} the forward fails here. "
        f"{sum(map(meets, rows.values()))} hold all that is asked of",
        f"each: {LEAST_DB:.0f} dB on unseen calls (or what the float model has, with noise of 8 bits),",
        f"{MOST_DB} dB between artifact and reference, {100 * LEAST_QUANTIZED:.0f} % of the weights in integers.",
        "",
        "| class | | on a call unseen | artifact - reference | weights in integers | stay float | took |",
        "|" + " --- |" * 7,
        *(line(name, found) for name, found in sorted(rows.items())),
        "",
        f"Target `{target}` on {about['cpu']}.",
        END,
    ]
    DOCS.write_text(before + "\n".join(lines) + after, encoding="utf-8")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
