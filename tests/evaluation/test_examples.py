"""The examples of docs/metrics.md judge images as they stand, with small networks in place of those of the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import (
    BitImageProcessorPil,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPProcessor,
    Dinov2Config,
    Dinov2Model,
)

from mpq_compiler.evaluation import user_functions
from tests.harness import pages, tiny_pipelines

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
PROMPTS = ["a red fox in the snow", "two ships", "a house by the sea in a harbour of old green trees and blue men"] * 4


def function(name: str, place: str, folder: Path) -> Any:
    """A function of the page, whose network is read from a folder in place of a repository."""
    (block,) = (block for block in pages.blocks("docs/metrics.md") if f"def {name}(" in block.text)
    assert place in block.text
    found: dict[str, Any] = {"__name__": "judges"}
    exec(block.text.replace(place, str(folder)), found)
    return found[name]


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, (12, 3, 40, 40)).astype(np.float32)


def test_a_clip_score(tmp_path: Path, images: np.ndarray) -> None:
    """Of pictures and prompts as they are: another prompt gives another score, and so does another picture."""
    tokenizer = tiny_pipelines.pipeline("stable-diffusion").tokenizer
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": tiny_pipelines.TOKENS, **ids, **SMALL}
    vision = {"image_size": 224, "patch_size": 32, **SMALL}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(tmp_path)
    CLIPProcessor(CLIPImageProcessorPil(), tokenizer).save_pretrained(tmp_path)
    judges = user_functions.functions(score=function("clip_score", "openai/clip-vit-base-patch16", tmp_path))
    user_functions.probe(judges, images.shape[1:], PROMPTS)
    (found,) = user_functions.compare(judges, images, -images, PROMPTS)["scores"].values()
    assert -100 <= found["value"] <= 100 and found["difference"]["value"] != 0
    (scored,) = judges
    given = (images + 1) / 2
    values = scored(given, PROMPTS)
    assert len(np.unique(values.round(6))) == 12 and not np.allclose(values, scored(given, PROMPTS[::-1]))


def test_features_of_dino(tmp_path: Path, images: np.ndarray) -> None:
    Dinov2Model(Dinov2Config(image_size=224, patch_size=14, **SMALL)).save_pretrained(tmp_path)
    BitImageProcessorPil(crop_size={"height": 224, "width": 224}, size={"shortest_edge": 256}).save_pretrained(tmp_path)
    judges = user_functions.functions(function("dino", "facebook/dinov2-base", tmp_path))
    user_functions.probe(judges, images.shape[1:], [None])
    with pytest.warns(match="of rank 11"):
        (found,) = user_functions.compare(judges, images, -images, [None] * 12)["features"].values()
    assert found["dimensions"] == 32 and found["fid"] is not None and found["fid"]["value"] > 0
