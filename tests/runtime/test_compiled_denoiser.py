from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
import venv
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from mpq_compiler.artifact import bundle
from mpq_compiler.runtime import calls, compiled_denoiser, tvm
from mpq_compiler.support.errors import Notice, UserError
from mpq_compiler.targets import table as targets

pytest.importorskip("tvm")
from tests.harness import compiled_pipeline, relax_artifact, tree
from tests.harness.relax_artifact import expected

ROOT = Path(__file__).parents[2]
RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("artifact") / "tiny.mpq"
    relax_artifact.build(path)
    return path


@pytest.fixture(scope="module")
def denoiser(path):
    return compiled_denoiser.load(path, threads=1)


def inputs(batch: int, height: int = 3) -> dict[str, np.ndarray]:
    """Eighths, so that every product and sum is exact however the kernel is compiled."""
    return {
        "sample": RNG.integers(-64, 64, (batch, height, 16)).astype(np.float32) / 8,
        "timestep": RNG.integers(0, 1000, batch),
        "class_labels": RNG.integers(0, 10, batch),
    }


def python(code: str, *arguments: object, **environment: str) -> str:
    """Standard output of `code` in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# Running


@pytest.mark.parametrize("batch", [1, 2, 3, 5, 8])
def test_any_batch_is_split_into_what_there_is(denoiser, batch):
    given = inputs(batch)
    result = denoiser.run(given)
    np.testing.assert_array_equal(result, expected(**given))
    for b in range(batch):
        alone = denoiser.run({name: value[b : b + 1] for name, value in given.items()})
        np.testing.assert_array_equal(alone, result[b : b + 1])


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_the_last_part_is_filled_up(denoiser, batch):
    given = inputs(batch, height=5)  # which has a specialization for two samples only
    np.testing.assert_array_equal(denoiser.run(given), expected(**given))


def test_schedule():
    def parts(batch: int, *sizes: int | None) -> list[tuple[int | None, int, int]]:
        chosen = calls.parts_of(batch, [{"batch": size} for size in sizes])
        return [(function["batch"], begin, end) for function, begin, end in chosen]

    assert parts(5, 1, 2) == [(2, 0, 2), (2, 2, 4), (1, 4, 5)]
    assert parts(3, 4) == [(4, 0, 3)]
    assert parts(9, 4, 2) == [(4, 0, 4), (4, 4, 8), (2, 8, 9)]
    assert parts(7, 1, None) == [(None, 0, 7)]


def test_results_do_not_share_memory(denoiser):
    first = denoiser.run(given := inputs(1))
    kept = first.copy()
    for _ in range(3):
        denoiser.run(inputs(1))
    np.testing.assert_array_equal(first, kept)
    np.testing.assert_array_equal(first, expected(**given))


def test_strides_and_alignment_do_not_matter(denoiser):
    given = inputs(2)
    wanted = denoiser.run(given)
    turned = np.asfortranarray(given["sample"])
    every_other = np.repeat(given["sample"], 2, axis=2)[..., ::2]
    raw = np.zeros(given["sample"].nbytes + 4, np.uint8)
    odd = raw[4:].view(np.float32).reshape(given["sample"].shape)
    odd[...] = given["sample"]
    for sample in (turned, every_other, odd, given["sample"][:, ::-1][:, ::-1]):
        np.testing.assert_array_equal(denoiser.run({**given, "sample": sample}), wanted)


def test_a_zip_runs(path, tmp_path):
    import shutil

    shutil.make_archive(str(tmp_path / "tiny"), "zip", path)
    given = inputs(2)
    np.testing.assert_array_equal(compiled_denoiser.load(tmp_path / "tiny.zip").run(given), expected(**given))


def test_an_overwritten_artifact_runs_its_new_code(tmp_path):
    """The dynamic loader keeps libraries by path."""
    relax_artifact.build(tmp_path / "a.mpq")
    given = inputs(1)
    old = compiled_denoiser.load(tmp_path / "a.mpq")
    manifest = json.loads((tmp_path / "a.mpq/manifest.json").read_text())
    manifest["functions"][0]["name"] = "denoise_renamed"
    sizes = [(f["name"], f["batch"], f["inputs"][0]["shape"][1]) for f in manifest["functions"]]
    target = targets.resolve("native")

    def kernels(path: Path) -> None:
        relax_artifact.library(sizes, target, path, relax_artifact.stated(manifest))

    bundle.write(
        tmp_path / "a.mpq", manifest, {"kernels.so": kernels}, relax_artifact.TENSORS, overwrite=True
    )
    for loaded in (compiled_denoiser.load(tmp_path / "a.mpq"), old):
        np.testing.assert_array_equal(loaded.run(given), expected(**given))


def test_calls_from_threads_take_turns(path):
    denoiser = compiled_denoiser.load(path, threads=2)
    wrong = []

    def work() -> None:
        for _ in range(50):
            given = {**inputs(3)}
            if not np.array_equal(denoiser.run(given), expected(**given)):
                wrong.append(given)

    with ThreadPoolExecutor(4) as workers:
        for done in [workers.submit(work) for _ in range(4)]:
            done.result()
    assert not wrong


def test_denormals_are_kept_whatever_the_process_does(denoiser):
    torch = pytest.importorskip("torch")
    given = {
        "sample": np.full((1, 3, 16), 1e-40, np.float32),
        "timestep": np.array([0]),
        "class_labels": np.array([0]),
    }
    wanted = expected(**given)
    assert (wanted[..., 1:] != 0).all()
    assert torch.set_flush_denormal(True)
    try:
        np.testing.assert_array_equal(denoiser.run(given).view(np.int32), wanted.view(np.int32))
        assert (torch.tensor([1e-40]) * torch.tensor([0.5])).item() == 0, "the setting comes back"
    finally:
        torch.set_flush_denormal(False)


# Bad input


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"sample": None}, "input 'sample' is missing; this artifact takes sample, timestep, class_labels"),
        ({"smple": np.zeros(1)}, r"no input 'smple': did you mean 'sample'\?"),
        ({"sample": np.zeros((1, 3, 16))}, "'sample' is float64; this artifact takes float32"),
        ({"sample": np.zeros((1, 3, 16), np.float16)}, "'sample' is float16"),
        ({"sample": [[0.0]]}, "'sample' is a list; this artifact takes arrays or torch tensors of float32"),
        ({"sample": np.zeros((1, 3), np.float32)}, r"shape \[1, 3\]; this artifact takes \[B, 3, 16\]"),
        ({"sample": np.zeros((1, 4, 16), np.float32)}, r"takes \[B, 3, 16\] or \[B, 5, 16\]"),
        (
            {"sample": np.zeros((0, 3, 16), np.float32)},
            "'sample' is empty, of shape .* a batch needs a sample",
        ),
        ({"timestep": np.zeros(2, np.int64)}, "'timestep' has a batch of 2, and 'sample' one of 1"),
        ({"timestep": 0.5}, "'timestep' holds a value that int64 cannot"),
        ({"timestep": float("nan")}, "'timestep' holds a value that int64 cannot"),
        ({"timestep": "now"}, "'timestep' is a str"),
        (
            {"timestep": np.zeros((1, 2), np.int64)},
            r"'timestep' has shape \[1, 2\]; this artifact takes \[B\]",
        ),
        ({"class_labels": np.array([True])}, "'class_labels' is bool; this artifact takes int64"),
        ({"class_labels": np.array([10])}, "'class_labels' is 10 in sample 0; it goes from 0 to 9"),
        ({"class_labels": np.array([-1])}, "'class_labels' is -1 in sample 0; it goes from 0 to 9"),
    ],
)
def test_bad_input_is_one_sentence(denoiser, change, says):
    given = {name: value for name, value in {**inputs(1), **change}.items() if value is not None}
    with pytest.raises(UserError, match=says) as caught:
        denoiser.run(given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("half", ["bfloat16", "float16"])
def test_a_call_in_half_precision_is_answered_in_it(denoiser, half):
    """As a pipeline in half precision calls its denoiser; only the latents need be in it."""
    torch = pytest.importorskip("torch")
    given = {name: torch.from_numpy(value) for name, value in inputs(1).items()}
    given["sample"] = given["sample"].to(getattr(torch, half))
    found = denoiser(**given).sample
    expected = denoiser.run({**given, "sample": given["sample"].float()})
    assert found.dtype == getattr(torch, half) and torch.equal(found, torch.from_numpy(expected).to(found.dtype))


def test_bad_torch_input(denoiser):
    torch = pytest.importorskip("torch")
    given = {name: torch.from_numpy(value) for name, value in inputs(1).items()}
    with pytest.raises(UserError, match="'sample' is bfloat16"):
        denoiser.run({**given, "sample": given["sample"].bfloat16()})
    with pytest.raises(UserError, match="'sample' is float64"):
        denoiser(**{**given, "sample": given["sample"].double()})
    with pytest.raises(UserError, match=r"'sample' is on meta; this artifact takes it on the CPU: \.cpu\(\)"):
        denoiser(**{**given, "sample": given["sample"].to("meta")})


def test_a_non_finite_output_is_an_error(denoiser, path, tmp_path):
    offset = relax_artifact.TENSORS["offset"].copy()
    offset[:2] = np.inf, 3e37  # the sum of such values overflows, and each is finite
    relax_artifact.build(tmp_path / "large.mpq", tensors={**relax_artifact.TENSORS, "offset": offset})
    large, given = compiled_denoiser.load(tmp_path / "large.mpq"), inputs(2)
    given["class_labels"] = np.array([1, 0])
    with pytest.raises(
        UserError, match=r"output 'sample' holds NaN or infinity in \d+ of 96 .* first in sample 1"
    ):
        large.run(given)
    given["class_labels"] = np.array([1, 1])
    assert np.isfinite(large.run(given)).all()
    given["sample"][1, 0, 0] = np.nan
    with pytest.raises(UserError, match="input 'sample' holds NaN or infinity in sample 1; check"):
        denoiser.run(given)
    assert not np.isfinite(compiled_denoiser.load(path, check_finite=False).run(given)).all()


@pytest.mark.parametrize("value", [1e38, -2e18])
def test_an_input_whose_squares_overflow_is_an_error(denoiser, path, value):
    given = inputs(2)
    given["sample"][1, 0, 3] = value
    with pytest.raises(UserError, match=f"'sample' holds {re.escape(f'{value:.3g}')} in sample 1, and at most 1e"):
        denoiser.run(given)
    assert np.isfinite(compiled_denoiser.load(path, check_finite=False).run(given)).all()
    given["sample"][1, 0, 3] = np.sign(value) * 9e17
    assert np.isfinite(denoiser.run(given)).all()


def test_values_outside_what_was_calibrated_are_counted(denoiser, path, tmp_path):
    torch = pytest.importorskip("torch")
    calibrated = {"ranges": {"sample": {"low": -8.0, "high": 7.9}}}  # 16 below to 15.85, with half of it more
    relax_artifact.build(tmp_path / "calibrated.mpq", calibration=calibrated)
    counting, given = compiled_denoiser.load(tmp_path / "calibrated.mpq"), inputs(3)
    with warnings.catch_warnings():
        warnings.simplefilter("error", Notice)
        counting.run(given)
        given["sample"][2, :, 1] = 15.75
        counting(**given)
        assert counting.saturated == {"sample": 0}
    given["sample"][2, :, 1] = 15.875
    given["sample"][0, 0, 0] = -16
    with pytest.warns(Notice, match="^4 of 144 values of input 'sample' lie outside the range -15.95 to 15.85") as said:
        np.testing.assert_array_equal(counting.run(given), expected(**given))
        counting(torch.from_numpy(given["sample"]), given["timestep"], given["class_labels"])
    assert len(said) == 1 and said[0].filename == __file__
    assert counting.saturated == {"sample": 8}
    blind = compiled_denoiser.load(tmp_path / "calibrated.mpq", check_finite=False)
    blind.run(given)
    denoiser.run(given)
    assert blind.saturated is denoiser.saturated is None  # nobody looked; the artifact does not state its ranges


def test_a_machine_without_the_features_is_refused_before_anything_is_loaded(path, monkeypatch):
    monkeypatch.setattr(targets, "host_features", frozenset)
    monkeypatch.setattr(compiled_denoiser, "VirtualMachine", lambda *arguments: pytest.fail("loaded"))
    with pytest.raises(UserError, match=r"cannot run .*: it lacks "):
        compiled_denoiser.load(path)


def test_threads(path, monkeypatch):
    with pytest.raises(UserError, match="threads is 0; it must be at least 1"):
        compiled_denoiser.load(path, threads=0)
    given = inputs(5)
    for threads in (1, 2, 64, 1, None):
        np.testing.assert_array_equal(compiled_denoiser.load(path, threads=threads).run(given), expected(**given))


def test_another_version_of_tvm_is_refused(path, monkeypatch):
    monkeypatch.setattr(tvm.importlib.metadata, "version", lambda name: "0.99.0")
    monkeypatch.delenv(tvm.ENVIRONMENT, raising=False)
    with pytest.raises(UserError, match=r"compiled with TVM .*, and 0\.99\.0 is installed: pip install"):
        compiled_denoiser.load(path)


def test_damage_is_found_before_anything_is_loaded(path, tmp_path):
    import shutil

    copy = shutil.copytree(path, tmp_path / "a.mpq")
    os.truncate(copy / "kernels.so", 5000)
    with pytest.raises(UserError, match=r"kernels\.so is truncated"):
        compiled_denoiser.load(copy)


# In the place of a diffusers model


def test_called_like_the_model(denoiser):
    torch = pytest.importorskip("torch")
    given = inputs(2)
    sample, labels = torch.from_numpy(given["sample"]), torch.from_numpy(given["class_labels"])
    wanted = expected(given["sample"], 7, given["class_labels"])
    for timestep in (7, 7.0, np.int32(7), torch.tensor(7), torch.tensor([7]), torch.tensor([7.0, 7.0])):
        output = denoiser(sample, timestep, class_labels=labels, encoder_hidden_states=None)
        assert torch.is_tensor(output.sample) and output[0] is output.sample
        np.testing.assert_array_equal(output.sample.numpy(), wanted)
    (array,) = denoiser(given["sample"], 7, given["class_labels"], return_dict=False)
    assert isinstance(array, np.ndarray)
    np.testing.assert_array_equal(array, wanted)
    needs_grad = sample.clone().requires_grad_()
    assert not denoiser(needs_grad, 7, labels).sample.requires_grad
    with pytest.raises(UserError, match="given twice"):
        denoiser(sample, 7, labels, timestep=7)
    with pytest.raises(UserError, match="4 positional inputs are too many"):
        denoiser(sample, 7, labels, labels)
    with pytest.raises(UserError, match="no input 'text_embeds'"):
        denoiser(sample, 7, labels, added_cond_kwargs={"text_embeds": sample})
    denoiser(sample, 7, labels, added_cond_kwargs={"text_embeds": None})


def test_attributes_of_a_model(denoiser):
    torch = pytest.importorskip("torch")
    assert denoiser.config.in_channels == denoiser.config["in_channels"] == 3
    assert not hasattr(denoiser.config, "nothing")
    assert denoiser.dtype == torch.float32 and denoiser.device == torch.device("cpu")
    assert denoiser.to("cpu") is denoiser.to(torch.device("cpu"), torch.float32) is denoiser.eval()
    with pytest.raises(UserError, match="cannot move to cuda"):
        denoiser.to("cuda")
    with pytest.raises(UserError, match="cannot move to float16"):
        denoiser.to(dtype=torch.float16)
    assert "8 bits" not in repr(denoiser) and "UNet2DModel" in repr(denoiser)


def test_in_a_diffusers_pipeline(path):
    pytest.importorskip("torch")
    import torch
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    class Unconditional(compiled_denoiser.CompiledDenoiser):
        """Fixes the class, which DDPMPipeline does not pass on, and gives the sample its channels."""

        def __call__(self, sample, timestep, **options):
            flat = sample.reshape(len(sample), 3, 16)
            labels = torch.zeros(len(sample), dtype=torch.int64)
            output = super().__call__(flat, timestep, labels, **options)
            return compiled_denoiser.DenoiserOutput(output.sample.reshape(sample.shape))

    float_model = UNet2DModel(
        sample_size=4,
        block_out_channels=(32,),
        layers_per_block=1,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )
    pipeline = DDPMPipeline(unet=float_model, scheduler=DDPMScheduler())
    pipeline.unet = Unconditional(bundle.read(path), threads=1)
    pipeline.unet.config["sample_size"] = 4
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(batch_size=3, num_inference_steps=2, output_type="np").images
    assert images.shape == (3, 4, 4, 3) and np.isfinite(images).all()


# What is in the process

RUN = """
    import sys
    import numpy as np
    from mpq_compiler.runtime import compiled_denoiser as runtime
    {before}
    denoiser = runtime.load(sys.argv[1], threads=2)
    y = denoiser(np.ones((3, 3, 16), np.float32), timestep=1, class_labels=np.array([1, 2, 3])).sample
    np.testing.assert_array_equal(y[:, 0, 2], [102, 202, 302])
    maps = open("/proc/self/maps").read()
    {after}
