"""The compiled denoiser: runs an artifact without torch or a compiler, and stands in for a diffusers denoiser."""

from __future__ import annotations

import math
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np

from mpq_compiler.artifact import bundle as artifacts
from mpq_compiler.artifact.bundle import Artifact
from mpq_compiler.artifact.manifest import Function
from mpq_compiler.artifact.signature import Trust
from mpq_compiler.runtime import checks, covered, forks, instances, lora, on_gpu, pretrained
from mpq_compiler.runtime.calls import Fitted, Kind, kinds_of, output_shape, parts_of
from mpq_compiler.runtime.cuda import CudaMachine
from mpq_compiler.runtime.lora import LoadedLora
from mpq_compiler.runtime.memo import REUSE_BYTES
from mpq_compiler.runtime.on_gpu import OnGpu, Stacked, There
from mpq_compiler.runtime.tvm import VirtualMachine, usable_cores
from mpq_compiler.runtime.values import as_array, is_half, is_torch, is_traced, loaded_torch, stacked
from mpq_compiler.sampling.call_tree import (
    CONSTANTS,
    Arguments,
    CallForm,
    NoSuchCall,
    Value,
    bound,
    flatten,
    prefix,
    require_constants,
)
from mpq_compiler.sampling.convention import Convention
from mpq_compiler.sampling.reuse import KEPT, OUTPUT, WEIGHTS, Functions, KeptSteps, Schedule, of_compiled, of_outputs
from mpq_compiler.support import plugins
from mpq_compiler.support.errors import Notice, UserError
from mpq_compiler.support.execution import require_threads
from mpq_compiler.targets import nvidia
from mpq_compiler.targets import table as targets

Steps = TypeVar("Steps")

EXECUTORS = "mpq_compiler.executors"
"""The group of entry points that load an artifact of a backend: ``(artifact, threads) -> Executor``."""


class Executor(Protocol):
    """Executes the functions of an artifact, one call at a time."""

    def run(self, function: str, inputs: Sequence[np.ndarray]) -> np.ndarray:
        """Calls `function` on inputs in its order, of its shapes and types, with any strides; returns its output."""


