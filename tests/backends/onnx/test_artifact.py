"""The target `onnx`: artifacts against the packed program (contract (c)), how onnxruntime runs them, and refusals."""

from __future__ import annotations

import functools
import platform
import shutil
import subprocess
import sys
import textwrap
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import mpq_compiler
from mpq_compiler.artifact import bundle
from mpq_compiler.backends import onnx as backend
from mpq_compiler.backends.onnx.build import build, export_float
from mpq_compiler.backends.onnx.graph import IR_VERSION, OPSET
from mpq_compiler.driver import specialize
from mpq_compiler.evaluation import metrics
from mpq_compiler.evaluation.painter import from_artifact
from mpq_compiler.ir import costs, ops, specialization, views
from mpq_compiler.ir.aten import aten
from mpq_compiler.ir.interpreter import run
from mpq_compiler.pipeline import parser
from mpq_compiler.runtime import compiled_denoiser
from mpq_compiler.sampling.conditioning import Conditions
from mpq_compiler.support.errors import UserError
from mpq_compiler.targets import table as targets
from tests.harness import once, onnx_models, packed, programs

TARGET = targets.TARGETS["onnx"]
MODELS = (
    ("unet2d", "int3"),
    ("sd15", "int2+b"),
    ("pixart", "int4"),
    ("dit", "int4+r4"),
    ("sd3", "km3t"),
    ("flux", "int8"),
    ("sana", "int4g64"),
    ("hunyuan", "fp8"),
    ("unet2d-class", "fp4,activation_format=float,activations=4"),
    ("dit", "fp8,activation_format=float"),
)


@functools.cache
def compiled(name: str, weights: str) -> Path:
    def make(path: Path) -> None:
        program = packed.program(name, weights).program.fork()
        packed.write(path, program, TARGET, build(program))

    return once.made(f"{name}-{weights}.onnx.mpq", make)


def arrays(inputs):
    return {key: value.numpy() for key, value in inputs.items()}


# ------------------------------------------------------------------------------------------ (c) end to end


@pytest.mark.parametrize(("name", "weights"), MODELS)
def test_as_good_as_the_reference(name, weights):
    """64 inputs of mixed timesteps in one batch."""
    case = packed.program(name, weights)
    result = torch.from_numpy(compiled_denoiser.load(compiled(name, weights), threads=1).run(arrays(case.inputs)))
    expected = case.denoiser(**case.inputs)
    difference = packed.sqnr_db(result, expected) - packed.sqnr_db(run(case.program, case.inputs), expected)
    assert abs(difference) <= 0.1


@pytest.mark.parametrize("option", ["dynamic=true", "attention=8", "activations=5"])
def test_other_activations(option, tmp_path):
    pipeline = programs.RESIDUAL.replace("uniform=int2+b", f"uniform=int8,{option}")
    program, inputs = programs.after("pixart", "fuse-epilogues", pipeline), programs.inputs("pixart", 16)
    expected = programs.denoiser("pixart")(**inputs)
    result = onnx_models.run(program.fork(), inputs, tmp_path)
    assert abs(packed.sqnr_db(result, expected) - packed.sqnr_db(run(program, inputs), expected)) <= 0.1


@pytest.mark.parametrize("name", ["unet2d", "pixart"])
def test_several_image_sizes_share_the_weights(name, tmp_path):
    case = packed.program(name, "int3" if name == "unet2d" else "int4")
    size = (24, 8)
    front = parser.parse("trace,layout")
    there = specialize.laid_out(case.laid_out, case.denoiser, size, front)
    made = specialize.transplant(case.program, case.laid_out, there)
    others = [specialization.Specialization(made, (1,))]
    built = build(case.program.fork(), others)
    assert built.payload_bytes == costs.stored_bytes(case.planned) + specialize.added_bytes(case.program, others)
    loaded = compiled_denoiser.load(packed.write(tmp_path / "a.mpq", case.program, TARGET, built), threads=1)
    for program, denoiser in ((case.program, case.denoiser), (made, case.denoiser.resized(*size))):
        inputs = denoiser.random_inputs(8, 1)
        result, expected = torch.from_numpy(loaded.run(arrays(inputs))), denoiser(**inputs)
        assert abs(packed.sqnr_db(result, expected) - packed.sqnr_db(run(program, inputs), expected)) <= 0.1


def draw(path: Path, images: int, steps: int) -> np.ndarray:
    painter = from_artifact(path, threads=1)
    return painter.decode(painter.draw(Conditions({"class_labels": np.arange(images) % 10}), images, steps, seed=0))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["default", "w8a8"])
