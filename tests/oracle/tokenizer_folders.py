"""Small tokenizers of every kind, in folders as they could come from Hugging Face, for make_tokenizers.py."""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_WORDS = LLAMA3_WORDS.replace("{1,3}", "")
SPACE = "\u2581"
PIECES = 420


def write(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def template(name: str) -> str:
    return (Path(__file__).parent / "templates" / f"{name}.jinja").read_text(encoding="utf-8")


def token(content: str, **flags: bool) -> dict[str, Any]:
    """An added token as `added_tokens_decoder` holds it."""
    usual = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {"content": content, **usual, **flags}


def save(folder: Path, tokenizer: Tokenizer) -> None:
    compact = json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False, separators=(",", ":"))
    (folder / "tokenizer.json").write_text(compact + "\n", encoding="utf-8")


def configure(folder: Path, model_type: str, config: dict[str, Any]) -> None:
    write(folder / "config.json", {"model_type": model_type})
    write(folder / "tokenizer_config.json", config)


def byte_level(lines: list[str], words: str | None, vocab_size: int = 256 + PIECES, **options: Any) -> Tokenizer:
    """A BPE over bytes, split into words first by the regular expression."""
    tokenizer = Tokenizer(models.BPE())
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words is None)
    tokenizer.pre_tokenizer = letters
    if words is not None:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(words), "isolated"), letters])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=sorted(alphabet), show_progress=False)
    tokenizer.train_from_iterator(lines, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    tokenizer.model = models.BPE(vocab=model["vocab"], merges=merges, **options)
    return tokenizer


def sentencepiece_model(lines: list[str], **options: Any) -> bytes:
    model = io.BytesIO()
    usual = {
        "model_type": "bpe",
        "vocab_size": 259 + PIECES,
        "byte_fallback": True,
        "character_coverage": 0.9995,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "split_digits": True,
        "allow_whitespace_only_pieces": True,
        "num_threads": 1,
        "minloglevel": 3,
    }
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=model, **{**usual, **options})
    return model.getvalue()


