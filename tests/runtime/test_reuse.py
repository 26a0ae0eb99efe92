"""Artifacts whose steps reuse a part of the network: bits, samplers, pipelines of diffusers, bad use."""

from __future__ import annotations

import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import mpq_compiler
from mpq_compiler.evaluation.painter import from_artifact
from mpq_compiler.frontend import denoiser as denoisers
from mpq_compiler.runtime.compiled_denoiser import CompiledDenoiser, load
from mpq_compiler.sampling import loop
from mpq_compiler.sampling.schedulers import Scheduler
from mpq_compiler.support.errors import Notice
from mpq_compiler.targets import table as targets

MODEL, STEPS = "fashion-unet", 8
PIPELINE = (
    "trace,layout,calibrate{{samples=3,steps=8}},time-groups{{groups=2}},bit-allocation{{uniform=int8}},{}"
    "insert-fake-quant,round-weights,fold-fake-quant,fuse-epilogues"
)
KEPT = f"keep-values{{every=2,steps={STEPS},share=0.97,images=4,rounds=2}},"
OUTPUTS = f"keep-values{{every=2,steps={STEPS},images=4,rounds=2}},"


def compiled(folder: Path, kept: str = KEPT, target: str = "native") -> Path:
    path = folder / f"{target}{len(kept)}.mpq"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mpq_compiler.compile(MODEL, path, pipeline=PIPELINE.format(kept), target=target, shapes="1x4x14x14,2x4x14x14")
    return path


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("reuse"))


@pytest.fixture
def denoiser(path) -> CompiledDenoiser:
    return load(path, threads=1)


def drawn(model, denoiser: CompiledDenoiser, count: int = 3, steps: int = STEPS, seed: int = 5, **more) -> np.ndarray:
    scheduler = Scheduler.from_config(denoiser.manifest["sampling"]["scheduler"])
    labels = {"class_labels": np.arange(count)}
    return loop.sample(model, scheduler, loop.gaussian(count, (4, 14, 14), seed), labels, steps, **more)


def whole(denoiser: CompiledDenoiser):
    return lambda **inputs: denoiser.run(inputs)


def test_the_manifest_says_what_is_reused(denoiser):
    about = denoiser.manifest["reuse"]
    assert [bool(sources) for sources in about["sources"]] == [False] * 2 + [False, True] * 3
    assert len(about["timesteps"]) == STEPS and about["shape"] == [14, 14, 48]
    assert about["keeping"] == ["denoise_b1_keeping", "denoise_b2_keeping"]
    assert denoiser.input_names == ["sample", "timestep", "class_labels"]
    assert from_artifact(denoiser.artifact.path).steps == STEPS


def test_calls_from_outside_of_a_sampler_have_the_bits_of_an_artifact_without(denoiser, tmp_path):
    plain = load(compiled(tmp_path, ""), threads=1)
    assert "reuse" not in plain.manifest
    assert np.array_equal(drawn(whole(denoiser), denoiser), drawn(whole(plain), plain))
    assert np.array_equal(drawn(plain.steps(), plain), drawn(whole(plain), plain))


def test_steps_that_reuse_draw_something_else_but_near(denoiser):
    expected, found = drawn(whole(denoiser), denoiser), drawn(steps := denoiser.steps(), denoiser)
    assert steps.reused == 3
    error = float(np.square(found - expected).sum() / np.square(expected).sum())
    assert 0 < error < 0.05


def test_where_the_output_is_kept_steps_that_reuse_call_nothing(denoiser, tmp_path, monkeypatch):
    kept = load(compiled(tmp_path, OUTPUTS), threads=1)
    assert kept.manifest["reuse"].keys() == {"node", "timesteps", "sources"}
    assert kept.manifest["functions"] == load(compiled(tmp_path, ""), threads=1).manifest["functions"]
    expected, called = drawn(whole(denoiser), denoiser), []
    run = kept.executor.run
    monkeypatch.setattr(kept.executor, "run", lambda *args: called.append(args) or run(*args))
    found = drawn(steps := kept.steps(), kept, batch=1)
    assert steps.reused == 3 * 3 and len(called) == 3 * (STEPS - 3)
    assert 0 < np.square(found - expected).sum() / np.square(expected).sum() < 0.05
    assert np.array_equal(drawn(whole(kept), kept), expected)


