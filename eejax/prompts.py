"""Files of prompts. Nothing here imports jax."""

from __future__ import annotations

import json
from pathlib import Path

from eejax.errors import ConfigError


def read_prompts(file: str | Path, count: int | None = None) -> list[str]:
    """The first `count` prompts of a file, all of them for None.

    In a `.jsonl` file each line is an object with `prompt`, or with `instruction` and perhaps `input`; in any other
    file each line is a prompt. Blank lines are skipped.

    Raises:
        ConfigError: the file is unreadable, has too few prompts, or a line is no such object; the message names it.
    """
    file = Path(file)
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read prompts from {file}: {error}") from error
    numbered = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    if file.suffix == ".jsonl":
        prompts = [_prompt(line, f"{file}, line {number}") for number, line in numbered]
    else:
        prompts = [line for _, line in numbered]
    needed = 1 if count is None else count
    if len(prompts) < needed:
        raise ConfigError(f"{file} holds {len(prompts)} prompts, {needed} are needed")
    return prompts[:count]


def _prompt(line: str, where: str) -> str:
    try:
        entry = json.loads(line)
        parts = [entry["prompt"]] if "prompt" in entry else [entry["instruction"], entry.get("input", "")]
        return "\n\n".join(part for part in parts if part)
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f'{where}: expected an object with a "prompt", got {line[:80]!r}') from error
