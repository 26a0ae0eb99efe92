"""How diffusers calls a denoiser, where its call differs from the compiler's inputs. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

Array = TypeVar("Array", bound=Any)
"""A NumPy array or a torch tensor."""


@dataclass(frozen=True)
class Convention:
    """The conversion between a call of the model and the inputs and output of the compiled denoiser.

    The compiler's latents are images [B, C, H, W], and its timestep is on the scale that the model embeds (0 to 1000
    for all families). The defaults are for most models, whose call has both in this form.
    """

    patch: int = 1
    """Pixels along a side of a token: the model is called with latents as tokens [B, H*W / patch^2, C * patch^2]."""
    timestep_unit: float = 1.0
    """Divisor of the timestep: the model is called with the compiler's timestep divided by this."""
    baked: tuple[str, ...] = ()
    """Arguments that follow from the size and the number of tokens, and are constants of the compiled denoiser."""

    def pack(self, image: Array) -> Array:
        """Packs latents [B, C, H, W] into what the model is called with."""
        if self.patch == 1:
            return image
        batch, channels, height, width = image.shape
        p, h, w = self.patch, height // self.patch, width // self.patch
        parts = image.reshape(batch, channels, h, p, w, p)  # to [B, h, w, C, p, p]
        packed: Array = parts.swapaxes(1, 2).swapaxes(2, 4).swapaxes(3, 4).reshape(batch, h * w, channels * p * p)
        return packed

    def unpack(self, tokens: Array, height: int, width: int) -> Array:
        """Unpacks what the model takes or returns into an image [B, C, H, W]; the inverse of `pack`."""
        if self.patch == 1:
            return tokens
        p, h, w = self.patch, height // self.patch, width // self.patch
        batch, channels = tokens.shape[0], tokens.shape[2] // (p * p)
        parts = tokens.reshape(batch, h, w, channels, p, p)
        image: Array = parts.swapaxes(3, 4).swapaxes(2, 4).swapaxes(1, 2).reshape(batch, channels, height, width)
        return image

    def inputs(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Converts the keyword arguments of a call of the model to the compiler's inputs.

        Arguments that are None, and those that are baked in, are dropped.
        """
        found = {k: v for k, v in arguments.items() if k not in (*self.baked, "added_cond_kwargs", "return_dict")}
        found |= arguments.get("added_cond_kwargs") or {}
        found = {name: value for name, value in found.items() if value is not None}
        if self.patch != 1:
            rows, columns = (int(arguments["img_ids"][..., axis].max()) + 1 for axis in (1, 2))
            found["hidden_states"] = self.unpack(found["hidden_states"], rows * self.patch, columns * self.patch)
        if self.timestep_unit != 1:
            found["timestep"] = found["timestep"] * self.timestep_unit
        return found
