from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mpq_compiler.frontend import checkpoint
from mpq_compiler.support import usage
from mpq_compiler.support.errors import UserError

STEM = "diffusion_pytorch_model"
MIB = 1 << 20


def mapped(tensor: torch.Tensor, path: Path) -> bool:
    """Whether the tensor lies in a mapping of the file, by what the system says."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(str(path)):
            first, last = (int(word, 16) for word in line.split()[0].split("-"))
            if first <= tensor.data_ptr() and tensor.data_ptr() + tensor.nbytes <= last:
                return True
    return False


def held() -> int:
    """Bytes of memory that the system cannot have back, without what earlier tests and temporaries left in the heap."""
    usage.trim()
    return usage.memory()


def shards(folder: Path, **files: dict[str, torch.Tensor]) -> None:
    """Writes shards and their index; a tensor of several is, by the index, in the first."""
    places: dict[str, str] = {}
    for name, tensors in files.items():
        save_file(tensors, folder / f"{name}.safetensors")
        places = {tensor: f"{name}.safetensors" for tensor in tensors} | places
    (folder / f"{STEM}.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def refused(folder: Path, *parts: str) -> None:
    with pytest.raises(UserError) as caught:
        checkpoint.read_weights(folder)
    message = str(caught.value)
    assert "\n" not in message and all(part in message for part in parts), message


def test_weights_of_mixed_types_are_mapped_as_they_are_stored(tmp_path: Path) -> None:
    types = (torch.float16, torch.bfloat16, torch.float32, torch.int64, torch.uint8, torch.bool)
    given = {str(dtype): (torch.rand(3, 5) * 9).to(dtype) for dtype in types}
    save_file(given, path := tmp_path / f"{STEM}.safetensors")
    weights = checkpoint.read_weights(tmp_path)
    assert weights.keys() == given.keys()
    for name, tensor in given.items():
        assert weights[name].dtype == tensor.dtype and torch.equal(weights[name], tensor)
        at = weights[name].data_ptr()
        assert mapped(weights[name], path) if tensor.dtype != torch.float32 else at % 64 == 0, name


def test_float32_gives_the_same_bits_wherever_it_lies_in_its_file(tmp_path: Path) -> None:
    """Products with weights at addresses that are no multiples of 64 may differ in the last bit."""
    for offset in range(1, 16):
        save_file({"a": torch.ones(offset), "b": torch.randn(65, 33)}, tmp_path / f"{STEM}.safetensors")
        assert all(tensor.data_ptr() % 64 == 0 for tensor in checkpoint.read_weights(tmp_path).values())


def test_halves_take_no_memory_that_the_system_cannot_have_back(tmp_path: Path) -> None:
    path = tmp_path / f"{STEM}.safetensors"
    save_file({"a": torch.ones(32 * MIB, dtype=torch.bfloat16), "b": torch.ones(16 * MIB)}, path)  # 64 MiB each
    before = held()
    weights = checkpoint.read_weights(tmp_path)
    assert all(tensor[::2048].eq(1).all() for tensor in weights.values())  # every page is read
    assert held() - before < 4 * MIB


@pytest.mark.parametrize("scale", [None, torch.tensor(0.3)])
def test_8_bit_floats_do_neither(tmp_path: Path, scale: torch.Tensor | None) -> None:
    values = torch.full((16, MIB), 3.0).to(torch.float8_e4m3fn)  # 64 MiB of float32
    given = {"a.weight": values} | ({} if scale is None else {"a.weight_scale": scale})
    save_file(given, tmp_path / f"{STEM}.safetensors")
    before = held()
    weight = checkpoint.read_weights(tmp_path)["a.weight"]
    assert weight.float().eq(3.0 if scale is None else 3 * scale).all()
    assert held() - before < 4 * MIB


def test_a_change_does_not_reach_the_file(tmp_path: Path) -> None:
    save_file({"a": torch.ones(9)}, path := tmp_path / f"{STEM}.safetensors")
    checkpoint.read_weights(tmp_path)["a"].zero_()
    assert torch.equal(load_file(path)["a"], torch.ones(9))


def test_float64_is_narrowed(tmp_path: Path) -> None:
    given = torch.rand(7, dtype=torch.float64)
    save_file({"a": given}, tmp_path / f"{STEM}.safetensors")
    assert torch.equal(checkpoint.read_weights(tmp_path)["a"], given.float())


def test_a_tensor_at_an_odd_byte_is_copied(tmp_path: Path) -> None:
    """Writers sort by size, so that this does not happen; the format allows it."""
    values = torch.arange(4, dtype=torch.float16)
    header = {
        "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "b": {"dtype": "F16", "shape": [4], "data_offsets": [1, 9]},
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    data = len(text).to_bytes(8, "little") + text + b"\7" + values.numpy().tobytes()
    (tmp_path / f"{STEM}.safetensors").write_bytes(data)
    found = checkpoint.read_weights(tmp_path)["b"]
    assert torch.equal(found, values) and found.data_ptr() % 2 == 0


def test_headers_promise_what_is_read(tmp_path: Path) -> None:
    small = torch.rand(4, 6).to(torch.float8_e4m3fn)
    given = {"a.weight": small, "a.weight_scale": torch.tensor(0.3), "b": torch.ones(2, dtype=torch.float16)}
    shards(tmp_path, one=given, two={"c": torch.zeros(3, dtype=torch.int32)})
    promised, weights = checkpoint.headers(tmp_path).promised(), checkpoint.read_weights(tmp_path)
    assert {n: (t.shape, t.dtype) for n, t in promised.items()} == {n: (t.shape, t.dtype) for n, t in weights.items()}
    assert all(tensor.is_meta for tensor in promised.values())


# Planted faults


def test_a_truncated_shard_is_found_by_headers(tmp_path: Path) -> None:
    shards(tmp_path, one={"a": torch.ones(9)}, two={"b": torch.ones(9)})
    (tmp_path / "two.safetensors").write_bytes((tmp_path / "two.safetensors").read_bytes()[:-4])
    with pytest.raises(UserError, match=r"two\.safetensors is not a sound safetensors file"):
        checkpoint.headers(tmp_path)


def test_an_index_of_absent_shards(tmp_path: Path) -> None:
    names = "abcdef"
    shards(tmp_path, **{name: {name: torch.ones(1)} for name in names})
    (tmp_path / "b.safetensors").unlink()
    refused(tmp_path, "index.json'", "the file 'b.safetensors', which is not in that folder")
    for name in "cdef":
        (tmp_path / f"{name}.safetensors").unlink()
    refused(tmp_path, "5 files, 'b.safetensors', 'c.safetensors', 'd.safetensors' and 2 more, which are not in that")


def test_shards_without_an_index(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / f"{STEM}-00002-of-00003.safetensors")
    refused(tmp_path, "'diffusion_pytorch_model-00002-of-00003.safetensors' and no index", "index.json")


def test_an_index_of_other_shards(tmp_path: Path) -> None:
    shards(tmp_path, one={"a": torch.ones(9), "d": torch.ones(1)}, two={"b": torch.ones(9), "c": torch.ones(2)})
    save_file({"a": torch.ones(9)}, tmp_path / "two.safetensors")
    refused(tmp_path, "says that 'two.safetensors' holds 'b', 'c', and it does not", "of one commit")


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    shared = torch.rand(9)
    shards(tmp_path, one={"a": shared, "b": torch.ones(1)}, two={"a": shared.clone(), "c": torch.ones(1)})
    assert torch.equal(checkpoint.read_weights(tmp_path)["a"], shared)
    shards(tmp_path, one={"a": shared}, two={"a": shared + 1, "c": torch.ones(1)})
    refused(tmp_path, "'a' is in 'one.safetensors' and, with other values, in 'two.safetensors'")
    shards(tmp_path, one={"a": shared}, two={"a": shared.half(), "c": torch.ones(1)})
    refused(tmp_path, "'a' is in 'one.safetensors' and, as another type or shape, in 'two.safetensors'")


def test_a_type_that_is_no_weights(tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F4", "shape": [4], "data_offsets": [0, 2]}}).encode()
    path = tmp_path / f"{STEM}.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0")
    refused(tmp_path, "'a'", "type F4", "not quantized")
