"""Files of prompts. Nothing here imports jax."""

from __future__ import annotations

import gzip
import json
import zlib
from pathlib import Path

from eejax.core import ConfigError

JSON_SUFFIXES = (".jsonl", ".jsonl.gz")


def read_prompts(file: str | Path, count: int | None = None) -> list[str]:
    """The first `count` prompts of a file, all of them for None.

    In a `.jsonl` or `.jsonl.gz` file each line is an object with `prompt`, or with `instruction` and perhaps `input`;
    in any other file each line is a prompt. Blank lines are skipped.

    Raises:
        ConfigError: the file is unreadable, has too few prompts, or a line is no such object; the message names it.
    """
    return [prompt for prompt, _ in read_sourced_prompts(file, count)]


def read_sourced_prompts(file: str | Path, count: int | None = None) -> list[tuple[str, str]]:
    """`read_prompts` with each prompt's `source`: what its line names, else the name of the file without suffixes.

    Raises:
        ConfigError: as `read_prompts`.
    """
    file = Path(file)
    try:
        data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        lines = [line.decode("utf-8") for line in data.splitlines()]  # text would be split at U+2028 as well
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read prompts from {file}: {error}") from error
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    name = file.name.split(".")[0]
    if file.name.endswith(JSON_SUFFIXES):
        prompts = [_prompt(line, name, f"{file}, line {number}") for number, line in numbered]
    else:
        prompts = [(line, name) for _, line in numbered]
    needed = 1 if count is None else count
    if len(prompts) < needed:
        raise ConfigError(f"{file} holds {len(prompts)} prompts, {needed} are needed")
    return prompts[:count]


def _prompt(line: str, source: str, where: str) -> tuple[str, str]:
    try:
        entry = json.loads(line)
        parts = [entry["prompt"]] if "prompt" in entry else [entry["instruction"], entry.get("input", "")]
        return "\n\n".join(part for part in parts if part), str(entry.get("source", source))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f'{where}: expected an object with a "prompt", got {line[:80]!r}') from error