def test_the_bundled_model_draws_the_same_images(recipe, tmp_path):
    """W4A8 and w8a8, as `mpqc compile` makes them, against the packed program executed by the reference."""
    report = mpq_compiler.compile(
        packed.BUNDLED, tmp_path / "a.mpq", target="onnx", recipe=recipe, cache=packed.kernel_cache()
    )
    assert report.quality["executed_by"] == "artifact" and abs(report.quality["agreement_db"]) <= 0.1
    manifest = bundle.read(tmp_path / "a.mpq").manifest
    assert manifest["weights"]["payload_bytes"] == manifest["plan"]["stored_bytes"] == report.weights["bytes"]
    decoded = [key for key in report.fallbacks if key.endswith("-bit weights")]
    assert bool(decoded) == (recipe == "default"), "what onnxruntime holds wider than the file is said"
    mpq_compiler.compile(
        packed.BUNDLED, tmp_path / "b.mpq", target="reference", recipe=recipe, cache=packed.kernel_cache()
    )
    same = metrics.psnr_per_image(draw(tmp_path / "b.mpq", 4, 10), draw(tmp_path / "a.mpq", 4, 10))
    assert same.min() >= 35


# ------------------------------------------------------------------------------------------- the model file


def test_the_model_is_what_it_says():
    model = onnx.load(compiled("unet2d", "int3") / "model.onnx", load_external_data=False)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", OPSET)] and model.ir_version == IR_VERSION
    for value in (*model.graph.input, *model.graph.output):
        assert value.type.tensor_type.shape.dim[0].dim_param == "batch"
    assert [v.name for v in model.graph.input] == ["sample", "timestep"]
    assert [v.name for v in model.graph.output] == ["out_sample"]
    names = {n.name for n in model.graph.node}
    assert names >= {"g", "conv_in", "mid_block_attentions_0_to_q", "conv_norm_out", "conv_out"}
    places = {e.value for t in model.graph.initializer for e in t.external_data if e.key == "location"}
    assert places == {bundle.WEIGHTS}


@pytest.mark.parametrize(("name", "weights"), [("unet2d", "int3"), ("pixart", "int4")])
def test_what_onnxruntime_makes_of_it(name, weights, tmp_path):
    """One integer kernel a layer and one for its offsets, nothing decoded or dequantized in calls, few transposes."""
    program = packed.program(name, weights).program
    path = onnx_models.write(program.fork(), tmp_path)
    onnx_models.session(path, tmp_path / "optimized.onnx")
    made = Counter(n.op_type for n in onnx.load(tmp_path / "optimized.onnx", load_external_data=False).graph.node)
    ours = Counter(call.target for call in views.flatten(program))
    layers = ours[ops.quant_linear] + ours[ops.quant_conv2d]
    assert layers <= made["MatMulIntegerToFloat"] <= 2 * layers
    assert not {"DequantizeLinear", "Conv", "ConvInteger", "Gemm", "BitwiseOr"} & made.keys()
    assert made["QuantizeLinear"] == ours[ops.quantize]
    assert made["Transpose"] == 2 * ours[ops.group_norm] + 4 * ours[ops.attention] + 2


def test_equal_programs_give_equal_bytes():
    program = packed.program("unet2d", "int3").program
    first, second = (build(program.fork()) for _ in range(2))
    assert first.files == second.files and first.functions == second.functions
    assert first.payload_bytes == costs.stored_bytes(packed.program("unet2d", "int3").planned)


def test_any_program_with_onnxruntime_runs_it():
    """The example of docs/onnx.md."""
    case, path = packed.program("unet2d", "int3"), compiled("unet2d", "int3")
    session = onnxruntime.InferenceSession(path / "model.onnx")
    inputs = arrays(packed.take(case.inputs, slice(3)))
    (result,) = session.run(None, inputs)
    assert result.shape == inputs["sample"].shape
    if not backend.saturates():
        np.testing.assert_allclose(result, compiled_denoiser.load(path, threads=1).run(inputs), rtol=0, atol=1e-4)


def test_neither_torch_nor_the_compiler_is_loaded(tmp_path):
    pytest.importorskip("torch")
    np.savez(tmp_path / "inputs.npz", **arrays(packed.take(packed.program("unet2d", "int3").inputs, slice(2))))
    code = """
    import sys
    import numpy as np
    from mpq_compiler.runtime import compiled_denoiser as runtime
    denoiser = runtime.load(sys.argv[1], threads=1)
    assert denoiser.run(dict(np.load(sys.argv[2]))).shape[0] == 2
    assert not {"torch", "tvm", "onnx"} & sys.modules.keys()
    """
    arguments = [str(compiled("unet2d", "int3")), str(tmp_path / "inputs.npz")]
    subprocess.run([sys.executable, "-c", textwrap.dedent(code), *arguments], check=True, timeout=120)


# ---------------------------------------------------------------------------------------------- saturation


