"""Whole pipelines from prompt to picture, by us and by peers, each in a process of its own.

    python -m benchmarks.pipeline_peers make SYSTEM SOURCE TARGET SIZE          # what the system draws with
    python -m benchmarks.pipeline_peers draw SYSTEM SOURCE TARGET SIZE THREADS STEPS ROUNDS INTO

`benchmarks.pipelines` runs these, for peers by the Python that has them. ``SOURCE`` is the folder of a diffusers
pipeline with a text encoder of CLIP's, a UNet and an AutoencoderKL, or of FLUX.2 klein's; ``SIZE`` the pixels along a
side. Systems are:

- *mpq-w8a8*, *mpq-4*: ours, by the recipe w8a8, or the default one at 4 bits, by `load_pipeline`; *mpq-c*: the C
  program of the former;
- *torch*, *torch-bf16*: diffusers' own pipeline;
- *openvino*, *openvino-int8*, *openvino-hybrid*: OpenVINO GenAI's Text2ImagePipeline of what optimum-intel exports: as
  it is, with 8-bit weights, and quantized in the hybrid way that it documents for Stable Diffusion (activations of
  convolutions too), on the prompts that we calibrate on; where GenAI does not have a pipeline, optimum-intel's own;
- *onnxruntime*, *onnxruntime-int8*: `torch.onnx.export` of the three parts; in 8 bits UNet and decoder by
  `quantize_static` with QDQ on calls of the float pipeline, and the text encoder by `quantize_dynamic`.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

OURS = {"mpq-w8a8": ["--recipe", "w8a8"], "mpq-4": ["--weights", "4"], "mpq-c": ["--recipe", "w8a8"]}
OPENVINO = ("openvino", "openvino-int8", "openvino-hybrid")
ONNXRUNTIME = ("onnxruntime", "onnxruntime-int8")
TORCH = ("torch", "torch-bf16")
SYSTEMS = (*OURS, *OPENVINO, *ONNXRUNTIME, *TORCH)
GUIDANCE, SEED = 3.0, 1
"""The guidance of pipelines with a UNet; those with a transformer are drawn without."""
CALLS = 24
"""Calls that onnxruntime's quantizer calibrates on."""
LARGEST = 2**31
"""Bytes of weights with which onnxruntime's documentation asks to leave the optimizer out."""
PARTS = ("text", "denoiser", "decoder")
FEW = 16
"""Prompts that ours is calibrated on where weights are random, and so no picture is judged."""
Draw = Callable[[int], np.ndarray]
"""Draws a picture in so many steps: f32 [H, W, 3] from 0 to 1."""
Times = dict[str, list[float]]


def main() -> None:
    task, *arguments = sys.argv[1:]
    {"make": make, "draw": draw}[task](*arguments)


def prompts(source: str) -> list[str]:
    """The prompts of the pipeline, else ours: calibration's first, the one that is drawn last."""
    own = Path(source) / "prompts.txt"
    file = own if own.is_file() else Path(__file__).parents[1] / "mpq_compiler" / "frontend" / "prompts.txt"
    return file.read_text(encoding="utf-8").splitlines()


def is_klein(source: str) -> bool:
    return (Path(source) / "transformer").is_dir()


def guidance(source: str) -> float:
    return 1.0 if is_klein(source) else GUIDANCE


# ------------------------------------------------------------------------------------------------------------- making


def make(system: str, source: str, target: str, size: str) -> None:
    if system in OURS:
        _compile(system, source, target, int(size))
    elif system in OPENVINO:
        _export_openvino(system, source, target)
    elif system in ONNXRUNTIME:
        _export_onnx(system, source, target, int(size))


def _compile(system: str, source: str, target: str, size: int) -> None:
    _, channels, height, width = noise(source, size).shape
    command = ["compile", source, "-o", target, "--emit", "c", *OURS[system]]
    if is_klein(source):
        command += ["--shapes", f"1x{channels // 4}x{2 * height}x{2 * width}", "--steps", "4"]
    else:
        command += ["--shapes", f"1x{channels}x{height}x{width}", "--guidance", str(GUIDANCE)]
    few = Path(f"{target}.prompts.txt")
    if size > 64:
        few.write_text("".join(f"{line}\n" for line in prompts(source)[:FEW]), encoding="utf-8")
        command += ["--prompts", str(few), "--samples", "4"]
    subprocess.run([sys.executable, "-m", "mpq_compiler", *command], check=True)


