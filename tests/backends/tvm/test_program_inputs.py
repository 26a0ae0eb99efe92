"""What the C program takes of files and options is what the runtime in Python takes; all else is a sentence."""

from __future__ import annotations

import functools
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from torch import fx

from mpq_compiler.artifact import bundle, tvm_wheels
from mpq_compiler.backends.tvm import standalone
from mpq_compiler.backends.tvm.build import build
from mpq_compiler.backends.tvm.standalone import CRYPTOGRAPHY
from mpq_compiler.ir import ops
from mpq_compiler.ir.facts import Facts
from mpq_compiler.ir.findings import ASSUMPTIONS
from mpq_compiler.ir.program import PARAMETERS, InputSpec, Program, Stage, TensorStore
from mpq_compiler.runtime import compiled_denoiser
from mpq_compiler.support import tensorfile
from mpq_compiler.support.errors import UserError
from mpq_compiler.targets import table as targets
from tests.backends.tvm.test_emit import TARGETS
from tests.harness import once, packed, qemu
from tests.harness.mutants import joined, mutants

HOST, ARM = TARGETS[1], "aarch64-dotprod"
SANITIZED = "run-sanitized"
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g", "-O1", "-std=c11", "-Wall", "-Wextra")
UNUSED = ("-Wno-unused-function", "-Wno-missing-field-initializers", "-Werror")
"""Each program takes of the shared headers what it needs; tables leave out what is zero."""


@functools.cache
def artifact(target: str = HOST, emit: str = "c") -> Path:
    """The bundled denoiser with labels, and its program; for this machine also one with sanitizers."""

    def make(path: Path) -> None:
        case, row = packed.program(packed.BUNDLED), targets.resolve(target)
        built = build(case.program, row, (1, 2), jobs=2, cache=packed.kernel_cache(), emit=emit)
        if emit == "machine":
            built.files.update(tvm_wheels.files(row, None))
        below = {spec.name: spec.below for spec in case.program.inputs if spec.below}
        packed.write(path, case.program, row, built, {"below": below})

    return once.made(f"inputs-{target}-{emit}.mpq", make)


@functools.cache
def sanitized() -> Path:
    names = ("mpq.c", "mpq_run.c", standalone.MODEL, standalone.KERNELS, *CRYPTOGRAPHY)
    sources = [str(artifact() / name) for name in names]

    def make(path: Path) -> None:
        subprocess.run(["gcc", *SANITIZE, *UNUSED, *sources, "-lpthread", "-lm", "-o", str(path)], check=True)

    return once.made(SANITIZED, make)


def given(**changes: np.ndarray) -> dict[str, np.ndarray]:
    sample = np.random.default_rng(7).standard_normal((1, 4, 14, 14)).astype(np.float32)
    return {"sample": sample, "timestep": np.array([500], np.float32), "class_labels": np.array([3])} | changes


def run(
    inputs: Path | None,
    output: Path,
    *options: str,
    program: Path | None = None,
    target: str = HOST,
    emit: str = "c",
) -> str:
    """What the program says on its error output, if it refuses; else nothing, and the output is there."""
    folder = artifact(target, emit)
    command = [str(program or folder / bundle.PROGRAM), "--weights", str(folder / bundle.WEIGHTS)]
    command += ["--output", str(output), *(("--inputs", str(inputs)) if inputs else ()), *options]
    if target == ARM and platform.machine() != "aarch64":
        command = [*qemu.command("cortex-a76"), *command]
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0"}  # its end is what frees its memory
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=300, env=environment)
    assert done.returncode in (0, 1), (done.returncode, done.stderr)
    assert output.exists() == (done.returncode == 0) and not [*output.parent.glob(f".{output.name}*")]
    assert done.returncode == 0 or (done.stderr.startswith("error: ") and done.stderr.count("\n") == 1), done.stderr
    return done.stderr


