"""Tokenizers that `tests/oracle/make_tokenizers.py` wrote, and what Transformers makes of texts and conversations."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import sentencepiece

from eejax.core.errors import TokenizerError
from eejax.text.tokenizer import load_tokenizer

FOLDERS = Path(__file__).parent / "fixtures" / "tokenizers"
NAMES = sorted(folder.name for folder in FOLDERS.iterdir() if folder.is_dir())
WITH_TEMPLATE = ("added", "llama2-bare", "llama3", "mistral", "qwen2", "unigram")


def read_lines(file: Path) -> list:
    """The JSON values of a gzipped file, one a line."""
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def text_differences(folder: Path) -> tuple[int, list[tuple]]:
    """How many texts and lists of ids were compared, and what differs: kind, input, found, expected."""
    tokenizer = load_tokenizer(folder)
    [texts] = read_lines(folder.parent / "strings.json.gz")
    expected = read_lines(folder / "expected.jsonl.gz")
    differences = []
    for text, (ids, whole, skipped, kept) in zip(texts + [None] * len(expected), expected, strict=False):
        pairs = [
            ("decode", whole, tokenizer.decode(whole), text if skipped is None else skipped),
            ("decode with special", whole, tokenizer.decode(whole, False), text if kept is None else kept),
        ]
        if text is not None:
            pairs += [
                ("encode", text, tokenizer.encode(text, add_bos=False), ids),
                ("encode with special", text, tokenizer.encode(text), whole),
            ]
        differences += [pair for pair in pairs if pair[2] != pair[3]]
    return len(expected), differences


def chat_differences(folder: Path) -> tuple[int, list[tuple]]:
    """How many conversations the folder's template writes, and what differs: input, found, expected."""
    tokenizer = load_tokenizer(folder)
    conversations = json.loads((folder.parent / "conversations.json").read_text(encoding="utf-8"))
    written, differences = 0, []
    for (messages, options), expected in zip(conversations, read_lines(folder / "chats.jsonl.gz"), strict=True):
        prompt = options.pop("add_generation_prompt", False)
        try:
            text = tokenizer.apply_chat_template(messages, prompt, **options)
            found = [text, tokenizer.encode(text, add_bos=False)]
        except TokenizerError:
            found = None
        written += found is not None
        if found != expected:
            differences.append((messages, found, expected))
    return written, differences


def train_sentencepiece(sentences: Iterable[str], vocab_size: int, **options: Any) -> tuple[bytes, int]:
    """A small sentencepiece model with byte fallback, and how many ids it has."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        minloglevel=2,
        **options,
    )
    return model.getvalue(), sentencepiece.SentencePieceProcessor(model_proto=model.getvalue()).vocab_size()
