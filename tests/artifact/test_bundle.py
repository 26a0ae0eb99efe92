from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpq_compiler import schemas
from mpq_compiler.artifact import bundle
from mpq_compiler.support.errors import UserError

TENSORS = {
    "conv.weight.codes": np.arange(5000, dtype=np.uint8),
    "conv.weight.scale": np.linspace(0, 1, 7, dtype=np.float16),
}
FILES: dict[str, bundle.FileSource] = {"ir.txt": b"graph unet()\n", "kernels.so": b"\x7fELF" * 300}


def manifest() -> dict[str, Any]:
    value = {"shape": [1, 1, 8, 8], "dtype": "float32"}
    return {
        "name": "tiny",
        "target": {"name": "x86-64-avx2", "arch": "x86_64", "backend": "tvm", "features": ["avx2"]},
        "model": {"class": "UNet2DModel", "config": {"in_channels": 1}, "parameters": 10_000},
        "functions": [
            {
                "name": "denoise_b1",
                "batch": 1,
                "inputs": [{"name": "sample", **value}],
                "output": {"name": "sample", **value},
            }
        ],
        "tensors": [
            {"name": "conv.weight.scale", "parameter": "conv.weight"},
            {"name": "conv.weight.codes", "parameter": "conv.weight", "bits": 4, "original_shape": [8, 1250]},
        ],
        "versions": {"mpq-compiler": "0.1.0"},
    }


def write(path: Path, **options: Any) -> dict[str, Any]:
    return bundle.write(path, manifest(), options.pop("files", FILES), TENSORS, **options)


def resign(path: Path, **changes: Any) -> None:
    """Changes the manifest and all that vouches for it, as only a different writer could."""
    content = json.loads((path / "manifest.json").read_bytes()) | changes
    content["artifact_sha256"] = bundle.digest(content)
    (path / "manifest.json").write_bytes(bundle.canonical(content))


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def python(code: str, *arguments: object, prelude: str = "") -> subprocess.CompletedProcess[str]:
    """Runs `code` in a process of its own, where `write`, `path` and the modules of this test are at hand."""
    setup = f"""
        import importlib.util, os, sys
        from pathlib import Path
        spec = importlib.util.spec_from_file_location("test_artifact", {str(Path(__file__))!r})
        test = importlib.util.module_from_spec(spec); spec.loader.exec_module(test)
        from mpq_compiler.artifact import bundle as artifact
        from mpq_compiler.support.errors import UserError
        path = Path(sys.argv[1])
    """
    command = [sys.executable, "-c", textwrap.dedent(setup) + textwrap.dedent(code), *map(str, arguments)]
    if prelude:
        command = ["unshare", "-rm", "sh", "-ec", f'{prelude}\nexec "$@"', "sh", *command]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture(scope="session")
def mounts() -> None:
    """Skips where this user may not mount a file system of its own."""
    if (
        not shutil.which("unshare")
        or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode
    ):
        pytest.skip("needs user and mount namespaces")


@pytest.mark.parametrize("name", ["a.mpq", "a.zip"])
def test_round_trip(tmp_path, name):
    complete = write(tmp_path / name)
    assert os.listdir(tmp_path) == [name]
    read = bundle.read(tmp_path / name)
    assert read.manifest == complete
    assert read.file("ir.txt").read_bytes() == FILES["ir.txt"]
    assert schemas.check(complete, "manifest") is None
    for key, tensor in read.tensors().items():
        np.testing.assert_array_equal(tensor, TENSORS[key])
    payload = sum(tensor.nbytes for tensor in TENSORS.values())
    assert complete["weights"] == {"payload_bytes": payload, "average_bits": 8 * payload / 10_000}
    by_name = {entry["name"]: entry for entry in complete["tensors"]}
    assert by_name["conv.weight.codes"]["shape"] == [5000]
    assert by_name["conv.weight.codes"]["original_shape"] == [8, 1250]
    with pytest.raises(UserError, match=r"has no graph\.json"):
        read.file("graph.json")


def test_the_folder_of_a_zip_goes_with_the_artifact(tmp_path):
    write(tmp_path / "a.zip")
    read = bundle.read(tmp_path / "a.zip")
    folder, tensors = read.folder, read.tensors()
    del read
    assert not folder.exists()
    np.testing.assert_array_equal(tensors["conv.weight.codes"], TENSORS["conv.weight.codes"])