SHAPE = (1, 4, 14, 14)
REFUSED = {
    "has shape [1, 14, 14, 4]; denoise_b1 takes [1, 4, 14, 14]": {"sample": np.ones((1, 14, 14, 4), np.float32)},
    "input 'sample' has shape [2, 4, 14, 14]; denoise_b1 takes": {"sample": np.zeros((2, 4, 14, 14), "f")},
    "input 'sample' is F64; this artifact takes F32": {"sample": np.zeros((1, 4, 14, 14))},
    "input 'class_labels' is I32; this artifact takes I64": {"class_labels": np.array([5], np.int32)},
    "this artifact has no input 'colour': there is: sample": {"colour": np.zeros(3, "f")},
    "input 'class_labels' is 11 in sample 0; it goes from 0 to 10": {"class_labels": np.array([11])},
    "input 'class_labels' is -1 in sample 0": {"class_labels": np.array([-1])},
    "input 'class_labels' is 1000000000 in sample 0": {"class_labels": np.array([10**9])},
    "input 'class_labels' is 4294967299 in sample 0": {"class_labels": np.array([2**32 + 3])},
    "input 'sample' holds NaN or infinity in sample 0; check": {"sample": np.full(SHAPE, np.nan, "f")},
    "input 'sample' holds -2e+38 in sample 0, and at most 1e+18": {"sample": np.full(SHAPE, -2e38, "f")},
}


@pytest.mark.parametrize(("target", "emit"), [(HOST, "c"), (HOST, "machine"), (ARM, "c")])
def test_inputs_that_python_refuses(target, emit, tmp_path):
    if target == ARM and platform.machine() != "aarch64" and (absent := qemu.missing(ARM)):
        pytest.skip(absent)
    loaded = compiled_denoiser.load(artifact())
    for sentence, changes in REFUSED.items():
        save_file(given(**changes), tmp_path / "in")
        assert sentence in run(tmp_path / "in", tmp_path / "out", target=target, emit=emit)
        if "I32" not in sentence and "[2, 4" not in sentence:  # which Python converts, or splits
            with pytest.raises(UserError):
                loaded.run(given(**changes))
    for name in given():
        save_file({key: value for key, value in given().items() if key != name}, tmp_path / "in")
        said = run(tmp_path / "in", tmp_path / "out", target=target, emit=emit)
        assert f"input '{name}' is missing; this artifact takes sample" in said


def test_sentences_name_the_sample(tmp_path):
    rows = {name: np.repeat(value, 2, axis=0) for name, value in given().items()}
    rows["sample"][1, 3, 0, 0] = np.inf
    save_file(rows, tmp_path / "in")
    function = ("--function", "denoise_b2")
    said = run(tmp_path / "in", tmp_path / "out", *function)
    assert said == "error: input 'sample' holds NaN or infinity in sample 1; check what made it\n"
    with pytest.raises(UserError) as caught:
        compiled_denoiser.load(artifact()).run(rows)
    assert said == f"error: {caught.value}\n"
    rows["sample"][1] = 0
    rows["class_labels"][1] = 12
    save_file(rows, tmp_path / "in")
    said = run(tmp_path / "in", tmp_path / "out", *function)
    with pytest.raises(UserError) as caught:
        compiled_denoiser.load(artifact()).run(rows)
    assert said == f"error: {caught.value}\n"


def test_a_first_token_that_was_compiled_in(tmp_path):
    case, row = packed.program("sd15", rewrites="bos-split"), targets.resolve(HOST)
    built = build(case.program, row, (2,), jobs=2, cache=packed.kernel_cache(), emit="c")
    folder = packed.write(tmp_path / "bos.mpq", case.program, row, built, {}, [*case.program.facts[ASSUMPTIONS]])
    rows = {name: value[:2].numpy().copy() for name, value in case.inputs.items()}
    command = [folder / bundle.PROGRAM, "--weights", folder / bundle.WEIGHTS, "--inputs", tmp_path / "in"]
    for value, code in ((0.0, 0), (0.01, 0), (1.0, 1)):
        rows["encoder_hidden_states"][1, 0, :] += np.float32(value)
        save_file(rows, tmp_path / "in")
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
    with pytest.raises(UserError) as caught:
        compiled_denoiser.load(folder).run(rows)
    assert done.stderr == f"error: {caught.value}\n" and "in sample 1" in done.stderr