"""


def test_neither_torch_nor_the_compiler_is_loaded_and_torch_loads_later(path):
    pytest.importorskip("torch")
    after = """
    assert "libtvm_runtime.so" in maps and "libtvm_compiler" not in maps and "libtorch" not in maps
    assert "torch" not in sys.modules and "tvm" not in sys.modules
    import torch
    z = denoiser(torch.ones(2, 3, 16), torch.tensor(1), torch.tensor([1, 2])).sample
    assert torch.is_tensor(z) and torch.equal(z[:, 0, 2], torch.tensor([102.0, 202.0]))
    """
    python(RUN.format(before="", after=after), path)


def test_after_torch_and_after_tvm(path):
    pytest.importorskip("torch")
    python(RUN.format(before="import torch", after="assert 'libtorch' in maps"), path)
    python(RUN.format(before="import tvm", after="import tvm.relax"), path)
    python(RUN.format(before="", after="import tvm; tvm.runtime.tensor(y)"), path)


def test_the_caller_is_not_bound_to_a_core_and_one_thread_stays_one(path):
    code = """
    import os, sys
    import numpy as np
    from mpq_compiler.runtime import compiled_denoiser as runtime
    cores = os.sched_getaffinity(0)
    denoiser = runtime.load(sys.argv[1], threads=1)
    before = len(os.listdir("/proc/self/task"))
    denoiser(np.ones((2, 3, 16), np.float32), 1, np.array([1, 2]))
    assert len(os.listdir("/proc/self/task")) == before
    runtime.load(sys.argv[1], threads=2)(np.ones((2, 3, 16), np.float32), 1, np.array([1, 2]))
    assert os.sched_getaffinity(0) == cores
    """
    python(code, path)


@pytest.mark.skipif(tvm.usable_cores() < 2, reason="one core")
def test_threads_of_a_library(path):
    """They end with the last artifact that uses them, and a copy of the process starts its own."""
    code = """
    import gc, os, sys, time
    import numpy as np
    from mpq_compiler.runtime import compiled_denoiser as runtime
    def are(expected):  # a thread that has been joined is listed for a moment still
        for _ in range(500):
            if (found := len(os.listdir("/proc/self/task"))) == expected:
                return
            time.sleep(0.01)
        sys.exit(f"{found} threads, not {expected}")
    inputs = {"sample": np.ones((2, 3, 16), np.float32), "timestep": np.array([1, 2]), "class_labels": np.array([1, 2])}
    one = runtime.load(sys.argv[1], threads=1)
    expected = one.run(inputs)
    are(1)
    two = runtime.load(sys.argv[1], threads=2)
    are(2)
    if not (child := os.fork()):
        same = (two.run(inputs) == expected).all()
        are(2)
        os._exit(not same)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    again = runtime.load(sys.argv[1], threads=2)
    again.run(inputs)
    are(2)
    one = two = again = None
    gc.collect()
    are(1)
    """
    python(code, path, OPENBLAS_NUM_THREADS="1")  # NumPy's own end with a fork


@pytest.mark.parametrize("threads", [1, 2])
def test_children_run_whatever_other_threads_do(path, threads):
    """A thousand forks while two threads run in turns: a child has the bits."""
    code = """
    import os, signal, sys, threading
    import numpy as np
    from mpq_compiler.runtime import compiled_denoiser as runtime
    sys.setswitchinterval(0.0005)
    inputs = {"sample": np.ones((5, 3, 16), np.float32), "timestep": np.arange(5), "class_labels": np.arange(5)}
    others = {**inputs, "timestep": np.arange(5) + 7}
    denoiser = runtime.load(sys.argv[1], threads=int(sys.argv[2]))
    expected = denoiser.run(inputs)
    stop = threading.Event()
    def run():
        while not stop.is_set():
            denoiser.run(others)
    busy = [threading.Thread(target=run) for _ in range(2)]
    for each in busy:
        each.start()
    def child():
        signal.alarm(20)
        same = np.array_equal(denoiser.run(inputs), expected)
        os._exit(not same)
    failed = []
    for _ in range(500):
        if not (pid := os.fork()):
            child()
        if code := os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
            failed.append(code)
            break
    stop.set()
    for each in busy:
        each.join()
    sys.exit(f"{failed}" if failed else 0)
    """
    python(code, path, threads, OPENBLAS_NUM_THREADS="1")


def test_a_thread_may_fork_within_its_own_call(path):
    """As a signal's handler does: neither waits for the other."""
    code = """
    import os, signal, sys
    import numpy as np
    from mpq_compiler.runtime import compiled_denoiser as runtime
    denoiser = runtime.load(sys.argv[1], threads=1)
    inputs = {"sample": np.ones((1, 3, 16), np.float32), "timestep": np.arange(1), "class_labels": np.arange(1)}
    expected, run, codes = denoiser.run(inputs), denoiser.executor.run, []
    def forking(function, arrays):
        if pid := os.fork():
            codes.append(os.waitpid(pid, 0)[1])
        return run(function, arrays)
    denoiser.executor.run = forking
    signal.alarm(20)
    parent = os.getpid()
    same = np.array_equal(denoiser.run(inputs), expected)
    if os.getpid() != parent:
        denoiser.executor.run = run
        os._exit(not (same and np.array_equal(denoiser.run(inputs), expected)))
    assert same and codes == [0]
    """
    python(code, path, OPENBLAS_NUM_THREADS="1")


