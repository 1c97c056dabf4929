"""Text to token ids and back: tokenizers by format, chat templates, incremental detokenization, files of prompts.

No jax. A tokenizer's ids are those that `tokenizer.json`, or sentencepiece, gives for the folder.
"""

from __future__ import annotations

from eejax.text.detokenizer import Detokenizer
from eejax.text.prompts import read_prompts, read_sourced_prompts
from eejax.text.tokenizer import (
    CONFIG_FILE,
    MODEL_FILE,
    SPACE_MARK,
    Message,
    Tokenizer,
    chat_prompt,
    copy_tokenizer,
    has_tokenizer,
    load_end_tokens,
    load_tokenizer,
    require_tokenizer,
)

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
    "read_prompts",
    "read_sourced_prompts",
    "require_tokenizer",
]
