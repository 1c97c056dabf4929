"""Text of the demo model: which sets it may learn from, its tokenizer, and batches of packed examples."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sentencepiece

from eejax.text import CONFIG_FILE, MODEL_FILE, SPACE_MARK, Tokenizer

INSTRUCT = ("oasst1_en", "gsm8k", "simple_instructions", "tldr")
LM_TEXT = ("oasst1_en_messages",)
MEASURE_ONLY = ("dolly",)
"""Share-alike text: read for evaluation, never for weights that are shipped."""

USER, ASSISTANT = "<|user|>", "<|assistant|>"
PROMPT_WEIGHT = 0.25
"""The answer is what counts, but questions teach language too."""

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}<|user|>{{ message['content'] }}"
    "{% elif message['role'] == 'assistant' %}<|assistant|>{{ message['content'] }}{{ eos_token }}"
    "{% else %}{{ raise_exception('roles are user and assistant, not ' ~ message['role']) }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TOKENIZER_CONFIG = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "add_bos": True,
    "additional_special_tokens": [USER, ASSISTANT],
    "chat_template": CHAT_TEMPLATE,
}


def read_rows(file: Path) -> list[dict[str, str]]:
    """Rows of a gzipped JSON-lines file; none where the set has no such split."""
    if not file.exists():
        return []
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def question(row: dict[str, str]) -> str:
    """What the user says: the instruction and, where there is one, its input."""
    return row["instruction"] + ("\n\n" + row["input"] if row["input"] else "")


def train_tokenizer(data: Path, folder: Path, vocab_size: int) -> None:
    """Write `tokenizer.model`, trained on the sets that may be trained on, and `tokenizer_config.json` to `folder`."""
    texts = [text for name in INSTRUCT for row in read_rows(data / "instruct" / name / "train.jsonl.gz")
             for text in (question(row), row["output"])]  # fmt: skip
    for name in LM_TEXT:
        # Half of the messages: they would otherwise outweigh the instructions that the model is for.
        texts += [row["text"] for row in read_rows(data / "lm_text" / name / "train.jsonl.gz")[::2]]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        character_coverage=0.9995,
        max_sentence_length=20_000,
        user_defined_symbols=[USER, ASSISTANT, "\n", "\n\n", "\t"],
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        minloglevel=2,
    )
    (folder / MODEL_FILE).write_bytes(model.getvalue())
    (folder / CONFIG_FILE).write_text(json.dumps(TOKENIZER_CONFIG, indent=1) + "\n")


def bytes_per_token(folder: Path) -> np.ndarray:
    """UTF-8 bytes that each token of the tokenizer in `folder` stands for, `[V]` float32; 0 for special tokens."""
    sp = sentencepiece.SentencePieceProcessor(model_file=str(folder / MODEL_FILE))
    special = {USER, ASSISTANT}

    def size(i: int) -> int:
        piece = sp.id_to_piece(i)
        if sp.is_byte(i):
            return 1
        return (
            0
            if sp.is_control(i) or sp.is_unknown(i) or piece in special
            else len(piece.replace(SPACE_MARK, " ").encode())
        )

    return np.asarray([size(i) for i in range(sp.vocab_size())], np.float32)


@dataclass(frozen=True)
class Documents:
    """Tokenised texts of one set and split, end to end.

    Attributes:
        ids: `[N]` token ids; each document begins with BOS and ends with EOS.
        prompt: `[N]` bool: the token belongs to the question.
        starts: `[n + 1]` where each document begins, and the end of the last.
    """

    ids: np.ndarray
    prompt: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.starts) - 1


def joined(texts: Iterable[tuple[Sequence[int], Sequence[int]]]) -> Documents:
    """Documents from pairs of question and answer, both token ids."""
    ids: list[int] = []
    prompt: list[bool] = []
    starts = [0]
    for asked, answer in texts:
        ids += [*asked, *answer]
        prompt += [True] * len(asked) + [False] * len(answer)
        starts.append(len(ids))
    return Documents(np.asarray(ids, np.uint16), np.asarray(prompt, bool), np.asarray(starts, np.int64))


def tokenise(rows: list[dict[str, str]], tokenizer: Tokenizer) -> Documents:
    """Documents of instruct rows (as the chat template writes them) or of plain-text rows."""
    end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]

    def parts(row: dict[str, str]) -> tuple[list[int], list[int]]:
        if "instruction" not in row:
            return [], tokenizer.encode(row["text"]) + end
        text = tokenizer.apply_chat_template([{"role": "user", "content": question(row)}])
        return tokenizer.encode(text), tokenizer.encode(row["output"], add_bos=False) + end

    return joined(map(parts, rows))


def kept(cache: Path, name: str, make: Callable[[], Documents]) -> Documents:
    """What `make` returned when it was first called for `name`, kept as `.npy` in `cache`."""
    files = [cache / f"{name}-{part}.npy" for part in ("ids", "prompt", "starts")]
    if not all(file.exists() for file in files):
        documents = make()
        cache.mkdir(parents=True, exist_ok=True)
        for file, array in zip(files, (documents.ids, documents.prompt, documents.starts), strict=True):
            np.save(file, array)
    return Documents(*(np.load(file) for file in files))


def load_documents(
    data: Path, cache: Path, tokenizer_file: Path, tokenizer: Tokenizer, name: str, split: str
) -> Documents:
    """Documents of one set, tokenised once per tokenizer and kept in `cache`."""
    kind = "lm_text" if name in LM_TEXT else "instruct"
    if split == "train" and name not in INSTRUCT + LM_TEXT:
        raise ValueError(f"{name} may not be trained on")
    tag = hashlib.sha256(tokenizer_file.read_bytes()).hexdigest()[:12]
    file = data / kind / name / f"{split}.jsonl.gz"
    return kept(cache, f"{name}-{split}-{tag}", lambda: tokenise(read_rows(file), tokenizer))


def pack(
    sets: list[Documents], order: list[tuple[int, int]], rows: int, length: int
) -> Iterator[dict[str, np.ndarray]]:
    """Batches of `rows` rows of `length` positions, filled with documents in `order` (set, document).

    A document that does not fit in the rest of a row goes on in the next one only if it is longer than a row; the last
    batch is padded. Every batch holds tokens, targets (the next token), segments (the document's number within its row,
    0 for padding) and weights (1 for answers, `PROMPT_WEIGHT` for questions, 0 for padding), all `[rows, length]`.
    """

    def blank() -> dict[str, np.ndarray]:
        kinds = {"tokens": np.int32, "targets": np.int32, "segments": np.int32, "weights": np.float32}
        return {name: np.zeros((rows, length), kind) for name, kind in kinds.items()}

    batch, row, used, segment = blank(), 0, 0, 0
    for which, number in order:
        documents = sets[which]
        at, end = documents.starts[number], documents.starts[number + 1]
        while at < end - 1:
            size = min(end - 1 - at, length)
            if size > length - used:
                row, used, segment = row + 1, 0, 0
            if row == rows:
                yield batch
                batch, row = blank(), 0
            segment += 1
            place = (row, slice(used, used + size))
            batch["tokens"][place] = documents.ids[at : at + size]
            batch["targets"][place] = documents.ids[at + 1 : at + size + 1]
            batch["weights"][place] = np.where(documents.prompt[at + 1 : at + size + 1], PROMPT_WEIGHT, 1.0)
            batch["segments"][place] = segment
            used, at = used + size, at + size
    if used or row:
        yield batch


class TrainingData:
    """An endless, seeded, resumable stream of batches. A round is every instruct example and part of the plain text."""

    def __init__(
        self, instruct: list[Documents], lm_text: list[Documents], rows: int, length: int, lm_share: float, seed: int
    ) -> None:
        self._sets, self._first_lm = [*instruct, *lm_text], len(instruct)
        self._shape, self._lm_share, self._seed = (rows, length), lm_share, seed

    def _order(self, round_number: int) -> list[tuple[int, int]]:
        rng = np.random.default_rng([self._seed, round_number])
        order: list[tuple[int, int]] = []
        for which, documents in enumerate(self._sets):
            chosen = np.arange(len(documents))
            if which >= self._first_lm:
                # Walk through one fixed shuffle, so that rounds share no text until all of it has been seen.
                count = round(len(documents) * self._lm_share)
                chosen = np.random.default_rng([self._seed, which]).permutation(len(documents))
                chosen = np.take(chosen, np.arange(round_number * count, (round_number + 1) * count), mode="wrap")
            order += [(which, int(i)) for i in chosen]
        rng.shuffle(order)
        return order

    def batches(self, position: tuple[int, int]) -> Iterator[tuple[tuple[int, int], dict[str, np.ndarray]]]:
        """Batches from `position` (round, batch) on, each with the position of the one that follows it."""
        round_number, skip = position
        while True:
            for index, batch in enumerate(pack(self._sets, self._order(round_number), *self._shape)):
                if index >= skip:
                    yield (round_number, index + 1), batch
            round_number, skip = round_number + 1, 0