@pytest.mark.invariant("compiler-12")
def test_same_content_same_bytes(tmp_path):
    for number in (1, 2):
        (tmp_path / str(number)).mkdir()
        files = dict(sorted(FILES.items(), reverse=number == 2))
        write(tmp_path / str(number) / "a.mpq", files=files)
        write(tmp_path / str(number) / "a.zip", files=files)
    assert contents(tmp_path / "1/a.mpq") == contents(tmp_path / "2/a.mpq")
    assert (tmp_path / "1/a.zip").read_bytes() == (tmp_path / "2/a.zip").read_bytes()
    folder, zipped = bundle.read(tmp_path / "1/a.mpq"), bundle.read(tmp_path / "1/a.zip")
    assert contents(folder.folder) == contents(zipped.folder)


def test_a_zip_made_by_hand_is_read(tmp_path):
    write(tmp_path / "a.mpq")
    shutil.make_archive(str(tmp_path / "flat"), "zip", tmp_path / "a.mpq")
    shutil.make_archive(str(tmp_path / "nested"), "zip", tmp_path, "a.mpq")
    for name in ("flat.zip", "nested.zip"):
        assert bundle.read(tmp_path / name).manifest == bundle.read(tmp_path / "a.mpq").manifest


def test_files_from_paths_and_functions(tmp_path):
    (tmp_path / "source").write_bytes(b"from a path")
    files: dict[str, bundle.FileSource] = {
        "ir.txt": tmp_path / "source",
        "kernels.so": lambda path: path.write_bytes(b"from a function"),
    }
    write(tmp_path / "a.mpq", files=files)
    assert contents(tmp_path / "a.mpq")["ir.txt"] == b"from a path"
    assert contents(tmp_path / "a.mpq")["kernels.so"] == b"from a function"


@pytest.mark.parametrize("name", ["../x", "a/b", ".hidden", "manifest.json", "weights.safetensors", ""])
def test_file_names_are_plain(tmp_path, name):
    with pytest.raises(ValueError, match="cannot be the name"):
        write(tmp_path / "a.mpq", files={name: b""})


def test_manifest_and_tensors_must_agree(tmp_path):
    with pytest.raises(ValueError, match=r"'conv.weight.scale' is only in"):
        bundle.write(tmp_path / "a", manifest(), FILES, {"conv.weight.codes": TENSORS["conv.weight.codes"]})
    wrong = manifest() | {"functions": []}
    with pytest.raises(ValueError, match="'functions' must have at least 1"):
        bundle.write(tmp_path / "a", wrong, FILES, TENSORS)
    assert os.listdir(tmp_path) == []


# What exists, and what refuses to be written


@pytest.mark.parametrize("name", ["a.mpq", "a.zip"])
def test_existing_output_is_refused_unless_overwritten(tmp_path, name):
    write(tmp_path / name)
    with pytest.raises(UserError, match="exists; choose another name or give overwrite"):
        write(tmp_path / name)
    write(tmp_path / name, files={"ir.txt": b"second"}, overwrite=True)
    assert bundle.read(tmp_path / name).file("ir.txt").read_bytes() == b"second"
    assert os.listdir(tmp_path) == [name]


def test_only_artifacts_are_overwritten(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    (tmp_path / "notes.zip").write_text("not a zip")
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "manifest.json").write_text('{"name": "a web page"}')
    with zipfile.ZipFile(tmp_path / "checkpoint.pt", "w") as archive:
        archive.writestr("data.pkl", b"weights")
    for name in ("home", "notes.zip", "site", "checkpoint.pt"):
        with pytest.raises(UserError, match="is no artifact, so it is not overwritten"):
            write(tmp_path / name, overwrite=True)
    assert (tmp_path / "home" / "thesis.tex").read_text() == "years of work"


def test_no_such_folder(tmp_path):
    with pytest.raises(UserError, match=r"there is no folder .*create it first"):
        write(tmp_path / "none" / "a.mpq")


@pytest.mark.parametrize("name", ["a.mpq", "a.zip"])
@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt()])
def test_a_failing_file_leaves_nothing(tmp_path, name, error):
    write(tmp_path / name)
    before = bundle.read(tmp_path / name).manifest

    def fail(path: Path) -> None:
        path.write_bytes(b"half")
        raise error

    for overwrite, target in ((True, name), (False, "other-" + name)):
        with pytest.raises(type(error)):
            write(tmp_path / target, files={"ir.txt": b"new", "kernels.so": fail}, overwrite=overwrite)
    assert os.listdir(tmp_path) == [name]
    assert bundle.read(tmp_path / name).manifest == before


