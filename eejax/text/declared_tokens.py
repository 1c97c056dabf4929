"""Special and added tokens, as the files of a Hugging Face folder declare them. Nothing here imports jax."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from eejax.core import TokenizerError
from eejax.text.tokenizer_files import ADDED_FILE, CONFIG_FILE, FAST_FILE, TOKEN_MAP_FILE, read_object, typed

STANDARD = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Names that Transformers knows; a folder may give others, which end in `_token` too."""

Token = str | AddedToken


@dataclass
class Declared:
    """Tokens that a folder declares beside its vocabulary and merges.

    Attributes:
        named: by their names in Transformers; None where a file says that there is none.
        extra: special tokens without names; None where no file lists any.
        by_id: added tokens under the ids that they are meant to have.
    """

    named: dict[str, Token | None]
    extra: list[Token] | None
    by_id: dict[int, AddedToken]


def declared_tokens(folder: Path, config: Mapping[str, Any], fast: Mapping[str, Any]) -> Declared:
    """Tokens of `tokenizer_config.json` (`config`), or of older folders' files where it has no `added_tokens_decoder`.

    Args:
        fast: what `tokenizer.json` holds, nothing where there is none.

    Raises:
        TokenizerError: an entry is no token; the message names file and entry.
    """
    file = folder / CONFIG_FILE
    named = _named_tokens({name: value for name, value in config.items() if not _is_late(name, value)}, file)
    late = _named_tokens({name: value for name, value in config.items() if _is_late(name, value)}, file)
    given, listed = config.get("extra_special_tokens"), "extra_special_tokens" in config
    by_name = isinstance(given, dict)
    if by_name:
        late |= {name: _token(value, file, name) for name, value in given.items()}
        given, listed = None, False
    if "additional_special_tokens" in config and (fast or not by_name):  # the former name of the same
        given, listed = given or config["additional_special_tokens"], True
    extra = _tokens(given, file, "extra_special_tokens") if listed else None
    if "added_tokens_decoder" in config:
        entries = typed(config, "added_tokens_decoder", dict, {}, file)
        by_id = {_index(i, file): _added(value, file, "added_tokens_decoder") for i, value in entries.items()}
        declared = Declared(named, extra, by_id)
    else:
        declared = _with_old_files(folder, named, extra, fast)
    named, by_content = declared.named, {token.content: token for token in declared.by_id.values()}
    named |= {name: by_content.get(str(named[name]), named[name]) for name in STANDARD if named.get(name)}
    return Declared(named | late, declared.extra, declared.by_id)


def _with_old_files(
    folder: Path, named: dict[str, Token | None], extra: list[Token] | None, fast: Mapping[str, Any]
) -> Declared:
    """What the configuration names, with `special_tokens_map.json`, which wins, and `added_tokens.json`."""
    file = folder / TOKEN_MAP_FILE
    token_map = _read_token_map(file)
    named = named | _named_tokens(token_map, file)
    more = token_map.get("extra_special_tokens")
    more = _tokens(more, file, "extra_special_tokens") if isinstance(more, list) else None
    # Token objects of `tokenizer_config.json` do not count as special here: Transformers has not read them yet.
    special = [named[name] for name in STANDARD if isinstance(named.get(name), str) or name in token_map]
    special += [*(token for token in extra or () if isinstance(token, str)), *(more or ())]
    by_id = _added_by_id(folder, {str(token) for token in special}, fast)
    if more is not None:
        extra = [*(extra or ()), *more]
    elif extra is None and fast and "additional_special_tokens" in token_map:  # else the model's own pieces win
        extra = _tokens(token_map["additional_special_tokens"], file, "additional_special_tokens")
    return Declared(named, extra, by_id)


def _read_token_map(file: Path) -> dict[str, Any]:
    """What `special_tokens_map.json` holds: its tokens are special, though they are not marked so."""

    def marked(value: Any) -> Any:
        if isinstance(value, list):
            return [marked(one) for one in value]
        return {**value, "special": True} if isinstance(value, dict) else value

    return {name: marked(value) for name, value in read_object(file, missing={}).items()}


def _added_by_id(folder: Path, special: set[str], fast: Mapping[str, Any]) -> dict[int, AddedToken]:
    """Added tokens of `added_tokens.json` and, before these, of `tokenizer.json`."""
    by_id: dict[int, AddedToken] = {}
    file = folder / ADDED_FILE
    for content, i in read_object(file, missing={}).items():
        known = content in special
        by_id[_index(i, file)] = AddedToken(content, special=known, normalized=not known)
    file = folder / FAST_FILE
    for entry in typed(fast, "added_tokens", list, [], file):
        token = _added(entry, file, "added_tokens")
        by_id[_index(entry.get("id"), file)] = token
    return by_id


def _is_late(name: str, value: object) -> bool:
    """Whether it is a name of the folder's own for a token given as text: Transformers adds these last."""
    return name not in STANDARD and isinstance(value, str)


def _named_tokens(config: Mapping[str, Any], file: Path) -> dict[str, Token | None]:
    return {
        name: None if value is None else _token(value, file, name)
        for name, value in config.items()
        if name in STANDARD or (name.endswith("_token") and isinstance(value, str | dict))
    }


def _tokens(values: object, file: Path, name: str) -> list[Token]:
    if values is None:
        return []
    if not isinstance(values, list):
        raise TokenizerError(f"{file}: {name} must be a list of tokens, got {values!r:.200}")
    return [_token(value, file, name) for value in values]


def _token(value: object, file: Path, name: str) -> Token:
    return value if isinstance(value, str) else _added(value, file, name)


def _added(value: object, file: Path, name: str) -> AddedToken:
    if not isinstance(value, dict) or not isinstance(value.get("content"), str):
        raise TokenizerError(f"{file}: {name} must be text or an object with content, got {value!r:.200}")
    flags = {key: flag for key, flag in value.items() if key not in ("content", "id", "__type")}
    try:
        return AddedToken(value["content"], **flags)
    except (TypeError, ValueError) as error:
        raise TokenizerError(f"{file}: {name} has a token that cannot be read, {value!r:.200}: {error}") from error


def _index(value: object, file: Path) -> int:
    if isinstance(value, bool) or not str(value).isdecimal():
        raise TokenizerError(f"{file}: the id of an added token must be a whole number, got {value!r:.200}")
    return int(str(value))