@runtime_checkable
class Replaceable(Protocol):
    """An executor whose stored tensors can have other values."""

    def replace(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Replaces stored tensors, by name, by others of their shapes and types; all others are the artifact's."""


class DenoiserOutput(NamedTuple):
    """The output as diffusers expects it: `.sample`, or the first item."""

    sample: Any


class Returned(tuple[Value, ...]):
    """The output of a model that returns several values, or one of another name: by index, or by name."""

    fields: tuple[str, ...]

    def __new__(cls, values: Sequence[Value], fields: Sequence[str]) -> Returned:
        made = super().__new__(cls, values)
        made.fields = tuple(fields)
        return made

    def __getattr__(self, name: str) -> Value:
        if name in self.fields:
            return self[self.fields.index(name)]
        raise AttributeError(f"the output has no '{name}': it has {', '.join(self.fields)}")


class Config(dict[str, Any]):
    """The model's configuration, by key or by attribute, read-only by convention."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the model's configuration has no '{name}'") from None


def load(
    path: str | os.PathLike[str],
    threads: int | None = None,
    check_finite: bool = True,
    reuse_bytes: int = REUSE_BYTES,
    device: str | None = None,
    key: Trust | None = None,
) -> CompiledDenoiser:
    """Verifies and loads the artifact at `path`, a folder or a zip.

    Args:
        path: the artifact.
        threads: threads of a call, by default what the artifact was compiled with, else every core that this process
            may use, and never more than these. The number changes no bit of a result.
        check_finite: whether values are looked at: NaN or infinity in an input or the output is an error, and so is an
            input beyond `checks.LARGEST`; what lies outside the calibrated range is counted
            (`CompiledDenoiser.saturated`).
        reuse_bytes: memory for results that depend on timesteps and texts alone, which are kept between calls; 0
            computes them in every call (docs/artifact.md).
        device: the GPU of an artifact for one, such as "cuda:1"; the first by default.
        key: the public key of whoever has to have signed the artifact: in hexadecimal, or a file with it. Without one a
            signature is not looked at (docs/artifact.md).

    Raises:
        UserError: the artifact is not sound, this machine cannot run it, or an argument is out of range; with a key, it
            is not signed with that, or is not what was signed.
    """
    if reuse_bytes < 0:
        raise UserError(f"reuse_bytes is {reuse_bytes}; it must be 0 or more")
    require_threads(threads)
    artifact = artifacts.opened(path, key)
    chosen = threads or artifact.manifest.get("threads") or usable_cores()
    return CompiledDenoiser(artifact, chosen, check_finite, reuse_bytes, device=_number(artifact, device))


def _number(artifact: Artifact, device: str | None) -> int:
    """The number of the GPU that is named; 0 where none is. UserError: the artifact is for no GPU, or it is no name."""
    if device is None:
        return 0
    kind, _, number = device.partition(":")
    if kind != "cuda" or not (number or "0").isdecimal():
        raise UserError(f"device is '{device}'; name a GPU, such as cuda:1, or none")
    if not nvidia.is_for(artifact.manifest):
        raise UserError(f"device is '{device}', and {artifact.path} is for '{artifact.manifest['target']['name']}'")
    return int(number or 0)


def _executor(artifact: Artifact, threads: int, reuse_bytes: int, device: int) -> Executor:
    target = artifact.manifest["target"]
    targets.require_host(target["name"], target["arch"], target["features"])
    if target["backend"] == "tvm":
        if nvidia.is_for(artifact.manifest):
            return CudaMachine(artifact, threads, reuse_bytes, device)
        return VirtualMachine(artifact, threads, reuse_bytes)
    if (entry := plugins.find(EXECUTORS, target["backend"])) is not None:
        try:
            load: Callable[[Artifact, int], Executor] = entry.load()
            return load(artifact, threads)
        except ModuleNotFoundError as error:
            raise UserError(
                f"an artifact for '{target['name']}' needs {error.name}: pip install "
                f"'{plugins.requirement(entry)}', or compile it for this machine with --target native"
            ) from error
    raise UserError(
        f"artifacts for '{target['name']}' are not run here; load it with the {target['backend']} runtime"
    )


class CompiledDenoiser:
    """A compiled denoiser: call it as the model it was compiled from, or `run` it on NumPy arrays.

    It stands in for `pipeline.unet` or `pipeline.transformer` of diffusers: it has `config`, `dtype` and
    `device`, and returns torch tensors when it is given some. Calls from several threads take turns.
    """

    def __init__(
        self,
        artifact: Artifact,
        threads: int,
        check_finite: bool = True,
        reuse_bytes: int = REUSE_BYTES,
        executor: Executor | None = None,
        device: int = 0,
    ) -> None:
        pretrained.register()
        self.artifact = artifact
        self.manifest = artifact.manifest
        self.config = Config(self.manifest["model"]["config"])
        self.check_finite = check_finite
        ranges = covered.ranges(self.manifest)
        self._covered = {name: each.widened() for name, each in ranges.items() if not checks.is_mask(name)}
        self.saturated = dict.fromkeys(self._covered, 0) if check_finite and self._covered else None
        """How many values of each float input, over all calls, lay outside what calibration covered (`covered`), where
        activations are cut off. None where nobody counts: the artifact does not state its ranges, or without
        ``check_finite``. Tensors that stay on the GPU are not looked at."""
        self._kinds = kinds_of(self.manifest)
        self.signature: list[str] = self.manifest["model"].get("signature", self.input_names)
        call = self.manifest["model"].get("call", {})
        self._convention = Convention(**{**call, "baked": tuple(call.get("baked", ()))})
        held = CONSTANTS in self.manifest["files"]
        self._constants = artifact.tensors(CONSTANTS) if held else {}
        self.report: Any = None
        """The report of the compilation, where this process compiled it (`compile` of a pipeline); else None."""
        self._devices = ("cpu", "cuda") if nvidia.is_for(self.manifest) else ("cpu",)
        """The types of torch devices that inputs may be on."""
        self._drawing = threading.local()
        """Has the ``steps`` of the sampler that draws in a block of `reusing`, by where its tensors are."""
        self._lock = threading.Lock()
        self._unforked = forks.lock()
        """Held during calls beside `_lock`: a thread may fork within its own call, and may begin no other there."""
        forks.give_way()
        with self._unforked:
            self.executor = _executor(artifact, threads, reuse_bytes, device) if executor is None else executor
            """What runs the functions of the artifact; one call at a time."""
        self.lora: LoadedLora | None = None
        """The LoRA that is loaded (`load_lora`); None without one."""
        self._number = instances.numbered(self)

    def __repr__(self) -> str:
        target, weights = self.manifest["target"]["name"], self.manifest["weights"]
        return (
            f"CompiledDenoiser({self.manifest['name']}, {self.manifest['model']['class']} for {target}, "
            f"{weights['average_bits']:.2f} bits, {weights['payload_bytes']} bytes)"
        )

    def __getattr__(self, name: str) -> Value:
        """What diffusers' models have of their configuration, such as `in_channels`.

        Raises:
            NotOfAnArtifact: the model has it, and an artifact cannot; an AttributeError, as for any other name.
        """
        pretrained.register()  # a pipeline asks for some before it is saved
        config = self.__dict__.get("config", {})
        if name in config and not name.startswith("_"):
            return config[name]
        kind = self.__dict__.get("manifest", {}).get("model", {}).get("class", "")
        if (error := pretrained.of_the_model(kind, name)) is not None:
            raise error
        raise AttributeError(f"a compiled denoiser has no attribute '{name}'")

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: object) -> None:
        """Copies the artifact, as `pipeline.save_pretrained` does with its models; what it says of weights is fixed.

        The folder around it is made. UserError: something else than an artifact is in the way.
        """
        Path(save_directory).parent.mkdir(parents=True, exist_ok=True)  # of a pipeline it may be the first part
        artifacts.copy(self.artifact, save_directory, overwrite=True)

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], **kwargs: object) -> CompiledDenoiser:
        """Loads an artifact, as `DiffusionPipeline.from_pretrained` does with its models.

        Inputs of any float type are taken, whatever type the pipeline is loaded in. UserError: as `load`.
        """
        return load(path)

    def forget(self) -> None:
        """Evicts all results kept between calls, so that the next call computes everything."""
        if isinstance(self.executor, VirtualMachine):
            with self._unforked, self._lock:
                self.executor.forget()

    def load_lora(self, path: str | os.PathLike[str], scale: float = 1.0) -> LoadedLora:
        """Loads a LoRA into the branches of an artifact that was compiled with ``lora_rank``, in place of any before.

        Nothing is compiled: factors are data, and weights are prepared anew as at load. A LoRA of a higher rank than
        the branches is cut by its singular values, with a warning that says what it loses.

        Args:
            path: a safetensors file with the names of kohya's scripts, of PEFT, or of diffusers.
            scale: multiplies the change of every weight.

        Returns:
            What it has come to: layers, rank, and the loss of a cut.

        Raises:
            UserError: the artifact has no branches, or lacks one for a layer of the file; the file is damaged, of
                another kind, or of a model with other shapes. The artifact is then as it was.
        """
        tensors, found = lora.fit(self.artifact, path, scale)
        self._replace(tensors)
        self.lora = found
        for note in found.notes:
            warnings.warn(note, Notice, stacklevel=2)
        return found

    def unload_lora(self) -> None:
        """Unloads the LoRA: the outputs have the bits of the artifact without one. UserError: it has no branches."""
        lora.require(self.artifact)
        self._replace({})
        self.lora = None

    def _replace(self, tensors: Mapping[str, np.ndarray]) -> None:
        if not isinstance(self.executor, Replaceable):
            raise UserError(f"artifacts for '{self.manifest['target']['name']}' cannot load a LoRA")
        with self._unforked, self._lock:
            self.executor.replace(tensors)

    @property
    def input_names(self) -> list[str]:
        """The names of the inputs, in the order of the compiled functions."""
        return list(self._kinds[0].inputs)

    @property
    def dtype(self) -> Any:
        """The type it computes in: float32, torch's where torch is loaded, else NumPy's."""
        torch = loaded_torch()
        return torch.float32 if torch else np.dtype(np.float32)

    @property
    def device(self) -> Any:
        """The device it runs on, the CPU or a GPU: a torch device where torch is loaded, else a string.

        Where torch was built without CUDA this is the CPU, for its tensors cannot be anywhere else.
        """
        torch = loaded_torch()
        name = self._devices[-1] if not torch or torch.cuda.is_available() else "cpu"
        number = getattr(self.executor, "device", 0)
        name = f"{name}:{number}" if number else name
        return torch.device(name) if torch else name

    def to(self, *args: Any, **kwargs: Any) -> CompiledDenoiser:
        """Returns itself for float32 and a device that it runs on. UserError: any other device or type."""
        for argument in (*args, *kwargs.values()):
            if isinstance(argument, str | np.dtype) or type(argument).__module__ == "torch":
                name = str(argument).removeprefix("torch.")
                if name.split(":")[0] not in (*self._devices, "float32", "contiguous_format", "preserve_format"):
                    known = " or ".join(self._devices)
                    raise UserError(f"a compiled denoiser cannot move to {name}: this one takes float32 on {known}")
                own = getattr(self.executor, "device", 0)
                if name.startswith("cuda:") and name != f"cuda:{own}":
                    raise UserError(
                        f"a compiled denoiser cannot move to {name}: this one is on cuda:{own}; load it there, "
                        f"mpq_compiler.load(..., device='{name}')"
                    )
        return self

    def eval(self) -> CompiledDenoiser:
        """Returns itself: there is no other mode."""
        return self

    def requires_grad_(self, requires_grad: bool = True) -> CompiledDenoiser:
        """Returns itself, for it has no gradients. UserError: they are asked for."""
        if requires_grad:
            raise UserError("a compiled denoiser has no gradients; train the model it was compiled from")
        return self

    @property
    def add_embedding(self) -> Any:
        """The layer whose width SDXL's pipeline reads for its added conditions."""
        width = SimpleNamespace(in_features=self.config.projection_class_embeddings_input_dim)
        return SimpleNamespace(linear_1=width)

    @property
    def inner_dim(self) -> int:
        """The width of a transformer, which Hunyuan-DiT's pipeline divides by `num_heads`."""
        return int(self.config.num_attention_heads * self.config.attention_head_dim)

    @property
    def num_heads(self) -> int:
        """The number of attention heads of a transformer."""
        return int(self.config.num_attention_heads)

    def cache_context(self, name: str, **steps: object) -> Any:
        """A context that does nothing: some pipelines name their calls for caches of attention; there are none here."""
        return nullcontext()

    def __call__(self, *args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        """Predicts as the compiled model's `forward` does.

        Args:
            args: the inputs in the order of the model's signature, arrays or torch tensors. A number, or an array of
                one, is broadcast over the batch where the input has one value a sample (the timestep).
            return_dict: whether the result is a `DenoiserOutput`, else a tuple of one.
            kwargs: the inputs by name; those that are None count as absent.

        Returns:
            The prediction: a torch tensor where an input is one, on the device of the first of these, else an array.
            Tensors in half precision are computed in float32, and the result has the first one's type. An artifact
            for a GPU takes tensors on the GPU: they stay there, the result is there too, and all of it is on the
            caller's stream; it may be captured in a CUDA graph behind a first call, where the timestep is there too.
            Of these is not looked whether they are finite.

        Raises:
            UserError: as `run`; an input is given twice, or there are too many.
        """
        if is_traced():
            from mpq_compiler.runtime import operator

            found = operator.called(self._number, args, kwargs)
            return DenoiserOutput(found) if return_dict else (found,)
        if self._kinds[0].form is not None:
            return self._called(bound(self.signature, args, kwargs), return_dict)
        named = self._named(args, kwargs)
        result: Value = self._convention.pack(self._predicted(named, *self._placed(named, self._kinds[0])))
        return DenoiserOutput(result) if return_dict else (result,)

    def _predicted(self, inputs: Mapping[str, Value], tensors: Mapping[str, There], fitted: Fitted) -> Value:
        """The output for the inputs of a call, as `_placed` has them: where and in the type that they ask for."""
        given = next((value for value in inputs.values() if is_torch(value)), None)
        if tensors:
            result = self._predicted_there(tensors, fitted, given is not None)
            return result.to(given.dtype) if given is not None and is_half(given) else result
        steps = self._steps_of_block("here", self.steps)
        found: Value = self._run(fitted) if steps is None else steps(**fitted.arrays)
        if given is None:
            return found
        torch = loaded_torch()
        assert torch
        return torch.from_numpy(found).to(given.device, given.dtype if is_half(given) else None)

    def _predicted_there(self, tensors: Mapping[str, There], fitted: Fitted, as_torch: bool) -> Value:
        """The output for tensors on the GPU; within a block of `reusing` as a step of its sampler."""
        machine = self.executor
        assert isinstance(machine, CudaMachine)
        make = partial(self._steps_there, machine, as_torch)
        steps = self._steps_of_block("as torch" if as_torch else "there", make)
        if steps is None or on_gpu.stream_of(machine.device)[1]:  # what is captured is computed whole
            (found,) = self._run_there(tensors, fitted, machine, as_torch, [output_shape(fitted.functions)])
            return found
        inputs = {**fitted.arrays, **tensors}
        if "timestep" in tensors:
            inputs["timestep"] = machine.values(tensors["timestep"])
        return steps(**inputs)

    def _run_there(
        self,
        tensors: Mapping[str, OnGpu],
        fitted: Fitted,
        machine: CudaMachine,
        as_torch: bool,
        shapes: Sequence[tuple[int, ...]],
    ) -> list[Value]:
        """The output for tensors on the GPU: there, on the caller's stream, and nothing waits for it.

        Nothing looks whether values are finite: a look would wait.

        Args:
            tensors: the inputs that are on the GPU.
            fitted: all inputs; of these what is not on the GPU is read.
            machine: on that GPU.
            as_torch: whether tensors are made of torch's, or of the runtime's.
            shapes: of what a sample of the output has, one part behind the other; each is a tensor of its own, float32.
        """
        stream, capturing = on_gpu.stream_of(machine.device)
        if not capturing:
            self._require_values(tensors, machine)
        torch = loaded_torch() if as_torch else None
        device = f"cuda:{machine.device}"
        made = [
            torch.empty((fitted.batch, *shape), device=device)
            if torch
            else machine.empty((fitted.batch, *shape), "float32")
            for shape in shapes
        ]
        parts = [(out.data_ptr(), 4 * math.prod(shape)) for out, shape in zip(made, shapes, strict=True)]
        forks.give_way()
        with self._unforked, self._lock:
            for function, begin, end in parts_of(fitted.batch, fitted.functions):
                count = function["batch"] or end - begin
                rows = np.minimum(np.arange(begin, begin + count), end - 1)
                pieces = [
                    tensors[value["name"]].rows(begin, end, count, fitted.batch)
                    if value["name"] in tensors
                    else np.ascontiguousarray(fitted.arrays[value["name"]][rows])
                    for value in function["inputs"]
                ]
                result = machine.call(function["name"], pieces, stream, capturing)
                machine.end(result, parts, begin, end - begin, stream, capturing)
        return made

    def _placed(self, inputs: Mapping[str, Value], kind: Kind) -> tuple[dict[str, There], Fitted]:
        """Inputs that stay on the GPU; and all inputs checked, zeros of their shapes and types in place of these."""
        tensors: dict[str, There] = {}
        arrays = dict(inputs)
        if isinstance(self.executor, CudaMachine) and on_gpu.stays(inputs, self.executor.device):
            for name, value in inputs.items():
                if name in kind.inputs and on_gpu.device_of(value) is not None:
                    tensors[name] = on_gpu.taken(name, value, kind.inputs[name], self.executor.from_dlpack)
                    arrays[name] = on_gpu.standing_in(tensors[name])
        floats = {name: value.float() if is_half(value) else value for name, value in arrays.items()}
        return tensors, kind.fitted(floats, self._devices)

    def _require_values(self, tensors: Mapping[str, OnGpu], machine: CudaMachine) -> None:
        """Raises a UserError for labels beyond a table and tokens unlike the folded ones: this waits for the GPU."""
        for name, below in self.manifest["model"].get("below", {}).items():
            if isinstance(tensor := tensors.get(name), There):
                checks.require_range(name, machine.values(tensor), below)
        for assumed in self.manifest.get("assumptions", ()):
            if isinstance(tensor := tensors.get(assumed["input"]), There):
                checks.require_token(assumed, machine.values(tensor))

    def _called(self, arguments: Arguments, return_dict: bool) -> Value:
        """A call in the form of the recorded ones; the result has the structure of the model's own."""
        refusals = []
        for index in range(len(self._kinds)):
            try:
                form, inputs, placed = self._as_kind(index, arguments)
                break
            except UserError as error:
                refusals.append(error)
        else:
            raise self._refusal(refusals)
        returned = form.returned(self._predicted(inputs, *placed))
        return Returned(returned, form.fields) if return_dict and form.fields else returned

    def _as_kind(
        self, index: int, arguments: Arguments
    ) -> tuple[CallForm, Arguments, tuple[dict[str, There], Fitted]]:
        """The call as one of a kind: its form, the inputs, and these as `_placed`. UserError: it is none."""
        form = self._kinds[index].form
        assert form is not None
        inputs, constants = form.taken(arguments, stacked)
        values = {path: as_array(value) for path, value in constants.items()}
        of = prefix(index)
        held = {path.removeprefix(of): value for path, value in self._constants.items() if path.startswith(of)}
        require_constants(values, held, form.held)
        return form, inputs, self._placed(inputs, self._kinds[index])

    def _refusal(self, refusals: Sequence[UserError]) -> UserError:
        """Says in what a call differs from the nearest kind, and lists the kinds where there are several."""
        differs = min(refusals, key=lambda error: error.differences if isinstance(error, NoSuchCall) else 1)
        if len(self._kinds) == 1:
            return differs
        kinds = "; ".join(kind.text for kind in self._kinds)
        return UserError(f"{differs}; this denoiser was compiled for {len(self._kinds)} kinds of calls: {kinds}")

    def _named(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        named = bound(self.signature, args, kwargs)
        if "img_ids" in self._convention.baked and named.get("img_ids") is None:
            raise UserError("input 'img_ids' is missing; an artifact is called as its model is, or `run` on images")
        _, baked = flatten({name: named[name] for name in self._convention.baked if named.get(name) is not None})
        require_constants({p: as_array(v) for p, v in baked.items() if p in self._constants}, self._constants)
        arguments = self._convention.inputs(named)
        return {n: v for n, v in arguments.items() if not (isinstance(v, Mapping) and not v)}

    def run(self, inputs: Mapping[str, Value], out: np.ndarray | None = None, kind: int = 0) -> np.ndarray:
        """Runs the denoiser on arrays.

        A batch without a specialization of its own is run in parts, the largest first, and the last part is padded
        with copies of the last sample. Samples do not influence one another, so the parts do not show.

        Args:
            inputs: by name, the batch first.
            out: receives the output where it is given, float32 of its shape.
            kind: the index of the kind of calls, of an artifact that takes several (`model.calls` of its manifest).

        Returns:
            The output, float32 with the batch first; `out` where that is given.

        Raises:
            UserError: an input or `out` is missing, unknown, or of the wrong type, shape or device; the batch is empty;
                an input or the output is not finite, or an input beyond `checks.LARGEST`; a label is out of range.
        """
        if not 0 <= kind < len(self._kinds):
            raise UserError(f"there is no kind {kind} of calls: this artifact has {len(self._kinds)}, the first is 0")
        return self._run(self._kinds[kind].fitted(inputs, self._devices), out)

    def steps(self) -> Callable[..., np.ndarray]:
        """The denoiser as the steps of one sampler call it, by named arrays; each sampler has its own.

        Where the artifact says that steps reuse a part of the network as it was (`mpqc compile --reuse`), it is kept
        here from call to call (`sampling.reuse.KeptSteps`); else it is `run`.
        """
        reuse = self.manifest.get("reuse")
        if reuse is None:
            return lambda **inputs: self.run(inputs)
        schedule = Schedule.from_json(reuse)
        if schedule.node == OUTPUT:
            return KeptSteps(schedule, of_outputs(self.run), self.input_names[0])
        keeping, reusing = (partial(self._run_of, kind) for kind in self._kinds_of_reuse(reuse))
        output = output_shape(self._kinds[0].functions)
        functions = of_compiled(self.run, keeping, reusing, output, tuple(reuse["shape"]))
        return KeptSteps(schedule, functions, self.input_names[0])

    def _steps_there(self, machine: CudaMachine, as_torch: bool) -> KeptSteps | None:
        """The denoiser as the steps of one sampler call it on tensors on the GPU; None: all of it is computed.

        So it is where steps sum outputs and nothing does so there: that is torch's work.
        """
        reuse = self.manifest.get("reuse")
        if reuse is None or (reuse["node"] == OUTPUT and not as_torch):
            return None
        schedule, latent = Schedule.from_json(reuse), self.input_names[0]
        output = output_shape(self._kinds[0].functions)

        def called(kind: Kind, inputs: Mapping[str, Value], *shapes: tuple[int, ...]) -> list[Value]:
            tensors = {name: value for name, value in inputs.items() if isinstance(value, OnGpu)}
            arrays = {**inputs, **{name: on_gpu.standing_in(tensor) for name, tensor in tensors.items()}}
            return self._run_there(tensors, kind.fitted(arrays, self._devices), machine, as_torch, shapes)

        def whole(inputs: Mapping[str, Value]) -> Value:
            return called(self._kinds[0], inputs, output)[0]

        if schedule.node == OUTPUT:
            return KeptSteps(schedule, of_outputs(whole, "clone"), latent, on_gpu.conditions_key)
        kept, (keeping, reusing) = tuple(reuse["shape"]), self._kinds_of_reuse(reuse)

        def keep(inputs: Mapping[str, Value]) -> tuple[Value, Value]:
            found, value = called(keeping, inputs, output, kept)
            return found, on_gpu.taken(KEPT, value, reusing.inputs[KEPT], machine.from_dlpack)

        def reused(inputs: Mapping[str, Value], values: Sequence[There], weights: Sequence[float]) -> Value:
            rows = np.tile(np.array(weights, np.float32), (values[0].shape[0], 1))
            return called(reusing, {**inputs, KEPT: Stacked(values), WEIGHTS: rows}, output)[0]

        return KeptSteps(schedule, Functions(whole, keep, reused), latent, on_gpu.conditions_key)

    def _kinds_of_reuse(self, reuse: Mapping[str, Any]) -> tuple[Kind, Kind]:
        """The calls of steps that keep a value, and of those that reuse some."""
        keeping, reusing = (
            Kind("", None, [each for each in self.manifest["functions"] if each["name"] in reuse[how]])
            for how in ("keeping", "reusing")
        )
        return keeping, reusing

    @contextmanager
    def reusing(self) -> Iterator[None]:
        """Calls within the block, of this thread, are the steps of one sampler: ``with denoiser.reusing(): pipe(...)``.

        A pipeline of diffusers calls its model without saying where a drawing begins; beyond such a block all of it is
        computed in every call. On a GPU a call waits for the timestep where that is there too, and calls are told apart
        by which tensors their conditions are; what a CUDA graph captures is computed whole.
        """
        before, self._drawing.steps = getattr(self._drawing, "steps", None), {}
        try:
            yield
        finally:
            self._drawing.steps = before

    def _steps_of_block(self, where: str, make: Callable[[], Steps]) -> Steps | None:
        """The steps of the sampler that draws in a block of `reusing`, made at its first call; None beyond a block."""
        steps = getattr(self._drawing, "steps", None)
        if steps is None:
            return None
        if where not in steps:
            steps[where] = make()
        found: Steps = steps[where]
        return found

    def _run_of(self, kind: Kind, inputs: Mapping[str, Value]) -> np.ndarray:
        """The output of the functions of a kind."""
        return self._run(kind.fitted(inputs, self._devices))

    def _run(self, fitted: Fitted, out: np.ndarray | None = None) -> np.ndarray:
        arrays, batch, fitting = fitted
        if self.check_finite:
            self._look(arrays)
        for name, below in self.manifest["model"].get("below", {}).items():
            checks.require_range(name, arrays[name], below)
        for assumed in self.manifest.get("assumptions", ()):
            if type(arrays[assumed["input"]]) is np.ndarray:  # else its values are not known yet (`recording`)
                checks.require_token(assumed, arrays[assumed["input"]])
        if out is not None:
            checks.require_room(out, (batch, *output_shape(fitting)))
        schedule, found = parts_of(batch, fitting), []
        forks.give_way()
        with self._unforked, self._lock:
            for function, begin, end in schedule:
                result = self._part(function, arrays, begin, end)
                if out is not None:
                    np.copyto(out[begin:end], result)
                elif len(schedule) > 1:
                    found.append(result.copy())
        if out is not None or found:
            result = np.concatenate(found) if out is None else out
        if self.check_finite:
            checks.require_finite(self._kinds[0].functions[0]["output"]["name"], result)
        return result

    def _look(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Counts what lies outside what calibration covered. UserError: a value that cannot be computed with."""
        for name, array in arrays.items():
            if array.dtype.kind != "f":
                continue
            low, high = checks.extremes(name, array)
            within = self._covered.get(name)
            if within is not None and (low < within.low or high > within.high):
                self._saturate(name, within, array)

    def _saturate(self, name: str, within: covered.Range, array: np.ndarray) -> None:
        """Counts the values of an input that are not within, and warns of the first."""
        assert self.saturated is not None
        count = int(((array < within.low) | (array > within.high)).sum())
        with self._unforked, self._lock:
            is_first = not self.saturated[name]
            self.saturated[name] += count
        if is_first:
            warnings.warn(
                f"{count} of {array.size} values of input '{name}' lie outside the range {within.low:.4g} to "
                f"{within.high:.4g}, which is wider than what calibration saw: activations are cut off there; check "
                "the scale of this input, or calibrate on inputs like it",
                Notice,
                stacklevel=5,
            )

    def _part(
        self, function: Function, arrays: Mapping[str, np.ndarray], begin: int, end: int
    ) -> np.ndarray:
        rows: slice | np.ndarray = slice(begin, end)
        size = function["batch"] or end - begin
        if size > end - begin:
            rows = np.minimum(np.arange(begin, begin + size), end - 1)
        inputs = [arrays[value["name"]][rows] for value in function["inputs"]]
        return self.executor.run(function["name"], inputs)[: end - begin]
