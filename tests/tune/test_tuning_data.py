"""Text for tuning exits: what each kind of file says, how it is packed, and one clear error for every bad file."""

from __future__ import annotations

import gzip
import itertools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eejax.core.errors import ConfigError, TokenizerError
from eejax.text.tokenizer_files import Message
from eejax.tune.tuning_data import hold_out, pack, read_documents, shuffled_forever, text_bytes

BOS, EOS = 1, 2


class Letters:
    """A tokenizer that anybody can read: one id for each character, its code point."""

    vocab_size, bos_id, eos_id, cleans_up = 0x110000, BOS, EOS, False
    special_ids = frozenset({BOS, EOS})

    def __init__(self, has_chat_template: bool = False, adds_eos: bool = False) -> None:
        self.has_chat_template, self._adds_eos = has_chat_template, adds_eos

    def encode(self, text: str, add_bos: bool = True) -> list[int]:
        ids = [ord(letter) for letter in text]
        return [BOS, *ids, *([EOS] if self._adds_eos else [])] if add_bos else ids

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        return "".join(chr(i) for i in ids if i not in self.special_ids)

    def apply_chat_template(
        self, messages: Sequence[Message], add_generation_prompt: bool = True, **variables: object
    ) -> str:
        if any(message["role"] not in ("user", "assistant") for message in messages):
            raise TokenizerError("roles are user and assistant")
        return "".join(f"<{m['role'][0]}>{m['content']}" for m in messages) + "<a>" * add_generation_prompt


def written(folder: Path, name: str, content: str | bytes | list) -> Path:
    file = folder / name
    if isinstance(content, list):
        content = "".join(json.dumps(line) + "\n" for line in content)
    data = content.encode() if isinstance(content, str) else content
    file.write_bytes(gzip.compress(data) if name.endswith(".gz") and isinstance(content, str) else data)
    return file


def read(folder: Path, name: str, content: str | bytes | list, **kind: bool) -> list[str]:
    """Documents as strings, with BOS and EOS as `^` and `$`."""
    found = read_documents(written(folder, name, content), Letters(**kind))
    assert all(ids.dtype == np.int32 for ids in found)
    return ["".join({BOS: "^", EOS: "$"}.get(i, chr(i)) for i in ids.tolist()) for ids in found]


@pytest.mark.parametrize(
    ("content", "documents"),
    [
        ("one line", ["^one line$"]),
        ("one\ntwo\n\nthree", ["^one\ntwo$", "^three$"]),
        ("one\r\ntwo\r\n\r\nthree", ["^one\ntwo$", "^three$"]),
        ("\n\n one\n \t\n\n\nthree\n\n \n", ["^ one$", "^three$"]),
        ("\ufeffbom\n\nü", ["^bom$", "^ü$"]),
    ],
)
def test_text_is_split_at_blank_lines(tmp_path: Path, content: str, documents: list[str]) -> None:
    assert [found.replace("\n$", "$") for found in read(tmp_path, "a.txt", content)] == documents


CONVERSATION = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}