def test_an_output_that_is_not_finite(tmp_path):
    """Of a float layer, for quantizers take what is too large for the largest."""
    tensors, graph = TensorStore(), fx.Graph()
    operands = graph.placeholder("x"), graph.get_attr(tensors.add("weight", torch.full((3, 8), 3e30)))
    graph.output(graph.call_function(ops.linear, operands))
    spec, row = InputSpec("x", ("B", 5, 8), torch.float32), targets.resolve(HOST)
    program = Program(graph, tensors, (spec,), Stage.PACKED, facts=Facts({PARAMETERS: 24}))
    built = build(program, row, (2,), cache=packed.kernel_cache(), emit="c")
    folder, values = packed.write(tmp_path / "x.mpq", program, row, built), np.zeros((2, 5, 8), np.float32)
    values[1, 4] = 1e15
    save_file({"x": values}, tmp_path / "in")
    command = [folder / bundle.PROGRAM, "--weights", folder / bundle.WEIGHTS, "--inputs", tmp_path / "in"]
    done = subprocess.run([*command, "--output", tmp_path / "out"], capture_output=True, text=True)
    with pytest.raises(UserError, match="holds NaN or infinity in 3 of 30 values, first in sample 1; ") as caught:
        compiled_denoiser.load(folder).run({"x": values})
    assert done.stderr == f"error: {caught.value}\n" and not (tmp_path / "out").exists()


def test_damaged_files_are_refused_or_mean_what_python_reads(tmp_path):
    """With sanitizers: no byte outside, no result of what the runtime refuses, the runtime's bits for all else."""
    source, output = tmp_path / "in", tmp_path / "out"
    loaded, count, taken = compiled_denoiser.load(artifact(), threads=1), 80, set()
    with source.open("wb") as stream:
        tensorfile.save(stream, given())
    for what, data in mutants(3, count, source.read_bytes()):
        source.write_bytes(data)
        if said := run(source, output, program=sanitized()):
            assert str(source) in said or "input '" in said, (what, said)
            continue
        taken.add(what)
        expected = loaded.run(tensorfile.load(source))
        np.testing.assert_array_equal(load_file(output)["sample"].view(np.uint32), expected.view(np.uint32), what)
        output.unlink()
    assert {"payload", "escape"} <= taken  # others are sound by chance


EMPTY = b'{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'
HEADERS = {
    "trailing text": (lambda h: h.rstrip() + b"x", "is not JSON"),
    "two documents": (lambda h: h.rstrip() + b"{}", "is not JSON"),
    "nested": (lambda h: b'{"a":' * 10000 + h, "is not a sound safetensors file"),
    "a tensor twice": (lambda h: b'{"sample":%s,' % EMPTY + h[1:], "names 'sample' twice"),
    "a key twice": (lambda h: h.replace(b'"dtype":', b'"dtype":"F32","dtype":', 1), "says 'dtype', unknown or twice"),
    "another key": (lambda h: h.replace(b'"dtype":', b'"x":1,"dtype":', 1), "says 'x', unknown or twice"),
    "a half pair": (lambda h: h.replace(b"sample", b"\\ud800", 1), "is not JSON"),
    "an escape": (lambda h: h.replace(b"sample", b"\\u001b[2J", 1), "holds a control character"),
    "zero": (lambda h: h.replace(b"sample", b"sample\\u0000", 1), "is not JSON"),
    "a long form": (lambda h: h.replace(b"sample", b"\xc1\xb3ample", 1), "is not JSON"),
    "a fraction": (lambda h: h.replace(b"14", b"14.0", 1), "something that is not a size"),
    "a leading zero": (lambda h: h.replace(b"14", b"014", 1), "something that is not a size"),
    "a huge extent": (lambda h: h.replace(b"14", b"18446744073709551630", 1), "something that is not a size"),
    "a product": (lambda h: h.replace(b"14", b"4611686018427387904", 1), "does not fill the bytes of its shape"),
}