def _scale(source: str) -> int:
    config = json.loads((Path(source) / "vae" / "config.json").read_text(encoding="utf-8"))
    return int(2 ** (len(config["block_out_channels"]) - 1))


def _export_openvino(system: str, source: str, target: str) -> None:
    from openvino import save_model
    from openvino_tokenizers import convert_tokenizer
    from optimum.intel import OVDiffusionPipeline, OVWeightQuantizationConfig
    from transformers import AutoTokenizer

    asked: dict[str, Any] = {"export": True, "compile": False}
    if system == "openvino-int8":
        asked["quantization_config"] = OVWeightQuantizationConfig(bits=8)
    elif system == "openvino-hybrid":
        texts = prompts(source)[:96]
        asked["quantization_config"] = OVWeightQuantizationConfig(
            bits=8, quant_method="hybrid", dataset=texts, num_samples=CALLS * 2
        )
    else:
        asked["load_in_8bit"] = False
    OVDiffusionPipeline.from_pretrained(source, **asked).save_pretrained(target)
    if is_klein(source):
        return
    tokenizer, detokenizer = convert_tokenizer(
        AutoTokenizer.from_pretrained(Path(source) / "tokenizer"), with_detokenizer=True
    )
    save_model(tokenizer, Path(target) / "tokenizer" / "openvino_tokenizer.xml")
    save_model(detokenizer, Path(target) / "tokenizer" / "openvino_detokenizer.xml")


def _diffusers(source: str, dtype: str = "float32") -> Any:
    import torch
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(source, torch_dtype=getattr(torch, dtype))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _export_onnx(system: str, source: str, target: str, size: int) -> None:
    import torch

    from benchmarks.pipeline_exports import exports

    folder = Path(target)
    folder.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        for name, export in exports(_diffusers(source), noise(source, size).shape).items():
            file = folder / f"{name}.onnx"
            torch.onnx.export(export.module, export.example, file, dynamo=True, external_data=size > 64)
    if system == "onnxruntime-int8":
        _quantize_onnx(source, folder, size)


def _quantize_onnx(source: str, folder: Path, size: int) -> None:
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_dynamic,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    from benchmarks.pipeline_exports import run_by

    rows: dict[str, list[dict[str, np.ndarray]]] = {"denoiser": [], "decoder": []}
    sessions = _sessions(folder, 2)

    def noted(name: str, *arrays: np.ndarray) -> np.ndarray:
        given = dict(zip([each.name for each in sessions[name].get_inputs()], arrays, strict=True))
        if name in rows:
            rows[name].append(given)
        return np.asarray(sessions[name].run(None, given)[0])

    pipeline = run_by(_diffusers(source), noted)
    for prompt in prompts(source)[:4]:
        pipeline(
            prompt=prompt, num_inference_steps=CALLS // 4, guidance_scale=guidance(source), height=size, width=size
        )
    sessions.clear()

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self, given: list[dict[str, np.ndarray]]) -> None:
            self.rest = iter(given)

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.rest, None)

    for name, given in rows.items():
        path, ready = folder / f"{name}.onnx", folder / f"{name}.ready.onnx"
        data = path.with_name(f"{path.name}.data")
        large = data.exists() and data.stat().st_size > LARGEST
        quant_pre_process(
            path, ready, skip_optimization=large, skip_symbolic_shape=large, save_as_external_data=size > 64,
            all_tensors_to_one_file=True, external_data_location=f"{ready.name}.data",
        )  # fmt: skip
        for file in (path, data):
            file.unlink(missing_ok=True)
        quantize_static(
            ready, path, Reader(given), quant_format=QuantFormat.QDQ, per_channel=True,
            activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
            op_types_to_quantize=["Conv", "Gemm", "MatMul"], use_external_data_format=size > 64,
        )  # fmt: skip
        for file in folder.glob(f"{ready.name}*"):
            file.unlink()
    with tempfile.TemporaryDirectory(dir=folder) as scratch:  # the weights of both would be in a file of one name
        quantize_dynamic(folder / "text.onnx", Path(scratch) / "text.onnx", use_external_data_format=size > 64)
        for file in folder.glob("text.onnx*"):
            file.unlink()
        for file in Path(scratch).iterdir():
            file.rename(folder / file.name)


# ------------------------------------------------------------------------------------------------------------ drawing


