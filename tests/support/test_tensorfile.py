from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors.numpy import load as reference_load
from safetensors.numpy import load_file, save_file

from mpq_compiler.support import tensorfile
from mpq_compiler.support.errors import UserError

RNG = np.random.default_rng(0)
TENSORS = {
    "odd": RNG.integers(0, 256, 4097, dtype=np.uint8),
    "whole": RNG.standard_normal((64, 64)).astype(np.float32),
    "also.odd": RNG.integers(-127, 128, (65, 333), dtype=np.int8),
    "scale": RNG.standard_normal(7).astype(np.float16),
    "scalar": np.float64(3.5).reshape(()),
    "empty": np.zeros((0, 3), np.int64),
    "flags": np.array([True, False, True]),
    "transposed": RNG.standard_normal((48, 50)).astype(np.float32).T,
}


def encode(tensors=TENSORS, **options) -> bytes:
    stream = io.BytesIO()
    tensorfile.save(stream, tensors, **options)
    return stream.getvalue()


def file_of(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    return path


def with_header(header: object, data: bytes = b"") -> bytes:
    text = json.dumps(header).encode() if not isinstance(header, bytes) else header
    return len(text).to_bytes(8, "little") + text + data


def test_round_trip_and_the_safetensors_library_agrees(tmp_path):
    content = encode(metadata={"b": "2", "a": "1"})
    ours, theirs = tensorfile.load(file_of(tmp_path, content)), reference_load(content)
    assert {*ours} == {*TENSORS}
    assert {*theirs} - {*ours} == {"__pad0", "__pad1"}
    for name, tensor in TENSORS.items():
        for read in (ours[name], theirs[name]):
            assert read.dtype == tensor.dtype and read.shape == tensor.shape
            np.testing.assert_array_equal(read, tensor)


def test_large_tensors_are_aligned_and_padding_is_least(tmp_path):
    path = file_of(tmp_path, encode())
    header, start = tensorfile.read_header(path)
    assert start % 64 == 0
    padding = sum(
        e["data_offsets"][1] - e["data_offsets"][0] for n, e in header.items() if n.startswith("__pad")
    )
    assert padding == sum(-t.nbytes % 64 for t in TENSORS.values() if t.nbytes >= 4096) < 128
    for name, tensor in tensorfile.load(path).items():
        if tensor.nbytes >= 4096:
            assert tensor.ctypes.data % 64 == 0, name
            assert tensorfile.aligned(tensor) is tensor
        assert tensorfile.aligned(tensor).ctypes.data % 64 == 0
    assert tensorfile.payload_bytes(TENSORS) == path.stat().st_size - start - padding


def test_bytes_do_not_depend_on_insertion_order():
    assert encode(dict(reversed(TENSORS.items()))) == encode()


def test_reserved_names_and_types_are_refused():
    with pytest.raises(ValueError, match="reserved"):
        encode({"__pad7": np.zeros(1)})
    with pytest.raises(ValueError, match="complex128"):
        encode({"x": np.zeros(1, np.complex128)})


def test_reads_what_the_library_writes(tmp_path):
    plain = {name: np.ascontiguousarray(tensor) for name, tensor in TENSORS.items()}
    save_file(plain, tmp_path / "x.safetensors", {"format": "np"})
    for name, tensor in tensorfile.load(tmp_path / "x.safetensors").items():
        np.testing.assert_array_equal(tensor, plain[name])


def test_mapped_tensors_may_be_written_without_changing_the_file(tmp_path):
    path = file_of(tmp_path, encode())
    tensorfile.load(path)["whole"][...] = 0
    np.testing.assert_array_equal(load_file(path)["whole"], TENSORS["whole"])


ENTRY = {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "only 0 bytes"),
        (b"abc", "only 3 bytes"),
        ((2**63).to_bytes(8, "little"), "claims 9223372036854775808 bytes"),
        ((99_000_000).to_bytes(8, "little") + b"{}", "claims 99000000 bytes, the file has 10"),
        (with_header(b"nonsense"), "not JSON"),
        (with_header(b"\xff\xfe"), "not a sound"),
        (with_header(b"[" * 100_000), "not a sound"),
        (with_header([1]), "not an object"),
        (with_header({"x": 3}), "'x' is incomplete"),
        (with_header({"x": {**ENTRY, "dtype": "Q4"}}), "unknown type"),
        (with_header({"x": {**ENTRY, "shape": [-4]}}), "not a size"),
        (with_header({"x": {**ENTRY, "shape": [1.5]}}), "not a size"),
        (with_header({"x": {**ENTRY, "shape": [5]}}, b"1234"), "does not fill its 4 bytes"),
        (with_header({"x": {**ENTRY, "data_offsets": [2, 6]}}, b"123456"), "begins at byte 2 where 0"),
        (with_header({"x": ENTRY, "y": ENTRY}, b"1234"), "begins at byte 0 where 4"),
        (with_header({"x": ENTRY}, b"123"), "the file has"),
        (with_header({"x": ENTRY}, b"12345"), "the file has"),
        (with_header(b'{"x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"x":{}}'), "twice"),
    ],
)
def test_an_unsound_file_is_one_sentence(tmp_path, content, says):
    with pytest.raises(UserError, match=says) as caught:
        tensorfile.read_header(file_of(tmp_path, content))
    assert "\n" not in str(caught.value)


def test_missing_file_and_missing_type(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        tensorfile.load(tmp_path / "none")
    path = file_of(tmp_path, with_header({"x": {**ENTRY, "dtype": "F8_E4M3", "shape": [4]}}, b"1234"))
    with pytest.raises(UserError, match=r"'x' .* F8_E4M3"):
        tensorfile.load(path)


def test_bfloat16_is_read_as_float32(tmp_path):
    tensor = torch.tensor([[1.0, -0.1, float("inf")], [3e38, 1e-40, 0.0]], dtype=torch.bfloat16)
    safetensors.torch.save_file({"x": tensor}, tmp_path / "x.safetensors")
    read = tensorfile.load(tmp_path / "x.safetensors")["x"]
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, tensor.float().numpy())
