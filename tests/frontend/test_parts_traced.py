"""Parts beside the denoiser through the passes: texts pooled at a token, decoders, and both without a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import CLIPTextModelWithProjection, Qwen3Config, Qwen3ForCausalLM

from mpq_compiler.frontend import call_file, denoiser
from mpq_compiler.ir import ops
from mpq_compiler.ir.aten import aten
from mpq_compiler.ir.interpreter import run
from mpq_compiler.ir.program import Program
from mpq_compiler.pipeline import manager, parser
from mpq_compiler.pipeline.session import Session
from tests.harness import programs, tiny_pipelines


def traced(
    module: torch.nn.Module, rows: dict[str, torch.Tensor], folder: Path
) -> tuple[Program, denoiser.Denoiser]:
    calls = [{n: v[:3] for n, v in rows.items()}, {n: v[3:] for n, v in rows.items()}]
    name = next(iter(rows))
    call_file.write(folder / "calls.safetensors", module, calls, latent=name)
    made = denoiser.wrap_calls(module, folder / "calls.safetensors", latent=name)
    passes = parser.parse("trace,layout")
    program, _ = manager.run_pipeline(passes, programs.empty(), Session(denoiser=made))
    return program, made


class Pooled(torch.nn.Module):
    """A text encoder's pooled output, beside the states of its last layer but one."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        output = self.model(input_ids, output_hidden_states=True)
        return output.hidden_states[-2], output[0]


@pytest.mark.parametrize("legacy", [False, True])
def test_a_text_is_pooled_at_its_end(legacy: bool, tmp_path: Path) -> None:
    module = Pooled(tiny_pipelines.clip(CLIPTextModelWithProjection, legacy))
    end = tiny_pipelines.clip_tokenizer().eos_token_id
    tokens = torch.randint(0, end, (6, tiny_pipelines.TOKENS), generator=torch.Generator().manual_seed(0))
    for row, place in enumerate((1, 4, 7, 9, 14, 15)):
        tokens[row, place:] = end
    program, made = traced(module, {"input_ids": tokens}, tmp_path)
    (node,) = (n for n in program.graph.nodes if n.target is ops.row_of_token)
    assert node.args[2] == (None if legacy else end)
    inputs = {"input_ids": tokens, "timestep": torch.zeros(6)}
    expected = made(**inputs)
    assert torch.allclose(run(program, inputs), expected, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        states, pooled = module(tokens)
    assert torch.equal(expected, torch.cat([states.flatten(1), pooled], 1))


class Masked(torch.nn.Module):
    """A text encoder that takes a mask of its tokens, and gives states of two of its layers."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        output = self.model(input_ids, attention_mask=attention_mask, output_hidden_states=True)
        return output.hidden_states[1], output.hidden_states[-1]


def qwen3() -> torch.nn.Module:
    """A language model with grouped queries, rotary embeddings, causal attention, and norms of queries and keys."""
    config = Qwen3Config(
        vocab_size=81, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=32, use_cache=False,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).eval()


@pytest.mark.parametrize("make", [tiny_pipelines.t5, qwen3])
def test_masks_of_tokens(make: Callable[[], torch.nn.Module], tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = Masked(make())
    tokens = torch.randint(0, 81, (6, 12), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(12) < torch.tensor([3, 12, 5, 8, 4, 9])[:, None]).to(torch.int64)
    program, made = traced(module, {"input_ids": tokens, "attention_mask": mask}, tmp_path)
    assert not [n for n in program.graph.nodes if n.target in (aten.index.Tensor, aten.sym_size.int)]
    inputs = {"input_ids": tokens, "attention_mask": mask, "timestep": torch.zeros(6)}
    assert torch.allclose(run(program, inputs), made(**inputs), rtol=1e-4, atol=1e-5)
