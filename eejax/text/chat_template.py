"""Conversations to prompt text, as the Jinja template of a folder writes them. No jax here.

Templates are written for Transformers 5, so a template finds here what it finds there: the same environment, filters,
functions and variables.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from eejax.core import TokenizerError
from eejax.text.tokenizer_files import Message

REASONING = ("reasoning_content", "thinking", "reasoning")
"""Keys under which a message may hold its reasoning; templates read the first two."""


class ChatTemplate:
    """The templates of one folder, run in a sandbox: they come with the weights and are not trusted.

    Args:
        sources: Jinja text of each template by name. `tool_use` is taken when tools are given, else `default`.
        origin: the file that they come from, for messages.

    Raises:
        TokenizerError: a template is not valid Jinja.
    """

    def __init__(self, sources: Mapping[str, str], origin: Path) -> None:
        env = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, jinja2.ext.loopcontrols]
        )
        env.filters["tojson"] = _to_json
        env.globals["raise_exception"] = _raise_from_template
        env.globals["strftime_now"] = _now
        self._origin = origin
        self._templates: dict[str, jinja2.Template] = {}
        for name, source in sources.items():
            try:
                self._templates[name] = env.from_string(source)
            except (jinja2.TemplateError, RecursionError) as error:
                raise TokenizerError(f"{origin}: chat_template is not valid Jinja: {error}") from error

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool,
        special: Mapping[str, str],
        variables: Mapping[str, Any],
    ) -> str:
        """The prompt text of a conversation.

        Args:
            messages: mappings with `role` and, as a rule, `content`: text, or a list of parts. Other keys
                (`tool_calls`, `name`, ...) are there for the template; those that are None are left out.
            add_generation_prompt: end with the words that open an answer.
            special: special tokens by name (`bos_token`, ...).
            variables: more for the template, before all `tools` and `documents` (None unless given). They win over
                `special`.

        Raises:
            TokenizerError: there is no template, messages or variables are malformed, or the template refuses them.
        """
        if not self._templates:
            raise TokenizerError(f"{self._origin} has no chat_template; give the prompt as plain text")
        given = {"tools": None, "documents": None, **special, **variables}
        for name in ("tools", "documents"):
            entries = given[name]
            if entries is not None and not (_is_list(entries) and all(isinstance(one, Mapping) for one in entries)):
                raise TokenizerError(f"{name} must be a list of mappings, got {entries!r:.200}")
        conversation = _checked(messages)
        template = self._chosen(given["tools"] is not None)
        given = {name: _plain(value, name) for name, value in given.items()}
        try:
            return template.render(
                {**given, "messages": conversation, "add_generation_prompt": bool(add_generation_prompt)}
            )
        except Exception as error:  # a template is a program: it may divide by zero, or look up what is not there
            raise TokenizerError(f"{self._origin}: chat_template failed on these messages: {error}") from error

    def _chosen(self, with_tools: bool) -> jinja2.Template:
        for name in ("tool_use", "default") if with_tools else ("default",):
            if name in self._templates:
                return self._templates[name]
        raise TokenizerError(f"{self._origin} has chat templates {sorted(self._templates)} and none called 'default'")


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _checked(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as the template sees them: without what is None, and the reasoning under the names in use."""
    if not _is_list(messages) or not messages:
        raise TokenizerError(f"a conversation must be a list of messages, at least one, got {messages!r:.200}")
    found: list[dict[str, Any]] = []
    for number, message in enumerate(messages):
        said = isinstance(message, Mapping) and {key: value for key, value in message.items() if value is not None}
        if not said or "role" not in said or len(said) < 2:
            raise TokenizerError(f"message {number} must be a mapping with role and content, got {message!r:.200}")
        said = {key: _plain(value, f"message {number}") for key, value in said.items()}
        reasoning = next((said[key] for key in REASONING if key in said), None)
        if reasoning is not None:
            said = {"thinking": reasoning, **said, "reasoning_content": reasoning}
        found.append(said)
    return found


def _plain(value: Any, where: str) -> Any:
    """A copy made of JSON's types only: methods of other objects would be open to the template."""
    try:
        return json.loads(json.dumps(value, default=_as_dict))
    except (TypeError, ValueError, RecursionError) as error:
        raise TokenizerError(f"{where} must be made of text, numbers, lists and mappings: {error}") from error


def _as_dict(value: object) -> dict[Any, Any]:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} is none of them")


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %} ... {% endgeneration %}` marks an assistant's words for training; here it shows its content."""

    tags = {"generation"}  # noqa: RUF012 - Jinja wants a set

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter would escape `<`, `>` and `&` for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_from_template(message: str) -> None:
    raise jinja2.TemplateError(message)


def _now(form: str) -> str:
    return datetime.now().strftime(form)