def metaspace(model: bytes, legacy: bool) -> Tokenizer:
    """A sentencepiece BPE as Llama 2 came as `tokenizer.json`: its space marks set by normaliser (`legacy`) or not."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    pieces = [processor.id_to_piece(i) for i in range(processor.vocab_size())]
    known = set(pieces)
    cuts = [(piece[:i], piece[i:]) for piece in pieces for i in range(1, len(piece))]
    merges = [(left, right) for left, right in cuts if left in known and right in known]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if legacy:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme="first", split=False)
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


def with_bos(tokenizer: Tokenizer, bos: str) -> processors.PostProcessor:
    return processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )


# ---------------------------------------------------------------------------------------------------------- folders


def llama3(folder: Path, lines: list[str]) -> None:
    """Words by a regular expression, bytes, three end tokens, and a request to clean up that is not heard."""
    tokenizer = byte_level(lines, LLAMA3_WORDS, ignore_merges=True)
    names = [
        "begin_of_text",
        "end_of_text",
        "start_header_id",
        "end_header_id",
        "eom_id",
        "eot_id",
        "python_tag",
        "image",
    ]
    tokens = [f"<|{name}|>" for name in names]
    tokenizer.add_special_tokens(tokens)
    letters = processors.ByteLevel(trim_offsets=False)
    tokenizer.post_processor = processors.Sequence([letters, with_bos(tokenizer, tokens[0])])
    save(folder, tokenizer)
    ids = {name: tokenizer.token_to_id(name) for name in tokens}
    config = {
        "added_tokens_decoder": {str(i): token(name) for name, i in ids.items()},
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|eot_id|>",
        "chat_template": template("llama3"),
        "clean_up_tokenization_spaces": True,
        "model_input_names": ["input_ids", "attention_mask"],
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    configure(folder, "llama", config)
    ends = [ids[name] for name in ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")]
    write(folder / "generation_config.json", {"bos_token_id": ids["<|begin_of_text|>"], "eos_token_id": ends})


def qwen2(folder: Path, lines: list[str]) -> None:
    """NFC, no BOS, added tokens that are not special, and a template in a file of its own."""
    tokenizer = byte_level(lines, QWEN2_WORDS)
    tokenizer.normalizer = normalizers.NFC()
    special, plain = (
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        ["<tool_call>", "</tool_call>", "<think>", "</think>"],
    )
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens([AddedToken(one, normalized=False, special=False) for one in plain])
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    save(folder, tokenizer)
    added = {str(tokenizer.token_to_id(one)): token(one, special=one in special) for one in special + plain}
    config = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "additional_special_tokens": special[1:],
        "bos_token": None,
        "chat_template": "unused: the file wins",
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    configure(folder, "qwen2", config)
    (folder / "chat_template.jinja").write_text(template("chatml"), encoding="utf-8")
    write(folder / "generation_config.json", {"eos_token_id": tokenizer.token_to_id("<|im_end|>")})


def llama2_bare(folder: Path, lines: list[str]) -> None:
    """Only a sentencepiece model, as Llama 2 came first."""
    (folder / "tokenizer.model").write_bytes(sentencepiece_model(lines))
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": {"__type": "AddedToken", **token("<s>", normalized=True)},
        "eos_token": {"__type": "AddedToken", **token("</s>", normalized=True)},
        "chat_template": template("llama2"),
        "clean_up_tokenization_spaces": False,
        "legacy": False,
        "pad_token": None,
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
        "unk_token": {"__type": "AddedToken", **token("<unk>", normalized=True)},
    }
    configure(folder, "llama", config)


def llama2_old(folder: Path, lines: list[str]) -> None:
    """A sentencepiece model with tokens of its own, and the files that held added tokens once; EOS behind a text."""
    model = sentencepiece_model(lines, user_defined_symbols=["<mark>", "ing"], control_symbols=["<ctl>"])
    (folder / "tokenizer.model").write_bytes(model)
    size = sentencepiece.SentencePieceProcessor(model_proto=model).vocab_size()
    config = {
        "add_eos_token": True,
        "add_prefix_space": False,
        "tokenizer_class": "LlamaTokenizer",
        "pad_token": "<pad>",
    }
    configure(folder, "llama", config)
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    named = {"bos_token": {"content": "<s>", **plain}, "eos_token": "</s>", "pad_token": {"content": "<pad>", **plain}}
    write(folder / "special_tokens_map.json", named)
    write(folder / "added_tokens.json", {"<pad>": size, "<extra> word": size + 1})


def llama2_legacy(folder: Path, lines: list[str]) -> None:
    """A `tokenizer.json` whose normaliser Transformers does not use, since the class brings its own."""
    tokenizer = metaspace(sentencepiece_model(lines), legacy=True)
    tokenizer.post_processor = with_bos(tokenizer, "<s>")
    save(folder, tokenizer)
    names = {0: "<unk>", 1: "<s>", 2: "</s>"}
    config = {
        "add_bos_token": False,
        "added_tokens_decoder": {str(i): token(name, normalized=True) for i, name in names.items()},
        "bos_token": "<s>",
        "eos_token": "</s>",
        "legacy": True,
        "tokenizer_class": "LlamaTokenizerFast",
        "unk_token": "<unk>",
        "use_default_system_prompt": False,
    }
    configure(folder, "llama", config)


def added(folder: Path, lines: list[str]) -> None:
    """A `tokenizer.json` used as it stands, and added tokens of all sorts, some only in `tokenizer_config.json`."""
    tokenizer = metaspace(sentencepiece_model(lines), legacy=True)
    flags = {
        "<|user|>": {"rstrip": True},
        "<|assistant|>": {"lstrip": True},
        "<|system|>": {"lstrip": True, "rstrip": True},
        "cat": {"single_word": True, "special": False},
        "THE": {"normalized": True, "special": False},
        "  ": {"special": False},
        "né": {"special": False, "normalized": True},
    }
    tokenizer.add_tokens(
        [AddedToken(name, **{"normalized": False, "special": True, **one}) for name, one in flags.items()]
    )
    tokenizer.post_processor = with_bos(tokenizer, "<s>")
    save(folder, tokenizer)
    ids = {name: tokenizer.token_to_id(name) for name in ["<unk>", "<s>", "</s>", *flags]}
    more = {
        max(ids.values()) + 1: token("<late>", lstrip=True),
        max(ids.values()) + 2: token("late word", special=False),
    }
    config = {
        "added_tokens_decoder": {str(i): token(name, **flags.get(name, {})) for name, i in ids.items()}
        | {str(i): one for i, one in more.items()},
        "bos_token": "<s>",
        "chat_template": template("zephyr"),
        "eos_token": "</s>",
        "extra_special_tokens": ["<|user|>", "<|assistant|>", "<|system|>"],
        "mood_token": "<mood>",
        "pad_token": "</s>",
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
    }
    configure(folder, "llama", config)


def mistral(folder: Path, lines: list[str]) -> None:
    """Llama's class named, but Transformers uses `tokenizer.json` as it stands for this model type."""
    model = sentencepiece_model(lines)
    tokenizer = metaspace(model, legacy=False)
    names = ["INST", "/INST", "TOOL_CALLS", "AVAILABLE_TOOLS", "/AVAILABLE_TOOLS", "TOOL_RESULTS", "/TOOL_RESULTS"]
    tokenizer.add_special_tokens([f"[{name}]" for name in names])
    tokenizer.post_processor = with_bos(tokenizer, "<s>")
    save(folder, tokenizer)
    (folder / "tokenizer.model").write_bytes(model)
    templates = {"tool_use": template("mistral"), "default": template("mistral"), "rag": template("rag")}
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "additional_special_tokens": [],
        "bos_token": "<s>",
        "chat_template": [{"name": name, "template": template} for name, template in templates.items()],
        "eos_token": "</s>",
        "legacy": True,
        "tokenizer_class": "LlamaTokenizer",
        "unk_token": "<unk>",
    }
    configure(folder, "mistral", config)
    write(folder / "special_tokens_map.json", {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})


