"""Puts the tokenizer of a Hugging Face folder together as Transformers 5 does. Nothing here imports jax.

`tokenizer.json` alone does not say what Transformers makes of a folder. The class that the folder names, or that its
model type implies, may take only vocabulary, merges and post-processor from it and set up the rest by itself. A
sentencepiece `tokenizer.model` is turned into a BPE of the `tokenizers` library. And the configuration files bring
tokens of their own. The rules below were read from Transformers 5.23 (`AutoTokenizer`, `TokenizersBackend`, the classes
in `BUILDERS`; without `mistral-common`) and are held to it by the tests. A class that is not in `BUILDERS` is taken for
`TokenizersBackend`, which uses `tokenizer.json` unchanged.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from eejax.core import TokenizerError
from eejax.text.declared_tokens import STANDARD, Declared, Token, declared_tokens
from eejax.text.fast_tokenizer import FastTokenizer
from eejax.text.tokenizer_files import (
    CONFIG_FILE,
    FAST_FILE,
    MODEL_FILE,
    SPACE_MARK,
    TOKEN_MAP_FILE,
    declared_class,
    find_chat_templates,
    read_bytes,
    read_object,
    read_text,
)

GENERIC = "TokenizersBackend"
QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CONTROL, USER_DEFINED = 3, 4
"""Kinds of sentencepiece pieces that are looked for in the text before it is split."""
UNIGRAM = 1

Vocabulary = dict[str, int]
Merges = list[tuple[str, str]]
Builder = Callable[[Vocabulary, Merges, Mapping[str, Any]], tokenizers.Tokenizer]


# ------------------------------------------------------------------------------------------------- which class it is


def tokenizer_class(folder: Path, config: Mapping[str, Any]) -> str | None:
    """Name of the class that Transformers would take, one of `BUILDERS` or `GENERIC`.

    None where the folder names neither a tokenizer class nor a model type, as eejax's own checkpoints do not.

    Raises:
        TokenizerError: the name is no text.
    """
    named, model_type = declared_class(folder, config)
    if named is None and model_type is None:
        return None
    named = named.removesuffix("Fast") if isinstance(named, str) else None
    if model_type == "qwen2" or (model_type == "qwen3" and named is None):
        return "Qwen2Tokenizer"
    if model_type == "mistral" or named not in BUILDERS:
        return GENERIC
    file = folder / FAST_FILE
    if named == "LlamaTokenizer" and file.exists() and '"ByteLevel"' in read_text(file):
        return GENERIC  # Llama 3 under the name of Llama 2's class
    return named


# ------------------------------------------------------------------------------------------------ what splits and joins


def _llama(vocabulary: Vocabulary, merges: Merges, config: Mapping[str, Any]) -> tokenizers.Tokenizer:
    prefix = config.get("add_prefix_space")
    prefix = True if prefix is None else bool(prefix)
    scheme = "never" if not prefix else "always" if config.get("legacy") else "first"
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges, fuse_unk=True, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE_MARK, prepend_scheme=scheme, split=False)
    steps = [decoders.Replace(SPACE_MARK, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return backend


def _qwen2(vocabulary: Vocabulary, merges: Merges, config: Mapping[str, Any]) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(tokenizers.Regex(QWEN2_WORDS), behavior="isolated")
    letters = pre_tokenizers.ByteLevel(add_prefix_space=bool(config.get("add_prefix_space")), use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, letters])
    backend.decoder = decoders.ByteLevel()
    return backend


def _gpt2(vocabulary: Vocabulary, merges: Merges, config: Mapping[str, Any]) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=bool(config.get("add_prefix_space")))
    backend.decoder = decoders.ByteLevel()
    return backend


END_OF_TEXT = "<|endoftext|>"
BUILDERS: dict[str, tuple[Builder, dict[str, Token | None]]] = {
    "LlamaTokenizer": (_llama, {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}),
    "Qwen2Tokenizer": (_qwen2, dict.fromkeys(("unk_token", "eos_token", "pad_token"), END_OF_TEXT)),
    "GPT2Tokenizer": (_gpt2, dict.fromkeys(("unk_token", "bos_token", "eos_token"), END_OF_TEXT)),
}
"""Classes that set themselves up: how, and the special tokens that they have where no file speaks of these."""


def merges_of(pieces: Sequence[str]) -> Merges:
    """BPE merges that build the pieces of a sentencepiece model, in the order in which Transformers tries them.

    Whatever two pieces make up a third one is a merge; earlier pieces go first, and of one piece's merges that with the
    shorter left half.
    """
    known = set(pieces)
    halves = ((piece[:cut], piece[cut:]) for piece in pieces for cut in range(1, len(piece)))
    return [(left, right) for left, right in halves if left in known and right in known]


def _from_file(file: Path, fast: Mapping[str, Any], kind: str, config: Mapping[str, Any]) -> tokenizers.Tokenizer:
    model = fast["model"]
    if kind == GENERIC or model.get("type", "BPE") != "BPE":
        return tokenizers.Tokenizer.from_str(read_text(file))
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    merges = [(left, right) for left, right in pairs]
    backend = BUILDERS[kind][0](model["vocab"], merges, config)
    empty = {"type": "BPE", "vocab": {}, "merges": []}
    around = {"version": "1.0", "model": empty, "added_tokens": [], "post_processor": fast.get("post_processor")}
    post_processor = tokenizers.Tokenizer.from_str(json.dumps(around)).post_processor
    if post_processor is not None:
        backend.post_processor = post_processor
    return backend


def _from_sentencepiece(
    proto: Any, kind: str, config: Mapping[str, Any], by_id: Mapping[int, AddedToken]
) -> tokenizers.Tokenizer:
    vocabulary = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    if kind != GENERIC:
        return BUILDERS[kind][0](vocabulary, merges_of(list(vocabulary)), config)
    trainer, charsmap = proto.trainer_spec, proto.normalizer_spec.precompiled_charsmap
    if trainer.model_type == UNIGRAM:
        scored = [(piece.piece, piece.score) for piece in proto.pieces]
        model = models.Unigram(scored, unk_id=trainer.unk_id, byte_fallback=trainer.byte_fallback)
    else:
        merges = merges_of(list(vocabulary))
        for i, token in by_id.items():  # names for places that the model kept free
            if i < len(proto.pieces) and token.content not in vocabulary:
                vocabulary[token.content] = vocabulary.pop(proto.pieces[i].piece)
        options = {"unk_token": trainer.unk_piece, "byte_fallback": trainer.byte_fallback}
        model = models.BPE(vocab=vocabulary, merges=merges, fuse_unk=True, **options)
    backend = tokenizers.Tokenizer(model)
    spaces = [normalizers.Replace(" ", SPACE_MARK)]
    backend.normalizer = normalizers.Sequence([normalizers.Precompiled(charsmap), *spaces] if charsmap else spaces)
    steps = [decoders.Replace(SPACE_MARK, " ")]
    backend.decoder = decoders.Sequence(
        [*steps, decoders.ByteFallback(), decoders.Fuse()] if trainer.byte_fallback else steps
    )
    return backend


# ------------------------------------------------------------------------------------------------------------ all of it


def load_huggingface_tokenizer(folder: Path, config: Mapping[str, Any]) -> FastTokenizer:
    """The tokenizer of a folder with `tokenizer.json`, or else with a sentencepiece `tokenizer.model`.

    Args:
        config: what `tokenizer_config.json` holds.

    Raises:
        TokenizerError: a file is missing, unreadable or corrupt, or names a BOS or EOS that the vocabulary lacks; the
            message names the file.
    """
    kind = tokenizer_class(folder, config) or GENERIC
    from_file = (folder / FAST_FILE).exists()
    file = folder / (FAST_FILE if from_file else MODEL_FILE)
    if from_file:
        fast = read_object(file)
        tokens = declared_tokens(folder, config, fast)
        with _blamed(file):
            backend = _from_file(file, fast, kind, config)
        extra, implied = tokens.extra or [], {}
    else:
        proto = _read_sentencepiece(file)
        tokens = declared_tokens(folder, config, {})
        with _blamed(file):
            backend = _from_sentencepiece(proto, kind, config, tokens.by_id)
        extra = _listed_pieces(proto) if tokens.extra is None else tokens.extra
        implied = _implied_names(proto)
    given = {**(BUILDERS[kind][1] if kind in BUILDERS else implied), **tokens.named}
    order = [*STANDARD, *(name for name in given if name not in STANDARD)]
    named = {name: token for name in order if (token := given.get(name)) is not None}
    with _blamed(folder / CONFIG_FILE):
        _require_ends(backend, tokens, f"{folder / CONFIG_FILE} or {TOKEN_MAP_FILE}")
        _add_tokens(backend, tokens.by_id, named, extra)
        if kind == "Qwen2Tokenizer":
            backend.add_tokens([AddedToken(str(token), special=True) for token in (*named.values(), *extra)])
        if not from_file:
            _surround(backend, named, config)
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = bool(config.get("split_special_tokens"))
    with _blamed(file):
        backend.encode("")  # a post-processor that names unknown tokens loads, and fails only here
    cleans_up = bool(config.get("clean_up_tokenization_spaces")) and (
        not isinstance(backend.model, models.BPE)
        or bool(config.get("clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"))
    )
    names = {name: str(token) for name, token in named.items()}
    return FastTokenizer(backend, names, find_chat_templates(folder, config), cleans_up)


@contextmanager
def _blamed(file: Path) -> Iterator[None]:
    """Say which file an error of the `tokenizers` library, which has no classes of errors, is about."""
    try:
        yield
    except TokenizerError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # of Rust
            raise
        raise TokenizerError(f"{file} does not hold a usable tokenizer: {type(error).__name__}: {error}") from error


def _read_sentencepiece(file: Path) -> Any:
    from google.protobuf.message import DecodeError  # few folders need protobuf
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]: made at import
    data = read_bytes(file)
    try:
        proto.ParseFromString(data)
    except DecodeError as error:
        raise TokenizerError(f"{file} is not a sentencepiece model: {error}") from error
    if not proto.pieces or not proto.HasField("normalizer_spec"):  # the pieces come first, this comes last
        raise TokenizerError(f"{file} is not a sentencepiece model: it is cut off, or something else")
    return proto


def _listed_pieces(proto: Any) -> list[Token]:
    return [
        AddedToken(piece.piece, normalized=False, special=piece.type == CONTROL)
        for piece in proto.pieces
        if piece.type in (CONTROL, USER_DEFINED)
    ]


def _implied_names(proto: Any) -> dict[str, Token | None]:
    spec = proto.trainer_spec
    named = {"bos_token": (spec.bos_id, spec.bos_piece), "eos_token": (spec.eos_id, spec.eos_piece)}
    named["unk_token"] = (spec.unk_id, spec.unk_piece)
    return {name: piece for name, (i, piece) in named.items() if i >= 0}


def _require_ends(backend: tokenizers.Tokenizer, tokens: Declared, files: str) -> None:
    """BOS and EOS must be tokens that the model can have learnt; Transformers would make up new ones."""
    contents = {token.content for token in tokens.by_id.values()}
    for name in ("bos_token", "eos_token"):
        token = tokens.named.get(name)
        if token is not None and str(token) not in contents and backend.token_to_id(str(token)) is None:
            raise TokenizerError(f"{files} names {name} {str(token)!r}, which is not in the vocabulary")


def _add_tokens(
    backend: tokenizers.Tokenizer,
    by_id: Mapping[int, AddedToken],
    named: Mapping[str, Token],
    extra: Sequence[Token],
) -> None:
    """Add the declared tokens, in the order of their ids and with their flags, then special ones that are missing."""
    tokens = [by_id[i] for i in sorted(by_id)]
    known = {token.content for token in (*backend.get_added_tokens_decoder().values(), *tokens)}
    more: list[Token] = []
    for token in (*named.values(), *extra):
        if str(token) not in known and token not in more:
            more.append(token)
    tokens += [AddedToken(token, special=True) if isinstance(token, str) else token for token in more]
    contents = {str(token) for token in named.values()}
    for token in tokens:
        token.special = token.special or token.content in contents
    backend.add_tokens(tokens)


def _surround(backend: tokenizers.Tokenizer, named: Mapping[str, Token], config: Mapping[str, Any]) -> None:
    """Put BOS before and EOS after a text where a folder without `tokenizer.json` asks for it."""
    ends = [
        str(named[name]) if config.get(asked) and name in named else None
        for name, asked in (("bos_token", "add_bos_token"), ("eos_token", "add_eos_token"))
    ]
    used = {token: backend.token_to_id(token) for token in ends if token is not None}
    bos, eos = ([f"{token}:0"] if token is not None else [] for token in ends)
    backend.post_processor = processors.TemplateProcessing(
        single=[*bos, "$A:0", *eos], special_tokens=list(used.items())
    )
