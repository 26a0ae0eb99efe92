"""Tensors in files that go with the process, and the store that moves large ones there."""

from __future__ import annotations

import os
import tempfile

import pytest
import torch

from mpq_compiler.ir import scratch
from mpq_compiler.ir.program import TensorStore
from mpq_compiler.support.errors import UserError
from mpq_compiler.support.usage import memory

LARGE = (1024, 1024)
"""Of 4 MiB in float32."""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield tmp_path
    assert not [*tmp_path.iterdir()], "a file stayed behind"


def test_zeros_of_any_size_and_type():
    for shape, dtype in ((LARGE, torch.float32), ((4096, 1024), torch.int8), ((2048, 1024), torch.bfloat16)):
        made = scratch.zeros(shape, dtype)
        assert made.shape == shape and made.dtype == dtype and scratch.is_mapped(made) and not made.any()
    small = scratch.zeros((3, 4))
    assert small.shape == (3, 4) and not scratch.is_mapped(small)


def test_what_is_kept_has_the_same_values_and_strides():
    x = torch.randn(64, 32, 3, 3 * 64)
    channels_last, strided = x.permute(0, 2, 3, 1), torch.randn(2048, 1024)[:, ::2]
    for tensor in (x, channels_last, channels_last.permute(3, 0, 2, 1)):
        kept = scratch.kept(tensor)
        assert scratch.is_mapped(kept) and torch.equal(kept, tensor) and kept.stride() == tensor.stride()
    kept = scratch.kept(strided)
    assert scratch.is_mapped(kept) and torch.equal(kept, strided) and kept.is_contiguous()
    assert scratch.kept(kept) is kept
    small = torch.ones(3)
    assert scratch.kept(small) is small


def test_a_full_disk_is_said_in_a_sentence(monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match=r"4 MiB do not fit in .* \(No space left on device\): free some space"):
        scratch.zeros(LARGE)


def test_the_store_moves_large_tensors_out_of_memory_but_leaves_a_models_own_where_they_are():
    store, weight = TensorStore(), torch.randn(LARGE)
    assert store[store.hold("weight", weight)] is not None
    assert store["weight"].data_ptr() == weight.data_ptr()
    assert store[store.add("weight:transposed", weight.T)].data_ptr() == weight.data_ptr()
    changed = torch.empty(LARGE)  # one for all: the heap that earlier tests left can grow by each new one
    before = memory()
    for i in range(16):
        store.add(f"rotated.{i}", torch.add(weight, i, out=changed))
    assert memory() - before < 16 << 20, "64 MiB were added"
    assert all(torch.equal(store[f"rotated.{i}"], weight + i) for i in range(16))
    assert all(scratch.is_mapped(store[f"rotated.{i}"]) for i in range(16))
    assert store.add("rotated.3", weight + 3) == "rotated.3"


def test_the_store_reads_halves_as_floats_and_knows_their_form_without_reading():
    half = torch.randn(6, 4, dtype=torch.bfloat16).T
    store = TensorStore({"half": half, "codes": torch.zeros(3, dtype=torch.uint8)})
    read, meta = store.read("half"), store.meta("half")
    assert read.dtype == meta.dtype == torch.float32 and torch.equal(read, half.float())
    assert meta.device.type == "meta" and meta.shape == read.shape and meta.stride() == read.stride()
    assert store.meta("codes").dtype == torch.uint8
