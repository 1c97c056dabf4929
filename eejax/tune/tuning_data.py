"""Text for tuning exits: files to token ids, ids to rows of a batch. Nothing here imports jax."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eejax.core import ConfigError, InvalidRequestError, TokenizerError, require
from eejax.text import Tokenizer, chat_prompt

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz")
PAIRS = (("prompt", "response"), ("instruction", "output"))
FIELDS = "text; messages; prompt and response; or instruction, perhaps input, and output"

type Batch = dict[str, np.ndarray]
"""`tokens`, `targets` (the next token), `positions` and `segments` (number of the document within its row from 1, 0 for
padding), all `[B, T]` int32."""


def read_documents(file: str | Path, tokenizer: Tokenizer) -> list[np.ndarray]:
    """Token ids of every document in `file` that holds at least one token to predict.

    A `.txt` file holds documents with blank lines between them. Each line of a `.jsonl` or `.jsonl.gz` file is an
    object with `text`; with `prompt` and `response`; with `instruction`, perhaps `input`, and `output`; or with
    `messages`. Pairs and messages are written by the chat template where there is one, which also says how they begin
    and end; else their parts are joined by blank lines. Any other text ends with EOS, where that exists.

    Raises:
        ConfigError: the file is missing, empty or of another kind, a line is no such object, or no document is usable;
            the message names the file and the line.
    """
    found = []
    for where, entry in _entries(Path(file)):
        try:
            ids = _ids(entry, tokenizer, where)
        except (TokenizerError, InvalidRequestError) as error:
            raise ConfigError(f"{where}: {error}") from error
        if len(ids) > 1:
            found.append(np.asarray(ids, np.int32))
    require(bool(found), f"{file} holds no usable document: a document needs at least two tokens")
    return found


def _entries(file: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Objects of a `.jsonl` file, or paragraphs of a `.txt` file as such objects, each with its place in the file."""
    name = file.name.lower()
    require(name.endswith(SUFFIXES), f"text must be a file in {', '.join(SUFFIXES)}, got {file}")
    try:
        with gzip.open(file, "rb") if name.endswith(".gz") else file.open("rb") as stream:
            if not stream.peek(1):
                raise ConfigError(f"{file} is empty")
            if name.endswith(".txt"):
                text = stream.read().decode("utf-8-sig").replace("\r\n", "\n")
                yield from ((str(file), {"text": part}) for part in re.split(r"\n(?:[ \t]*\n)+", text))
                return
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    yield f"{file}, line {number}", _object(line, f"{file}, line {number}")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is not UTF-8: {error}") from error
    except (EOFError, zlib.error) as error:
        raise ConfigError(f"{file} is a damaged gzip file: {error}") from error
    except OSError as error:  # BadGzipFile is one
        raise ConfigError(f"cannot read {file}: {error.strerror or error}") from error


def _object(line: bytes, where: str) -> dict[str, Any]:
    try:
        entry = json.loads(line.decode("utf-8-sig"))
    except ValueError as error:  # malformed JSON and bytes that are not UTF-8
        raise ConfigError(f"{where} is not valid JSON: {error}") from error
    require(isinstance(entry, dict), f"{where} must be a JSON object, got {type(entry).__name__}")
    return entry


def _ids(entry: dict[str, Any], tokenizer: Tokenizer, where: str) -> list[int]:
    """Token ids of the document that `entry` describes; none of an empty one."""
    if "text" in entry:
        text = _string(entry, "text", where)
    else:
        messages = _conversation(entry, where)
        if tokenizer.has_chat_template:
            return chat_prompt(tokenizer, messages, add_generation_prompt=False)[1]
        text = "\n\n".join(_string(message, "content", where) for message in messages)
    if not text.strip():
        return []
    ids = tokenizer.encode(text)
    if tokenizer.eos_id is not None and ids[-1:] != [tokenizer.eos_id]:
        ids.append(tokenizer.eos_id)
    return ids


def _conversation(entry: dict[str, Any], where: str) -> list[dict[str, Any]]:
    if "messages" in entry:
        messages = entry["messages"]
        good = isinstance(messages, list) and all(
            isinstance(m, dict) and {"role", "content"} <= m.keys() for m in messages
        )
        require(good, f"{where}: messages must be a list of objects with role and content, got {messages!r:.80}")
        return messages
    pair = next((pair for pair in PAIRS if set(pair) <= entry.keys()), None)
    if pair is None:
        raise ConfigError(f"{where} must have {FIELDS}; it has {', '.join(entry) or 'no field'}")
    asked = [_string(entry, pair[0], where)]
    if pair[0] == "instruction" and entry.get("input") is not None:
        asked.append(_string(entry, "input", where))
    return [
        {"role": "user", "content": "\n\n".join(part for part in asked if part)},
        {"role": "assistant", "content": _string(entry, pair[1], where)},
    ]


def _string(entry: dict[str, Any], name: str, where: str) -> str:
    value = entry[name]
    require(isinstance(value, str), f"{where}: {name} must be a string, got {value!r:.80}")
    return value


def text_bytes(documents: Iterable[np.ndarray], tokenizer: Tokenizer) -> int:
    """UTF-8 bytes of the text that is predicted: of all tokens but each document's first, special ones left out."""
    return sum(len(tokenizer.decode(ids[1:].tolist()).encode("utf-8", "replace")) for ids in documents)


def hold_out(documents: Sequence[np.ndarray], share: float, seed: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Split documents at random: those to train on, and about `share` of them, at least one, to evaluate on.

    Raises:
        ConfigError: there are fewer than two documents.
    """
    require(
        len(documents) > 1,
        f"the text holds {len(documents)} document, and holding some out for evaluation takes two; "
        "give more text, or another file to evaluate on",
    )
    order = np.random.default_rng([seed, 0]).permutation(len(documents)).tolist()
    count = min(max(1, round(share * len(documents))), len(documents) - 1)
    return [documents[i] for i in order[count:]], [documents[i] for i in order[:count]]


def shuffled_forever(documents: Sequence[np.ndarray], seed: int) -> Iterator[np.ndarray]:
    """All documents in random order, again and again, each time in another order."""
    rng = np.random.default_rng([seed, 1])
    while True:
        for i in rng.permutation(len(documents)).tolist():
            yield documents[i]


def pack(documents: Iterable[np.ndarray], rows: int, length: int) -> Iterator[Batch]:
    """Batches of `rows` rows of `length` tokens, filled with documents in the order in which they come.

    A document that does not fit in what is left of a row begins the next one. One longer than a row is cut into pieces,
    each of which is predicted without the text before it. The last batch is padded.
    """

    def blank() -> Batch:
        return {name: np.zeros((rows, length), np.int32) for name in ("tokens", "targets", "positions", "segments")}

    batch, row, used, segment = blank(), 0, 0, 0
    for ids in documents:
        for at in range(0, len(ids) - 1, length):
            piece = ids[at : at + length + 1]
            size = len(piece) - 1
            if size > length - used:
                row, used, segment = row + 1, 0, 0
            if row == rows:
                yield batch
                batch, row = blank(), 0
            segment += 1
            place = (row, slice(used, used + size))
            batch["tokens"][place], batch["targets"][place] = piece[:-1], piece[1:]
            batch["positions"][place], batch["segments"][place] = np.arange(size), segment
            used += size
    if used or row:
        yield batch
