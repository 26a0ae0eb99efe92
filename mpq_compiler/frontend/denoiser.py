"""Denoisers (diffusers' UNets and transformers) behind one interface of named tensors.

A model is understood by its structure, never by a list of names: the class that config.json names, the parameters of
its `forward` and its configuration say which tensors it takes.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mpq_compiler import schemas
from mpq_compiler.frontend import call_file, checkpoint, checkpoint_fit, checkpoint_module
from mpq_compiler.frontend.call_file import Recording
from mpq_compiler.frontend.call_module import CallModule, held
from mpq_compiler.frontend.finite import require_finite
from mpq_compiler.frontend.input_specs import (
    TensorModule,
    convention_of,
    fixed_values,
    random_values,
    specs_of,
)
from mpq_compiler.frontend.time_type import takes_fractions
from mpq_compiler.ir.program import InputSpec
from mpq_compiler.sampling import call_tree, schedulers
from mpq_compiler.sampling import loop as sampling
from mpq_compiler.sampling.call_tree import TIME, CallForm
from mpq_compiler.sampling.conditioning import LABELS, TEXT, Conditioning, Conditions
from mpq_compiler.sampling.convention import Convention
from mpq_compiler.sampling.schedulers import DDIM, FlowMatchEuler, Scheduler
from mpq_compiler.sampling.text_encoder import TextEncoder
from mpq_compiler.support.errors import UserError, nearest


@dataclass
class Denoiser:
    """A loaded denoiser: its module, its inputs, how it is sampled, and how its latents become images."""

    name: str
    module: TensorModule | CallModule = field(repr=False)
    input_specs: dict[str, InputSpec]
    """The inputs in order; every one has the batch as its first dimension."""
    scheduler: Scheduler
    codec: str = "identity"
    config: dict[str, Any] = field(default_factory=dict, repr=False)
    """The model's config.json."""
    null_class: int | None = None
    """The label that stands for "no class", where the model was trained with one."""
    class_names: tuple[str, ...] = ()
    text: TextEncoder | None = None
    """The encoder of its prompts, where one ships with it."""
    features: Path | None = None
    """The file of the feature extractor for its images (metrics.Features), where one ships."""
    guidance: float | None = None
    """Classifier-free guidance of calibration's sampling; None: the model's usual one, for most models none."""
    given: Conditions | None = None
    """Conditions from a file, in place of varied classes or prompts."""
    notes: tuple[str, ...] = ()
    """What was assumed while loading, one sentence each, for the user to read."""
    examples: Mapping[str, torch.Tensor] | None = field(default=None, repr=False)
    """Rows of recorded inputs, where the model is taken by its calls; None: its inputs are known."""
    more_inputs: str | None = None
    """What a user does for more inputs to calibrate on; empty where nothing does, None: samples more, or gives a file.
    """
    kinds: tuple[Denoiser, ...] = field(default=(), repr=False)
    """The model as calls of further kinds call it."""
    source: Mapping[str, str] | None = None
    """The repository of the hub, the commit and the file that it was read from (`checkpoint.Location.source`)."""

    @property
    def latent(self) -> str:
        """The name of the input that holds the noisy latents: `sample` or `hidden_states`."""
        return next(iter(self.input_specs))

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """The shape of a sample's latents: of an image channels, height and width."""
        return self.input_specs[self.latent].sample

    @property
    def conditions(self) -> tuple[str, ...]:
        """The names of the inputs besides the latents and the timestep."""
        return tuple(name for name in self.input_specs if name not in (self.latent, "timestep"))

    @property
    def labels(self) -> int | None:
        """The number of class labels, the null class included; None without class labels."""
        return self.input_specs[LABELS].below if LABELS in self.input_specs else None

    @property
    def classes(self) -> int | None:
        """The number of real classes, without the null class; None without class labels."""
        return self.labels - (self.null_class is not None) if self.labels else None

    @property
    def conditioning(self) -> Conditioning:
        """How it is conditioned, and which conditions can be made for it."""
        return Conditioning(
            self.name,
            {n: (self.input_specs[n].sample, _type_name(self.input_specs[n].dtype)) for n in self.conditions},
            self.fixed,
            self.classes,
            self.null_class,
            self.text,
            self.given,
            self.whole,
        )

    @property
    def seen(self) -> bool:
        """Whether its call is of no known form, and was seen in a pipeline (`wrap_seen`)."""
        return isinstance(self.module, TensorModule) and self.module.seen

    @property
    def whole(self) -> bool:
        """Whether it can draw alone: its calls are known, and it predicts all channels of the latents that it takes."""
        if isinstance(self.module, CallModule):
            return False
        taken, given = (self.config.get(name) for name in ("in_channels", "out_channels"))
        return not (isinstance(taken, int) and isinstance(given, int)) or given >= taken

    @property
    def form(self) -> CallForm | None:
        """The form of its calls, where it is taken by recorded ones."""
        return self.module.form if isinstance(self.module, CallModule) else None

    @property
    def kind_texts(self) -> list[str]:
        """Each kind of its recorded calls in words, its own first; none where it is not taken by calls."""
        kinds = (self, *self.kinds)
        found = [k.form.described({n: s.shape for n, s in k.input_specs.items()}) for k in kinds if k.form]
        return call_tree.kinds_text(found, self.form.latents.path) if self.form else []

    @property
    def constants(self) -> dict[str, np.ndarray] | None:
        """The tensors by path that are the same in every call; None where a call has none, and no form.

        Those of further kinds of calls have `call_tree.prefix`.
        """
        held = self.module.constants()
        if not held and self.form is None:
            return None
        kinds = [held, *(kind.module.constants() for kind in self.kinds)]
        return {
            call_tree.prefix(i) + path: value.numpy() for i, each in enumerate(kinds) for path, value in each.items()
        }

    @property
    def fixed(self) -> dict[str, list[float]]:
        """Values of the inputs that need not be chosen (`input_specs.fixed_values`)."""
        return {} if isinstance(self.module, CallModule) or self.seen else fixed_values(self.input_specs)

    def resized(self, height: int, width: int) -> Denoiser:
        """The model on latents of another height and width. UserError: it takes none of that size."""
        if isinstance(self.module, CallModule):
            raise UserError(
                f"'{self.name}' is compiled for its recorded calls, which have one size: leave --shapes out, and "
                "record calls of the other size"
            )
        if self.seen:
            raise UserError(f"'{self.name}' is compiled as its pipeline called it, at one size: leave --shapes out")
        tokens = self.input_specs[TEXT].sample[0] if TEXT in self.input_specs else None
        specs, _ = specs_of(self.module.model, self.config, (height, width), tokens)
        specs["timestep"] = self.input_specs["timestep"]
        module = TensorModule(self.module.model, specs).eval()
        scheduler = _of_size(self.scheduler, self.module.model, self.config, specs)
        return replace(self, module=module, input_specs=specs, scheduler=scheduler)

    @property
    def parameters(self) -> int:
        """The number of parameters, over which true bits are averaged."""
        return sum(parameter.numel() for parameter in self.module.parameters())

    def __call__(self, **inputs: Any) -> torch.Tensor:
        """Runs the model without gradients on arrays or tensors by name; the sampling loop calls this."""
        with torch.no_grad():
            tensors = {name: _tensor(value) for name, value in inputs.items()}
            # Schedulers differ in the type of their timesteps; another's than the model's own may have fractions.
            timestep = tensors["timestep"]
            own = timestep.to(self.input_specs["timestep"].dtype)
            tensors["timestep"] = own if torch.equal(own.to(timestep.dtype), timestep) else timestep.float()
            output: torch.Tensor = self.module(**tensors)
            return output

    def random_inputs(self, batch: int, generator: torch.Generator | int = 0) -> dict[str, torch.Tensor]:
        """Draws random inputs by name: normal values; timesteps and labels that differ within the batch.

        Args:
            batch: the number of samples.
            generator: a generator, or the seed of one.
        """
        if isinstance(generator, int):
            generator = torch.Generator().manual_seed(generator)
        if self.examples is not None:
            return self._examples(batch, generator)
        return random_values(self.input_specs, batch, self.scheduler.num_train_timesteps, generator)

    def _examples(self, batch: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Recorded rows, with latents of other noise: what the inputs mean besides is not known.

        Tokens, which are numbers of words, are those that were recorded.
        """
        assert self.examples is not None
        count = len(self.examples[self.latent])
        rows = {name: value[torch.arange(batch) % count] for name, value in self.examples.items()}
        latents = rows[self.latent]
        if not latents.is_floating_point():
            return rows
        return rows | {self.latent: torch.randn(latents.shape, generator=generator) * latents.std() + latents.mean()}

    def example_inputs(self, batch: int = 2) -> dict[str, torch.Tensor]:
        """The inputs that the model is traced with."""
        return self.random_inputs(batch)

    def conditions_for(self, wanted: Any) -> dict[str, np.ndarray]:
        """The conditions for class labels (integers [N]) or prompts (strings): arrays [N, ...] by input name.

        Raises:
            UserError: a class or a word that the model does not know, or a model that takes neither.
        """
        return dict(self.conditioning.of(wanted).values)

    def default_conditions(self, count: int) -> dict[str, np.ndarray]:
        """Conditions for `count` varied samples: the real classes in turn, or varied prompts."""
        return dict(self.conditioning.varied(count).values)

    def null_conditions(self, count: int) -> dict[str, np.ndarray] | None:
        """The unconditional conditions, for guidance; None where the model has no unconditional case."""
        null = self.conditioning.varied(count).null
        return None if null is None else dict(null)

    @property
    def calls_per_step(self) -> int:
        """Calls of the model in a step of `record_calibration`: 2 with guidance, else 1."""
        arguments = self.conditioning.arguments(self.conditioning.mixed(1, 0), 1, self.guidance)
        return 2 if "null_conditions" in arguments else 1

    def sampled(self, guidance: float | None = None, conditions: str | Path | None = None) -> Denoiser:
        """The denoiser with another guidance, and with the conditions of a file, where they are given."""
        given = self.given if conditions is None else self.conditioning.load(conditions)
        return replace(self, guidance=self.guidance if guidance is None else guidance, given=given)

    def sampling(self) -> dict[str, Any]:
        """How it is sampled, as JSON: all that an artifact needs to draw by itself."""
        return {
            "latent": self.latent,
            "shape": list(self.latent_shape),
            "codec": self.codec,
            "scheduler": self.scheduler.to_config(),
            "null_class": self.null_class,
            "classes": self.classes,
            "class_names": list(self.class_names),
            "fixed": self.fixed,
            "text": None if self.text is None else self.text.to_json(),
        }

    def decode(self, latents: Any) -> np.ndarray:
        """Decodes latents [N, C, h, w] to images in [-1, 1], float32 [N, channels, height, width]."""
        return sampling.decode(self.codec, np.asarray(latents))


def load(
    model: str | Path,
    *,
    size: int | tuple[int, int] | None = None,
    tokens: int | None = None,
    prediction_type: str | None = None,
    scheduler: str | Path | None = None,
    guidance: float | None = None,
    conditions: str | Path | None = None,
) -> Denoiser:
    """Loads a denoiser in float32, for evaluation.

    Args:
        model: a bundled name, a folder with config.json and safetensors, a pipeline's folder, or a hub id
            (`owner/name`, or `owner/name@revision` with a commit, tag or branch).
        size: height and width of the latents, by default the configuration's sample_size.
        tokens: length of the text condition (by default harness.json's, else 77, for transformers 120).
        prediction_type: overrides the scheduler's.
        scheduler: a scheduler_config.json to use instead of the model's own.
        guidance: classifier-free guidance of what is sampled (`Denoiser.guidance`).
        conditions: a safetensors file with conditions to sample with (`Conditioning.load`).

    Raises:
        UserError: the model is missing, damaged, or of a structure that is not supported.
    """
    place = checkpoint.locate(model)
    module = checkpoint_module.read(place)
    harness = checkpoint.read_json(place.harness) if place.harness else {}
    if problem := schemas.check(harness, "harness"):
        raise UserError(f"'{place.harness}' does not say how '{place.name}' is sampled: {problem}")
    chosen = Path(scheduler) if scheduler else place.scheduler
    made = wrap(
        module,
        name=place.name,
        size=size,
        tokens=tokens or harness.get("tokens"),
        codec=harness.get("codec", "identity"),
        scheduler=_read_scheduler(chosen, prediction_type) if chosen else None,
        prediction_type=prediction_type,
        null_class=harness.get("null_class"),
        class_names=tuple(harness.get("class_names", ())),
        text=_text_encoder(harness, place.harness),
        features=place.harness.parent / harness["features"]
        if place.harness and "features" in harness
        else None,
    )
    require_finite(module, [functools.partial(_called, made)], place.denoiser)
    return _of_place(made, module, place).sampled(guidance, conditions)


def load_calls(
    model: str | Path, calibration: str | Path, latent: str | None = None, time: str | None = None
) -> Denoiser:
    """Loads a denoiser of any class, as it was called when the file's calls were recorded (`call_file.has_call`).

    UserError: the model is missing or damaged, or the calls are another model's.
    """
    place = checkpoint.locate(model)
    module = checkpoint_module.read(place, by_calls=True)
    made = wrap_calls(module, calibration, name=place.name, latent=latent, time=time)
    require_finite(module, [functools.partial(_called, kind) for kind in (made, *made.kinds)], place.denoiser)
    return _of_place(made, module, place)


def _of_place(made: Denoiser, module: torch.nn.Module, place: checkpoint.Location) -> Denoiser:
    """The denoiser with what is known of the checkpoint that it was read from."""
    return replace(made, notes=(*made.notes, *checkpoint_fit.notes(module, place)), source=place.source)


def _called(denoiser: Denoiser) -> torch.Tensor:
    return denoiser(**denoiser.random_inputs(1))


def wrap_calls(
    model: torch.nn.Module,
    calibration: str | Path,
    *,
    name: str = "denoiser",
    latent: str | None = None,
    time: str | None = None,
) -> Denoiser:
    """Wraps a module in memory as the `Denoiser` of the calls that a file holds.

    The module itself is taken: it is in float32 and frozen from then on.

    Args:
        model: the module.
        calibration: the file.
        name: its name in messages and reports.
        latent: the argument with the noisy latents, where the file's is not meant.
        time: the argument with the time, where the file's is not meant.

    Raises:
        UserError: the calls are another model's, or have no such latents or time.
    """
    model = model.float().eval().requires_grad_(False)
    first, *others = (
        _of_kind(model, recording, calibration, name) for recording in call_file.read(calibration, latent, time)
    )
    notes = tuple(dict.fromkeys(note for kind in (first, *others) for note in kind.notes))
    return replace(first, kinds=tuple(others), notes=notes)


def _of_kind(model: torch.nn.Module, recording: Recording, calibration: str | Path, name: str) -> Denoiser:
    """The denoiser of the recorded calls of one kind. UserError: the calls are another model's."""
    form, rows = recording.form, recording.inputs
    module = CallModule(model, form, recording.constants)
    try:
        module = held(module, rows)
    except Exception as error:  # a model may raise anything
        counted = [repr(a.path) for a in form.arguments if a.input != form.latent]
        shared = f"; if samples share {' or '.join(counted)}, record calls of another number of them" if counted else ""
        raise UserError(
            f"{type(model).__name__} cannot be called with one sample of the calls in '{calibration}': "
            f"{checkpoint_module.one_line(error)}{shared}"
        ) from error
    names = [form.latent, TIME, *(a.input for a in module.form.arguments if a.input not in (form.latent, TIME))]
    specs = {name: rows[name] for name in names}
    notes = tuple(
        f"the values of '{path}' decide what {type(model).__name__} computes, and are part of the artifact: calls must "
        "give those that were recorded"
        for path in module.form.constants
        if path not in form.constants
    )
    made = Denoiser(
        name=name,
        module=module.eval(),
        notes=notes,
        input_specs={name: InputSpec(name, ("B", *value.shape[1:]), value.dtype) for name, value in specs.items()},
        scheduler=FlowMatchEuler() if rows[TIME].is_floating_point() else DDIM(),
        config=dict(getattr(model, "config", {})),
        examples={name: rows[name] for name in specs},
        more_inputs="record more calls (docs/calibration.md)",
    )
    return _with_time(made)


def _read_scheduler(path: Path, prediction_type: str | None) -> dict[str, Any]:
    """Reads a scheduler_config.json. UserError: it is none, or is malformed; the sentence names file and key."""
    config = checkpoint.read_json(path)
    if "_class_name" not in config:
        raise UserError(f"'{path}' is no scheduler configuration: it lacks the key '_class_name'")
    try:
        schedulers.from_config({**config, "prediction_type": prediction_type} if prediction_type else config)
    except UserError as error:
        raise UserError(f"'{path}': {error}") from error
    return config


def _text_encoder(harness: Mapping[str, Any], path: Path | None) -> TextEncoder | None:
    """Loads the text encoder that a harness.json describes; None where it describes none."""
    if path is None or "text" not in harness:
        return None
    tables = Path(harness["text"]["tables"])
    if ".." in tables.parts or tables.is_absolute():
        raise UserError(f"'text.tables' in '{path}' must name a file below its folder")
    return TextEncoder.load(harness["text"], path.parent / tables)


def wrap(
    model: torch.nn.Module,
    *,
    name: str = "denoiser",
    size: int | tuple[int, int] | None = None,
    tokens: int | None = None,
    codec: str = "identity",
    scheduler: Mapping[str, Any] | Scheduler | None = None,
    prediction_type: str | None = None,
    null_class: int | None = None,
    class_names: tuple[str, ...] = (),
    text: TextEncoder | None = None,
    features: Path | None = None,
) -> Denoiser:
    """Wraps a diffusers module in memory as a `Denoiser`.

    The module itself is taken: it is in float32 and frozen from then on. Pass a copy of one that is still trained.

    Args:
        model: a diffusers UNet or transformer.
        name: its name in messages and reports.
        size: height and width of the latents, by default the configuration's sample_size.
        tokens: length of the text condition.
        codec: how latents become images (`sampling.loop.decode`).
        scheduler: a scheduler, or its configuration; by default one is assumed, and `Denoiser.notes` says which.
        prediction_type: overrides the scheduler's.
        null_class: the label for "no class".
        class_names: names of the classes, by label.
        text: an encoder of its prompts.
        features: the file of the feature extractor for its images.

    Raises:
        UserError: a structure that is not supported, or arguments that do not fit the model.
    """
    if codec not in sampling.CODECS:
        raise UserError(
            f"the codec {codec!r} of '{name}' is not known; {nearest(str(codec), sampling.CODECS)}"
        )
    config = dict(getattr(model, "config", {}))
    specs, notes = specs_of(model, config, size, tokens)
    chosen, note = _scheduler(scheduler, prediction_type, specs)
    notes += [note] if note else []
    chosen = _of_size(chosen, model, config, specs)
    module = TensorModule(model.float().eval().requires_grad_(False), specs).eval()
    if null_class is None and LABELS in specs and not config.get("num_class_embeds"):
        null_class = (specs[LABELS].below or 1) - 1  # DiT's table has a row more than classes
    if text is not None and specs[TEXT].sample != text.positions.shape:
        made = list(text.positions.shape)
        raise UserError(f"the text encoder of '{name}' makes {made} of a prompt, where it takes {specs[TEXT]}")
    wrapped = Denoiser(
        name=name,
        module=module,
        input_specs=specs,
        scheduler=chosen,
        codec=codec,
        config=config,
        null_class=null_class,
        class_names=class_names,
        text=text,
        features=features,
        notes=tuple(notes),
    )
    return _with_time(wrapped)


def wrap_seen(
    model: torch.nn.Module,
    call: Mapping[str, torch.Tensor],
    inputs: Sequence[str],
    *,
    name: str,
    unit: float,
    scheduler: Scheduler,
) -> Denoiser:
    """Wraps a module as the `Denoiser` of a call that its pipeline was seen to make.

    The module itself is taken: it is in float32 and frozen from then on.

    Args:
        model: the module.
        call: the arguments of the call.
        inputs: those that vary, the latents first; others are constants of the denoiser, but for the time.
        name: its name in messages and reports.
        unit: what the scheduler's times are divided by.
        scheduler: the pipeline's.
    """
    constants = {n: value for n, value in call.items() if n not in (*inputs, TIME)}
    latent, *conditions = inputs
    specs = {n: InputSpec(n, ("B", *call[n].shape[1:]), torch.float32) for n in (latent, TIME, *conditions)}
    convention = Convention(timestep_unit=unit, baked=tuple(constants))
    module = TensorModule(model.float().eval().requires_grad_(False), specs, convention, constants)
    return Denoiser(name, module.eval(), specs, scheduler, config=dict(getattr(model, "config", {})))


def _with_time(denoiser: Denoiser) -> Denoiser:
    """The denoiser with times in float32 where its model computes with them in floats: any scheduler's fit then."""
    time = denoiser.input_specs[TIME]
    if time.dtype.is_floating_point or not takes_fractions(denoiser.module, denoiser.random_inputs(1)):
        return denoiser
    return replace(denoiser, input_specs=denoiser.input_specs | {TIME: replace(time, dtype=torch.float32)})


def _of_size(scheduler: Scheduler, model: Any, config: Mapping[str, Any], specs: Mapping[str, InputSpec]) -> Scheduler:
    """Fits the scheduler to the size of the latents: flow matching shifts its times by their number of tokens."""
    if not isinstance(scheduler, FlowMatchEuler):
        return scheduler
    packed = convention_of(model).patch
    token = packed * (config.get("patch_size") or 1)
    _, height, width = next(iter(specs.values())).sample
    return replace(scheduler, image_seq_len=(height // token) * (width // token), even_sigmas=packed > 1)


def _scheduler(
    given: Mapping[str, Any] | Scheduler | None, prediction_type: str | None, specs: Mapping[str, InputSpec]
) -> tuple[Scheduler, str | None]:
    """The scheduler to sample with, and a sentence on what was assumed or replaced, or None."""
    if isinstance(given, Scheduler):
        return given, None
    if given is not None:
        scheduler, note = schedulers.from_config(
            {**given, "prediction_type": prediction_type} if prediction_type else given
        )
        if prediction_type and isinstance(scheduler, FlowMatchEuler):
            raise UserError(f"flow matching has no prediction type: leave '{prediction_type}' out")
        return scheduler, note
    if prediction_type is None and specs["timestep"].dtype.is_floating_point and "image_meta_size" not in specs:
        # Of the models that count time in fractions, only Hunyuan-DiT is none of flow matching.
        return FlowMatchEuler(shift=3.0), "no scheduler with the model: flow matching with a shift of 3 is assumed"
    ddim = _default_ddim(TEXT in specs, prediction_type or "epsilon")
    what = f"DDIM with {ddim.beta_schedule} betas and {ddim.prediction_type} prediction"
    return ddim, f"no scheduler with the model: {what} is assumed"


def _default_ddim(latent: bool, prediction_type: str) -> DDIM:
    """The DDIM scheduler of a model without one: Stable Diffusion's for text models, else diffusers' defaults."""
    spacing = "trailing" if prediction_type == "v_prediction" else "leading"
    if not latent:
        return DDIM(prediction_type=prediction_type, timestep_spacing=spacing)
    return DDIM(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
        timestep_spacing=spacing,
    )


def _type_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _tensor(value: Any) -> torch.Tensor:
    # torch shares memory with arrays, except for those with negative strides, which it refuses
    return value if isinstance(value, torch.Tensor) else torch.from_numpy(np.ascontiguousarray(value))
