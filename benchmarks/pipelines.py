"""Prompt to picture, side by side: seconds for the text, a step, the decoder and the whole, and peak memory.

    python -m venv PEERS && PEERS/bin/pip install 'optimum-intel[openvino,diffusers]' openvino-genai \\
        openvino-tokenizers nncf onnxruntime onnx onnxscript        # their releases ask for others than ours
    python -m benchmarks.pipelines --peers PEERS/bin/python
    python -m benchmarks.pipelines --peers PEERS/bin/python --pipelines emoji --systems mpq-w8a8 openvino-hybrid

Every system draws the same prompt from the same noise in four guided steps, in a process of its own
(`benchmarks.pipeline_peers`), one after the other, and all of them again for each run; what stands in the table are
medians. PSNR is that of the picture against diffusers' in float32. Pipelines: the bundled one; and two with random
weights at 256 x 256 pixels, whose pictures are noise and say nothing of quality: one of the size of Stable Diffusion
1.5, and one like FLUX.2 klein, its transformer cut to two double and two single blocks, and before it a language model
as Qwen3-0.6B, of which it reads the 28 layers. Klein is drawn without guidance, as it is meant to be.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks import cells, documents
from benchmarks.machine import provenance
from benchmarks.pipeline_peers import ONNXRUNTIME, OPENVINO, SYSTEMS
from mpq_compiler.frontend import checkpoint

RESULTS = cells.RESULTS / "pipelines.json"
DOCS = cells.ROOT / "docs" / "pipelines.md"
SIZES = {"emoji": 32, "sd15": 256, "klein": 256}
"""The pixels along a side, by pipeline."""
ROUNDS = {"emoji": 30, "sd15": 1, "klein": 1}
"""Pictures of a run, by pipeline."""
STEPS, RUNS = 4, 3
STAGES = ("text_s", "step_s", "decoder_s", "whole_s")


def source(name: str, folder: Path) -> Path:
    """The folder of a diffusers pipeline, which is made where there is none."""
    if name in checkpoint.bundled_pipelines():
        return checkpoint.bundled_pipelines()[name]
    made = folder / name / "pipeline"
    if not made.exists():
        {"sd15": _random_stable_diffusion, "klein": _random_klein}[name](made)
    return made


def _random_stable_diffusion(target: Path) -> None:
    """A pipeline of Stable Diffusion 1.5's configuration with weights as they are initialized, in half precision."""
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.bundled_pipelines()["emoji"] / "tokenizer")
    tokenizer.model_max_length = 77
    ids = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    text = CLIPTextConfig(
        vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, **ids
    )
    levels = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    vae = AutoencoderKL(**levels, block_out_channels=(128, 256, 512, 512), layers_per_block=2, sample_size=512)
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1,
    )  # fmt: skip
    pipeline = StableDiffusionPipeline(
        vae, CLIPTextModel(text), tokenizer, UNet2DConditionModel(sample_size=64, cross_attention_dim=768), scheduler,
        None, None, requires_safety_checker=False,
    )  # fmt: skip
    from benchmarks.train_emoji import save

    save(pipeline, target)


def _random_klein(target: Path) -> None:
    """A pipeline as FLUX.2 klein's, of four blocks, with weights as they are initialized, in half precision."""
    import torch
    from diffusers import (
        AutoencoderKLFlux2,
        FlowMatchEulerDiscreteScheduler,
        Flux2KleinPipeline,
        Flux2Transformer2DModel,
    )
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.bundled_pipelines()["emoji"] / "tokenizer")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.model_max_length = 512
    text = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=1024, intermediate_size=3072, num_hidden_layers=28,
        num_attention_heads=16, num_key_value_heads=8, head_dim=128, max_position_embeddings=512,
    )  # fmt: skip
    transformer = Flux2Transformer2DModel(
        in_channels=128, num_layers=2, num_single_layers=2, attention_head_dim=128, num_attention_heads=24,
        joint_attention_dim=3 * text.hidden_size, guidance_embeds=False,
    )  # fmt: skip
    levels = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    vae = AutoencoderKLFlux2(**levels, block_out_channels=(128, 256, 512, 512), layers_per_block=2)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipeline = Flux2KleinPipeline(scheduler, vae, Qwen3ForCausalLM(text), tokenizer, transformer, is_distilled=True)
    pipeline.to(torch.float16).save_pretrained(target, safe_serialization=True)


