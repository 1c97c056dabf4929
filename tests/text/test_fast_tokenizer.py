"""Tokenizers of Hugging Face folders: equal to Transformers', and clear about files that cannot be used."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from sentencepiece import sentencepiece_model_pb2

from eejax.core.errors import TokenizerError
from eejax.text.fast_tokenizer import FastTokenizer
from eejax.text.huggingface_tokenizer import tokenizer_class
from eejax.text.sentencepiece_tokenizer import SentencePieceTokenizer
from eejax.text.tokenizer import has_tokenizer, load_end_tokens, load_tokenizer
from eejax.text.tokenizer_copy import copy_tokenizer
from tests.oracle_env import REPOSITORY, oracle_python
from tests.tokenizer_cases import FOLDERS, NAMES, WITH_TEMPLATE, chat_differences, text_differences


@pytest.fixture
def broken(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of the tokenizer that the test names, to damage."""
    return Path(shutil.copytree(FOLDERS / request.param, tmp_path / "broken"))


def rewrite(file: Path, **changes: object) -> None:
    """Change entries of a JSON object; `...` removes one."""
    value = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    value |= changes
    file.write_text(json.dumps({key: one for key, one in value.items() if one is not ...}), encoding="utf-8")


# --------------------------------------------------------------------------------------------- equal to Transformers


@pytest.mark.parametrize("name", NAMES)
def test_a_thousand_strings_as_transformers_has_them(name: str) -> None:
    count, differences = text_differences(FOLDERS / name)
    assert differences == []
    assert count == 1000 + 100  # strings, and lists of any ids


@pytest.mark.parametrize("seed", [1])
def test_tokenizers_and_strings_never_seen_before(seed: int, tmp_path: Path) -> None:
    python = oracle_python()
    if python is None:
        pytest.skip("needs Transformers: `make oracle` makes an environment that has it")
    script = REPOSITORY / "tests" / "oracle" / "make_tokenizers.py"
    subprocess.run([python, "-B", script, "--out", tmp_path, "--seed", str(seed)], check=True, capture_output=True)
    folders = [folder for folder in tmp_path.iterdir() if folder.is_dir()]
    assert sorted(folder.name for folder in folders) == NAMES
    for folder in folders:
        assert text_differences(folder)[1] == []
        assert chat_differences(folder)[1] == []
    assert (folders[0] / "expected.jsonl.gz").read_bytes() != (
        FOLDERS / folders[0].name / "expected.jsonl.gz"
    ).read_bytes()


def test_what_a_tokenizer_says_of_itself() -> None:
    llama3, qwen2, bare = (load_tokenizer(FOLDERS / name) for name in ("llama3", "qwen2", "llama2-bare"))
    assert all(isinstance(one, FastTokenizer) for one in (llama3, qwen2, bare))
    assert (llama3.vocab_size, llama3.bos_id, llama3.eos_id) == (684, 676, 681)
    assert llama3.special_ids == frozenset(range(676, 684))
    assert (qwen2.bos_id, qwen2.eos_id) == (None, 678)
    assert qwen2.special_ids == {676, 677, 678}  # <think> and its like are added tokens, but text
    assert (bare.bos_id, bare.eos_id, bare.special_ids) == (1, 2, {0, 1, 2})
    for name in NAMES:
        assert load_tokenizer(FOLDERS / name).has_chat_template == (name in WITH_TEMPLATE)


def test_ids_that_a_model_has_beyond_its_tokenizer_stand_for_no_text() -> None:
    for name in NAMES:
        tokenizer = load_tokenizer(FOLDERS / name)
        ids = tokenizer.encode("some words", add_bos=False)
        beyond = [tokenizer.vocab_size, tokenizer.vocab_size + 7, 2**40]
        assert tokenizer.decode([*ids, *beyond]) == tokenizer.decode(ids)
        assert tokenizer.decode(beyond, skip_special=False) == ""
        with pytest.raises(TokenizerError, match="token id -1 is negative"):
            tokenizer.decode([3, -1])


