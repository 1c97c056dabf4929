"""Text to token ids and back: tokenizers by format, chat templates, incremental detokenization, files of prompts.

No jax. A tokenizer's ids are those that `tokenizer.json`, or sentencepiece, gives for the folder. `tokenizer.py` opens
a folder's tokenizer; the code of the format that it has, and what answering plain text does not need, is imported when
it is used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from eejax.text.detokenizer import Detokenizer
from eejax.text.tokenizer import Tokenizer, has_tokenizer, load_end_tokens, load_tokenizer, require_tokenizer
from eejax.text.tokenizer_files import CONFIG_FILE, MODEL_FILE, SPACE_MARK, Message

if TYPE_CHECKING:
    from eejax.text.chat import chat_prompt, prompt_ids
    from eejax.text.prompts import read_prompts, read_sourced_prompts
    from eejax.text.tokenizer_copy import copy_tokenizer

__all__ = [
    "CONFIG_FILE",
    "MODEL_FILE",
    "SPACE_MARK",
    "Detokenizer",
    "Message",
    "Tokenizer",
    "chat_prompt",
    "copy_tokenizer",
    "has_tokenizer",
    "load_end_tokens",
    "load_tokenizer",
    "prompt_ids",
    "read_prompts",
    "read_sourced_prompts",
    "require_tokenizer",
]

_MODULES = {
    "chat_prompt": "chat",
    "prompt_ids": "chat",
    "copy_tokenizer": "tokenizer_copy",
    "read_prompts": "prompts",
    "read_sourced_prompts": "prompts",
}
"""Where names are defined that answering plain text does not need."""


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