def test_ctrl_c(tmp_path):
    code = """
        import signal
        signal.signal(signal.SIGINT, signal.default_int_handler)
        interrupt = lambda path: (path.write_bytes(b"half"), os.kill(os.getpid(), signal.SIGINT))
        test.write(path, files={"kernels.so": interrupt})
    """
    done = python(code, tmp_path / "a.mpq")
    assert "KeyboardInterrupt" in done.stderr
    assert done.returncode == -signal.SIGINT
    assert os.listdir(tmp_path) == []


TRY = """
    try:
        test.write(path, overwrite=True, **OPTIONS)
    except UserError as error:
        print(error)
    print(os.listdir(path.parent))
"""


@pytest.mark.parametrize("suffix", ["mpq", "zip"])
def test_a_full_disk(mounts, tmp_path, suffix):
    code = 'OPTIONS = {"files": {"kernels.so": bytes(2 << 20)}}' + textwrap.dedent(TRY)
    done = python(code, tmp_path / f"a.{suffix}", prelude=f"mount -t tmpfs -o size=1m tmpfs {tmp_path}")
    assert done.returncode == 0, done.stderr
    assert "No space left on device; free some space" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_disk_that_fills_while_overwriting_keeps_the_old(mounts, tmp_path):
    code = 'test.write(path)\nOPTIONS = {"files": {"kernels.so": bytes(2 << 20)}}' + textwrap.dedent(TRY)
    code += "assert artifact.read(path).file('kernels.so').read_bytes() == test.FILES['kernels.so']\n"
    done = python(code, tmp_path / "a.mpq", prelude=f"mount -t tmpfs -o size=1m tmpfs {tmp_path}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "['a.mpq']"


def test_a_read_only_disk(mounts, tmp_path):
    prelude = f"mount -t tmpfs tmpfs {tmp_path}; mount -o remount,ro {tmp_path}"
    done = python("OPTIONS = {}" + textwrap.dedent(TRY), tmp_path / "a.mpq", prelude=prelude)
    assert done.returncode == 0, done.stderr
    assert "cannot be written to; choose another place" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_file_size_limit(tmp_path):
    code = """
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
        OPTIONS = {}
    """
    done = python(textwrap.dedent(code) + textwrap.dedent(TRY), tmp_path / "a.mpq")
    assert done.returncode == 0, done.stderr
    assert "File too large" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


# What is refused when reading


def flip(path: Path, position: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


DAMAGE = {
    "truncated kernels": (lambda a: truncate(a / "kernels.so"), r"kernels\.so is truncated \(600 of 1200"),
    "altered weights": (lambda a: flip(a / "weights.safetensors"), r"weights\.safetensors was altered"),
    "longer ir": (lambda a: (a / "ir.txt").write_bytes(b"graph unet()\n\n"), r"ir\.txt was altered"),
    "missing kernels": (lambda a: (a / "kernels.so").unlink(), r"kernels\.so is missing"),
    "extra file": (lambda a: (a / "model.bin").touch(), r"holds model\.bin, which does not belong"),
    "extra folder": (lambda a: (a / "dumps").mkdir(), "holds dumps"),
    "folder for a file": (
        lambda a: ((a / "ir.txt").unlink(), (a / "ir.txt").mkdir()),
        "ir.txt is not a plain file",
    ),
    "no manifest": (lambda a: (a / "manifest.json").unlink(), "is not an artifact: it has no manifest"),
    "truncated manifest": (lambda a: truncate(a / "manifest.json"), "not JSON"),
    "binary manifest": (lambda a: (a / "manifest.json").write_bytes(b"\xff\x00"), "not JSON"),
    "deep manifest": (lambda a: (a / "manifest.json").write_bytes(b"[" * 200_000), "not JSON"),
    "another manifest": (
        lambda a: (a / "manifest.json").write_bytes(b'{"name": "web app"}'),
        "not say format",
    ),
    "space in manifest": (
        lambda a: (a / "manifest.json").write_bytes((a / "manifest.json").read_bytes() + b" "),
        "manifest.json was altered",
    ),
    "altered manifest": (
        lambda a: (a / "manifest.json").write_bytes(
            (a / "manifest.json").read_bytes().replace(b"10000", b"10001")
        ),
        "manifest.json was altered",
    ),
    "newer version": (lambda a: resign(a, format_version=4), "version 4, made by a newer mpq-compiler"),
    "older version": (lambda a: resign(a, format_version=2), "version 2, made by an earlier mpq-compiler"),
    "wrong schema": (lambda a: resign(a, functions=[]), "does not obey the schema .*'functions'"),
    "unknown key": (lambda a: resign(a, colour="red"), "unknown key 'colour'"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_one_sentence(tmp_path, case):
    damage, says = DAMAGE[case]
    write(tmp_path / "a.mpq")
    damage(tmp_path / "a.mpq")
    with pytest.raises(UserError, match=says) as caught:
        bundle.read(tmp_path / "a.mpq")
    assert "\n" not in str(caught.value)


def test_every_byte_is_covered(tmp_path):
    write(tmp_path / "a.mpq")
    for file in sorted((tmp_path / "a.mpq").iterdir()):
        for position in np.random.default_rng(0).integers(0, file.stat().st_size, 40):
            flip(file, int(position))
            with pytest.raises(UserError):
                bundle.read(tmp_path / "a.mpq")
            flip(file, int(position))
    bundle.read(tmp_path / "a.mpq")


@pytest.mark.parametrize("name", [bundle.WEIGHTS, bundle.KERNELS])
def test_what_is_opened_is_verified_where_it_is_read(tmp_path, name):
    """Weights and kernels, once each; the path of what was verified is handed out again."""
    write(tmp_path / "a.mpq")
    sound = bundle.opened(tmp_path / "a.mpq")
    path = sound.file(name)
    flip(tmp_path / "a.mpq" / name, -1)
    assert sound.file(name) == path
    artifact = bundle.opened(tmp_path / "a.mpq")
    for use in (artifact.file, artifact.content, *([artifact.tensors] if name == bundle.WEIGHTS else [])):
        with pytest.raises(UserError, match=rf"{name} was altered after it was written; copy or compile it again"):
            use(name)


def test_wrong_paths(tmp_path):
    with pytest.raises(UserError, match="there is no artifact"):
        bundle.read(tmp_path / "none")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(UserError, match="is not an artifact"):
        bundle.read(tmp_path / "text")


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_damaged_zips(tmp_path, compression):
    write(tmp_path / "a.mpq")
    files = contents(tmp_path / "a.mpq")

    def pack(entries: dict[str, bytes]) -> Path:
        with zipfile.ZipFile(tmp_path / "x.zip", "w", compression) as archive:
            for name, content in entries.items():
                archive.writestr(name, content)
        return tmp_path / "x.zip"

    bundle.read(pack(files))
    cases = [
        ({**files, "ir.txt": b"graph unet_\n\n"}, r"ir\.txt was altered"),
        ({**files, "ir.txt": bytes(50 << 20)}, r"ir\.txt is larger than the manifest says"),
        ({**files, "extra": b""}, "extra is not in the manifest"),
        ({**files, "../ir.txt": b""}, "more than the files of one artifact"),
        ({k: v for k, v in files.items() if k != "ir.txt"}, r"ir\.txt is missing"),
        ({k: v for k, v in files.items() if k != "manifest.json"}, r"it has no manifest\.json"),
    ]
    for entries, says in cases:
        with pytest.raises(UserError, match=says):
            bundle.read(pack(entries))
    truncate(pack(files))
    with pytest.raises(UserError, match="nor a whole zip"):
        bundle.read(tmp_path / "x.zip")
    # The container fields (times, modes) are not hashed, its files are: a flipped bit shows or is harmless.
    refused = 0
    for position in np.random.default_rng(0).integers(0, pack(files).stat().st_size, 60):
        flip(pack(files), int(position))
        try:
            assert contents(bundle.read(tmp_path / "x.zip").folder) == files
        except UserError:
            refused += 1
    assert refused > 20


def test_no_torch_and_no_tvm():
    code = "import sys, mpq_compiler.artifact.bundle; print({'torch', 'tvm', 'tvm_ffi'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_weights_are_read_by_the_safetensors_library(tmp_path):
    from safetensors.numpy import load_file

    write(tmp_path / "a.mpq")
    theirs = load_file(tmp_path / "a.mpq" / "weights.safetensors")
    for name, tensor in TENSORS.items():
        np.testing.assert_array_equal(theirs[name], tensor)