@pytest.mark.parametrize("name", HEADERS)
def test_headers_that_are_not_strict(name, tmp_path):
    change, sentence = HEADERS[name]
    with (tmp_path / "in").open("wb") as stream:
        tensorfile.save(stream, given())
    whole = (tmp_path / "in").read_bytes()
    size = 8 + int.from_bytes(whole[:8], "little")
    changed = change(whole[8:size])
    assert changed != whole[8:size]
    (tmp_path / "in").write_bytes(joined(changed, whole[size:]))
    assert sentence in run(tmp_path / "in", tmp_path / "out", program=sanitized())


def test_headers_that_are_sound(tmp_path):
    """Escapes, metadata, spaces, another order of keys and padding are read as what they are."""
    source, output = tmp_path / "in", tmp_path / "out"
    save_file(given(), source)
    assert not run(source, output)
    expected = output.read_bytes()
    whole = source.read_bytes()
    size = 8 + int.from_bytes(whole[:8], "little")
    document, payload = json.loads(whole[8:size]), whole[size:] + bytes(5)
    document = {name: dict(reversed(entry.items())) for name, entry in document.items()}
    document["__pad0"] = {"dtype": "U8", "shape": [5], "data_offsets": [len(payload) - 5, len(payload)]}
    text = {"__metadata__": {"\u00e9\u20ac\U0001f600": 'a "text"\n\\'}, **document}
    for ascii_only in (False, True):
        header = json.dumps(text, indent=1, ensure_ascii=ascii_only).replace("sample", "s\\u0061mple").encode()
        source.write_bytes(joined(header, payload))
        assert not run(source, output, program=sanitized())
        assert output.read_bytes() == expected


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--threads", "3x"), "--threads is '3x'; it must be a whole number from 1 to 1024"),
        (("--threads", ""), "--threads is ''; it must be"),
        (("--threads", "-1"), "--threads is '-1'; it must be"),
        (("--threads", "0"), "--threads is '0'; it must be"),
        (("--repeat", "4294967297"), "--repeat is '4294967297'; it must be"),
        (("--repeat", "99999999999999999999999999"), "; it must be a whole number from 1 to 1000000"),
        (("--repeat", " 1"), "--repeat is ' 1'; it must be"),
        (("--threads", "1", "--repeat", "2", "--threads", "1"), "--threads is given twice; give it once"),
        (("--reuse", "no"), "--reuse is 'no'; it can be 'yes'"),
        (("--profile", "all"), "--profile is 'all'; it can be 'kernels'"),
    ],
)
def test_options_that_are_not_strict(options, sentence, tmp_path):
    assert sentence in run(None, tmp_path / "out", *options)


def test_the_output_is_whole_or_not_there(tmp_path):
    folder = artifact()
    program = [folder / bundle.PROGRAM, "--weights", folder / bundle.WEIGHTS]
    save_file(given(), tmp_path / "in")

    def done(*options: object, **limits: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*program, *map(str, options)], capture_output=True, text=True, **limits)

    before = (tmp_path / "in").read_bytes()
    (tmp_path / "link").symlink_to(tmp_path / "in")
    for output in (tmp_path / "in", tmp_path / "link"):
        found = done("--inputs", tmp_path / "in", "--output", output)
        assert found.returncode == 1 and "is a file that is read; name another" in found.stderr
    assert done("--output", folder / bundle.WEIGHTS).returncode == 1
    assert (tmp_path / "in").read_bytes() == before
    (tmp_path / "out").write_text("what was there")
    small = done("--output", tmp_path / "out", preexec_fn=_no_room)
    assert small.returncode == 1 and "cannot write" in small.stderr
    assert (tmp_path / "out").read_text() == "what was there"
    assert {each.name for each in tmp_path.iterdir()} == {"in", "link", "out"}
    (tmp_path / "there").symlink_to(tmp_path / "out")
    assert done("--output", tmp_path / "there").returncode == 0
    assert (tmp_path / "there").is_symlink() and load_file(tmp_path / "out")["sample"].shape == (1, 4, 14, 14)
    assert done("--output", "/dev/full").returncode == 1
    assert done("--output", "/dev/null").returncode == 0 and not Path("/dev/null").is_file()
    assert "it is not a file" in done("--inputs", tmp_path).stderr