def test_all_cpu_targets_draw_the_same_bits(denoiser, tmp_path):
    narrow = "x86-64-avx2"
    if targets.missing_features(targets.resolve(narrow)) or targets.resolve("native").name == narrow:
        pytest.skip(f"this machine has no second target beside {narrow}")
    other = load(compiled(tmp_path, target=narrow), threads=1)
    assert np.array_equal(drawn(denoiser.steps(), denoiser), drawn(other.steps(), other))


@pytest.mark.parametrize("threads", [1, 2])
def test_batches_do_not_show(path, threads):
    denoiser = load(path, threads=threads)
    together = drawn(denoiser.steps(), denoiser, batch=3)  # in parts of two and one
    assert np.array_equal(together, drawn(denoiser.steps(), denoiser, batch=1))


def test_other_steps_are_computed_whole_with_a_notice(denoiser):
    with pytest.warns(Notice, match=f"does not follow the {STEPS} steps"):
        found = drawn(denoiser.steps(), denoiser, steps=5)
    assert np.array_equal(found, drawn(whole(denoiser), denoiser, steps=5))


def test_samplers_in_threads_keep_their_own(denoiser):
    expected = {seed: drawn(denoiser.steps(), denoiser, seed=seed) for seed in range(4)}
    found = {}

    def draw(seed: int) -> None:
        found[seed] = drawn(denoiser.steps(), denoiser, seed=seed)

    threads = [threading.Thread(target=draw, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(found[seed], expected[seed]) for seed in expected)


def test_guidance_reuses_for_both_conditions(denoiser):
    model = denoisers.load(MODEL)
    conditions = {"class_labels": np.array([1, 2])}
    null = {"class_labels": np.full(2, model.null_class)}
    scheduler = Scheduler.from_config(denoiser.manifest["sampling"]["scheduler"])
    noise = loop.gaussian(2, (4, 14, 14), 3)

    def draw(model):
        return loop.sample(model, scheduler, noise, conditions, STEPS, guidance=2.0, null_conditions=null)

    steps = denoiser.steps()
    found, expected = draw(steps), draw(whole(denoiser))
    assert steps.reused == 6
    assert 0 < np.square(found - expected).sum() / np.square(expected).sum() < 0.1


def test_a_block_makes_the_calls_of_a_pipeline_steps(denoiser):
    """As a pipeline of diffusers calls its model, with torch tensors."""
    scheduler = Scheduler.from_config(denoiser.manifest["sampling"]["scheduler"])
    noise, labels = loop.gaussian(2, (4, 14, 14), 3), {"class_labels": np.array([1, 2])}

    def called(sample, timestep, class_labels):
        given = (torch.from_numpy(np.asarray(x)) for x in (sample, timestep, class_labels))
        return denoiser(*given).sample.numpy()

    def draw(model):
        return loop.sample(model, scheduler, noise, labels, STEPS)

    with denoiser.reusing():
        found = draw(called)
    assert np.array_equal(found, draw(denoiser.steps()))
    assert np.array_equal(draw(called), draw(whole(denoiser))), "beyond the block all is computed"


def test_a_schedule_that_is_no_schedule_is_refused(path, tmp_path):
    import json

    manifest = json.loads((path / "manifest.json").read_text())
    for change in ({"timesteps": []}, {"shape": [0]}, {"keeping": []}, {"more": 1}):
        broken = manifest | {"reuse": manifest["reuse"] | change}
        assert mpq_compiler.schemas.check(broken, "manifest")
