"""A frozen text encoder for models that take short prompts: a table of words plus a table of positions.

A prompt has one word of every slot, in the order of the slots ("dark plain boot": tone, texture, class). The empty
prompt is the unconditional case, which classifier-free guidance leads away from. The encoder is small enough to travel
with an artifact, which thus draws from prompts by itself. It is in NumPy; nothing here imports torch.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mpq_compiler.support import tensorfile
from mpq_compiler.support.errors import UserError, nearest

Array = np.ndarray

FILE = "text.safetensors"
"""The file of the tables in an artifact."""
BOS, EOS, PAD = "<bos>", "<eos>", "<pad>"
CLASS = "class"
"""The slot whose words are the classes, in the order of their labels."""


@dataclass(frozen=True, eq=False)
class TextEncoder:
    """The encoder: token i at position p becomes `words[i] + positions[p]`, float32 [D]."""

    vocabulary: tuple[str, ...]
    """The rows of `words`: `<bos>`, `<eos>`, `<pad>` and the words of the slots."""
    slots: Mapping[str, tuple[str, ...]]
    """The slots of a prompt in their order: the words of each, by its name."""
    words: Array = field(repr=False)
    """The embedding of every word of the vocabulary, float32 [V, D]."""
    positions: Array = field(repr=False)
    """The embedding of every position, float32 [L, D]."""

    @classmethod
    def load(cls, about: Mapping[str, Any], path: str | Path) -> TextEncoder:
        """Loads an encoder from its description and the file of its tables.

        Args:
            about: a harness.json or a manifest, of which `vocabulary` and `prompt` are read.
            path: a safetensors file with the tables `words` and `positions`.

        Raises:
            UserError: description and tables contradict each other; the sentence names the key.
        """
        tables = tensorfile.load(path)
        for name in ("words", "positions"):
            if name not in tables or tables[name].ndim != 2:
                raise UserError(f"the text encoder '{path}' lacks the table '{name}'")
        words, positions = (np.array(tables[name], np.float32) for name in ("words", "positions"))
        vocabulary, slots = about.get("vocabulary"), about.get("prompt")
        if not isinstance(vocabulary, list) or len(vocabulary) != len(words) or len(set(vocabulary)) != len(words):
            raise UserError(f"'vocabulary' of the text encoder '{path}' must list its {len(words)} words, each once")
        if not isinstance(slots, list) or not all(_is_slot(slot) for slot in slots):
            raise UserError(f"'prompt' of the text encoder '{path}' must list the parts of a prompt: name and words")
        known = {BOS, EOS, PAD, *(word for slot in slots for word in slot["words"])}
        if strange := sorted(known - set(vocabulary)):
            raise UserError(f"'vocabulary' of the text encoder '{path}' lacks '{strange[0]}'")
        if words.shape[1:] != positions.shape[1:] or len(positions) < len(slots) + 2:
            raise UserError(f"the tables of the text encoder '{path}' do not fit its prompts")
        return cls(tuple(vocabulary), {slot["name"]: tuple(slot["words"]) for slot in slots}, words, positions)

    def to_json(self) -> dict[str, Any]:
        """The description that `load` reads, without the tables."""
        # A list, for manifests sort the keys of objects.
        slots = [{"name": name, "words": list(words)} for name, words in self.slots.items()]
        return {"vocabulary": list(self.vocabulary), "prompt": slots}

    def save(self, path: Path) -> None:
        """Writes the tables to a safetensors file."""
        with path.open("wb") as stream:
            tensorfile.save(stream, {"words": self.words, "positions": self.positions})

    @cached_property
    def _rows(self) -> dict[str, int]:
        return {word: i for i, word in enumerate(self.vocabulary)}

    @property
    def form(self) -> str:
        """The pattern of a prompt: `<tone> <texture> <class>`."""
        return " ".join(f"<{name}>" for name in self.slots)

    @property
    def example(self) -> str:
        """A prompt: the first word of every slot."""
        return " ".join(slot[0] for slot in self.slots.values())

    def split(self, prompt: str) -> tuple[str, ...]:
        """Splits a prompt into its words, one of each slot; () for the empty prompt.

        Raises:
            UserError: a word is unknown, or the words do not fill the slots in their order.
        """
        given = tuple(prompt.split())
        for word in given:
            if not any(word in slot for slot in self.slots.values()):
                hint = nearest(word, {w for slot in self.slots.values() for w in slot})
                raise UserError(f"the prompt '{prompt}' has the word '{word}', which the model does not know; {hint}")
        fits = len(given) == len(self.slots) and all(
            word in slot for word, slot in zip(given, self.slots.values(), strict=True)
        )
        if given and not fits:
            raise UserError(f"the prompt '{prompt}' must be {self.form}, such as '{self.example}'")
        return given

    def tokens(self, prompts: Sequence[str]) -> Array:
        """Tokenizes prompts, int64 [N, L]: `<bos>`, the words, `<eos>` and padding."""
        rows = np.full((len(prompts), len(self.positions)), self._rows[PAD], np.int64)
        for row, prompt in zip(rows, prompts, strict=True):
            text = [BOS, *self.split(prompt), EOS]
            row[: len(text)] = [self._rows[word] for word in text]
        return rows

    def encode(self, prompts: Sequence[str]) -> Array:
        """Encodes prompts: their embeddings, float32 [N, L, D]."""
        embeddings: Array = self.words[self.tokens(prompts)] + self.positions
        return embeddings

    def labels(self, prompts: Sequence[str]) -> Array | None:
        """The classes that the prompts ask for, int64 [N]; None where a prompt is empty or there is no such slot."""
        if CLASS not in self.slots or not all(prompt.strip() for prompt in prompts):
            return None
        place, classes = list(self.slots).index(CLASS), self.slots[CLASS]
        return np.array([classes.index(self.split(prompt)[place]) for prompt in prompts], np.int64)

    @cached_property
    def all_prompts(self) -> tuple[str, ...]:
        """Every prompt once; the last slot changes fastest, and the words before it change at every prompt too."""
        *before, last = self.slots.values()
        beginnings = list(itertools.product(*before))
        return tuple(
            " ".join([*beginnings[(turn + i) % len(beginnings)], word])
            for turn in range(len(beginnings))
            for i, word in enumerate(last)
        )


def _is_slot(slot: Any) -> bool:
    return isinstance(slot, dict) and isinstance(slot.get("name"), str) and isinstance(slot.get("words"), list)
