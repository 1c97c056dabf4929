"""Copying a tokenizer from one model folder to another. No jax here."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from eejax.text.huggingface_tokenizer import tokenizer_class
from eejax.text.tokenizer import has_tokenizer, load_end_tokens
from eejax.text.tokenizer_files import (
    ADDED_FILE,
    CONFIG_FILE,
    FAST_FILE,
    GENERATION_FILE,
    MODEL_FILE,
    MORE_TEMPLATES,
    TEMPLATE_FILE,
    TOKEN_MAP_FILE,
    read_object,
)

COPIED = (FAST_FILE, MODEL_FILE, CONFIG_FILE, TOKEN_MAP_FILE, ADDED_FILE, TEMPLATE_FILE, GENERATION_FILE)


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