def test_text_that_cannot_be_encoded() -> None:
    for name in ("llama3", "llama2-bare"):
        with pytest.raises(TokenizerError, match="UTF-8"):
            load_tokenizer(FOLDERS / name).encode("lone \ud800 surrogate")
        with pytest.raises(TokenizerError, match="must be a str, got bytes"):
            load_tokenizer(FOLDERS / name).encode(b"bytes")  # pyright: ignore[reportArgumentType]


# ------------------------------------------------------------------------------------------------------ which it is


@pytest.mark.parametrize(
    ("model_type", "named", "expected"),
    [
        (None, None, None),
        (None, "LlamaTokenizer", "LlamaTokenizer"),
        (None, "PreTrainedTokenizerFast", "TokenizersBackend"),
        ("llama", None, "TokenizersBackend"),
        ("llama", "LlamaTokenizerFast", "LlamaTokenizer"),
        ("llama", "GPT2Tokenizer", "GPT2Tokenizer"),
        ("llama", "CodeLlamaTokenizer", "TokenizersBackend"),
        ("mistral", "LlamaTokenizer", "TokenizersBackend"),
        ("qwen2", None, "Qwen2Tokenizer"),
        ("qwen2", "LlamaTokenizerFast", "Qwen2Tokenizer"),
        ("qwen3", None, "Qwen2Tokenizer"),
        ("qwen3", "Qwen2TokenizerFast", "Qwen2Tokenizer"),
        ("qwen3", "PreTrainedTokenizerFast", "TokenizersBackend"),
    ],
)
def test_the_class_that_transformers_takes(
    tmp_path: Path, model_type: str | None, named: str | None, expected: str | None
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({} if model_type is None else {"model_type": model_type}))
    config = {} if named is None else {"tokenizer_class": named}
    assert tokenizer_class(tmp_path, config) == expected
    if named is not None:  # the model's configuration may name it, too
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, "tokenizer_class": named}))
        assert tokenizer_class(tmp_path, {}) == expected


def test_llama_s_class_is_not_taken_for_bytes(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(FOLDERS / "llama3", tmp_path / "t"))
    rewrite(folder / "tokenizer_config.json", tokenizer_class="LlamaTokenizer")
    assert tokenizer_class(folder, {"tokenizer_class": "LlamaTokenizer"}) == "TokenizersBackend"
    text = "  two words\n"
    assert load_tokenizer(folder).encode(text) == load_tokenizer(FOLDERS / "llama3").encode(text)


