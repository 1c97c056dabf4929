"""Tokenizers that the `tokenizers` library runs: those of Hugging Face folders. No jax here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import tokenizers

from eejax.text.tokenizer_files import Message, checked_text, known_ids

if TYPE_CHECKING:
    from eejax.text.chat_template import ChatTemplate

CLEANED = (
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)
"""What Transformers replaces, in this order, where a tokenizer asks for `clean_up_tokenization_spaces`."""


class FastTokenizer:
    """A tokenizer of the `tokenizers` library, with the names of its special tokens and a chat template.

    Its results are those of Transformers 5 for the same folder; `eejax.text.huggingface_tokenizer` puts it together.

    Args:
        backend: what splits and joins.
        named: special tokens by their names in Transformers (`bos_token`, ...).
        templates: Jinja text of the chat templates by name, and the file that they come from.
        cleans_up: `decode` takes out spaces before punctuation and in contractions.

    Attributes:
        vocab_size: number of ids; every id lies in `0..vocab_size-1`.
        bos_id, eos_id: ids that open a text and end an answer; None where the folder names none.
        special_ids: ids that have no text, left out by `decode`.
        has_chat_template: whether `apply_chat_template` can be used.
        cleans_up: see above.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        named: Mapping[str, str],
        templates: tuple[Mapping[str, str], Path],
        cleans_up: bool,
    ) -> None:
        self._backend = backend
        self._named = dict(named)
        self._templates = templates
        self.cleans_up = cleans_up
        self.vocab_size = 1 + max(backend.get_vocab(with_added_tokens=True).values(), default=-1)
        self.bos_id, self.eos_id = (
            backend.token_to_id(named[name]) if name in named else None for name in ("bos_token", "eos_token")
        )
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self.has_chat_template = bool(templates[0])

    def encode(self, text: str, add_bos: bool = True) -> list[int]:
        """Token ids of `text`; added tokens written out in it become their own ids.

        With `add_bos` come the tokens that the folder puts around a text: BOS as a rule, EOS for some, nothing for
        others. A BOS that `text` spells is then a second one, as in Transformers.

        Raises:
            TokenizerError: `text` is no string or holds lone surrogates, which UTF-8 cannot write.
        """
        return self._backend.encode(checked_text(text), add_special_tokens=add_bos).ids

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Text of `ids`; special ids are left out, or written as their names. Broken UTF-8 becomes U+FFFD.

        Ids that are no token have no text: models may have more rows than their tokenizer has tokens.

        Raises:
            TokenizerError: an id is negative.
        """
        text = self._backend.decode(known_ids(ids, self.vocab_size), skip_special_tokens=skip_special)
        if self.cleans_up:
            for spaced, clean in CLEANED:
                text = text.replace(spaced, clean)
        return text

    def apply_chat_template(
        self, messages: Sequence[Message], add_generation_prompt: bool = True, **variables: object
    ) -> str:
        """The conversation `[{"role": ..., "content": ...}, ...]` as one prompt.

        Raises:
            TokenizerError: there is no template, it is not valid Jinja, or it refuses the messages.
        """
        return self._template.render(messages, add_generation_prompt, self._named, variables)

    @cached_property
    def _template(self) -> ChatTemplate:
        from eejax.text.chat_template import ChatTemplate  # Jinja is imported for conversations only

        return ChatTemplate(*self._templates)
