"""The tokenizer that lies in a model's folder: text to token ids and back. No jax here."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

from eejax.core import TokenizerError
from eejax.text.tokenizer_files import (
    CONFIG_FILE,
    FAST_FILE,
    GENERATION_FILE,
    MODEL_FILE,
    Message,
    declared_class,
    read_object,
)


class Tokenizer(Protocol):
    """What the rest of eejax needs of a tokenizer, whatever its file format."""

    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    special_ids: frozenset[int]
    has_chat_template: bool
    cleans_up: bool

    def encode(self, text: str, add_bos: bool = True) -> list[int]:
        """Token ids of `text`; special tokens written out in it become their own ids.

        Args:
            add_bos: put around them what the tokenizer puts around a text: BOS, as a rule.
        """
        ...

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Text of `ids`. Bytes that are not UTF-8 become U+FFFD; ids beyond the vocabulary have no text."""
        ...

    def apply_chat_template(
        self, messages: Sequence[Message], add_generation_prompt: bool = True, **variables: object
    ) -> str:
        """The conversation as one prompt, ready for `encode(..., add_bos=False)`: the template spells BOS itself.

        Args:
            messages: `{"role": ..., "content": ...}`; content is text or, if the template knows them, a list of parts.
            add_generation_prompt: end with the words that open an answer.
            variables: more that the template may use, `tools` and `documents` for instance.
        """
        ...


def has_tokenizer(path: str | Path) -> bool:
    """Whether the folder `path` holds a tokenizer of a kind that `load_tokenizer` knows."""
    return any((Path(path) / name).exists() for name in (FAST_FILE, MODEL_FILE))


def require_tokenizer(path: str | Path) -> None:
    """Raise `TokenizerError` where `has_tokenizer` is false."""
    if not has_tokenizer(path):
        raise TokenizerError(f"there is no tokenizer in {path}: neither {FAST_FILE} nor {MODEL_FILE}")


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of the folder `path`.

    With `tokenizer.json`, or with a sentencepiece `tokenizer.model` where the folder names a tokenizer class or a model
    type, it is Transformers' own for that folder. Any other `tokenizer.model` is left to sentencepiece.

    Raises:
        TokenizerError: there is none, or a file is unreadable or corrupt; the message names it.
    """
    folder = Path(path)
    config = read_object(folder / CONFIG_FILE, missing={})
    require_tokenizer(folder)
    if not (folder / FAST_FILE).exists() and declared_class(folder, config) == (None, None):
        from eejax.text.sentencepiece_tokenizer import SentencePieceTokenizer

        return SentencePieceTokenizer(folder, read_object(folder / CONFIG_FILE))  # eejax's own folders have one
    from eejax.text.huggingface_tokenizer import load_huggingface_tokenizer

    return load_huggingface_tokenizer(folder, config)


def load_end_tokens(path: str | Path, tokenizer: Tokenizer | None = None) -> frozenset[int]:
    """Ids that end an answer: `tokenizer`'s EOS, and those of the folder's `generation_config.json`.

    Llama 3 has three. Where that file names none, those of the model's `config.json` count, as in Transformers.

    Raises:
        TokenizerError: `eos_token_id` is neither a token id nor a list of them; the message names file and value.
    """
    own = frozenset() if tokenizer is None or tokenizer.eos_id is None else frozenset({tokenizer.eos_id})
    for name in (GENERATION_FILE, "config.json"):
        file = Path(path) / name
        given = read_object(file, missing={}).get("eos_token_id")
        if given is None:
            continue
        found = given if isinstance(given, list) else [given]
        if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in found):
            raise TokenizerError(f"{file}: eos_token_id must be a token id or a list of token ids, got {given!r:.200}")
        return own.union(found)
    return own
