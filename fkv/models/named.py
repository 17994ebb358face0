"""A language model by its name, with what turns text into its tokens and back."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fkv.models.config import ModelConfig
from fkv.models.decoder import LM


@dataclasses.dataclass(frozen=True)
class Model:
    """A frozen language model, with its tokenizer.

    Attributes:
      lm: the decoder.
      tokenizer: of `transformers`, or None where the directory has none.
      stop: ids of the tokens that end an answer.
      name, revision: as it was loaded.
      directory: of its files, or its GGUF file, if it has any.
    """

    lm: LM
    tokenizer: Any
    stop: tuple[int, ...]
    name: str
    directory: Path | None = None
    revision: str = ""

    def __repr__(self) -> str:
        texts = self.tokenizer
        known = "no tokenizer" if texts is None else f"vocabulary of {len(texts):,}"
        return f"Model({self.full_name!r}, {str(self.lm)[3:-1]}, {known})"

    @property
    def config(self) -> ModelConfig:
        return self.lm.config

    @property
    def full_name(self) -> str:
        """Its name, and its revision if it has one."""
        return f"{self.name}@{self.revision}" if self.revision else self.name


def decode(model: Model, tokens: Sequence[int], special: bool = False) -> str:
    """Text of token ids, without special tokens unless asked for."""
    if model.tokenizer is None:
        return ""
    return model.tokenizer.decode(np.asarray(tokens), skip_special_tokens=not special)