def draw(system: str, source: str, target: str, size: str, threads: str, steps: str, rounds: str, into: str) -> None:
    """Draws once to warm up, then ``rounds`` times, and writes times, memory and the picture."""
    os.environ["OMP_NUM_THREADS"] = threads
    times: Times = {"text": [], "step": [], "decoder": []}
    begin = time.perf_counter()
    kind = "mpq" if system in ("mpq-w8a8", "mpq-4") else system.split("-")[0] if system != "mpq-c" else "c"
    makers = {"mpq": _ours, "c": _c, "openvino": _openvino, "onnxruntime": _onnxruntime, "torch": _torch}
    drawn = makers[kind](system, source, target, int(size), int(threads), times)
    loaded, whole = time.perf_counter() - begin, []
    picture = drawn(int(steps))
    for values in times.values():
        values.clear()
    for _ in range(int(rounds)):
        begin = time.perf_counter()
        picture = drawn(int(steps))
        whole.append(time.perf_counter() - begin)
    usage = resource.getrusage(resource.RUSAGE_CHILDREN if kind == "c" else resource.RUSAGE_SELF)
    told = {
        "load_s": loaded,
        "whole_s": float(np.median(whole)),
        **{f"{name}_s": float(np.median(values)) if values else None for name, values in times.items()},
        "peak_bytes": usage.ru_maxrss * 1024,
    }
    np.save(Path(into) / "picture.npy", picture)
    (Path(into) / "draw.json").write_text(json.dumps(told))
    os._exit(0)  # threads of some runtimes are in no hurry


