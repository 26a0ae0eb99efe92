"""The text encoder of the bundled model: prompts, tokens, embeddings, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mpq_compiler.frontend import checkpoint
from mpq_compiler.sampling.text_encoder import TextEncoder
from mpq_compiler.support.errors import UserError

FOLDER = checkpoint.bundled()["fashion-text"]
ABOUT: dict[str, Any] = checkpoint.read_json(FOLDER / "harness.json")["text"]
TABLES = FOLDER / ABOUT["tables"]


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    return TextEncoder.load(ABOUT, TABLES)


def test_prompts_become_tokens_and_embeddings(encoder: TextEncoder) -> None:
    tokens = encoder.tokens(["dark plain boot", ""])
    spelled = [[encoder.vocabulary[t] for t in row] for row in tokens]
    assert spelled[0] == ["<bos>", "dark", "plain", "boot", "<eos>", "<pad>", "<pad>", "<pad>"]
    assert spelled[1] == ["<bos>", "<eos>"] + ["<pad>"] * 6
    tables = load_file(TABLES)
    embeddings = encoder.encode(["dark plain boot"])
    assert embeddings.dtype == np.float32
    assert np.array_equal(embeddings[0], tables["words"][tokens[0]] + tables["positions"])


def test_token_0_is_the_same_for_all_prompts_and_far_larger(encoder: TextEncoder) -> None:
    """What bos-split needs, and why: two channels of the first token dwarf everything else."""
    embeddings = encoder.encode(encoder.all_prompts)
    assert (embeddings[:, 0] == embeddings[0, 0]).all()
    assert np.abs(embeddings[:, 0]).max() > 4 * np.abs(embeddings[:, 1:]).max()
    assert (np.abs(embeddings[0, 0]) > 10).sum() == 2


def test_all_prompts_once_and_varied_from_the_first(encoder: TextEncoder) -> None:
    prompts = encoder.all_prompts
    assert len(prompts) == len(set(prompts)) == 3 * 2 * 10
    assert [p.split()[2] for p in prompts[:10]] == ABOUT["prompt"][2]["words"]
    assert len({tuple(p.split()[:2]) for p in prompts[:10]}) == 6
    labels = encoder.labels(prompts[:20])
    assert labels is not None
    assert labels.tolist() == [*range(10)] * 2
    assert encoder.labels(["dark plain boot", " "]) is None


@pytest.mark.parametrize(
    ("prompt", "sentence"),
    [
        ("dark plain boots", "'boots', which the model does not know; did you mean 'boot'"),
        ("plain dark boot", "must be <tone> <texture> <class>, such as 'dark plain tshirt'"),
        ("dark boot", "must be <tone> <texture> <class>"),
        ("dark plain boot boot", "must be <tone> <texture> <class>"),
        ("<bos> plain boot", "'<bos>'"),
    ],
)
def test_prompts_that_are_refused(encoder: TextEncoder, prompt: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        encoder.encode([prompt])


def test_it_travels(encoder: TextEncoder, tmp_path: Path) -> None:
    """Through a file, and JSON whose keys were sorted on the way."""
    encoder.save(tmp_path / "text.safetensors")
    about = json.loads(json.dumps(encoder.to_json(), sort_keys=True))
    again = TextEncoder.load(about, tmp_path / "text.safetensors")
    assert again.all_prompts == encoder.all_prompts
    assert np.array_equal(again.encode(encoder.all_prompts), encoder.encode(encoder.all_prompts))


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"vocabulary": ABOUT["vocabulary"][1:]}, "'vocabulary'"),
        ({"vocabulary": ["<sos>", *ABOUT["vocabulary"][1:]]}, "'<bos>'"),
        ({"vocabulary": ["dark", *ABOUT["vocabulary"][1:]]}, "each once"),
        ({"prompt": ["dark"]}, "'prompt'"),
        ({"prompt": [{"name": "tone", "words": ["dark", "black"]}]}, "'black'"),
        ({"prompt": [{"name": str(i), "words": ["dark"]} for i in range(7)]}, "do not fit"),
    ],
)
def test_descriptions_that_are_refused(change: dict[str, Any], key: str) -> None:
    with pytest.raises(UserError, match=key):
        TextEncoder.load({**ABOUT, **change}, TABLES)


def test_tables_that_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "text.safetensors"
    save_file({"words": load_file(TABLES)["words"]}, path)
    with pytest.raises(UserError, match="'positions'"):
        TextEncoder.load(ABOUT, path)


def test_prompts_need_no_torch() -> None:
    room = "mpq_compiler.sampling"
    code = f"import {room}.conditioning, {room}.text_encoder, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
