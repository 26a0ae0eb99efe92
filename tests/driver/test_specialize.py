"""One packed program at several image sizes: the graphs, the artifact, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import fx

from mpq_compiler.driver import specialize
from mpq_compiler.ir import stored_tensors
from mpq_compiler.ir.aten import aten
from mpq_compiler.ir.interpreter import run
from mpq_compiler.ir.program import Program, Stage, TensorStore
from mpq_compiler.ir.specialization import Specialization
from mpq_compiler.pipeline import parser
from mpq_compiler.pipeline.backend import BuildRequest, backend_of
from mpq_compiler.runtime import compiled_denoiser
from mpq_compiler.support.errors import UserError
from mpq_compiler.targets import table as targets
from tests.harness import packed

LAYOUT = parser.parse("trace,layout")
SIZES = {"unet2d": (24, 8), "pixart": (24, 8), "flux": (8, 24), "sd15": (8, 8), "dit": (8, 8)}
CASES = [("unet2d", "int3", ""), ("pixart", "int4", ""), ("sd15", "int8", "split-shortcut,bos-split")]
NATIVE = "x86-64-avx2"


def specialized(name: str, weights: str, rewrites: str) -> Program:
    case = packed.program(name, weights, rewrites)
    there = specialize.laid_out(case.laid_out, case.denoiser, SIZES[name], LAYOUT)
    return specialize.transplant(case.program, case.laid_out, there)


def inputs_at(case: packed.Packed, denoiser, count: int) -> dict[str, torch.Tensor]:
    """The case's inputs with latents of the denoiser's size."""
    latents = denoiser.random_inputs(count, 5)[denoiser.latent]
    return packed.take(case.inputs, slice(count)) | {denoiser.latent: latents}


@pytest.mark.parametrize("name", SIZES)
def test_a_transplanted_layout_is_the_other_layout(name):
    """Nothing but the size is transplanted: the laid-out graph itself becomes that of the other size, to the bit."""
    case = packed.program(name)
    other = case.denoiser.resized(*SIZES[name])
    there = specialize.laid_out(case.laid_out, case.denoiser, SIZES[name], LAYOUT)
    here = case.laid_out.fork(tensors=TensorStore(dict(case.laid_out.tensors)))
    made = specialize.transplant(here, here, there)
    inputs = other.random_inputs(3, 5)
    assert made.inputs == there.inputs
    assert torch.equal(run(made, inputs), run(there, inputs))
    assert torch.allclose(run(made, inputs), other(**inputs), rtol=0, atol=1e-4)


@pytest.mark.parametrize(("name", "weights", "rewrites"), CASES)
def test_the_packed_program_is_as_good_at_the_other_size(name, weights, rewrites):
    case, made = packed.program(name, weights, rewrites), specialized(name, weights, rewrites)
    other = case.denoiser.resized(*SIZES[name])
    first, second = packed.take(case.inputs, slice(8)), inputs_at(case, other, 8)
    at_first = packed.sqnr_db(run(case.program, first), case.denoiser(**first))
    at_second = packed.sqnr_db(run(made, second), other(**second))
    assert at_second > at_first - 3


@pytest.mark.parametrize(("name", "weights", "rewrites"), CASES)
def test_only_constants_are_added(name, weights, rewrites):
    case, made = packed.program(name, weights, rewrites), specialized(name, weights, rewrites)
    before, after = stored_tensors.stored(case.program), stored_tensors.stored(case.program, made)
    added = {key: stored for key, stored in after.items() if key not in before}
    assert all(key.startswith("constant.") and "@" in key for key in added)
    assert bool(added) == (name == "pixart")  # its position embeddings
    others = [Specialization(made, (1,))]
    assert specialize.added_bytes(case.program, others) == sum(stored.array.nbytes for stored in added.values())


@pytest.mark.parametrize("target", [NATIVE, "reference"])
@pytest.mark.parametrize(("name", "weights", "rewrites"), CASES)
def test_an_artifact_of_two_sizes(name, weights, rewrites, target, tmp_path):
    row = targets.resolve(target)
    if lacking := targets.missing_features(row):
        pytest.skip(f"this machine lacks {', '.join(lacking)}")
    case, made = packed.program(name, weights, rewrites), specialized(name, weights, rewrites)
    request = BuildRequest((1, 2), [Specialization(made, (2,))], cache=packed.kernel_cache())
    built = backend_of(row).build(case.program, row, request)
    artifact = compiled_denoiser.load(packed.write(tmp_path / "a.mpq", case.program, row, built), threads=1)
    other = case.denoiser.resized(*SIZES[name])
    for program, denoiser in ((case.program, case.denoiser), (made, other)):
        inputs = inputs_at(case, denoiser, 5)
        result = torch.from_numpy(artifact.run({key: value.numpy() for key, value in inputs.items()}))
        expected, exact = denoiser(**inputs), run(program, inputs)
        assert result.shape == expected.shape
        assert abs(packed.sqnr_db(result, expected) - packed.sqnr_db(exact, expected)) <= 0.1
        if target == "reference":
            assert torch.equal(result, exact)
    inputs = {key: value.numpy() for key, value in inputs_at(case, other, 1).items()}
    latent = case.denoiser.latent
    inputs[latent] = np.zeros((1, inputs[latent].shape[1], 4, 4), np.float32)
    with pytest.raises(UserError, match=r"takes \[B, \d, (16|24|8), .*\] or \[B, \d, (16|24|8), "):
        artifact.run(inputs)


# ---------------------------------------------------------------------------------------------- refusals


def program(size: int, build_graph) -> Program:
    """A program on x f32 [B, 2, size, size] whose graph `build_graph(graph, store, x)` completes."""
    from mpq_compiler.ir.program import InputSpec

    graph, store = fx.Graph(), TensorStore()
    x = graph.placeholder("x")
    graph.output(build_graph(graph, store, x))
    return Program(graph, store, (InputSpec("x", ("B", 2, size, size), torch.float32),), Stage.REWRITTEN)


def test_another_graph_is_refused():
    def build_graph(extra):
        def made(graph, store, x):
            y = graph.call_function(aten.relu.default, (x,))
            return graph.call_function(aten.neg.default, (y,)) if extra else y

        return made

    with pytest.raises(UserError, match=r"cannot hold the sizes 4x4 and 8x8: .*compile one artifact for each"):
        specialize.transplant(
            program(4, build_graph(False)), program(4, build_graph(False)), program(8, build_graph(True))
        )


def test_a_rewritten_call_that_depends_on_the_size_is_refused():
    def build_graph(size, target=aten.reshape.default):
        def made(graph, store, x):
            y = graph.call_function(target, (x, [-1, 2 * size * size]))
            y.name = "flat"
            return graph.call_function(aten.reshape.default, (y, [-1, 2, size, size]))

        return made

    here, there = program(4, build_graph(4)), program(8, build_graph(8))
    made = specialize.transplant(here, here, there)
    x = torch.randn(3, 2, 8, 8)
    assert torch.equal(run(made, {"x": x}), x)
    with pytest.raises(UserError, match="a pass rewrote 'flat'"):
        specialize.transplant(program(4, build_graph(4, aten.view.default)), here, there)
    renamed = here.fork()
    renamed.node("flat").name = "flattened"
    with pytest.raises(UserError, match="a pass removed 'flat'"):
        specialize.transplant(renamed, here, there)


def test_a_size_that_the_model_does_not_take():
    case = packed.program("dit")
    with pytest.raises(UserError, match="cannot be traced"):
        specialize.laid_out(case.laid_out, case.denoiser, (8, 16), LAYOUT)