def noise(source: str, size: int) -> np.ndarray:
    """Latents [1, C, H, W], the same for all systems; those of klein, of two by two, are drawn as rows."""
    side, draw = size // _scale(source), np.random.Generator(np.random.PCG64(SEED))
    if is_klein(source):
        rows = draw.standard_normal((1, side**2 // 4, 128), dtype=np.float32)
        return np.ascontiguousarray(rows.transpose(0, 2, 1)).reshape(1, 128, side // 2, side // 2)
    return draw.standard_normal((1, 4, side, side), dtype=np.float32)


@contextmanager
def _timed(into: list[float]) -> Iterator[None]:
    begin = time.perf_counter()
    yield
    into.append(time.perf_counter() - begin)


def _ours(system: str, source: str, target: str, size: int, threads: int, times: Times) -> Draw:
    from mpq_compiler.runtime.pipeline import load_pipeline

    pipe = load_pipeline(target, threads)
    prompt, given = prompts(source)[-1], noise(source, size)
    if is_klein(source):  # which has it in rows
        given = np.ascontiguousarray(given.reshape(*given.shape[:2], -1).transpose(0, 2, 1))

    def drawn(steps: int) -> np.ndarray:
        encode, marks = pipe.encode, []

        def encoded(*args: Any) -> Any:
            with _timed(times["text"]):
                found = encode(*args)
            marks.append(time.perf_counter())
            return found

        pipe.encode = encoded  # type: ignore[method-assign]
        latents = pipe.latents(
            [prompt], steps=steps, guidance=guidance(source), noise=given,
            progress=lambda done, total: marks.append(time.perf_counter()),
        )  # fmt: skip
        del pipe.encode
        times["step"].append((marks[-1] - marks[0]) / steps)
        with _timed(times["decoder"]):
            return pipe.decode(latents)[0]

    return drawn


def _c(system: str, source: str, target: str, size: int, threads: int, times: Times) -> Draw:
    from PIL import Image

    picture, prompt = Path(target).with_suffix(".png"), prompts(source)[-1]

    def drawn(steps: int) -> np.ndarray:
        tokens = Path(target).with_suffix(f".{steps}.ids")
        if not tokens.exists():
            asked = ["--prompt", prompt, "--steps", str(steps), "--seed", str(SEED), "-o", str(tokens)]
            if not is_klein(source):
                asked += ["--guidance", str(GUIDANCE)]
            subprocess.run(
                [sys.executable, "-m", "mpq_compiler", "tokenize", target, *asked], check=True,
                stdout=subprocess.DEVNULL,
            )  # fmt: skip
        command = [f"{target}/mpq_run", "--tokens", str(tokens), "-o", str(picture), "--threads", str(threads)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return np.asarray(Image.open(picture), np.float32) / 255

    return drawn


def _openvino(system: str, source: str, target: str, size: int, threads: int, times: Times) -> Draw:
    import openvino_genai as genai
    from openvino import Tensor

    if is_klein(source):
        return _optimum(source, target, size, threads, times)
    pipe = genai.Text2ImagePipeline(target)
    config = pipe.get_generation_config()
    config.guidance_scale = GUIDANCE
    pipe.set_generation_config(config)
    pipe.reshape(1, size, size, GUIDANCE)
    pipe.compile("CPU", INFERENCE_NUM_THREADS=threads)
    prompt = prompts(source)[-1]

    class Given(genai.Generator):  # type: ignore[misc]
        """The noise that all systems begin with."""

        def __init__(self) -> None:
            super().__init__()
            self.values = noise(source, size).ravel()
            self.at = 0

        def next(self) -> float:
            self.at += 1
            return float(self.values[self.at - 1])

        def randn_tensor(self, shape: Any) -> Tensor:
            return Tensor(self.values.reshape([int(n) for n in shape]).copy())

    def drawn(steps: int) -> np.ndarray:
        found = pipe.generate(
            prompt, num_inference_steps=steps, height=size, width=size, guidance_scale=GUIDANCE, generator=Given()
        )
        metrics = pipe.get_performance_metrics()
        times["text"].append(sum(metrics.get_text_encoder_infer_duration().values()) / 1e3)
        times["step"].append(metrics.get_iteration_duration().mean / 1e3)
        times["decoder"].append(metrics.get_vae_decoder_infer_duration() / 1e3)
        return np.asarray(found.data[0], np.float32) / 255

    return drawn


def _optimum(source: str, target: str, size: int, threads: int, times: Times) -> Draw:
    from optimum.intel import OVDiffusionPipeline

    pipeline = OVDiffusionPipeline.from_pretrained(
        target, compile=False, ov_config={"INFERENCE_NUM_THREADS": str(threads)}
    )
    pipeline.reshape(1, size, size, 1)
    pipeline.compile()
    pipeline.set_progress_bar_config(disable=True)
    _time_parts(pipeline, times)
    return _drawn_by(pipeline, source, size, times)


def _torch(system: str, source: str, target: str, size: int, threads: int, times: Times) -> Draw:
    import torch

    torch.set_num_threads(threads)
    pipeline = _diffusers(source, "bfloat16" if system == "torch-bf16" else "float32")
    for part in (pipeline.vae,) if is_klein(source) else (pipeline.unet, pipeline.vae):
        part.to(memory_format=torch.channels_last)
    _time_parts(pipeline, times)
    return _drawn_by(pipeline, source, size, times)


def _time_parts(pipeline: Any, times: Times) -> None:
    for owner, name, key in ((pipeline.text_encoder, "forward", "text"), (pipeline.vae, "decode", "decoder")):
        method = getattr(owner, name)

        def timed(*args: Any, method: Any = method, key: str = key, **kwargs: Any) -> Any:
            with _timed(times[key]):
                return method(*args, **kwargs)

        setattr(owner, name, timed)


def _drawn_by(pipeline: Any, source: str, size: int, times: Times) -> Draw:
    import torch

    prompt, dtype = prompts(source)[-1], (pipeline.transformer if is_klein(source) else pipeline.unet).dtype

    def drawn(steps: int) -> np.ndarray:
        marks = []

        def ended(pipe: Any, step: int, time_: Any, values: Any) -> Any:
            marks.append(time.perf_counter())
            return values

        found = pipeline(
            prompt=prompt, num_inference_steps=steps, guidance_scale=guidance(source), height=size, width=size,
            output_type="np",
            latents=torch.from_numpy(noise(source, size)).to(dtype), callback_on_step_end=ended,
        )  # fmt: skip
        times["step"].append((marks[-1] - marks[0]) / (steps - 1))
        return np.asarray(found.images[0], np.float32)

    return drawn


def _sessions(folder: Path, threads: int) -> dict[str, Any]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    return {
        name: onnxruntime.InferenceSession(str(folder / f"{name}.onnx"), options) for name in PARTS
    }


def _onnxruntime(system: str, source: str, target: str, size: int, threads: int, times: Times) -> Draw:
    import torch

    from benchmarks.pipeline_exports import run_by

    torch.set_num_threads(threads)
    sessions = _sessions(Path(target), threads)
    names = {key: [each.name for each in session.get_inputs()] for key, session in sessions.items()}

    def called(part: str, *arrays: np.ndarray) -> np.ndarray:
        with _timed(times.get(part, [])):
            return np.asarray(sessions[part].run(None, dict(zip(names[part], arrays, strict=True)))[0])

    return _drawn_by(run_by(_diffusers(source), called), source, size, times)


if __name__ == "__main__":
    main()
