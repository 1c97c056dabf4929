"""What tokenizers of both formats need: reading the files of a folder, checking text and ids. No jax here."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from eejax.core import TokenizerError

MODEL_FILE = "tokenizer.model"
FAST_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
TOKEN_MAP_FILE = "special_tokens_map.json"
ADDED_FILE = "added_tokens.json"
GENERATION_FILE = "generation_config.json"
TEMPLATE_FILE = "chat_template.jinja"
MORE_TEMPLATES = "additional_chat_templates"

SPACE_MARK = "\u2581"
"""How sentencepiece writes a space; the character itself can then only be spelled in bytes."""

Message = Mapping[str, object]
"""One message of a conversation: `role`, and as a rule `content`."""


def read_bytes(file: Path) -> bytes:
    """The file's bytes. Raises `TokenizerError` where it is missing, unreadable or empty."""
    try:
        data = file.read_bytes()
    except OSError as error:
        raise TokenizerError(f"cannot read {file}: {error.strerror or error}") from error
    if not data:
        raise TokenizerError(f"{file} is empty")
    return data


def read_text(file: Path) -> str:
    """The file's text. Raises `TokenizerError` where it cannot be read, is empty or is not UTF-8."""
    try:
        return read_bytes(file).decode("utf-8")
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{file} is not UTF-8: {error}") from error


def read_object(file: Path, missing: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The JSON object in `file`; `missing`, where that is given and there is no such file.

    Raises:
        TokenizerError: the file cannot be read, or holds something else; the message names it.
    """
    if missing is not None and not file.exists():
        return dict(missing)
    text = read_text(file)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise TokenizerError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise TokenizerError(f"{file} must hold a JSON object, got {type(value).__name__}")
    return value


def typed(config: Mapping[str, Any], name: str, kind: type, default: Any, file: Path) -> Any:
    """`config[name]`, or `default` where it is absent or null. Raises `TokenizerError` where it is no `kind`."""
    value = config.get(name)
    if value is None:
        return default
    if not isinstance(value, kind):
        raise TokenizerError(f"{file}: {name} must be of type {kind.__name__}, got {value!r:.200}")
    return value


def declared_class(folder: Path, config: Mapping[str, Any]) -> tuple[object, object]:
    """The tokenizer class and the model type that a folder names; both None in eejax's own checkpoints.

    Args:
        config: what `tokenizer_config.json` holds.

    Raises:
        TokenizerError: the class in `tokenizer_config.json` is not text.
    """
    try:
        model = read_object(folder / "config.json", missing={})
    except TokenizerError:
        model = {}  # whatever reads the model's configuration reports what is wrong with it
    named = typed(config, "tokenizer_class", str, None, folder / CONFIG_FILE) or model.get("tokenizer_class")
    return named, model.get("model_type")


def find_chat_templates(folder: Path, config: Mapping[str, Any]) -> tuple[dict[str, str], Path]:
    """Jinja text of a folder's chat templates by name, and the file that they come from. Files win over `config`.

    Args:
        config: what `tokenizer_config.json` holds; its `chat_template` is text, or a list of `{name, template}`.

    Raises:
        TokenizerError: a template cannot be read or is not text; the message names the file.
    """
    file = folder / TEMPLATE_FILE
    found = {"default": file} if file.exists() else {}
    found |= {one.stem: one for one in sorted((folder / MORE_TEMPLATES).glob("*.jinja"))}
    if found:
        sources = {name: read_text(one) for name, one in found.items()}
        return sources, file if file.exists() else folder / MORE_TEMPLATES
    file, given = folder / CONFIG_FILE, config.get("chat_template")
    if not given:
        return {}, file
    if isinstance(given, str):
        return {"default": given}, file
    entries = [{"name": name, "template": given[name]} for name in given] if isinstance(given, dict) else given
    if not isinstance(entries, list) or not all(_is_named_template(one) for one in entries):
        raise TokenizerError(f"{file}: chat_template must be text or a list of {{name, template}}, got {given!r:.200}")
    return {one["name"]: one["template"] for one in entries}, file


def _is_named_template(entry: object) -> bool:
    return isinstance(entry, dict) and all(isinstance(entry.get(key), str) for key in ("name", "template"))


def checked_text(text: str) -> str:
    """`text` itself. Raises `TokenizerError` where it is no str or holds lone surrogates, which UTF-8 cannot write."""
    if not isinstance(text, str):
        raise TokenizerError(f"text to encode must be a str, got {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TokenizerError(f"text cannot be written as UTF-8: {error}") from error
    return text


def known_ids(ids: Iterable[int], vocab_size: int) -> list[int]:
    """Those of `ids` that a tokenizer of `vocab_size` tokens may know. Raises `TokenizerError` for a negative one."""
    found = [int(i) for i in ids]
    if found and min(found) < 0:
        raise TokenizerError(f"token id {min(found)} is negative")
    return [i for i in found if i < vocab_size]
