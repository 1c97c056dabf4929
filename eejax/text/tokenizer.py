"""Text to token ids and back, for the tokenizer that lies in a model's folder. Nothing here imports jax."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from eejax.core import InvalidRequestError, TokenizerError
from eejax.text.chat_template import MORE_TEMPLATES, TEMPLATE_FILE, Message
from eejax.text.huggingface_tokenizer import GENERIC, load_huggingface_tokenizer, tokenizer_class
from eejax.text.sentencepiece_tokenizer import SPACE_MARK, SentencePieceTokenizer
from eejax.text.tokenizer_files import ADDED_FILE, CONFIG_FILE, FAST_FILE, MODEL_FILE, TOKEN_MAP_FILE, read_object

__all__ = [
    "CONFIG_FILE",
    "FAST_FILE",
    "MODEL_FILE",
    "SPACE_MARK",
    "Message",
    "SentencePieceTokenizer",
    "Tokenizer",
    "chat_prompt",
    "copy_tokenizer",
    "has_tokenizer",
    "load_end_tokens",
    "load_tokenizer",
    "require_tokenizer",
]

GENERATION_FILE = "generation_config.json"
COPIED = (FAST_FILE, MODEL_FILE, CONFIG_FILE, TOKEN_MAP_FILE, ADDED_FILE, TEMPLATE_FILE, GENERATION_FILE)


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
        """Text of `ids`. Bytes that are not UTF-8 become U+FFFD; ids beyond the vocabulary stand for no text."""
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
    kind = tokenizer_class(folder, config)
    if kind is None and not (folder / FAST_FILE).exists():
        return SentencePieceTokenizer(folder, read_object(folder / CONFIG_FILE))  # eejax's own folders have one
    return load_huggingface_tokenizer(folder, config, kind or GENERIC)


def chat_prompt(
    tokenizer: Tokenizer | None,
    messages: Sequence[Message],
    add_generation_prompt: bool = True,
    variables: Mapping[str, object] | None = None,
) -> tuple[str, list[int]]:
    """A conversation as its chat template writes it, and that text's token ids.

    No BOS is added, as in Transformers: a template spells it where the model wants it.

    Args:
        variables: more for the template, `tools` and `documents` for instance.

    Raises:
        TokenizerError: there is no tokenizer, or it has no template.
        InvalidRequestError: the template refuses this conversation.
    """
    if tokenizer is None:
        raise TokenizerError("this model has no tokenizer, so it cannot write a conversation; give token ids")
    if not tokenizer.has_chat_template:
        raise TokenizerError("this model has no chat template; give the prompt as plain text")
    more = dict(variables or {})
    taken = ("messages", "add_generation_prompt")
    wrong = [name for name in more if not isinstance(name, str) or name in taken]
    if wrong:
        raise InvalidRequestError(f"chat template variables must have names other than {', '.join(taken)}, got {wrong}")
    try:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt, **more)
        return text, tokenizer.encode(text, add_bos=False)
    except TokenizerError as error:
        raise InvalidRequestError(str(error)) from error


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


def copy_tokenizer(source: str | Path, target: str | Path) -> list[str]:
    """Copy all files that tokenizer and end tokens come from, so that both are the same in the folder `target`.

    Returns the names of the files copied.

    What the source takes from the model's `config.json` is written down beside the tokenizer: the class in
    `tokenizer_config.json`, the end tokens in `generation_config.json`.

    Raises:
        TokenizerError: a file that has to be looked into is unreadable.
    """
    folder, to = Path(source), Path(target)
    names = [name for name in COPIED if (folder / name).is_file()]
    for name in names:
        shutil.copyfile(folder / name, to / name)
    if (folder / MORE_TEMPLATES).is_dir():
        shutil.copytree(folder / MORE_TEMPLATES, to / MORE_TEMPLATES, dirs_exist_ok=True)
    if has_tokenizer(folder):
        config = read_object(folder / CONFIG_FILE, missing={})
        kind = tokenizer_class(folder, config)
        if tokenizer_class(to, config) != kind:
            _write(to / CONFIG_FILE, {**config, "tokenizer_class": kind})
    ends = load_end_tokens(folder)
    if ends != load_end_tokens(to):
        generation = read_object(folder / GENERATION_FILE, missing={})
        _write(to / GENERATION_FILE, {**generation, "eos_token_id": sorted(ends)})
    return names


def _write(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
