import io
import itertools
import random
from functools import cache

import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, trainers

from eejax.text.detokenizer import CLEANING, REPLACEMENT, WINDOW, Detokenizer
from eejax.text.fast_tokenizer import CLEANED
from eejax.text.tokenizer import load_tokenizer
from tests.tokenizer_cases import FOLDERS, read_lines
from tests.tokenizer_cases import NAMES as FOLDER_NAMES

SENTENCES = [
    "The weaver sold two bolts of blue cloth and went home before the rain.",
    "Nine boats crossed the bay; seven came back, and nobody asked about the others.",
    "An answer may be short. Stop here. Stop there. It ends by itself.",
    "Größe, café, naïve: 12 % of the words — “quoted” — carry accents.",
    "def add(a, b):\n    return a + b\n",
]
SPECIALS = ["<s>", "</s>", "<unk>"]
UNSEEN = "Ω 你好吗 🙂🙃 \ufffd ñandú\n\n  x"


class SentencePiece:
    """sentencepiece with byte fallback, as Llama 2 and the demo model have it."""

    cleans_up = False

    def __init__(self, **options):
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(SENTENCES * 20),
            model_writer=model,
            vocab_size=400,
            model_type="bpe",
            byte_fallback=True,
            character_coverage=0.98,
            normalization_rule_name="identity",
            user_defined_symbols=["<|end|>"],
            minloglevel=3,
            num_threads=1,
            **options,
        )
        self._model = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
        self.size = self._model.get_piece_size()
        self.bytes = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in range(256)]
        self.specials = [i for i in range(self.size) if self._model.is_control(i) or self._model.is_unknown(i)]

    def encode(self, text):
        return self._model.encode(text)

    def decode(self, ids, skip_special=True):
        return self._model.decode(ids)