def test_weights_move_to_large_pages():
    pages = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    release = tuple(map(int, os.uname().release.split(".")[:2]))
    if release < (6, 1) or not pages.exists() or "[madvise]" not in pages.read_text():
        pytest.skip("this system collapses no pages, or has made all of them large already")
    code = """
    import mmap
    import numpy as np
    from mpq_compiler.runtime import tvm as tvm_runtime
    tvm_ffi = tvm_runtime.load()
    def large():
        with open("/proc/self/smaps_rollup") as lines:
            return next(int(line.split()[1]) for line in lines if line.startswith("AnonHugePages"))
    memory = mmap.mmap(-1, 16 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    values = np.frombuffer(memory, np.float32)
    values[:] = np.arange(values.size)
    before = large()
    tvm_runtime._use_large_pages([tvm_ffi.from_dlpack(part) for part in values.reshape(2, -1)])
    assert large() - before >= 12 << 10, (before, large())  # all but what lies at the ends, in KiB
    assert (values == np.arange(values.size)).all()
    """
    python(code)


def test_stored_weights_leave_memory_as_they_are_prepared():
    code = """
    import ctypes, mmap, sys
    import numpy as np
    from mpq_compiler.runtime import compiled_denoiser
    from mpq_compiler.support import tensorfile

    def resident(array):
        begin = -(-array.ctypes.data // mmap.PAGESIZE) * mmap.PAGESIZE
        pages = (array.ctypes.data + array.nbytes - begin) // mmap.PAGESIZE
        found = (ctypes.c_ubyte * pages)()
        assert ctypes.CDLL(None).mincore(ctypes.c_void_p(begin), ctypes.c_size_t(pages * mmap.PAGESIZE), found) == 0
        return sum(page & 1 for page in found), pages

    executor = compiled_denoiser.load(sys.argv[1], threads=1).executor
    prepare, stored = executor._artifact.manifest["prepare"], executor._artifact.tensors()
    arrays = [tensorfile.aligned(stored[name]) for name in prepare["tensors"]]
    large = [array for array in arrays if array.nbytes >= 4 * mmap.PAGESIZE and tensorfile.mapping(array)]
    assert len(large) > 5 and all(there == pages for there, pages in map(resident, large))
    arguments = [executor._tensor(array) for array in arrays]
    with executor._calling(), executor._dropping(arrays, prepare["reads"]):
        made = executor._machine[prepare["name"]](*arguments)
    kept = {each.data_ptr() for each in made}
    for array in large:
        there, pages = resident(array)
        assert there == (pages if array.ctypes.data in kept else 0)
    again = {name: np.array(array) for name, array in zip(prepare["tensors"], arrays) if array.ctypes.data in kept}
    assert all(np.array_equal(array, executor._artifact.tensors()[name]) for name, array in again.items())
    """
    python(code, compiled_pipeline.path() / "unet")


