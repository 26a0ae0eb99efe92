"""Tokens of prompts, as a pipeline's tokenizer makes them, by the library `tokenizers`. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, TypedDict

import numpy as np

from mpq_compiler.support.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Array = np.ndarray
IDS, MASK = "input_ids", "attention_mask"
"""What a tokenizer gives: the numbers of tokens, and 1 for each that is none of padding."""
FORMS: dict[str, Callable[[str], str]] = {
    "as it is": lambda prompt: prompt,
    "stripped": str.strip,
    "stripped, in lower case": lambda prompt: prompt.lower().strip(),
}
"""What pipelines do to a prompt before it is tokenized."""


class Padding(TypedDict):
    """How the library pads."""

    pad_id: int
    pad_token: str
    direction: str


class TokensData(TypedDict):
    """How tokens are made as plain data, without the tokenizer, which is a file."""

    name: str
    outputs: dict[str, str]
    length: int
    before: str
    after: str
    form: str
    padding: Padding


@dataclass(frozen=True)
class Tokens:
    """How a pipeline makes tokens of a prompt: all have one length, longer prompts are cut."""

    name: str
    """The pipeline's attribute of the tokenizer."""
    outputs: Mapping[str, str]
    """`IDS` or `MASK` by the name of the source that it is for glue."""
    length: int
    """Tokens of a prompt, padding included."""
    before: str
    """The text before the prompt, of those that are put as a question to a language model."""
    after: str
    """The text behind the prompt."""
    form: str
    """One of `FORMS`."""
    padding: Padding
    model: str = field(repr=False)
    """The tokenizer, as the library writes it to its `tokenizer.json`."""

    @cached_property
    def _library(self) -> Tokenizer:
        try:
            from tokenizers import Tokenizer
        except ModuleNotFoundError as error:
            raise UserError("prompts need the library tokenizers: pip install 'mpq-compiler[pipeline]'") from error
        made = Tokenizer.from_str(self.model)
        made.enable_truncation(self.length)
        made.enable_padding(**self.padding, length=self.length)
        return made

    def text(self, prompt: str) -> str:
        """The text that is tokenized."""
        return self.before + FORMS[self.form](prompt) + self.after

    def of(self, prompts: Sequence[str]) -> dict[str, Array]:
        """The tokens of prompts, i64 [N, length] by the name of the source."""
        found = self._library.encode_batch([self.text(prompt) for prompt in prompts])
        arrays = {
            IDS: np.array([each.ids for each in found], np.int64),
            MASK: np.array([each.attention_mask for each in found], np.int64),
        }
        return {source: arrays[kind] for source, kind in self.outputs.items()}

    def lost(self, prompt: str) -> str:
        """What is cut off the end of a prompt that is too long; empty where nothing is."""
        (found,) = self._library.encode_batch([self.text(prompt)])
        if not found.overflowing:
            return ""
        text, ends = self.text(prompt), [end for _, end in found.offsets]
        return text[max(ends, default=0) :].removesuffix(self.after).strip()

    def to_json(self) -> TokensData:
        """Plain data, which `from_json` reads."""
        return {
            "name": self.name,
            "outputs": dict(self.outputs),
            "length": self.length,
            "before": self.before,
            "after": self.after,
            "form": self.form,
            "padding": self.padding,
        }

    @classmethod
    def from_json(cls, data: TokensData, model: str) -> Tokens:
        """Tokens from plain data and the tokenizer."""
        return cls(
            data["name"], data["outputs"], data["length"], data["before"], data["after"], data["form"], data["padding"],
            model,
        )  # fmt: skip

    @classmethod
    def like(
        cls,
        name: str,
        model: str,
        padding: Padding,
        given: Mapping[str, str],
        made: Mapping[str, Mapping[str, Array]],
    ) -> Tokens:
        """How tokens were made, found by examples.

        Args:
            name: the pipeline's attribute of the tokenizer.
            model: the tokenizer, as the library writes it.
            padding: of the tokenizer.
            given: the text that was tokenized, by prompt.
            made: the tokens [1, length] by prompt, and by the source's name as ``"0:input_ids"``.

        Raises:
            UserError: tokens have no common length, or are not made like this.
        """
        first = next(iter(made.values()))
        lengths = {value.shape[-1] for each in made.values() for value in each.values()}
        if len(lengths) != 1:
            raise UserError(
                f"'{name}' gives {min(lengths)} tokens for one prompt and {max(lengths)} for another: only tokens "
                "that are padded to one length can be compiled; compile the denoiser alone with --parts denoiser"
            )
        outputs = {source: source.partition(":")[2] for source in first}
        for form, change in FORMS.items():
            parted = [text.partition(change(prompt)) for prompt, text in given.items()]
            around = {(before, after) for before, found, after in parted}
            if len(around) != 1 or not all(found for _, found, _ in parted):
                continue
            ((before, after),) = around
            tokens = cls(name, outputs, next(iter(lengths)), before, after, form, padding, model)
            ours = {prompt: tokens.of([prompt]) for prompt in made}
            if all(np.array_equal(ours[p][name], value) for p, each in made.items() for name, value in each.items()):
                return tokens
            break
        raise UserError(
            f"the pipeline makes tokens with '{name}' in a way that is not known: compile its denoiser alone with "
            "--parts denoiser"
        )