def test_a_sentencepiece_model_that_no_configuration_claims_is_left_to_sentencepiece(tmp_path: Path) -> None:
    shutil.copy(FOLDERS / "llama2-bare" / "tokenizer.model", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    assert has_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert isinstance(tokenizer, SentencePieceTokenizer)
    assert tokenizer.decode(tokenizer.encode("as it was")) == "as it was"


def test_a_folder_without_tokenizer(tmp_path: Path) -> None:
    assert not has_tokenizer(tmp_path)
    with pytest.raises(TokenizerError, match=r"no tokenizer in .*neither tokenizer\.json nor tokenizer\.model"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_a_copy_is_the_same_without_the_model_s_configuration(name: str, tmp_path: Path) -> None:
    copy_tokenizer(FOLDERS / name, tmp_path)
    (tmp_path / "config.json").write_text('{"n_layers": 2}')
    one, other = load_tokenizer(FOLDERS / name), load_tokenizer(tmp_path)
    text = " <s>Two  words</s> [INST]\n<|im_start|>cat, é e\u0301 123 \u2581"
    ids = one.encode(text)
    assert other.encode(text) == ids
    assert (other.decode(ids), other.decode(ids, False)) == (one.decode(ids), one.decode(ids, False))
    assert (other.bos_id, other.eos_id, other.special_ids) == (one.bos_id, one.eos_id, one.special_ids)
    assert other.has_chat_template == one.has_chat_template
    assert load_end_tokens(tmp_path) == load_end_tokens(FOLDERS / name)


# -------------------------------------------------------------------------------------------------------- end tokens


@pytest.mark.parametrize(
    ("generation", "model", "expected"),
    [
        ({"eos_token_id": 5}, {"eos_token_id": 9}, {5}),
        ({"eos_token_id": [5, 7]}, {}, {5, 7}),
        ({"eos_token_id": None}, {"eos_token_id": [9]}, {9}),
        ({}, {"eos_token_id": 0}, {0}),
        (None, {"eos_token_id": 9}, {9}),
        (None, None, set()),
    ],
)
def test_where_end_tokens_come_from(
    tmp_path: Path, generation: dict | None, model: dict | None, expected: set[int]
) -> None:
    for name, value in (("generation_config.json", generation), ("config.json", model)):
        if value is not None:
            (tmp_path / name).write_text(json.dumps(value))
    assert load_end_tokens(tmp_path) == expected
    own = load_tokenizer(FOLDERS / "llama2-bare")
    assert load_end_tokens(tmp_path, own) == expected | {own.eos_id}
    other = tmp_path / "other"
    other.mkdir()
    copy_tokenizer(tmp_path, other)
    assert load_end_tokens(other) == expected


@pytest.mark.parametrize("value", [-1, 1.5, "</s>", True, [1, "2"], {"a": 1}])
def test_end_tokens_that_are_none(tmp_path: Path, value: object) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(TokenizerError) as caught:
        load_end_tokens(tmp_path)
    assert "generation_config.json: eos_token_id" in str(caught.value)
    assert repr(value) in str(caught.value)


# --------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("broken", ["llama3", "qwen2"], indirect=True)
@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("tokenizer.json", b"", "tokenizer.json is empty"),
        ("tokenizer.json", b"{", "tokenizer.json is not valid JSON"),
        ("tokenizer.json", b"\xff\xfe{}", "tokenizer.json is not UTF-8"),
        ("tokenizer.json", b"[" * 100_000, "tokenizer.json is not valid JSON"),
        ("tokenizer.json", b"[]", "tokenizer.json must hold a JSON object, got list"),
        ("tokenizer.json", b"{}", "tokenizer.json does not hold a usable tokenizer"),
        ("tokenizer.json", b'{"model": 3}', "tokenizer.json does not hold a usable tokenizer"),
        ("tokenizer.json", b'{"added_tokens": 3}', "tokenizer.json"),
        ("tokenizer.json", "half", "tokenizer.json is not valid JSON"),
        ("tokenizer_config.json", b"[1]", "tokenizer_config.json must hold a JSON object, got list"),
        ("tokenizer_config.json", b'{"tokenizer_class": 3}', "tokenizer_class must be of type str, got 3"),
        ("tokenizer_config.json", b'{"bos_token": 3}', "tokenizer_config.json: bos_token must be text or an object"),
        ("tokenizer_config.json", b'{"eos_token": {"id": 3}}', "tokenizer_config.json: eos_token must be text or"),
        ("tokenizer_config.json", b'{"eos_token": "<gone>"}', "tokenizer_config.json.* names eos_token '<gone>'"),
        ("tokenizer_config.json", b'{"bos_token": "<gone>"}', "tokenizer_config.json.* names bos_token '<gone>'"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": [1]}', "added_tokens_decoder must be of type dict"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"x": {"content": "a"}}}', "a whole number, got 'x'"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"1": "a"}}', None),
        (
            "tokenizer_config.json",
            b'{"added_tokens_decoder": {"1": {"content": "a", "lstrip": "y"}}}',
            "cannot be read",
        ),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"1": {"content": "\\ud800"}}}', "cannot be read"),
        (
            "tokenizer_config.json",
            b'{"extra_special_tokens": 7}',
            "extra_special_tokens must be a list of tokens, got 7",
        ),
        ("special_tokens_map.json", b"3", "special_tokens_map.json must hold a JSON object, got int"),
        ("special_tokens_map.json", b'{"eos_token": [1]}', "special_tokens_map.json: eos_token must be text"),
        ("added_tokens.json", b'{"a": "b"}', "added_tokens.json: the id of an added token must be .* got 'b'"),
    ],
)
def test_broken_files_are_named(broken: Path, name: str, content: bytes | str, said: str | None) -> None:
    if name in ("special_tokens_map.json", "added_tokens.json"):  # read only where the configuration lists no tokens
        rewrite(broken / "tokenizer_config.json", added_tokens_decoder=...)
    file = broken / name
    if isinstance(content, str):
        content = file.read_bytes()[: file.stat().st_size // 2]
    file.write_bytes(content)
    with pytest.raises(TokenizerError, match=said or "must be text or an object with content, got 'a'") as caught:
        load_tokenizer(broken)
    assert name in str(caught.value)


@pytest.mark.parametrize("broken", ["llama2-bare", "unigram"], indirect=True)
@pytest.mark.parametrize("content", [b"", b"\x00\x01 no model", b"\x0a", 0.3, 0.9, None])
def test_broken_sentencepiece_models_are_named(broken: Path, content: bytes | float | None) -> None:
    file = broken / "tokenizer.model"
    if content is None:  # cut off between two of its parts
        proto = sentencepiece_model_pb2.ModelProto.FromString(file.read_bytes())
        content = sentencepiece_model_pb2.ModelProto(pieces=proto.pieces).SerializeToString()
    elif isinstance(content, float):
        content = file.read_bytes()[: int(content * file.stat().st_size)]
    file.write_bytes(content)
    with pytest.raises(TokenizerError, match=r"tokenizer\.model (is empty|is not a sentencepiece model)"):
        load_tokenizer(broken)


@pytest.mark.parametrize("broken", ["llama3"], indirect=True)
def test_a_post_processor_that_names_unknown_tokens(broken: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The library panics at the first text, not when it reads the file."""
    file = broken / "tokenizer.json"
    value = json.loads(file.read_text(encoding="utf-8"))
    value["post_processor"]["processors"][1]["special_tokens"] = {}
    file.write_text(json.dumps(value))
    with pytest.raises(TokenizerError, match=r"tokenizer\.json does not hold a usable tokenizer"):
        load_tokenizer(broken)
    capfd.readouterr()  # what the panic says on stderr


@pytest.mark.parametrize("broken", ["llama3"], indirect=True)
def test_truncation_and_padding_of_the_file_do_not_apply(broken: Path) -> None:
    file = broken / "tokenizer.json"
    value = json.loads(file.read_text(encoding="utf-8"))
    truncation = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    padding = {"strategy": {"Fixed": 50}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0}
    value |= {"truncation": truncation, "padding": padding | {"pad_type_id": 0, "pad_token": "!"}}
    file.write_text(json.dumps(value))
    text = "more than three tokens, and fewer than fifty"
    assert load_tokenizer(broken).encode(text) == load_tokenizer(FOLDERS / "llama3").encode(text)


@pytest.mark.parametrize("broken", ["llama3"], indirect=True)
def test_special_tokens_may_be_split_if_the_folder_says_so(broken: Path) -> None:
    text = "<|eot_id|>"
    assert len(load_tokenizer(broken).encode(text, add_bos=False)) == 1
    rewrite(broken / "tokenizer_config.json", split_special_tokens=True)
    assert len(load_tokenizer(broken).encode(text, add_bos=False)) > 1


@pytest.mark.parametrize("broken", ["llama3"], indirect=True)
def test_clean_up_is_for_tokenizers_that_are_no_bpe_unless_asked_for(broken: Path) -> None:
    tokenizer = load_tokenizer(broken)
    ids = tokenizer.encode("so , it is n't .")
    assert tokenizer.decode(ids) == "so , it is n't ."
    file = broken / "tokenizer_config.json"
    rewrite(file, clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output=True)
    assert load_tokenizer(broken).decode(ids) == "so, it isn't."
    unigram = load_tokenizer(FOLDERS / "unigram")
    assert unigram.decode(unigram.encode("so , it is n't .")) == "so, it isn't."
