"""Token ids to text as they come, up to the first stop string. No jax here."""

from __future__ import annotations

from typing import Protocol

REPLACEMENT = "\ufffd"
"""What tokenizers show for bytes that are not UTF-8, and for the bytes of an incomplete character."""

MAX_UNDECIDED = 3
"""Bytes of a UTF-8 character that may precede its last one: as many replacement characters are shown."""

CLEANING = " 'nvr"
"""What may still change at the end of a text that is cleaned up: replacements such as that of " n't" begin so."""

WINDOW = 32
"""Tokens that are decoded again for the new ones: normally at most this many."""


class Decoder(Protocol):
    """The half of a tokenizer that is needed here.

    Attributes:
        cleans_up: `decode` takes out spaces before punctuation (`clean_up_tokenization_spaces` of Hugging Face).
    """

    cleans_up: bool

    def decode(self, ids: list[int], skip_special: bool = True) -> str:
        """Text of these tokens, without the special ones."""
        ...


class Detokenizer:
    """Streams the text of one answer.

    The pieces that `append` and `finish` return, joined, are `tokenizer.decode(all ids)` up to the first stop
    string: the one completed first, and of those completed by the same character the longest. Text once returned
    is never withdrawn: a character whose bytes are incomplete is held back, and so is what may begin a stop string.

    How it works. A token's text depends on those before it only in two ways: leading whitespace may be stripped
    while the text is empty, and bytes of one character may be spread over several tokens. So it is enough to decode a
    window of the latest tokens, if the window begins with some text whose beginning does not matter. What is not
    decided yet shows as up to three replacement characters at its end. Where texts are cleaned up, a space may also
    vanish because of what follows, so letters that can begin such a place are held back as well. (One decoder does not
    behave so: the `ByteFallback` of Hugging Face replaces a whole run of byte tokens when one of them is
    invalid. After invalid bytes the text keeps what had been shown; so it does where the very first token is a space
    spelled as a byte.)

    Attributes:
        stopped: the stop string that was completed, None while there is none. Tokens after it change nothing.
        num_tokens: tokens taken, the one that completed `stopped` being the last.
    """

    def __init__(self, tokenizer: Decoder, stop: tuple[str, ...] = ()) -> None:
        self.stopped: str | None = None
        self.num_tokens = 0
        self._tokenizer = tokenizer
        self._cleaning = CLEANING if tokenizer.cleans_up else ""
        self._stop = stop
        self._longest_stop = max(map(len, stop), default=0)
        self._shown: list[str] = []
        self._held = ""  # decided, but it may begin a stop string
        self._done = False
        self._window: list[int] = []
        self._text = ""  # of the window
        self._taken = ""  # its beginning, which has been passed on
        self._settled: list[int] = []  # lengths of the window at which nothing was undecided
        self._silent: list[int] = []  # the latest tokens as far as they did not change the text
        self._limit = WINDOW

    @property
    def text(self) -> str:
        """All text returned so far."""
        self._shown = ["".join(self._shown)]
        return self._shown[0]

    def append(self, *token_ids: int) -> str:
        """Take some more tokens; returns the text that can now be shown, often empty or longer than their own.

        Several tokens cost as much as one, unless a stop string or a broken character is among them.
        """
        if self._done or not token_ids:
            return ""
        text = self._tokenizer.decode([*self._window, *token_ids])
        if len(token_ids) > 1 and not self._is_plain(text):
            return "".join(self.append(token) for token in token_ids)
        self.num_tokens += len(token_ids)
        if text != self._text:
            self._silent = []
            self._window.extend(token_ids)
        else:
            # Endless special tokens must not fill the window. Bytes may leave the text unchanged too (a decoder
            # that shows one replacement character for three bytes), but not three times the same.
            for token in token_ids:
                if self._silent.count(token) < 2:
                    self._silent.append(token)
                    self._window.append(token)
        self._text = text
        undecided = min(MAX_UNDECIDED, len(text) - len(text.rstrip(REPLACEMENT)))
        undecided = undecided or len(text) - len(text.rstrip(self._cleaning))
        if not undecided:
            self._settled.append(len(self._window))
        new = ""
        if not undecided or text.startswith(self._taken):
            end = max(len(self._taken), len(text) - undecided)  # three bytes may turn into one replacement character
            new, self._taken = text[len(self._taken) : end], text[:end]
            if len(self._window) >= self._limit:
                self._slide()
        return self._show(new)

    def finish(self) -> str:
        """After the last token: returns what was held back. It may complete a stop string, see `stopped`."""
        if self._done:
            return ""
        shown = self._show(self._text[len(self._taken) :])
        if self.stopped is None:
            self._shown.append(self._held)
            shown += self._held
        self._done = True
        return shown

    def _is_plain(self, text: str) -> bool:
        """Whether the window's text may become this one at once: neither broken characters nor stop strings are new."""
        new = text[len(self._taken) :]
        if not text.startswith(self._taken) or REPLACEMENT in new:
            return False
        return not any(stop in self._held + new for stop in self._stop)

    def _slide(self) -> None:
        """Drop about the older half of the window, if what is left still tells what follows."""
        half = len(self._window) // 2
        start = max((length for length in self._settled if length <= half), default=half)
        text = self._tokenizer.decode(self._window[start:])
        taken = len(text) - (len(self._text) - len(self._taken))
        # The text may be wrong where it begins: whitespace stripped, bytes of a half character shown one by one, at
        # most three. After them it is right, whatever follows. (Cleaning up may differ as far as the first letter that
        # cannot begin a replacement, and what was taken ends with such a one.)
        if taken > MAX_UNDECIDED:
            del self._window[:start]
            self._settled = [length - start for length in self._settled if length > start]
            self._text, self._taken = text, text[:taken]
        self._limit = max(WINDOW, 2 * len(self._window))

    def _show(self, new: str) -> str:
        """Pass on decided text as far as no stop string is in it, nor begins at its end."""
        text = self._held + new  # no stop string begins further left: that part has been ruled out
        found = [(at + len(stop), at, stop) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            _, end, self.stopped = min(found)
            self._done = True
        else:
            end = self._first_possible_stop(text)
        shown, self._held = text[:end], text[end:]
        self._shown.append(shown)
        return shown

    def _first_possible_stop(self, text: str) -> int:
        """Where the longest end of `text` that begins a stop string starts; its length if there is none."""
        for start in range(max(0, len(text) - self._longest_stop + 1), len(text)):
            if any(stop.startswith(text[start:]) for stop in self._stop):
                return start
        return len(text)