@pytest.mark.parametrize(
    ("line", "plain", "templated"),
    [
        ({"text": "some text"}, "^some text$", "^some text$"),
        ({"source": 3, "text": "beside others"}, "^beside others$", "^beside others$"),
        ({"prompt": "q", "response": "a"}, "^q\n\na$", "<u>q<a>a"),
        ({"instruction": "do", "output": "a"}, "^do\n\na$", "<u>do<a>a"),
        ({"instruction": "do", "input": None, "output": "a"}, "^do\n\na$", "<u>do<a>a"),
        ({"instruction": "do", "input": "this", "output": "a"}, "^do\n\nthis\n\na$", "<u>do\n\nthis<a>a"),
        ({"instruction": "do", "input": "", "output": "a"}, "^do\n\na$", "<u>do<a>a"),
        (CONVERSATION, "^q\n\na$", "<u>q<a>a"),
    ],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_lines_are_read_whatever_they_are_called(
    tmp_path: Path, line: dict, plain: str, templated: str, name: str
) -> None:
    content = "\n" + json.dumps(line) + "\n \n" + json.dumps({"text": "more"})
    assert read(tmp_path, name, content) == [plain, "^more$"]
    assert read(tmp_path, name, content, has_chat_template=True) == [templated, "^more$"]


def test_a_tokenizer_that_ends_texts_itself_ends_them_once(tmp_path: Path) -> None:
    assert read(tmp_path, "a.jsonl", [{"text": "end"}], adds_eos=True) == ["^end$"]


def test_empty_documents_are_left_out(tmp_path: Path) -> None:
    assert read(tmp_path, "a.jsonl", [{"text": ""}, {"text": " \n"}, {"text": "x"}]) == ["^x$"]


TWO = json.dumps({"text": "good"}) + "\n"
BAD = {
    "missing": (None, "a.txt", ["cannot read", "a.txt", "No such file"]),
    "kind": ("text", "a.csv", ["a.csv", ".txt, .jsonl, .jsonl.gz"]),
    "empty": ("", "a.jsonl", ["a.jsonl is empty"]),
    "empty_gzip": ("", "a.jsonl.gz", ["a.jsonl.gz is empty"]),
    "no_json": (TWO + "{oops\n", "a.jsonl", ["a.jsonl, line 2", "not valid JSON"]),
    "cut_json": (TWO + '\n{"text": "x', "a.jsonl.gz", ["a.jsonl.gz, line 3", "not valid JSON"]),
    "bytes": (TWO.encode() + b'{"text": "\xff"}', "a.jsonl", ["a.jsonl, line 2", "not valid JSON"]),
    "text_bytes": (b"a\xffb", "a.txt", ["a.txt is not UTF-8"]),
    "no_object": ("[1]\n", "a.jsonl", ["a.jsonl, line 1", "JSON object", "list"]),
    "fields": ([{"txt": "x", "id": 1}], "a.jsonl", ["line 1", "text; messages; prompt and response", "txt, id"]),
    "no_fields": ([{}], "a.jsonl", ["line 1", "no field"]),
    "half_a_pair": ([{"prompt": "x"}], "a.jsonl", ["line 1", "prompt and response"]),
    "no_string": ([{"text": 7}], "a.jsonl", ["line 1", "text must be a string", "7"]),
    "no_answer": ([{"prompt": "x", "response": None}], "a.jsonl", ["line 1", "response must be a string", "None"]),
    "messages": ([{"messages": "hello"}], "a.jsonl", ["line 1", "messages must be a list", "hello"]),
    "message": ([{"messages": [{"role": "user"}]}], "a.jsonl", ["line 1", "role and content"]),
    "parts": ([{"messages": [{"role": "user", "content": []}]}], "a.jsonl", ["line 1", "content must be a string"]),
    "no_gzip": (TWO.encode(), "a.jsonl.gz", ["a.jsonl.gz", "gzip"]),
    "cut_gzip": (gzip.compress(TWO.encode() * 99)[:-12], "a.jsonl.gz", ["a.jsonl.gz", "damaged gzip"]),
    "nothing": ([{"text": " "}, {"text": ""}], "a.jsonl", ["a.jsonl", "no usable document"]),
    "blank": (" \n\n ", "a.txt", ["a.txt", "no usable document"]),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_named_with_the_line(tmp_path: Path, case: str) -> None:
    content, name, parts = BAD[case]
    file = tmp_path / name if content is None else written(tmp_path, name, content)
    with pytest.raises(ConfigError) as error:
        read_documents(file, Letters())
    for part in [str(tmp_path), *parts]:
        assert part in str(error.value)


def test_a_conversation_that_the_template_refuses_is_named(tmp_path: Path) -> None:
    file = written(tmp_path, "a.jsonl", [CONVERSATION, {"messages": [{"role": "tool", "content": "x"}]}])
    with pytest.raises(ConfigError, match=r"line 2: roles are user and assistant"):
        read_documents(file, Letters(has_chat_template=True))


def test_bytes_are_those_of_the_text_that_is_predicted(tmp_path: Path) -> None:
    documents = read_documents(written(tmp_path, "a.jsonl", [{"text": "aü"}, CONVERSATION]), Letters(True))
    # The first token of a document is never predicted: BOS of one, `<` of the other.
    assert text_bytes(documents, Letters()) == len("aü".encode()) + len("u>q<a>a")


def numbered(count: int) -> list[np.ndarray]:
    return [np.asarray([i, i], np.int32) for i in range(count)]


def firsts(documents: Iterable[np.ndarray]) -> list[int]:
    return [int(ids[0]) for ids in documents]


@pytest.mark.parametrize(("count", "share", "held"), [(100, 0.05, 5), (2, 0.01, 1), (3, 0.99, 2), (10, 0.26, 3)])
def test_documents_are_held_out_at_random(count: int, share: float, held: int) -> None:
    train, kept = hold_out(numbered(count), share, seed=1)
    assert len(kept) == held
    assert sorted(firsts(train) + firsts(kept)) == list(range(count))
    assert firsts(hold_out(numbered(count), share, seed=1)[1]) == firsts(kept)
    assert count < 100 or firsts(hold_out(numbered(count), share, seed=2)[1]) != firsts(kept)


def test_one_document_cannot_be_split() -> None:
    with pytest.raises(ConfigError, match="holds 1 document"):
        hold_out(numbered(1), 0.5, seed=0)


def test_documents_come_round_and_round_in_other_orders() -> None:
    found = firsts(itertools.islice(shuffled_forever(numbered(9), seed=3), 27))
    rounds = [tuple(found[i : i + 9]) for i in (0, 9, 18)]
    assert all(sorted(one) == list(range(9)) for one in rounds)
    assert len(set(rounds)) == 3
    assert found == firsts(itertools.islice(shuffled_forever(numbered(9), seed=3), 27))


@given(
    lengths=st.lists(st.integers(2, 23), max_size=12),
    rows=st.integers(1, 3),
    length=st.integers(1, 9),
)
def test_packing_keeps_every_prediction_and_mixes_no_documents(lengths: list[int], rows: int, length: int) -> None:
    documents = [np.arange(100 * i, 100 * i + n, dtype=np.int32) for i, n in enumerate(lengths, start=1)]
    seen = []
    for batch in pack(documents, rows, length):
        assert all(part.shape == (rows, length) and part.dtype == np.int32 for part in batch.values())
        for row in range(rows):
            one = {name: part[row] for name, part in batch.items()}
            for segment in range(1, one["segments"].max(initial=0) + 1):
                which = one["segments"] == segment
                tokens, targets = one["tokens"][which], one["targets"][which]
                assert one["positions"][which].tolist() == list(range(len(tokens)))
                assert len(set(tokens // 100)) == 1
                seen += list(zip(tokens.tolist(), targets.tolist(), strict=True))
            # Padding stands behind the text, and so no token of it is ever attended to.
            padding = np.flatnonzero(one["segments"] == 0)
            assert padding.tolist() == list(range(length - len(padding), length))
            assert not any(part[padding].any() for part in one.values())
    assert seen == [pair for ids in documents for pair in itertools.pairwise(ids.tolist())]
