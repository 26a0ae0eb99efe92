"""The manifest of an artifact as a type (schemas/manifest.json says the same, and is what files are checked by)."""

from __future__ import annotations

from typing import Any, NotRequired, TypedDict


class Value(TypedDict):
    """An input or output of a function; None stands for the batch of a function for any batch."""

    name: str
    shape: list[int | None]
    dtype: str


class Function(TypedDict):
    """A specialization of the model for a batch size; None for any."""

    name: str
    batch: int | None
    inputs: list[Value]
    parts: NotRequired[list[str]]
    output: Value


class Part(TypedDict):
    """A function of one sample whose results do not depend on the latents."""

    name: str
    inputs: list[Value]
    outputs: list[Value]


class Prepare(TypedDict):
    """The function that lays out the stored tensors once, after loading."""

    name: str
    tensors: list[str]
    reads: NotRequired[list[int]]
    """How often its calls read each tensor; one more where it hands it on."""


class Memory(TypedDict):
    """Bytes by the names of functions and parts."""

    prepared_bytes: int
    activation_bytes: dict[str, int]
    workspace_bytes: dict[str, int]


class Cost(TypedDict):
    """What an artifact costs: the figures that papers state beside quality."""

    bytes: int
    """The stored weights."""
    float_bytes: int
    """The float model's weights, in f32."""
    peak_bytes: int | None
    """What a call on one thread holds at most; None where the target does not say."""
    bops: int | None
    """Bit operations of a call, per sample (docs/allocation.md); None of artifacts that do not say."""
    float_bops: int | None
    """The float model's, at 32 bits."""


class Target(TypedDict):
    """What the artifact runs on."""

    name: str
    arch: str
    backend: str
    isa: NotRequired[str]
    features: list[str]
    cuda: NotRequired[int]
    """The least release of CUDA of the driver; 12060 is 12.6."""
    numerics: NotRequired[str]
    tvm: NotRequired[dict[str, Any]]


class Calls(TypedDict):
    """A kind of calls that the artifact takes."""

    text: str
    form: dict[str, object]
    functions: list[str]


class Source(TypedDict):
    """The repository of the hub that the model was read from, its commit, and the file of the weights."""

    repository: str
    commit: str
    file: str


Model = TypedDict(
    "Model",
    {
        "class": str,
        "config": dict[str, Any],
        "parameters": int,
        "signature": NotRequired[list[str]],
        "below": NotRequired[dict[str, int]],
        "call": NotRequired[dict[str, Any]],
        "calls": NotRequired[list[Calls]],
        "source": NotRequired[Source],
    },
)
"""The model that was compiled: diffusers' class and configuration, and how it is called."""


class Tensor(TypedDict):
    """A stored tensor, and what it means to the layer that it belongs to."""

    name: str
    dtype: str
    shape: list[int]
    parameter: NotRequired[str]
    bits: NotRequired[float]
    row_class: NotRequired[str]
    coding: NotRequired[str]
    original_shape: NotRequired[list[int]]


class LoraStep(TypedDict):
    """A step that channels of a layer went through: a factor, a rotation, or a part from ``start`` to ``stop``."""

    kind: str
    tensor: NotRequired[str]
    start: NotRequired[int]
    stop: NotRequired[int]


class LoraBranch(TypedDict):
    """A branch: the stored tensors that are its factors, and the steps from the model's channels to its own."""

    up: str
    down: str
    rank: int
    steps: list[LoraStep]


class LoraLayer(TypedDict):
    """A layer of the model that has a branch, or several where its inputs were split; its weight has the shape."""

    name: str
    shape: list[int]
    branches: list[LoraBranch]


class Lora(TypedDict):
    """The branches for LoRA, and the rank that was asked for."""

    rank: int
    layers: list[LoraLayer]


class RewriteStep(TypedDict):
    """A step that a parameter went through: a factor of its channels, a Hadamard rotation of blocks, or a part."""

    kind: str
    tensor: NotRequired[str]
    block: NotRequired[int]
    start: NotRequired[int]
    stop: NotRequired[int]


class Rewrite(TypedDict):
    """A parameter that passes rewrote: the model's that it was, and the steps in order."""

    parameter: str
    origin: str
    steps: list[RewriteStep]


class Assumption(TypedDict):
    """A token of an input that the compiler took for constant."""

    input: str
    token: int
    values: list[float]


class Ends(TypedDict):
    """The least and the greatest value of an input in calibration."""

    low: float
    high: float


class Calibration(TypedDict):
    """What the inputs were that the artifact was calibrated on; keys beside these say where they came from."""

    seed: int
    inputs: int
    ranges: NotRequired[dict[str, Ends]]
    """Ranges of the float inputs, by name."""


class Weights(TypedDict):
    """The size of the stored tensors."""

    payload_bytes: int
    average_bits: float


class File(TypedDict):
    """A file of the artifact."""

    bytes: int
    sha256: str


class Reuse(TypedDict):
    """What steps of a sampler take from earlier ones (`sampling.reuse.Schedule`), and by which functions."""

    node: str
    """That of the value that is kept, or ``output``, which takes no functions."""
    shape: NotRequired[list[int]]
    """The shape of the kept value of a sample, float32."""
    timesteps: list[float]
    sources: list[list[list[float]]]
    """The steps whose kept values each step sums, with their weights; a step with none computes all."""
    keeping: NotRequired[list[str]]
    reusing: NotRequired[list[str]]


class Manifest(TypedDict):
    """What an artifact holds, and how it came about."""

    format: str
    format_version: int
    name: str
    target: Target
    model: Model
    functions: list[Function]
    parts: NotRequired[list[Part]]
    tiles: NotRequired[dict[str, list[int]]]
    threads: NotRequired[int]
    memory: NotRequired[Memory]
    prepare: NotRequired[Prepare]
    tensors: list[Tensor]
    lora: NotRequired[Lora]
    reuse: NotRequired[Reuse]
    rewrites: NotRequired[list[Rewrite]]
    weights: Weights
    recipe: NotRequired[dict[str, Any]]
    pipeline: NotRequired[str]
    plan: NotRequired[dict[str, Any]]
    assumptions: NotRequired[list[Assumption]]
    calibration: NotRequired[Calibration]
    quality: NotRequired[dict[str, Any]]
    sampling: NotRequired[dict[str, Any]]
    versions: dict[str, str]
    files: dict[str, File]
    artifact_sha256: str


def cost(manifest: Manifest) -> Cost:
    """The bytes, the peak memory and the bit operations of an artifact."""
    memory, plan = manifest.get("memory"), manifest.get("plan", {})
    held = None
    if memory is not None:
        most = (max(each.values(), default=0) for each in (memory["activation_bytes"], memory["workspace_bytes"]))
        held = memory["prepared_bytes"] + sum(most)
    return {
        "bytes": manifest["weights"]["payload_bytes"],
        "float_bytes": 4 * manifest["model"]["parameters"],
        "peak_bytes": held,
        "bops": plan.get("bops"),
        "float_bops": plan.get("float_bops"),
    }