def unigram(folder: Path, lines: list[str]) -> None:
    """A sentencepiece unigram model with a normaliser and without byte fallback, whose answers are cleaned up."""
    changed = {"\t": " ", "\n": " ", "ﬁ": "fi", "①": "1", "…": "...", "e\u0301": "é", "\u200b": "", "\u3000": " "}
    with tempfile.NamedTemporaryFile("w", suffix=".tsv") as rules:  # the usual rules, NFKC, take 240 kB in the model
        for pair in changed.items():
            rules.write("\t".join(" ".join(f"{ord(letter):X}" for letter in text) for text in pair) + "\n")
        rules.flush()
        model = sentencepiece_model(
            lines,
            model_type="unigram",
            vocab_size=PIECES,
            byte_fallback=False,
            normalization_rule_name="",
            normalization_rule_tsv=rules.name,
            remove_extra_whitespaces=True,
            user_defined_symbols=["<sep>"],
        )
    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    proto.normalizer_spec.ClearField("normalization_rule_tsv")  # a name that is never the same
    (folder / "tokenizer.model").write_bytes(proto.SerializeToString(deterministic=True))
    config = {"add_bos_token": True, "clean_up_tokenization_spaces": True, "chat_template": template("rag")}
    configure(folder, "mistral", config)


def gpt2(folder: Path, lines: list[str]) -> None:
    """The class splits words by its own rule, not by that of `tokenizer.json`; tokens in all the old places."""
    tokenizer = byte_level(lines, None)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words])
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    save(folder, tokenizer)
    size = tokenizer.get_vocab_size()
    write(folder / "added_tokens.json", {"<sep>": size, "<mark>": size + 1})
    extra = [{"content": "<ctl>", "lstrip": True, "normalized": False, "rstrip": False, "single_word": False}]
    write(folder / "special_tokens_map.json", {"extra_special_tokens": extra})
    config = {
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>", "<sep>"],
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "tokenizer_class": "GPT2Tokenizer",
        "unk_token": "<|endoftext|>",
        "vocab_size": 49152,
    }
    configure(folder, "llama", config)


FOLDERS: dict[str, Callable[[Path, list[str]], None]] = {
    "llama3": llama3,
    "qwen2": qwen2,
    "llama2-bare": llama2_bare,
    "llama2-old": llama2_old,
    "llama2-legacy": llama2_legacy,
    "added": added,
    "mistral": mistral,
    "unigram": unigram,
    "gpt2": gpt2,
}
