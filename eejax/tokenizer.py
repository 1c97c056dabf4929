"""Text to token ids and back, for the tokenizer that lies in a checkpoint folder.

`tokenizer.model` is a sentencepiece model; `tokenizer_config.json` names its special tokens and, optionally, holds a
chat template in Hugging Face style. Nothing here imports jax.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jinja2
import jinja2.sandbox
import sentencepiece

from eejax.errors import TokenizerError

MODEL_FILE = "tokenizer.model"
CONFIG_FILE = "tokenizer_config.json"

SPACE_MARK = "\u2581"
"""Sentencepiece writes a space so; the character itself can then only be spelled in bytes."""

Message = Mapping[str, str]


class Tokenizer(Protocol):
    """What the engine needs of a tokenizer, whatever its file format."""

    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    special_ids: frozenset[int]

    def encode(self, text: str, add_bos: bool = True) -> list[int]:
        """Token ids of `text`; special tokens written out in it become their own ids. BOS is never doubled."""
        ...

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Text of `ids`. Bytes that are not UTF-8 become U+FFFD."""
        ...

    def apply_chat_template(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The conversation as one prompt, ready for `encode`."""
        ...


class ChatTemplate:
    """A Jinja template in Hugging Face style, run in a sandbox: it comes with the weights and is not trusted."""

    def __init__(self, source: str, origin: Path) -> None:
        env = jinja2.sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        env.globals["raise_exception"] = _raise_from_template
        self._origin = origin
        try:
            self._template = env.from_string(source)
        except jinja2.TemplateError as error:
            raise TokenizerError(f"{origin}: chat_template is not valid Jinja: {error}") from error

    def render(self, messages: Sequence[Message], add_generation_prompt: bool, special: Mapping[str, str]) -> str:
        """The prompt text of `messages`. Raises `TokenizerError` when the template refuses them."""
        for number, message in enumerate(messages):
            if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
                raise TokenizerError(f"message {number} must be a mapping with role and content, got {message!r}")
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                **special,
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise TokenizerError(f"{self._origin}: chat_template failed on these messages: {error}") from error


def _raise_from_template(message: str) -> None:
    raise jinja2.TemplateError(message)


class SentencePieceTokenizer:
    """A sentencepiece model with special tokens spelled out in text and a chat template.

    Attributes:
        vocab_size: number of ids; every id lies in `0..vocab_size-1`.
        bos_id, eos_id: ids that open a text and end an answer; None where the model has none.
        special_ids: ids that stand for no text, left out by `decode`.
    """

    def __init__(self, model: bytes, config: Mapping[str, Any], origin: Path) -> None:
        self._origin = origin
        try:
            self._sp = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, OSError, ValueError) as error:
            raise TokenizerError(f"{origin / MODEL_FILE} is not a sentencepiece model: {error}") from error
        self.vocab_size: int = self._sp.vocab_size()
        if self.vocab_size == 0:
            raise TokenizerError(f"{origin / MODEL_FILE} is not a sentencepiece model: it holds no pieces")
        self.bos_id = self._named_id(config, "bos_token", self._sp.bos_id())
        self.eos_id = self._named_id(config, "eos_token", self._sp.eos_id())
        self._add_bos = _typed(config, "add_bos", bool, True, origin) and self.bos_id is not None
        extra = _typed(config, "additional_special_tokens", list, [], origin)
        named = [self._id_of(str(token)) for token in extra]
        control = [i for i in range(self.vocab_size) if self._sp.is_control(i)]
        ids = {i for i in (self.bos_id, self.eos_id, *named, *control) if i is not None}
        self.special_ids = frozenset(ids)
        self._special = {self._sp.id_to_piece(i): i for i in sorted(ids)}
        # Longest first, so that no special token hides one that it begins.
        words = sorted((*self._special, SPACE_MARK), key=len, reverse=True)
        self._split = re.compile("(" + "|".join(re.escape(word) for word in words) + ")")
        self._mark_ids = [self._sp.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
        template = _typed(config, "chat_template", str, "", origin)
        self._template = ChatTemplate(template, origin / CONFIG_FILE) if template else None

    def _id_of(self, token: str) -> int:
        number = self._sp.piece_to_id(token)
        if number == self._sp.unk_id() and token != self._sp.id_to_piece(number):
            raise TokenizerError(f"{self._origin / CONFIG_FILE} names {token!r}, which {MODEL_FILE} does not have")
        return number

    def _named_id(self, config: Mapping[str, Any], name: str, default: int) -> int | None:
        token = _typed(config, name, str, "", self._origin)
        if token:
            return self._id_of(token)
        return default if default >= 0 else None

    def encode(self, text: str, add_bos: bool = True) -> list[int]:
        """Token ids of `text`; special tokens written out in it become their own ids.

        With `add_bos` the ids begin with BOS, once, even where `text` (a chat template's, say) already spells it.

        Raises:
            TokenizerError: `text` is no string or holds lone surrogates, which UTF-8 cannot write.
        """
        if not isinstance(text, str):
            raise TokenizerError(f"text to encode must be a str, got {type(text).__name__}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise TokenizerError(f"text cannot be written as UTF-8: {error}") from error
        ids: list[int] = []
        for part in self._split.split(text):
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

        Raises:
            TokenizerError: an id lies outside the vocabulary.
        """
        text: list[str] = []
        run: list[int] = []
        for i in map(int, ids):
            if not 0 <= i < self.vocab_size:
                raise TokenizerError(f"token id {i} is outside the vocabulary 0..{self.vocab_size - 1}")
            if i not in self.special_ids:
                run.append(i)
            elif not skip_special:
                text += [self._sp.decode(run), self._sp.id_to_piece(i)]
                run = []
        return "".join([*text, self._sp.decode(run)])

    def apply_chat_template(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The conversation `[{"role": ..., "content": ...}, ...]` as one prompt, ready for `encode`.

        Raises:
            TokenizerError: there is no template, or it refuses the messages.
        """
        if self._template is None:
            raise TokenizerError(f"{self._origin / CONFIG_FILE} has no chat_template; give the prompt as plain text")
        names = {"bos_token": self.bos_id, "eos_token": self.eos_id}
        special = {name: "" if i is None else self._sp.id_to_piece(i) for name, i in names.items()}
        return self._template.render(messages, add_generation_prompt, special)


def _typed(config: Mapping[str, Any], name: str, kind: type, default: Any, origin: Path) -> Any:
    value = config.get(name, default)
    if value is None:
        return default
    if not isinstance(value, kind):
        raise TokenizerError(f"{origin / CONFIG_FILE}: {name} must be of type {kind.__name__}, got {value!r}")
    return value


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of the checkpoint folder `path`.

    Raises:
        TokenizerError: a file is missing, unreadable or corrupt; the message names it.
    """
    folder = Path(path)
    config_file = folder / CONFIG_FILE
    model = _read(folder / MODEL_FILE)
    try:
        config = json.loads(_read(config_file))
    except ValueError as error:  # both malformed JSON and bytes that are not UTF-8
        raise TokenizerError(f"{config_file} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise TokenizerError(f"{config_file} must hold a JSON object, got {type(config).__name__}")
    return SentencePieceTokenizer(model, config, folder)


def _read(file: Path) -> bytes:
    try:
        data = file.read_bytes()
    except OSError as error:
        raise TokenizerError(f"cannot read {file}: {error.strerror or error}") from error
    if not data:
        raise TokenizerError(f"{file} is empty")
    return data