def run(python: str, *arguments: str, threads: int = 2) -> str | None:
    """Runs a task of `benchmarks.pipeline_peers`; returns why it failed, in a sentence."""
    environment = {**os.environ, "PYTHONPATH": str(cells.ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(
        [python, "-m", "benchmarks.pipeline_peers", *arguments], cwd=cells.ROOT, env=environment, capture_output=True
    )
    if not done.returncode:
        return None
    return cells.sentence((done.stderr.decode(errors="replace").strip().splitlines() or ["no word"])[-1])


def python_of(system: str, peers: str) -> str:
    return peers if system in (*OPENVINO, *ONNXRUNTIME) else sys.executable


def measure(name: str, systems: Sequence[str], threads: int, folder: Path, peers: str) -> list[dict[str, Any]]:
    """The cells of one pipeline: every system in turn, and all of them again for each run."""
    origin, size = source(name, folder), SIZES[name]
    found: dict[str, list[dict[str, float]]] = {system: [] for system in systems}
    pictures: dict[str, np.ndarray] = {}
    errors: dict[str, str] = {}
    (folder / name).mkdir(parents=True, exist_ok=True)
    for system in systems:
        target = folder / name / ("mpq-w8a8" if system == "mpq-c" else system)
        if target.exists() or system.startswith("torch"):
            continue
        if (said := run(python_of(system, peers), "make", system, str(origin), str(target), str(size))) is not None:
            errors[system] = said
    for _ in range(RUNS):
        for system in systems:
            if system in errors:
                continue
            target = folder / name / ("mpq-w8a8" if system == "mpq-c" else system)
            with tempfile.TemporaryDirectory() as into:
                asked = (system, str(origin), str(target), str(size), str(threads), str(STEPS), str(ROUNDS[name]), into)
                if (said := run(python_of(system, peers), "draw", *asked, threads=threads)) is not None:
                    errors[system] = said
                    continue
                found[system].append(json.loads((Path(into) / "draw.json").read_text(encoding="utf-8")))
                pictures[system] = np.load(Path(into) / "picture.npy")
    rows = []
    for system in systems:
        cell: dict[str, Any] = {"pipeline": name, "subject": system, "threads": threads, "parameters": 0}
        if system in errors:
            rows.append({**cell, "error": errors[system], **provenance()})
            continue
        for key in (*STAGES, "load_s", "peak_bytes"):
            values = [each[key] for each in found[system] if each[key] is not None]
            cell[key] = median(values) if values else None
        if "torch" in pictures and system != "torch":
            error = float(np.square(pictures[system] - pictures["torch"]).mean())
            cell["psnr_db"] = round(-10 * np.log10(max(error, 1e-12)), 2)
        rows.append({**cell, **provenance()})
    return rows


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 0.9995 else f"{1e3 * seconds:.3g} ms"


def table(found: Sequence[dict[str, Any]]) -> str:
    """The table of all cells, times beside the ratio to our first."""
    lines = []
    for cell in found:
        first = next(c for c in found if [c[k] for k in ("pipeline", "threads")] == [cell["pipeline"], cell["threads"]])
        row = [cell["pipeline"], str(cell["threads"]), cell["subject"]]
        if "error" in cell:
            lines.append([*row, cell["error"], "", "", "", "", ""])
            continue
        times = ["" if cell[key] is None else _time(cell[key]) for key in STAGES]
        times[-1] += f", {cell['whole_s'] / first['whole_s']:.2f} x"
        memory = f"{cell['peak_bytes'] / 2**20:.0f} MiB, {cell['peak_bytes'] / first['peak_bytes']:.2f} x"
        lines.append([*row, *times, memory, "" if cell.get("psnr_db") is None else f"{cell['psnr_db']:.1f} dB"])
    headers = ("pipeline", "threads", "system", "text", "a step", "decoder", "whole", "peak memory", "PSNR")
    cpus = sorted({f"{cell['cpu']} ({cell['isa']}), {cell['cores']} cores" for cell in found})
    return f"{documents.table(headers, lines)}\n\nMeasured on {'; '.join(cpus)}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pipelines", nargs="+", choices=SIZES, default=[*SIZES])
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=[*SYSTEMS])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--peers", default=sys.executable, metavar="PYTHON", help="that has the peers")
    parser.add_argument("--folder", type=Path, help="for what is made; it is kept there")
    args = parser.parse_args()
    systems = [name for name in SYSTEMS if name in args.systems]
    with tempfile.TemporaryDirectory() as scratch:
        for name in args.pipelines:
            for threads in args.threads:
                for cell in measure(name, systems, threads, args.folder or Path(scratch), args.peers):
                    order = {"pipeline": tuple(SIZES), "threads": (1, 2), "subject": SYSTEMS}
                    cells.keep(RESULTS, cell, ("pipeline", "subject", "threads"), order)
                    print(json.dumps({k: v for k, v in cell.items() if k not in provenance()}), flush=True)
    documents.insert(DOCS, "pipelines", table(cells.read(RESULTS)))


if __name__ == "__main__":
    main()
