"""Tokenizers that the sentencepiece library runs itself: those of eejax's own checkpoints. No jax here."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sentencepiece

from eejax.core import TokenizerError
from eejax.text.tokenizer_files import (
    CONFIG_FILE,
    MODEL_FILE,
    SPACE_MARK,
    Message,
    checked_text,
    find_chat_templates,
    known_ids,
    read_bytes,
    typed,
)

if TYPE_CHECKING:
    from eejax.text.chat_template import ChatTemplate


class SentencePieceTokenizer:
    """A sentencepiece model with special tokens spelled out in text and a chat template.

    `tokenizer_config.json` may hold `bos_token`, `eos_token`, `add_bos` (true by default), `additional_special_tokens`
    and `chat_template`.

    Attributes:
        vocab_size: number of ids; every id lies in `0..vocab_size-1`.
        bos_id, eos_id: ids that open a text and end an answer; None where the model has none.
        special_ids: ids that have no text, left out by `decode`.
        has_chat_template: whether `apply_chat_template` can be used.
        cleans_up: False: spaces before punctuation are text.

    Raises:
        TokenizerError: a file of the folder is missing, unreadable or corrupt; the message names it.
    """

    cleans_up = False

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        self._origin = folder / CONFIG_FILE
        file = folder / MODEL_FILE
        model = read_bytes(file)
        try:
            self._sp = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, OSError, ValueError) as error:
            raise TokenizerError(f"{file} is not a sentencepiece model: {error}") from error
        self.vocab_size: int = self._sp.vocab_size()
        if self.vocab_size == 0:
            raise TokenizerError(f"{file} is not a sentencepiece model: it holds no pieces")
        self.bos_id = self._named_id(config, "bos_token", self._sp.bos_id())
        self.eos_id = self._named_id(config, "eos_token", self._sp.eos_id())
        self._add_bos = typed(config, "add_bos", bool, True, self._origin) and self.bos_id is not None
        extra = typed(config, "additional_special_tokens", list, [], self._origin)
        named = [self._id_of(str(token)) for token in extra]
        control = [i for i in range(self.vocab_size) if self._sp.is_control(i)]
        ids = {i for i in (self.bos_id, self.eos_id, *named, *control) if i is not None}
        self.special_ids = frozenset(ids)
        self._special = {self._sp.id_to_piece(i): i for i in sorted(ids)}
        # Longest first, so that no special token hides one that it begins.
        words = sorted((*self._special, SPACE_MARK), key=len, reverse=True)
        self._split = re.compile("(" + "|".join(re.escape(word) for word in words) + ")")
        self._mark_ids = [self._sp.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
        self._templates = find_chat_templates(folder, config)
        self.has_chat_template = bool(self._templates[0])

    def _id_of(self, token: str) -> int:
        number = self._sp.piece_to_id(token)
        if number == self._sp.unk_id() and token != self._sp.id_to_piece(number):
            raise TokenizerError(f"{self._origin} names {token!r}, which {MODEL_FILE} does not have")
        return number

    def _named_id(self, config: Mapping[str, Any], name: str, default: int) -> int | None:
        token = typed(config, name, str, "", self._origin)
        if token:
            return self._id_of(token)
        return default if default >= 0 else None

    def encode(self, text: str, add_bos: bool = True) -> list[int]:
        """Token ids of `text`; special tokens written out in it become their own ids.

        With `add_bos` the ids begin with BOS, once, even where `text` (a chat template's, say) already spells it.

        Raises:
            TokenizerError: `text` is no string or holds lone surrogates, which UTF-8 cannot write.
        """
        ids: list[int] = []
        for part in self._split.split(checked_text(text)):
            if part in self._special:
                ids.append(self._special[part])
            elif part == SPACE_MARK:
                ids.extend(self._mark_ids)
            elif part:
                ids.extend(self._sp.encode(part))
        if add_bos and self._add_bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            ids.insert(0, self.bos_id)
        return ids

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Text of `ids`; special ids are left out, or written as their names. Broken UTF-8 becomes U+FFFD.

        Ids beyond the vocabulary have no text: models may have more rows than their tokenizer has tokens.

        Raises:
            TokenizerError: an id is negative.
        """
        text: list[str] = []
        run: list[int] = []
        for i in known_ids(ids, self.vocab_size):
            if i not in self.special_ids:
                run.append(i)
            elif not skip_special:
                text += [self._sp.decode(run), self._sp.id_to_piece(i)]
                run = []
        return "".join([*text, self._sp.decode(run)])

    def apply_chat_template(
        self, messages: Sequence[Message], add_generation_prompt: bool = True, **variables: object
    ) -> str:
        """The conversation `[{"role": ..., "content": ...}, ...]` as one prompt.

        Raises:
            TokenizerError: there is no template, it is not valid Jinja, or it refuses the messages.
        """
        names = {"bos_token": self.bos_id, "eos_token": self.eos_id}
        special = {name: "" if i is None else self._sp.id_to_piece(i) for name, i in names.items()}
        return self._template.render(messages, add_generation_prompt, special, variables)

    @cached_property
    def _template(self) -> ChatTemplate:
        from eejax.text.chat_template import ChatTemplate  # Jinja is imported for conversations only

        return ChatTemplate(*self._templates)