def bytes_to_letters():
    """The letter that stands for each byte in byte-level vocabularies: itself if printable, else one from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = itertools.count(256)
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


class ByteLevel:
    """A Hugging Face tokenizer over bytes, as GPT-2 and Llama 3 have it."""

    cleans_up = False

    def __init__(self):
        self._model = tokenizers.Tokenizer(models.BPE())
        self._model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        self._model.decoder = decoders.ByteLevel()
        alphabet = bytes_to_letters()
        trainer = trainers.BpeTrainer(
            vocab_size=400, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
        )
        self._model.train_from_iterator([*SENTENCES * 3, "你好 🙂🙂🙂🙂 🙃🙃🙃🙃"], trainer)
        self.size = self._model.get_vocab_size()
        self.bytes = [self._model.token_to_id(letter) for letter in alphabet]
        self.specials = [self._model.token_to_id(token) for token in SPECIALS]

    def encode(self, text):
        return self._model.encode(text).ids

    def decode(self, ids, skip_special=True):
        return self._model.decode(ids, skip_special_tokens=skip_special)


class ByteFallback(ByteLevel):
    """A Hugging Face tokenizer with pieces and byte tokens, as converted from Llama 2."""

    def __init__(self):
        vocab = {token: i for i, token in enumerate([*SPECIALS, *(f"<0x{b:02X}>" for b in range(256)), "▁"])}
        for letter in sorted(set("".join(SENTENCES)) - {" ", "\n", "é", "ö"}):
            vocab[letter] = len(vocab)
        self._model = tokenizers.Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
        self._model.normalizer = tokenizers.normalizers.Sequence(
            [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
        )
        self._model.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        self._model.add_special_tokens(SPECIALS)
        self.size = self._model.get_vocab_size()
        self.bytes = [vocab[f"<0x{byte:02X}>"] for byte in range(256)]
        self.specials = [vocab[token] for token in SPECIALS]


class Folder:
    """A tokenizer from a Hugging Face folder, as the engine has it."""

    def __init__(self, name):
        self._tokenizer = load_tokenizer(FOLDERS / name)
        self.size = self._tokenizer.vocab_size + 3  # and ids that only the model has
        self.cleans_up = self._tokenizer.cleans_up
        self.specials = sorted(self._tokenizer.special_ids)
        backend = self._tokenizer._backend
        spellings = [(f"<0x{byte:02X}>", letter) for byte, letter in enumerate(bytes_to_letters())]
        ids = [[backend.token_to_id(one) for one in pair] for pair in spellings]
        self.bytes = [next((i for i in pair if i is not None), 0) for pair in ids]

    def encode(self, text):
        return self._tokenizer.encode(text, add_bos=False)

    def decode(self, ids, skip_special=True):
        return self._tokenizer.decode(ids, skip_special)


@cache
def tokenizer(name):
    if name in FOLDER_NAMES:
        return Folder(name)
    return {
        "sentencepiece": SentencePiece,
        "sentencepiece-plain": lambda: SentencePiece(add_dummy_prefix=False, remove_extra_whitespaces=False),
        "sentencepiece-keep": lambda: SentencePiece(remove_extra_whitespaces=False),
        "byte-level": ByteLevel,
        "byte-fallback": ByteFallback,
    }[name]()


REWRITING = ["byte-fallback", "llama2-bare", "llama2-old", "llama2-legacy", "added", "mistral"]
"""Their decoder rewrites a whole run of bytes when one of them is invalid."""
NAMES = [
    "sentencepiece",
    "sentencepiece-plain",
    "sentencepiece-keep",
    "byte-level",
    "llama3",
    "qwen2",
    "gpt2",
    "unigram",
]
every_tokenizer = pytest.mark.parametrize("name", NAMES)


def expected(text, stop):
    """`text` up to the stop string that is complete first, the longest of those that end together."""
    ends = [(text.find(s) + len(s), text.find(s), s) for s in stop if s in text]
    return (text[: min(ends)[1]], min(ends)[2]) if ends else (text, None)


def stream(detokenizer, ids):
    shown = [detokenizer.append(i) for i in ids]
    return "".join(shown) + detokenizer.finish()


@st.composite
def token_ids(draw, name, max_size=90):
    """Token ids of every kind: any token, runs of any bytes, specials, encoded text cut anywhere."""
    rng = random.Random(draw(st.integers(0, 2**32 - 1)))
    tok, ids = tokenizer(name), []
    kinds = draw(
        st.lists(st.sampled_from(["any", "bytes", "high", "special", "text", "repeat", "replacement"]), max_size=8)
    )
    for kind in kinds:
        match kind:
            case "any":
                ids += [rng.randrange(tok.size) for _ in range(rng.randint(1, 12))]
            case "bytes":
                ids += rng.choices(tok.bytes, k=rng.randint(1, 12))
            case "high":  # what may begin, continue or break a character
                ids += rng.choices([tok.bytes[0xF0], tok.bytes[0xE4], *tok.bytes[0x80:]], k=rng.randint(1, 40))
            case "replacement":  # a genuine one behind bytes that show as such
                ids += rng.choices(tok.bytes[0x80:], k=rng.randint(0, 3)) + [tok.bytes[b] for b in REPLACEMENT.encode()]
            case "special":
                ids += rng.choices(tok.specials, k=rng.randint(1, 5))
            case "text":
                text = tok.encode(rng.choice([*SENTENCES, UNSEEN, UNSEEN]))
                ids += text[rng.randrange(len(text)) :][: rng.randint(1, 30)]
            case "repeat":
                ids += [rng.choice([*tok.specials, *tok.bytes, *range(tok.size)])] * rng.randint(1, 40)
    return ids[:max_size]


@st.composite
def valid_ids(draw, name):
    """Pieces, characters spelled in bytes, whole texts and specials, but no bytes that make up no character."""
    rng = random.Random(draw(st.integers(0, 2**32 - 1)))
    tok, ids = tokenizer(name), []
    pieces = sorted(set(range(tok.size)) - set(tok.bytes))
    for kind in draw(st.lists(st.sampled_from(["pieces", "characters", "special", "text", "repeat"]), max_size=8)):
        match kind:
            case "pieces":
                ids += rng.choices(pieces, k=rng.randint(1, 12))
            case "characters":
                letters = "".join(rng.choices("é你🙂\n\0\u2581'", k=rng.randint(1, 9)))
                ids += [tok.bytes[byte] for byte in letters.encode()]
            case "special":
                ids += rng.choices(tok.specials, k=rng.randint(1, 5))
            case "text":
                ids += tok.encode(rng.choice([*SENTENCES, UNSEEN, UNSEEN]))
            case "repeat":
                ids += [rng.choice(pieces)] * rng.randint(1, 40)
    return ids


def stops_in(draw, text):
    """Stop strings, most of which occur in `text` or begin like something in it."""
    stops = []
    for _ in range(draw(st.integers(0, 3))):
        start = draw(st.integers(0, max(0, len(text) - 1)))
        end = text[start : start + draw(st.integers(1, 6))]
        stops.append((end or "x") + draw(st.sampled_from(["", "", " ", "e", REPLACEMENT])))
    return tuple(stops)


@every_tokenizer
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_the_deltas_make_up_the_decoded_text_up_to_the_first_stop_string(name, data):
    tok = tokenizer(name)
    ids = data.draw(token_ids(name))
    whole = tok.decode(ids)
    stop = stops_in(data.draw, whole)
    text, stopped = expected(whole, stop)
    detokenizer = Detokenizer(tok, stop)
    shown = ""
    for token in ids:
        delta = detokenizer.append(token)
        shown += delta
        assert detokenizer.text == shown
        assert text.startswith(shown)  # nothing to be taken back: neither half characters nor half stop strings
    shown += detokenizer.finish()
    assert (shown, detokenizer.text, detokenizer.stopped) == (text, text, stopped)
    assert detokenizer.append(ids[-1] if ids else 5) == detokenizer.finish() == ""
    assert detokenizer.text == text


@pytest.mark.parametrize("name", REWRITING)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_the_deltas_make_up_the_decoded_text_where_bytes_make_up_characters(name, data):
    tok = tokenizer(name)
    ids = data.draw(valid_ids(name))
    whole = tok.decode(ids)
    stop = stops_in(data.draw, whole)
    text, stopped = expected(whole, stop)
    detokenizer = Detokenizer(tok, stop)
    shown = ""
    for token in ids:
        shown += detokenizer.append(token)
        assert text.startswith(shown)
    assert (shown + detokenizer.finish(), detokenizer.stopped) == (text, stopped)


@every_tokenizer
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_tokens_that_come_several_at_once_stop_where_single_ones_do(name, data):
    tok = tokenizer(name)
    ids = data.draw(token_ids(name))
    stop = stops_in(data.draw, tok.decode(ids))
    single, several = Detokenizer(tok, stop), Detokenizer(tok, stop)
    rest = list(ids)
    while rest:
        group = [rest.pop(0) for _ in range(data.draw(st.integers(1, len(rest))))]
        shown = [single.append(token) for token in group]
        assert several.append(*group) == "".join(shown)
        assert (several.num_tokens, several.stopped) == (single.num_tokens, single.stopped)
    assert several.finish() == single.finish()
    assert several.stopped == single.stopped


@pytest.mark.parametrize("name", FOLDER_NAMES)
def test_a_thousand_strings_stream_as_they_decode(name):
    tok = tokenizer(name)
    [texts] = read_lines(FOLDERS / "strings.json.gz")
    for text in texts[::4]:
        ids = tok.encode(text)
        assert stream(Detokenizer(tok), ids) == tok.decode(ids)


@every_tokenizer
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_whatever_follows_the_shown_text_stands(name, data):
    tok = tokenizer(name)
    ids, more = data.draw(token_ids(name)), data.draw(token_ids(name, max_size=8))
    stop = stops_in(data.draw, tok.decode(ids + more))
    detokenizer = Detokenizer(tok, stop)
    for token in ids:
        detokenizer.append(token)
    assert expected(tok.decode(ids + more), stop)[0].startswith(detokenizer.text)
    for one in stop:  # and if the text went on to complete a stop string
        assert expected(tok.decode(ids + tok.encode(one[1:])), stop)[0].startswith(detokenizer.text)


@every_tokenizer
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_without_stop_strings_only_an_incomplete_character_is_held_back(name, data):
    tok = tokenizer(name)
    ids = data.draw(token_ids(name))
    detokenizer = Detokenizer(tok)
    for i, token in enumerate(ids):
        detokenizer.append(token)
        held = tok.decode(ids[: i + 1])[len(detokenizer.text) :]
        if tok.cleans_up:  # or what a space may still vanish from
            assert held.rstrip(REPLACEMENT).strip(CLEANING) == ""
        else:
            assert held == REPLACEMENT * len(held)
            assert len(held) <= 3


@pytest.mark.parametrize("name", [*NAMES, *REWRITING])
def test_characters_that_take_several_tokens_come_whole(name):
    tok = tokenizer(name)
    ids = tok.encode((SENTENCES[3] + " " + UNSEEN.replace(REPLACEMENT, "")) * 8)
    whole = tok.decode(ids)
    assert "naïve" in whole
    assert "🙂🙃" in whole
    detokenizer, shown = Detokenizer(tok), ""
    for token in ids:
        shown += detokenizer.append(token)
        assert REPLACEMENT not in shown
        assert whole.startswith(shown)
    assert shown + detokenizer.finish() == whole


@pytest.mark.parametrize("name", [*NAMES[:-1], *REWRITING])  # all that have bytes
def test_replacement_characters_come_out_where_bytes_are_invalid(name):
    tok = tokenizer(name)
    a, b = (tok.encode(letter)[-1] for letter in "ab")
    lead = tok.bytes[0xF0]  # of four bytes; three are missing
    detokenizer = Detokenizer(tok)
    assert [detokenizer.append(i).replace(" ", "") for i in (a, lead, b, lead)] == ["a", "", f"{REPLACEMENT}b", ""]
    assert detokenizer.finish() == REPLACEMENT
    assert detokenizer.text.replace(" ", "") == f"a{REPLACEMENT}b{REPLACEMENT}"


def test_byte_fallback_that_rewrites_a_run_of_bytes_does_not_derail_the_text():
    tok = tokenizer("byte-fallback")
    run = [*tok.encode("你"), tok.bytes[0xFF]]
    assert tok.decode(run) == REPLACEMENT * 4  # the character before, which has been shown, is gone
    text = stream(Detokenizer(tok), [*run, *tok.encode("bay") * 50])
    assert text.startswith(f"你{REPLACEMENT}")
    assert text.endswith(REPLACEMENT + " bay" * 50)


class Letters:
    """Token i is the i-th of these byte strings; remembers how many tokens it decoded at once."""

    cleans_up = False

    def __init__(self, *pieces):
        self.pieces = pieces
        self.most = 0

    def decode(self, ids, skip_special=True):
        self.most = max(self.most, len(ids))
        return b"".join(self.pieces[i] for i in ids).decode(errors="replace")


@pytest.mark.parametrize(
    ("stop", "pieces", "deltas", "stopped"),
    [
        (("ND",), ["a E", "N", "D b"], ["a E", "", ""], "ND"),
        (("END",), ["a E", "N", "D b"], ["a ", "", ""], "END"),
        (("END",), ["a E", "N", "E", "ND"], ["a ", "", "EN", ""], "END"),
        (("END",), ["aEN", "x"], ["a", "ENx"], None),
        (("END",), ["aEN"], ["a"], None),  # the rest comes with finish
        (("aab",), ["a", "a", "a", "b"], ["", "", "a", ""], "aab"),
        (("b", "ab"), ["x", "a", "b"], ["x", "", ""], "ab"),  # they end together: the longer
        (("abcd", "bc"), ["a", "b", "cd"], ["", "", "a"], "bc"),  # "bc" is complete first, within one token too
        (("cd", "bc"), ["abcd"], ["a"], "bc"),
        (("\n\n",), ["a\n", "\nb"], ["a", ""], "\n\n"),
        (("x",), ["axbxc", "x"], ["a", ""], "x"),
        (("é",), ["a", b"\xc3", b"\xa9"], ["a", "", ""], "é"),
    ],
)
def test_stop_strings(stop, pieces, deltas, stopped):
    pieces = [piece if isinstance(piece, bytes) else piece.encode() for piece in pieces]
    detokenizer = Detokenizer(Letters(*pieces), stop)
    assert [detokenizer.append(i) for i in range(len(pieces))] == deltas
    assert detokenizer.stopped == stopped
    text = expected(b"".join(pieces).decode(), stop)[0]
    assert "".join(deltas) + detokenizer.finish() == detokenizer.text == text


class Cleaning(Letters):
    """Cleans up as Transformers does."""

    cleans_up = True

    def decode(self, ids, skip_special=True):
        text = super().decode(ids)
        for spaced, clean in CLEANED:
            text = text.replace(spaced, clean)
        return text


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.sampled_from([*" .?!,'ntmsverx", " '", "' ", " n't", "'ve", "ten", "n \n", "\x80"]), max_size=120),
    st.data(),
)
def test_a_space_that_the_next_token_takes_away_is_not_shown(pieces, data):
    tok = Cleaning(*(piece.encode("latin-1") for piece in pieces))
    whole = tok.decode(range(len(pieces)))
    text, _ = expected(whole, stop := stops_in(data.draw, whole))
    detokenizer = Detokenizer(tok, stop)
    for i in range(len(pieces)):
        detokenizer.append(i)
        assert text.startswith(detokenizer.text)
    detokenizer.finish()
    assert detokenizer.text == text


def test_what_is_held_back_begins_what_is_cleaned_up():
    assert {letter for spaced, _ in CLEANED for letter in spaced[:-1]} == set(CLEANING)
    tok = Cleaning(b"a", b" ", b"' ", b".", b"b n", b"'", b"t", b"x")
    detokenizer = Detokenizer(tok)
    assert [detokenizer.append(i) for i in range(8)] == ["a", "", "", " '.", "b", "", "n't", "x"]


def test_tokens_after_a_stop_string_change_nothing():
    tok = Letters(b"a", b"STOP", b"b")
    detokenizer = Detokenizer(tok, ("STOP",))
    assert [detokenizer.append(i) for i in (0, 1, 2, 1)] == ["a", "", "", ""]
    assert tok.most == 2
    assert (detokenizer.text, detokenizer.stopped, detokenizer.finish()) == ("a", "STOP", "")


def test_a_stop_string_may_be_complete_only_at_the_end():
    detokenizer = Detokenizer(Letters(b"a", b"\xc3"), (REPLACEMENT,))
    assert [detokenizer.append(i) for i in (0, 1)] == ["a", ""]
    assert detokenizer.stopped is None
    assert detokenizer.finish() == ""
    assert (detokenizer.text, detokenizer.stopped) == ("a", REPLACEMENT)


def test_whitespace_that_is_stripped_only_at_the_start_of_the_text():
    class Stripping(Letters):
        def decode(self, ids, skip_special=True):
            return super().decode(ids).removeprefix(" ")

    tok = Stripping(b" ", *[b""] * 3 * WINDOW, b" x", b" y")
    ids = list(range(len(tok.pieces)))
    assert stream(Detokenizer(tok), ids) == tok.decode(ids) == " x y"


class Counting:
    def __init__(self, inner):
        self.inner, self.tokens, self.most = inner, 0, 0
        self.cleans_up = inner.cleans_up

    def decode(self, ids, skip_special=True):
        self.tokens += len(ids)
        self.most = max(self.most, len(ids))
        return self.inner.decode(ids, skip_special)


@pytest.mark.parametrize("name", [*NAMES, *REWRITING])
@pytest.mark.parametrize("what", ["text", "specials", "specials after a lead byte", "invalid", "emoji"])
def test_cost_of_a_token_does_not_grow_with_the_text(name, what):
    tok = tokenizer(name)
    match what:
        case "text":
            ids = tok.encode(" ".join(SENTENCES)) * 8
        case "specials":
            ids = tok.specials[:2] * 500
        case "specials after a lead byte":
            ids = [*tok.encode("bay"), tok.bytes[0xF0], *tok.specials[:2] * 500, *tok.encode("bay")]
        case "invalid":
            ids = [*tok.encode("bay"), *tok.bytes[0x80:0x81] * 900, *tok.encode("bay")]
        case "emoji":
            ids = tok.encode("🙂🙃" * 150)
    counting = Counting(tok)
    detokenizer = Detokenizer(counting)
    assert stream(detokenizer, ids) == tok.decode(ids)
    assert counting.most <= 3 * WINDOW
    assert counting.tokens <= len(ids) * 2 * WINDOW
    counting, rest = Counting(tok), ids
    detokenizer = Detokenizer(counting)
    while rest:
        detokenizer.append(*rest[:WINDOW])
        rest = rest[WINDOW:]
    assert detokenizer.text + detokenizer.finish() == tok.decode(ids)
    # Single tokens are decoded only where a character is broken, as in every group of the other texts.
    assert counting.tokens <= len(ids) * WINDOW or what not in ("text", "specials")
