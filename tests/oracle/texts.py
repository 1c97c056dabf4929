"""Texts for make_tokenizers.py, made up from a seed: what tokenizers are trained on, and what they are asked."""

from __future__ import annotations

import random
import unicodedata
from pathlib import Path


def _read_pools(file: Path) -> dict[str, list[str]]:
    """Lines `name: word word ...`; a name may have several."""
    found: dict[str, list[str]] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        name, _, words = line.partition(": ")
        found.setdefault(name, []).extend(words.split())
    return found


POOLS = _read_pools(Path(__file__).with_name("words.txt"))
WORDS, FOREIGN, SCRIPTS, EMOJI, MARKED = (POOLS[name] for name in ("words", "foreign", "scripts", "emoji", "marked"))
SPELLED = [*POOLS["spelled"], "late word", "<extra> word"]
"""Special and added tokens of all folders, to be spelled out in the strings."""

CODE = (
    "def add(a, b):\n    return a + b\n",
    "for (int i = 0; i < n; ++i) {\n\tsum += x[i] * 0.5f;\n}\n",
    '{"key": [1, 2.5e-3, null, true], "nested": {"a\\n": "\\u00e9"}}',
    "git log --oneline | grep -E '^[0-9a-f]{7}' > /tmp/out.txt 2>&1",
    "SELECT name, COUNT(*) FROM users WHERE age >= 18 GROUP BY name;",
    "<div class=\"x\">It's &amp; isn't</div><!-- done -->",
    "if __name__ == '__main__':\n        main()  # don't",
    "x = y if z else -1; print(f'{x!r:>10}')\r\nw = 0b1011 ^ 0xFF",
    "\\begin{equation} e^{i\\pi} + 1 = 0 \\end{equation}",
    "fn main() -> Result<(), Box<dyn Error>> { Ok(()) }",
)
PUNCTUATION = ["...", "!?", " -- ", "«»", "“”", "(); ", "[]{}", "\\", "//", "@#$%^&*", "~`"]
PUNCTUATION += [" 's", " n't", " 've", " ' "]
SPACES = ["\t", "\n", "\n\n", "\r\n", "\r", "\v\f", "\u00a0", "\u2003", "\u3000", "\u200b", "\u2028", "\x85"]
SPACES += [" ", "  ", "    "]
CONTROL = ["\x00", "\x01\x02", "\x07", "\x1b[31m", "\x7f", "\x80\x9f", "\ufeff", "\ufffd", "\uffff", "\ue000", "\u202e"]
CONTROL += ["\u200d", "\U0010ffff"]
MARKS = ["e\u0301", "a\u0308\u0304", "o\u0302\u0323", "n\u0303", "\u0301", "Z\u0351\u036b\u0343", *POOLS["marks"]]


def sentence(rng: random.Random, words: int) -> str:
    """Words with some punctuation and numbers between them."""
    parts = []
    for _ in range(words):
        kind = rng.random()
        if kind < 0.84:
            word = rng.choice(WORDS)
        elif kind < 0.9:
            word = rng.choice(FOREIGN)
        elif kind < 0.95:
            word = str(rng.randrange(10 ** rng.randint(1, 5)))
        else:
            word = rng.choice(WORDS) + rng.choice([",", ";", ":", "'s", "n't", "-" + rng.choice(WORDS)])
        parts.append(word)
    text = " ".join(parts)
    return text[:1].upper() + text[1:] + rng.choice([".", ".", "?", "!", ""])


def corpus(seed: int, lines: int = 1500) -> list[str]:
    """Text to train a small tokenizer on."""
    rng = random.Random(f"corpus {seed}")
    found = [sentence(rng, rng.randint(3, 14)) for _ in range(lines)]
    found += [rng.choice(CODE) for _ in range(lines // 15)]
    found += [" ".join(rng.choice("=-a ") * rng.randint(2, 9) for _ in range(4)) for _ in range(lines // 15)]
    found += [" ".join(rng.choices(SCRIPTS[:8] + EMOJI[:3], k=3)) for _ in range(lines // 15)]
    return found


def strings(seed: int, count: int = 1000) -> list[str]:
    """Different strings of every kind that a tokenizer may trip over."""
    rng = random.Random(f"strings {seed}")
    found: dict[str, None] = dict.fromkeys(["", " ", "  ", "\n", "\t", "\x00", "a", "▁", "é", "🙂", *SPELLED])
    found |= dict.fromkeys([*CODE, *SCRIPTS, *EMOJI, *CONTROL, *MARKS, *MARKED, *SPACES, *PUNCTUATION])
    kinds = [_words, _words, _mixed, _mixed, _special, _special, _spaced, _any, _normalised, _long, _digits]
    while len(found) < count:
        found[rng.choice(kinds)(rng)] = None
    return list(found)[:count]


def _words(rng: random.Random) -> str:
    return sentence(rng, rng.randint(1, 10))


def _mixed(rng: random.Random) -> str:
    pools = [WORDS, FOREIGN, SCRIPTS, EMOJI, PUNCTUATION, SPACES, CONTROL, MARKS, MARKED, CODE]
    pieces = [rng.choice(rng.choice(pools)) for _ in range(rng.randint(2, 7))]
    return rng.choice(["", " "]).join(pieces)


def _special(rng: random.Random) -> str:
    """Special tokens as they are, cut, doubled, in other case, with and without space around them."""
    pieces = []
    for _ in range(rng.randint(1, 4)):
        token = rng.choice(SPELLED)
        token = rng.choice([token, token, token, token[:-1], token[1:], token * 2, token.upper()])
        pieces += [token, rng.choice(["", "", " ", "  ", "\n", rng.choice(WORDS), " " + rng.choice(WORDS), "▁", "é"])]
    return rng.choice(["", " ", rng.choice(WORDS)]) + "".join(pieces)


def _spaced(rng: random.Random) -> str:
    """Spaces of all sorts before, between and behind words."""
    words = rng.choices(WORDS, k=rng.randint(0, 4))
    gaps = ["".join(rng.choices(SPACES, k=rng.randint(1, 3))) for _ in range(len(words) + 1)]
    return "".join(gap + word for gap, word in zip(gaps, [*words, ""], strict=True))


def _any(rng: random.Random) -> str:
    """Any characters at all, half of them near each other."""
    start = rng.randrange(0x2FFFF)
    codes = [rng.choice([start + rng.randrange(64), rng.randrange(0x110000)]) for _ in range(rng.randint(1, 12))]
    return "".join(chr(code) for code in codes if not 0xD800 <= code < 0xE000)


def _normalised(rng: random.Random) -> str:
    text = " ".join(rng.choices([*FOREIGN, *SCRIPTS, *MARKS], k=rng.randint(1, 4)))
    return unicodedata.normalize(rng.choice(["NFC", "NFD", "NFKC", "NFKD"]), text)


def _long(rng: random.Random) -> str:
    """One very long word."""
    letters = rng.choice(
        ["a", "=", " ", "=-", "ab", "abcdefghijklmnopqrstuvwxyz", "你好", "0123456789", "é", "🙂", "_-", "a▁"]
    )
    return "".join(rng.choices(letters, k=rng.choice([7, 13, 40, 90, 90, 300, 40, 90, 90, 1000])))


def _digits(rng: random.Random) -> str:
    number = str(rng.randrange(10 ** rng.randint(1, 20)))
    return rng.choice(
        [number, f"{int(number):,}", f"-{number}.5e+{len(number)}", f"${number}/{number[::-1]}", "1" * len(number)]
    )