def _no_room() -> None:
    """No file may have more than 100 bytes; a write beyond is an error and no signal."""
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))


OPENED = """
import ctypes, os, sys
import numpy as np

mpq = ctypes.CDLL(sys.argv[1])
mpq.mpq_open.restype = ctypes.c_void_p
weights, kernels = sys.argv[2] + "/weights.safetensors", sys.argv[2] + "/kernels.so"
model = ctypes.c_void_p(mpq.mpq_open(weights.encode(), 1))
assert model.value
given = [np.ones((1, 4, 14, 14), np.float32), np.full(1, 500, np.float32), np.full(1, 3)]

def run():
    mpq.mpq_forget(model)
    output = np.zeros((1, 4, 14, 14), np.float32)
    pointers = (ctypes.c_void_p * 3)(*(array.ctypes.data for array in given))
    assert mpq.mpq_run(model, 0, pointers, ctypes.c_void_p(output.ctypes.data)) == 0
    return output

expected = run()
for path in (weights, kernels):
    size = os.path.getsize(path)
    with open(path, "rb+") as file:  # in place
        file.write(os.urandom(size))
    assert np.array_equal(run(), expected)
    os.truncate(path, 0)
    assert np.array_equal(run(), expected)
assert not mpq.mpq_open(weights.encode(), 1)
maps = open("/proc/self/maps").read()
assert "weights.safetensors" not in maps
"""


@pytest.mark.parametrize("emit", ["c", "machine"])
def test_files_that_change_under_an_open_model(emit, tmp_path):
    """Nothing of them is read again: the same bits, and no signal."""
    folder = shutil.copytree(artifact(HOST, emit), tmp_path / "copy")
    sources = ("mpq.c", standalone.KERNELS) if emit == "c" else ("mpq_vm.c",)
    sources += CRYPTOGRAPHY
    command = ["gcc", *standalone.LINKED, "-shared", "-fPIC", standalone.MODEL, *sources, "-ldl", "-lpthread", "-lm"]
    subprocess.run([*command, "-o", tmp_path / "libmpq.so"], check=True, cwd=folder)
    done = subprocess.run(
        [sys.executable, "-c", OPENED, str(tmp_path / "libmpq.so"), str(folder)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_prepared_weights_stand_in_memory_once(tmp_path):
    """While a model is opened, too: its stored weights leave memory as they are prepared."""
    folder = artifact()
    model = (folder / standalone.MODEL).read_text()
    sources = ["mpq.c", standalone.MODEL, standalone.KERNELS, *CRYPTOGRAPHY]
    (tmp_path / "peak.c").write_text(PEAK)
    command = ["gcc", "-std=gnu11", f"-I{folder}", str(tmp_path / "peak.c"), *(str(folder / each) for each in sources)]
    subprocess.run([*command, "-lpthread", "-lm", "-o", tmp_path / "peak"], check=True)
    done = subprocess.run([tmp_path / "peak", folder / bundle.WEIGHTS], capture_output=True, text=True, check=True)
    before, most, memory = map(int, done.stdout.split())
    file = (folder / bundle.WEIGHTS).stat().st_size
    assert "MPQ_FILE" in model and most - before < memory + file // 2, (most - before, memory, file)


PEAK = """
#include "mpq.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static long kib(const char *what) {
    char line[256];
    long found = 0;
    FILE *file = fopen("/proc/self/status", "r");
    while (fgets(line, sizeof line, file))
        if (!strncmp(line, what, strlen(what))) found = atol(line + strlen(what));
    fclose(file);
    return found;
}

int main(int count, char **words) {
    long before = kib("VmRSS:");
    mpq_model *model = mpq_open(words[count - 1], 1);
    if (!model) return 1;
    printf("%ld %ld %zu", before << 10, kib("VmHWM:") << 10, mpq_bytes(model));
    return 0;
}
"""