def test_a_runtime_library_by_name(path, tmp_path):
    library = tmp_path / "elsewhere.so"
    library.write_bytes(tvm.library_path().read_bytes())
    after = "assert sys.argv[2] in maps and 'tvm/lib' not in maps"
    python(RUN.format(before="", after=after), path, library, MPQ_TVM_RUNTIME=str(library))


def test_no_runtime_library(monkeypatch, tmp_path):
    monkeypatch.delitem(sys.modules, "tvm", raising=False)
    monkeypatch.setenv(tvm.ENVIRONMENT, str(tmp_path / "none.so"))
    with pytest.raises(UserError, match=r"MPQ_TVM_RUNTIME names .*none\.so, which is not a file"):
        tvm.library_path()
    monkeypatch.delenv(tvm.ENVIRONMENT)
    monkeypatch.setattr(tvm.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"not installed: pip install 'mpq-compiler\[runtime\]'"):
        tvm.library_path()


@pytest.mark.slow
def test_a_runtime_only_installation(path, tmp_path):
    """`pip install mpq-compiler[runtime]` at the tested versions: no torch, and artifacts run."""
    from mpq_compiler.api import compile
    from mpq_compiler.frontend import denoiser as denoisers
    from mpq_compiler.support import tensorfile
    from tests.harness import tiny

    venv.create(tmp_path / "venv", with_pip=True)
    interpreter = tmp_path / "venv/bin/python"
    pip = [interpreter, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    source = tree.copy(tmp_path / "source")
    subprocess.run([*pip, "-c", source / "constraints.txt", f"{source}[runtime]"], check=True, cwd=tmp_path)
    code = RUN.format(
        before="import importlib.util; assert not importlib.util.find_spec('torch')",
        after="assert 'libtvm_compiler' not in maps; print(runtime.__file__)",
    )
    command = [interpreter, "-c", textwrap.dedent(code), path]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path / "venv")), "the installed package ran, not this tree"

    compiled, recorded, output = (tmp_path / name for name in ("tiny.mpq", "in.safetensors", "out.safetensors"))
    compile.compile(denoisers.wrap(tiny.model("unet2d"), name="tiny"), compiled, recipe="w8a8", samples=2, steps=2)
    given = {name: value.numpy() for name, value in tiny.inputs("unet2d", batch=3).items()}
    with recorded.open("wb") as stream:
        tensorfile.save(stream, given)
    command = [tmp_path / "venv/bin/mpqc", "run", compiled, "--input", recorded, "--output", output]
    subprocess.run(command, check=True, cwd=tmp_path)
    np.testing.assert_array_equal(tensorfile.load(output)["output"], compiled_denoiser.load(compiled).run(given))
