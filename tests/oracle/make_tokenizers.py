"""Small tokenizers, and what Transformers makes of them: the fixtures of test_fast_tokenizer.py and test_chat.py.

Runs in the oracle's environment (`make oracle`), not in the project's, and imports nothing of eejax. Below `--out`:

    strings.json.gz         texts of every kind, the same for all tokenizers
    conversations.json      messages and options for the chat templates, the same for all
    versions.json           what wrote all this
    NAME/                   a folder as it could come from Hugging Face, without weights
        expected.jsonl.gz   one line a string: [ids, ids with what is put around a text, text of the latter without and
                            with special tokens]; null for a text that is the string itself. Then lines of any ids, some
                            beyond the vocabulary: [null, ids, text without, text with special tokens]
        chats.jsonl.gz      one line a conversation: [text, ids], or null where the template refuses it

The same seed and versions give the same bytes.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import shutil
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ["TOKENIZERS_PARALLELISM"] = "false"

from conversations import CONVERSATIONS
from texts import corpus, strings
from tokenizer_folders import FOLDERS, write
from transformers import AutoTokenizer
from transformers.utils import logging

ANY_IDS = 100


def write_lines(file: Path, lines: Iterable[Any]) -> None:
    text = "".join(json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n" for line in lines)
    file.write_bytes(gzip.compress(text.encode(), 9, mtime=0))


def expected(tokenizer: Any, texts: list[str], seed: int) -> Iterable[list[Any]]:
    def line(text: str | None, ids: list[int] | None, whole: list[int]) -> list[Any]:
        decoded = [tokenizer.decode(whole, skip_special_tokens=skip) for skip in (True, False)]
        return [ids, whole, *(None if one == text else one for one in decoded)]

    for text in texts:
        yield line(text, tokenizer.encode(text, add_special_tokens=False), tokenizer.encode(text))
    rng = random.Random(f"ids {seed}")
    for _ in range(ANY_IDS):
        yield line(None, None, [rng.randrange(len(tokenizer) + 3) for _ in range(rng.randint(1, 20))])


def chat(tokenizer: Any, messages: list[dict], options: dict) -> list[Any] | None:
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, **options)
        return [text, tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **options)]
    except Exception:
        return None


def main() -> None:
    parser = argparse.ArgumentParser(description="Write small tokenizers and what Transformers makes of them.")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write to")
    parser.add_argument("--only", nargs="+", choices=FOLDERS, metavar="NAME", help="these tokenizers only")
    parser.add_argument("--seed", type=int, default=0, help="other text to train on, other strings")
    options = parser.parse_args()
    logging.set_verbosity_error()
    options.out.mkdir(parents=True, exist_ok=True)
    packages = ("transformers", "tokenizers", "sentencepiece", "jinja2")
    write(options.out / "versions.json", {name: version(name) for name in packages})
    write(options.out / "conversations.json", CONVERSATIONS)
    texts = strings(options.seed)
    write_lines(options.out / "strings.json.gz", [texts])
    lines = corpus(options.seed)
    for name in options.only or FOLDERS:
        folder = options.out / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        FOLDERS[name](folder, lines)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        write_lines(folder / "expected.jsonl.gz", expected(tokenizer, texts, options.seed))
        write_lines(folder / "chats.jsonl.gz", [chat(tokenizer, *one) for one in CONVERSATIONS])
        print(f"{name}: {type(tokenizer).__name__}, {len(tokenizer)} tokens", flush=True)


if __name__ == "__main__":
    main()
