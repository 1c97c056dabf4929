"""Conversations and single messages as prompts: what the chat template writes, in token ids. No jax here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from eejax.core import InvalidRequestError, TokenizerError
from eejax.text.tokenizer import Tokenizer
from eejax.text.tokenizer_files import Message


def chat_prompt(
    tokenizer: Tokenizer | None,
    messages: Sequence[Message],
    add_generation_prompt: bool = True,
    variables: Mapping[str, object] | None = None,
) -> tuple[str, list[int]]:
    """A conversation as its chat template writes it, and that text's token ids.

    No BOS is added, as in Transformers: a template spells it where the model wants it.

    Args:
        variables: more for the template, `tools` and `documents` for instance.

    Raises:
        TokenizerError: there is no tokenizer, or it has no template.
        InvalidRequestError: the template refuses this conversation.
    """
    if tokenizer is None:
        raise TokenizerError("this model has no tokenizer, so it cannot write a conversation; give token ids")
    if not tokenizer.has_chat_template:
        raise TokenizerError("this model has no chat template; give the prompt as plain text")
    more = dict(variables or {})
    taken = ("messages", "add_generation_prompt")
    wrong = [name for name in more if not isinstance(name, str) or name in taken]
    if wrong:
        raise InvalidRequestError(f"chat template variables must have names other than {', '.join(taken)}, got {wrong}")
    try:
        text = tokenizer.apply_chat_template(messages, add_generation_prompt, **more)
        return text, tokenizer.encode(text, add_bos=False)
    except TokenizerError as error:
        raise InvalidRequestError(str(error)) from error


def prompt_ids(tokenizer: Tokenizer | None, text: str) -> list[int]:
    """Token ids of `text` as the only message of a conversation, or as plain text where there is no chat template.

    Raises:
        TokenizerError: there is no tokenizer.
        InvalidRequestError: the template or the tokenizer refuses the text.
    """
    if tokenizer is None or tokenizer.has_chat_template:
        return chat_prompt(tokenizer, [{"role": "user", "content": text}])[1]
    try:
        return tokenizer.encode(text)
    except TokenizerError as error:
        raise InvalidRequestError(str(error)) from error
