"""The tokenizer of a checkpoint folder: round trips, special tokens, chat templates, and broken files."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import example, given
from hypothesis import strategies as st

from checkpoints.demo_data import TOKENIZER_CONFIG
from eejax.core.errors import TokenizerError
from eejax.text.sentencepiece_tokenizer import SentencePieceTokenizer
from eejax.text.tokenizer import Tokenizer, load_tokenizer
from eejax.text.tokenizer_files import CONFIG_FILE, MODEL_FILE

TEXTS = [
    "The cat sat on the mat.",
    "How many legs do 12 cats have?\n\nThey have 48 legs.",
    "for x in range(10):\n\tprint(x)",
]


def train(folder: Path) -> Path:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 20),
        model_writer=model,
        model_type="bpe",
        vocab_size=330,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        user_defined_symbols=["<|user|>", "<|assistant|>", "\n", "\n\n", "\t"],
        pad_id=-1,
        minloglevel=2,
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MODEL_FILE).write_bytes(model.getvalue())
    (folder / CONFIG_FILE).write_text(json.dumps(TOKENIZER_CONFIG))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)


def test_every_text_survives_the_round_trip(tokenizer: Tokenizer) -> None:
    @given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
    @example("")
    @example("  two  spaces  and\ttabs\t\n\n\n end ")
    @example("\u2581 sentencepiece's own mark for a space \u2581\u2581")
    @example("\r\n \x00 \ufeff \U0001f469\u200d\U0001f469 \u6f22\u5b57")
    def check(text: str) -> None:
        ids = tokenizer.encode(text)
        assert ids[0] == tokenizer.bos_id
        assert all(0 <= i < tokenizer.vocab_size for i in ids)
        assert tokenizer.decode(ids) == text

    check()


def test_digits_stand_alone(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode("4848", add_bos=False)) == 4


def test_special_tokens_written_out_become_their_ids(tokenizer: Tokenizer) -> None:
    assert isinstance(tokenizer, SentencePieceTokenizer)
    ids = tokenizer.encode("<|user|>cat</s><s><|assistant|>", add_bos=False)
    user, assistant = tokenizer.encode("<|user|><|assistant|>", add_bos=False)
    assert (user, assistant) == (3, 4)
    assert [i for i in ids if i in tokenizer.special_ids] == [user, tokenizer.eos_id, tokenizer.bos_id, assistant]
    assert {user, assistant, tokenizer.bos_id, tokenizer.eos_id} <= tokenizer.special_ids
    assert tokenizer.decode(ids) == "cat"
    assert tokenizer.decode(ids, skip_special=False) == "<|user|>cat</s><s><|assistant|>"


def test_bos_is_written_once(tokenizer: Tokenizer) -> None:
    once = tokenizer.encode("cat")
    assert tokenizer.encode("<s>cat") == once
    assert tokenizer.encode("cat", add_bos=False) == once[1:]


def test_a_special_token_inside_a_character_does_not_break_it(tokenizer: Tokenizer) -> None:
    first, *rest = tokenizer.encode("\u6f22", add_bos=False)[-3:]
    assert tokenizer.decode([first, tokenizer.bos_id or 0, *rest]) == "\u6f22"
    assert "\ufffd" in tokenizer.decode([first])


def test_chat_template(tokenizer: Tokenizer) -> None:
    talk = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Bye"},
    ]
    text = tokenizer.apply_chat_template(talk)
    assert text == "<s><|user|>Hi<|assistant|>Hello</s><|user|>Bye<|assistant|>"
    assert tokenizer.apply_chat_template(talk[:1], add_generation_prompt=False) == "<s><|user|>Hi"
    assert tokenizer.encode(text)[:2] == [tokenizer.bos_id, 3]


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([{"role": "wizard", "content": "x"}], "roles are user and assistant, not wizard"),
        ([{"role": "user"}], "message 0 must be a mapping with role and content"),
    ],
)
def test_chat_template_refuses(tokenizer: Tokenizer, messages: list, said: str) -> None:
    with pytest.raises(TokenizerError, match=said):
        tokenizer.apply_chat_template(messages)


def test_template_runs_in_a_sandbox(folder: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(folder, tmp_path / "t")
    source = "{{ messages.__class__.__base__.__subclasses__() }}"
    (broken / CONFIG_FILE).write_text(json.dumps({"chat_template": source}))
    with pytest.raises(TokenizerError, match="unsafe"):
        load_tokenizer(broken).apply_chat_template([{"role": "user", "content": "x"}])


def test_a_template_that_is_no_jinja_is_refused_when_it_is_used(folder: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(folder, tmp_path / "t")
    (broken / CONFIG_FILE).write_text(json.dumps({"chat_template": "{% if %}"}))
    tokenizer = load_tokenizer(broken)
    assert tokenizer.decode(tokenizer.encode("cat")) == "cat"
    for _ in range(2):
        with pytest.raises(TokenizerError, match=r"tokenizer_config\.json: chat_template is not valid Jinja"):
            tokenizer.apply_chat_template([{"role": "user", "content": "x"}])


def test_plain_text_needs_neither_jinja_nor_the_other_format(folder: Path) -> None:
    code = (
        "import sys; from eejax.text import load_tokenizer; load_tokenizer(sys.argv[1]).encode('cat');"
        "sys.exit(bool({'jinja2', 'tokenizers'} & sys.modules.keys()))"
    )
    assert subprocess.run([sys.executable, "-c", code, str(folder)], check=False).returncode == 0


def test_bad_input_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(TokenizerError, match="UTF-8"):
        tokenizer.encode("lone \ud800 surrogate")
    with pytest.raises(TokenizerError, match="must be a str, got bytes"):
        tokenizer.encode(b"bytes")  # pyright: ignore[reportArgumentType]
    with pytest.raises(TokenizerError, match="token id -1 is negative"):
        tokenizer.decode([-1])


def test_ids_beyond_the_vocabulary_stand_for_no_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("cat")
    assert tokenizer.decode([*ids[:2], tokenizer.vocab_size, *ids[2:], 2**40]) == "cat"


def test_without_template_the_error_says_so(folder: Path, tmp_path: Path) -> None:
    plain = shutil.copytree(folder, tmp_path / "t")
    (plain / CONFIG_FILE).write_text("{}")
    tokenizer = load_tokenizer(plain)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    with pytest.raises(TokenizerError, match="no chat_template"):
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}])


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (MODEL_FILE, None, "no tokenizer in .*: neither tokenizer.json nor tokenizer.model"),
        (MODEL_FILE, b"", "tokenizer.model is empty"),
        (MODEL_FILE, b"\x00\x01 no model", "tokenizer.model is not a sentencepiece model"),
        (MODEL_FILE, "half", "tokenizer.model is not a sentencepiece model"),
        (CONFIG_FILE, None, "cannot read .*tokenizer_config.json: No such file"),
        (CONFIG_FILE, b"{", "tokenizer_config.json is not valid JSON"),
        (CONFIG_FILE, b"\xff\xfe", "tokenizer_config.json is not UTF-8"),
        (CONFIG_FILE, b"[]", "tokenizer_config.json must hold a JSON object, got list"),
        (CONFIG_FILE, b'{"eos_token": "<gone>"}', "names '<gone>', which tokenizer.model does not have"),
        (CONFIG_FILE, b'{"add_bos": "yes"}', "add_bos must be of type bool, got 'yes'"),
        (CONFIG_FILE, b'{"chat_template": 3}', "chat_template must be text or a list"),
    ],
)
def test_broken_files_are_named(
    folder: Path, tmp_path: Path, name: str, content: bytes | str | None, said: str
) -> None:
    broken = shutil.copytree(folder, tmp_path / "t")
    file = broken / name
    if content is None:
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2] if isinstance(content, str) else content)
    with pytest.raises(TokenizerError, match=said):
        load_tokenizer(broken)
