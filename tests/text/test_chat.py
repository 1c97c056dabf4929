"""Chat templates: conversations written as Transformers writes them, in a sandbox, with clear refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import MappingProxyType

import pytest

from eejax.core.errors import TokenizerError
from eejax.text.chat_template import ChatTemplate
from eejax.text.tokenizer import load_tokenizer
from eejax.text.tokenizer_files import find_chat_templates
from tests.tokenizer_cases import FOLDERS, NAMES, WITH_TEMPLATE, chat_differences

ASK = [{"role": "user", "content": "Hi"}]


def render(source: str, messages: list | None = None, prompt: bool = False, special: dict | None = None, **more) -> str:
    template = ChatTemplate({"default": source}, Path("here.jinja"))
    return template.render(ASK if messages is None else messages, prompt, special or {}, more)


# --------------------------------------------------------------------------------------------- equal to Transformers


@pytest.mark.parametrize("name", WITH_TEMPLATE)
def test_conversations_as_transformers_writes_them(name: str) -> None:
    written, differences = chat_differences(FOLDERS / name)
    assert differences == []
    assert written >= {"unigram": 2}.get(name, 13)  # the others are refused, there as here


@pytest.mark.parametrize("name", sorted(set(NAMES) - set(WITH_TEMPLATE)))
def test_without_a_template_the_error_says_so(name: str) -> None:
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json has no chat_template"):
        load_tokenizer(FOLDERS / name).apply_chat_template(ASK)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ {'a<': 'é&'} | tojson }}", '{"a<": "é&"}'),
        ("{{ [1, {'b': 2}] | tojson(indent=1) }}", '[\n 1,\n {\n  "b": 2\n }\n]'),
        ("{{ {'b': 1, 'a': 2} | tojson(sort_keys=true, separators=(',', ':')) }}", '{"a":2,"b":1}'),
        ("{{ 'é' | tojson(ensure_ascii=true) }}", '"\\u00e9"'),
        ("{{ strftime_now('%Y') | length }}", "4"),
        ("  {% if true %}\n  x\n  {% endif %}\ny\n", "  x\ny"),
        (
            "{% for i in range(9) %}{% if i == 1 %}{% continue %}{% endif %}{% if i == 3 %}{% break %}{% endif %}"
            "{{ i }}{% endfor %}",
            "02",
        ),
        ("{% generation %}{% set x = 1 %}a{{ x }}{% endgeneration %}{{ x is defined }}", "a1False"),
        ("{%- generation -%}  a  {%- endgeneration -%}  b", "ab"),
        ("{{ tools is none }} {{ documents is none }} {{ add_generation_prompt }}", "True True False"),
        ("{{ nothing }}{{ messages[0].nothing }}.", "."),
        ("{% set n = namespace(a=1) %}{% for m in messages %}{% set n.a = 2 %}{% endfor %}{{ n.a }}", "2"),
        ("{{ '<&>' }}", "<&>"),
    ],
)
def test_what_a_template_finds(source: str, expected: str) -> None:
    assert render(source) == expected


def test_variables_win_over_special_tokens_and_not_over_messages() -> None:
    source = "{{ bos_token }}{{ eos_token }}{{ mood }}{{ messages | length }}{{ self is defined }}"
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    assert render(source, special=special, mood="!", eos_token="<e>") == "<s><e>!1True"
    assert render("{{ messages | length }}", messages=ASK * 2, **{"self": 3}) == "2"


def test_messages_as_templates_expect_them() -> None:
    """Keys that are None are not there; reasoning goes by both of its names; content may be a list of parts."""
    keys = "{% for m in messages %}{{ m.keys() | sort | join(',') }};{% endfor %}"
    assert render(keys, [{"role": "assistant", "content": None, "tool_calls": []}]) == "role,tool_calls;"
    both = "{{ messages[0].reasoning_content }}{{ messages[0].thinking }}"
    for name in ("reasoning_content", "thinking", "reasoning"):
        assert render(both, [{"role": "assistant", "content": "x", name: "hm"}]) == "hmhm"
    parts = [{"type": "text", "text": "a"}, {"type": "image"}]
    assert render("{{ messages[0].content[0].text }}", [{"role": "user", "content": parts}]) == "a"
    assert render("{{ messages[0].content }}", [MappingProxyType({"role": "user", "content": "a"})]) == "a"
    assert render("{{ messages[0].content }}", ({"role": "user", "content": "a"},)) == "a"


def test_the_caller_s_messages_stay_as_they_are() -> None:
    messages = [{"role": "user", "content": ["a"], "name": None}]
    render("{{ messages[0].content | length }}", messages)
    assert messages == [{"role": "user", "content": ["a"], "name": None}]


# ---------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update(a=1) }}",
        "{{ raise_exception.__globals__.keys() }}",
        "{{ '{0.__class__.__base__}'.format(1).x.y }}",
        "{% include 'other' %}",
        "{% import 'other' as other %}",
    ],
)
def test_templates_run_in_a_sandbox(source: str) -> None:
    with pytest.raises(TokenizerError, match=r"here\.jinja: chat_template failed on these messages"):
        render(source)


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('not so') }}",
        "{{ 1 / 0 }}",
        "{{ messages[0].nothing.more }}",
        "{{ 'a' + 1 }}",
        "{{ messages | no_such_thing }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{{ 'a'.encode('no such codec') }}",
    ],
)
def test_templates_that_fail(source: str) -> None:
    with pytest.raises(
        TokenizerError, match=r"here\.jinja: chat_template (failed on these messages|is not valid Jinja)"
    ):
        render(source)
    if "raise_exception" in source:
        with pytest.raises(TokenizerError, match="not so"):
            render(source)


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "at least one"),
        ("Hi", "must be a list of messages"),
        ({"role": "user", "content": "x"}, "must be a list of messages"),
        (["Hi"], "message 0 must be a mapping with role and content, got 'Hi'"),
        ([*ASK, {"role": "user"}], "message 1 must be a mapping with role and content"),
        ([{"content": "x"}], "message 0 must be a mapping with role and content"),
        ([{"role": "user", "content": object()}], "message 0 must be made of text, numbers, lists and mappings"),
        ([{"role": "user", "content": {1, 2}}], "message 0 must be made of .* set is none of them"),
    ],
)
def test_messages_that_are_none(messages: list, said: str) -> None:
    with pytest.raises(TokenizerError, match=said):
        render("x", messages)
    endless: list = []
    endless.append(endless)
    with pytest.raises(TokenizerError, match="message 0 must be made of"):
        render("x", [{"role": "user", "content": endless}])


@pytest.mark.parametrize("name", ["tools", "documents"])
def test_tools_and_documents_are_lists_of_mappings(name: str) -> None:
    assert render("{{ " + name + " | length }}", **{name: [{"a": 1}, {}]}) == "2"
    for wrong in ({"a": 1}, "text", [1], 3):
        with pytest.raises(TokenizerError, match=f"{name} must be a list of mappings"):
            render("x", **{name: wrong})
    with pytest.raises(TokenizerError, match=f"{name} must be made of"):
        render("x", **{name: [{"a": print}]})


# --------------------------------------------------------------------------------------------- where they come from


def load_chat_template(folder: Path, config: dict) -> ChatTemplate:
    return ChatTemplate(*find_chat_templates(folder, config))


def test_files_win_over_the_configuration(tmp_path: Path) -> None:
    config = {"chat_template": "config"}
    assert load_chat_template(tmp_path, config).render(ASK, False, {}, {}) == "config"
    (tmp_path / "chat_template.jinja").write_text("file é", encoding="utf-8")
    assert load_chat_template(tmp_path, config).render(ASK, False, {}, {}) == "file é"
    more = tmp_path / "additional_chat_templates"
    more.mkdir()
    (more / "tool_use.jinja").write_text("with {{ tools | length }}")
    template = load_chat_template(tmp_path, config)
    assert template.render(ASK, False, {}, {}) == "file é"
    assert template.render(ASK, False, {}, {"tools": [{}]}) == "with 1"


def test_templates_by_name() -> None:
    entries = [{"name": "default", "template": "one"}, {"name": "tool_use", "template": "two"}]
    for given in (entries, {"default": "one", "tool_use": "two"}):
        template = load_chat_template(Path("nowhere"), {"chat_template": given})
        assert template.render(ASK, False, {}, {}) == "one"
        assert template.render(ASK, False, {}, {"tools": []}) == "two"
    template = load_chat_template(
        Path("nowhere"), {"chat_template": [{"name": "b", "template": ""}, {"name": "a", "template": ""}]}
    )
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json has chat templates \['a', 'b'\] and none called"):
        template.render(ASK, False, {}, {})


@pytest.mark.parametrize("given", [None, "", [], {}])
def test_no_template(tmp_path: Path, given: object) -> None:
    template = load_chat_template(tmp_path, {"chat_template": given})
    with pytest.raises(TokenizerError, match="has no chat_template; give the prompt as plain text"):
        template.render(ASK, False, {}, {})


@pytest.mark.parametrize("given", [3, True, ["x"], [{"name": "a"}], [{"name": 1, "template": "x"}], {"a": 1}])
def test_templates_of_the_wrong_kind(tmp_path: Path, given: object) -> None:
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json: chat_template must be text or a list of"):
        load_chat_template(tmp_path, {"chat_template": given})


@pytest.mark.parametrize("source", ["{% if %}", "{{", "{% generation %}", "{% endif %}", "{{ " + "(" * 5000])
def test_templates_that_are_no_jinja(tmp_path: Path, source: str) -> None:
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json: chat_template is not valid Jinja"):
        load_chat_template(tmp_path, {"chat_template": source})
    (tmp_path / "chat_template.jinja").write_text(source)
    with pytest.raises(TokenizerError, match=r"chat_template\.jinja: chat_template is not valid Jinja"):
        load_chat_template(tmp_path, {})


@pytest.mark.parametrize(("content", "said"), [(b"", "is empty"), (b"\xff", "is not UTF-8")])
def test_template_files_that_cannot_be_read(tmp_path: Path, content: bytes, said: str) -> None:
    folder = Path(shutil.copytree(FOLDERS / "qwen2", tmp_path / "t"))
    (folder / "chat_template.jinja").write_bytes(content)
    with pytest.raises(TokenizerError, match=rf"chat_template\.jinja {said}"):
        load_tokenizer(folder)


def test_special_tokens_reach_the_template(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(FOLDERS / "added", tmp_path / "t"))
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    config["chat_template"] = (
        "{{ [bos_token, eos_token, unk_token, pad_token, mood_token] | join }}{{ cls_token is defined }}"
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_tokenizer(folder).apply_chat_template(ASK) == "<s></s><unk></s><mood>False"