@pytest.mark.parametrize(
    ("machine", "flags", "expected"),
    [
        ("x86_64", {"avx2", "fma"}, True),
        ("x86_64", {"avx2", "avx512f", "avx512bw"}, True),
        ("x86_64", {"avx2", "avx512f", "avx512_vnni"}, False),
        ("x86_64", {"avx2", "avx_vnni"}, False),
        ("AMD64", set(), True),
        ("aarch64", {"asimd"}, False),
    ],
)
def test_where_products_saturate(machine, flags, expected, monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.setattr(targets, "host_features", lambda: frozenset(flags))
    assert backend.saturates() == expected


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("qemu-x86_64") is None, reason="qemu-x86_64 is not installed")
def test_products_are_exact_without_vnni(tmp_path):
    """On an emulated Haswell the option restores what saturation destroys."""
    case = packed.program("pixart", "int8")
    onnx_models.write(case.program.fork(), tmp_path)
    inputs = packed.take(case.inputs, slice(2))
    np.savez(tmp_path / "inputs.npz", **arrays(inputs))
    code = """
    import sys
    import numpy as np
    import onnxruntime
    from mpq_compiler.backends.onnx import PRECISION
    for value in "01":
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.add_session_config_entry(PRECISION, value)
        session = onnxruntime.InferenceSession("model.onnx", options)
        np.save(f"y{value}.npy", session.run(None, dict(np.load("inputs.npz")))[0])
    """
    command = ["qemu-x86_64", "-cpu", "Haswell", sys.executable, "-c", textwrap.dedent(code)]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=300, capture_output=True)
    expected = run(case.program, inputs)
    saturated, exact = (packed.sqnr_db(torch.from_numpy(np.load(tmp_path / f"y{v}.npy")), expected) for v in "01")
    assert saturated < 30 and exact > 60


# ------------------------------------------------------------------------------------------ float programs


@pytest.mark.parametrize(
    ("name", "stage"),
    [("unet2d", "trace"), ("sd15", "trace"), ("unet2d", "layout"), ("sd15", "layout"), ("pixart", "layout")],
)
def test_float_programs(name, stage, tmp_path):
    program, inputs = programs.after(name, stage), programs.inputs(name, 3)
    export_float(program, tmp_path / "float.onnx")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["float.onnx", "float.safetensors"]
    (result,) = onnx_models.session(tmp_path / "float.onnx").run(None, arrays(inputs))
    expected = run(program, inputs)
    assert (torch.from_numpy(result) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert program.fallbacks == programs.after(name, stage).fallbacks


def test_float_models_are_named_onnx(tmp_path):
    with pytest.raises(UserError, match=r"must end in \.onnx"):
        export_float(programs.after("pixart", "layout"), tmp_path / "model.pb")


# ----------------------------------------------------------------------------------------------- bad input


def test_without_onnxruntime(monkeypatch):
    path = compiled("unet2d", "int3")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"needs onnxruntime: pip install 'mpq-compiler\[onnx\]'"):
        compiled_denoiser.load(path)


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_compiling_without_the_packages(package, monkeypatch, tmp_path):
    """Before anything is computed."""
    for module in [m for m in sys.modules if m.startswith("mpq_compiler.backends.onnx.")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"'onnx' needs {package}, .*: pip install 'mpq-compiler\[onnx\]'"):
        mpq_compiler.compile("no such model", tmp_path / "a.mpq", target="onnx")


def test_a_model_that_onnxruntime_refuses(tmp_path):
    program = packed.program("pixart", "int4").program
    built = build(program.fork())
    built.files["model.onnx"] = built.files["model.onnx"][:1000]
    with pytest.raises(UserError, match=r"onnxruntime [\d.]+ cannot load .*model\.onnx"):
        compiled_denoiser.load(packed.write(tmp_path / "a.mpq", program, TARGET, built))


def test_damaged_files(tmp_path):
    folder = tmp_path / "a.mpq"
    shutil.copytree(compiled("pixart", "int4"), folder)
    for name in ("model.onnx", bundle.WEIGHTS):
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:-1])
        with pytest.raises(UserError, match=f"{name} is truncated"):
            compiled_denoiser.load(folder)
        (folder / name).unlink()
        with pytest.raises(UserError, match=f"{name} is missing"):
            compiled_denoiser.load(folder)
        (folder / name).write_bytes(content)


def test_wrong_sizes_and_batches():
    loaded = compiled_denoiser.load(compiled("unet2d", "int3"), threads=1)
    given = arrays(packed.take(packed.program("unet2d", "int3").inputs, slice(2)))
    with pytest.raises(UserError, match=r"has shape \[2, 3, 8, 16\]; this artifact takes \[B, 3, 16, 16\]"):
        loaded.run({**given, "sample": given["sample"][:, :, :8]})
    with pytest.raises(UserError, match="one of 1"):
        loaded.run({**given, "sample": given["sample"][:1]})


def test_an_operator_without_a_form_is_named():
    program = packed.program("pixart", "int4").program.fork()
    last = program.graph.output_node()
    with program.graph.inserting_before(last):
        odd = program.graph.call_function(aten.cumsum.default, (last.args[0], 1))
    last.args = (odd,)
    with pytest.raises(UserError, match=rf"node '{odd.name}' \(aten.cumsum\) cannot be exported to ONNX: .*reference"):
        build(program)
