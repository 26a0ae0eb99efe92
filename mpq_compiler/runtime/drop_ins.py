"""Compiled text encoders and decoders in the place of a diffusers pipeline's own.

>>> parts = mpq_compiler.load_pipeline("out.mpq")
>>> pipeline.text_encoder, pipeline.vae = parts.drop_in("text_encoder"), parts.drop_in("vae")
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from mpq_compiler.artifact.pipeline import EncoderEntry
from mpq_compiler.runtime.compiled_denoiser import CompiledDenoiser, Config, DenoiserOutput, Returned
from mpq_compiler.sampling.call_tree import Value, unflatten
from mpq_compiler.support.errors import UserError


class _DropIn:
    """What a pipeline asks of its modules beside calling them."""

    def __init__(self, part: CompiledDenoiser) -> None:
        self.part = part
        self.config: Config = part.config

    @property
    def dtype(self) -> Value:
        """The type it computes in, float32."""
        return self.part.dtype

    @property
    def device(self) -> Value:
        """The device it runs on."""
        return self.part.device

    def modules(self) -> Iterator[Value]:
        """No modules, which pipelines look for hooks in."""
        return iter(())

    def to(self, *args: Value, **kwargs: Value) -> _DropIn:
        """Returns itself for float32 and a device that it runs on. UserError: any other device or type."""
        self.part.to(*args, **kwargs)
        return self


class CompiledDecoder(_DropIn):
    """A compiled decoder, which stands in for `pipeline.vae`: it decodes, and encodes where there is an encoder too."""

    def __init__(self, part: CompiledDenoiser, encoder: Callable[[], CompiledDenoiser] | None = None) -> None:
        super().__init__(part)
        self._encoder = encoder

    def decode(self, z: Value, return_dict: bool = True, generator: Value = None) -> Value:
        """Decodes latents [B, C, H, W] of the compiled size to images; `.sample`, or the first item."""
        image = self.part(z, return_dict=False)
        return DenoiserOutput(image) if return_dict else (image,)

    def encode(self, x: Value, return_dict: bool = True) -> Value:
        """Encodes images [B, channels, H, W] from -1 to 1 of the compiled size; `.latent_dist`, or the first item.

        UserError: the pipeline was compiled without its encoder.
        """
        if self._encoder is None:
            raise UserError(
                "the pipeline was compiled without an encoder of images: add encoder to --parts, or keep the "
                "pipeline's own vae"
            )
        found = Certain(self._encoder()(x, return_dict=False))
        return Returned([found], ["latent_dist"]) if return_dict else (found,)


class Certain:
    """The latents of an image as a distribution without spread: of what the encoder gives, the mean is compiled."""

    def __init__(self, mean: Value) -> None:
        self.mean = mean

    def mode(self) -> Value:
        """The mean."""
        return self.mean

    def sample(self, generator: Value = None) -> Value:
        """The mean, whatever the generator."""
        return self.mean


class CompiledEncoder(_DropIn):
    """A compiled text encoder, which stands in for `pipeline.text_encoder`.

    Of what the model returns it gives what the pipeline read when it was compiled; the rest is `NotCompiled`.
    """

    def __init__(self, part: CompiledDenoiser, entry: EncoderEntry) -> None:
        super().__init__(part)
        self._tree, self._fields, self._dimensions = entry["returned"], entry["fields"], entry["dimensions"]
        self._paths = [name.partition(":")[2] for name in entry["outputs"]]

    def __call__(self, input_ids: Value = None, attention_mask: Value = None, **kwargs: Value) -> Returned:
        """Encodes tokens [B, T]: what the model returns, by index or by name."""
        given = {"input_ids": input_ids, "attention_mask": attention_mask}
        taken = {name: given[name] for name in self.part.input_names if name in given}
        output = self.part(**taken, return_dict=False)
        tensors = output if isinstance(output, tuple) else (output,)
        known = {path: NotCompiled(path, dimensions) for path, dimensions in self._dimensions.items()}
        returned = unflatten(self._tree, known | dict(zip(self._paths, tensors, strict=True)))
        return Returned([returned[name] for name in self._fields], self._fields)


class NotCompiled:
    """What a text encoder returns and its pipeline did not read when it was compiled."""

    def __init__(self, path: str, dimensions: int) -> None:
        self._path, self.ndim = path, dimensions

    def __getattr__(self, name: str) -> Value:
        raise UserError(
            f"the pipeline reads '{self._path}' of its text encoder, and did not when it was compiled: compile it "
            "again as it is called now"
        )
