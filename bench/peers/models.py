"""Random models as Hugging Face folders that every engine opens, and the requests that all of them answer."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from bench.cost import ModelCost, TokenCost, prefill_ops
from bench.shapes import SHAPES
from eejax.core import ConfigError, ExitConfig, ModelConfig, replacing_folder
from eejax.model import LazyArray, leaves, param_shapes
from eejax.model.huggingface import read_config, write_config, write_folder, write_leaves

EMBEDDING_SCALE = 0.02
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")
FIRST_TOKEN = 300
"""Prompts draw from the tokens from here on: none is special, none a single byte."""

MODELS = {
    "S": SHAPES["llama-20m"],
    "M": SHAPES["llama-125m"],
    "L": SHAPES["llama-1b"],
    # Wide enough for the tokenizer's bytes and special tokens.
    "tiny": dataclasses.replace(SHAPES["tiny"], vocab_size=512, max_position=512),
}
"""22M, 125M and 1.1B parameters; `tiny` is for dry runs."""


def write_model(folder: Path, config: ModelConfig, seed: int) -> None:
    """A folder with `config.json`, float32 weights and a tokenizer; it appears whole or not at all.

    Matrices are normal: of blocks with a deviation of the inputs' number to -1/2, embedding and output of 0.02. So
    blocks outweigh the embedding, and a tied model does not repeat its last token for ever, whatever its cache holds.
    """

    def drawn(number: int, name: str, like: jax.ShapeDtypeStruct) -> LazyArray:
        def read() -> np.ndarray:
            if name.endswith("norm"):
                return np.ones(like.shape, np.float32)
            scale = like.shape[-1] ** -0.5 if name.startswith("blocks.") else EMBEDDING_SCALE
            return np.float32(scale) * np.random.default_rng([seed, number]).standard_normal(like.shape, np.float32)

        return LazyArray(like.shape, np.dtype(np.float32), read)

    config = dataclasses.replace(config, exits=ExitConfig(()))
    found = {name: drawn(number, name, leaf) for number, (name, leaf) in enumerate(leaves(param_shapes(config)))}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    with replacing_folder(folder) as part:
        write_config(part, config, dtype="float32", torch_dtype="float32", **ids)
        (part / "generation_config.json").write_text(json.dumps(ids) + "\n")
        write_folder(part, write_leaves(config, found), 2**40)
        _write_tokenizer(part, config.vocab_size)


def _write_tokenizer(folder: Path, size: int) -> None:
    """Byte-level BPE with pairs of bytes up to the vocabulary's size. No text passes it: engines want one there."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = list(product(alphabet, alphabet))[: size - len(SPECIAL_TOKENS) - len(alphabet)]
    tokens = [*SPECIAL_TOKENS, *alphabet, *(first + second for first, second in merges)]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    described = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(described, indent=1) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(names, indent=1) + "\n")


@dataclass(frozen=True, slots=True)
class PeerModel:
    """A model on disk. `config` has no exits."""

    name: str
    folder: Path
    config: ModelConfig


def find_model(name: str, work: Path, seed: int) -> PeerModel:
    """S, M, L or tiny, written below `work` where it is not there yet; or the Hugging Face folder of that path.

    Raises:
        ConfigError: there is no such folder.
        CheckpointError: its configuration is not supported.
    """
    if name in MODELS:
        folder = work / "models" / f"{name}-{seed}"
        if not folder.is_dir():
            write_model(folder, MODELS[name], seed)
    else:
        folder = Path(name).resolve()
        if not (folder / "config.json").is_file():
            raise ConfigError(f"--model {name!r} is neither one of {', '.join(MODELS)} nor a Hugging Face folder")
    return PeerModel(name if name in MODELS else folder.name, folder, read_config(folder))


@dataclass(frozen=True, slots=True)
class Request:
    """Prompt tokens, and the number of tokens to answer with."""

    prompt: tuple[int, ...]
    max_new: int


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests that arrive all at once."""

    name: str
    requests: tuple[Request, ...]

    @property
    def prompt_tokens(self) -> int:
        return sum(len(one.prompt) for one in self.requests)

    @property
    def output_tokens(self) -> int:
        return sum(one.max_new for one in self.requests)

    def to_dict(self) -> dict[str, Any]:
        """As the engines' processes read it."""
        return {"name": self.name, "requests": [dataclasses.asdict(one) for one in self.requests]}


def _drawn(random: np.random.Generator, count: int) -> list[tuple[int, int]]:
    prompts = random.integers(16, 129, count)
    answers = np.clip(random.lognormal(3.9, 1.0, count), 8, 256)
    return [(int(prompt), int(answer)) for prompt, answer in zip(prompts, answers, strict=True)]


WORKLOADS: dict[str, Callable[[np.random.Generator], list[tuple[int, int]]]] = {
    "b1": lambda _: [(64, 128)],
    "b8": functools.partial(_drawn, count=8),
    "b32": functools.partial(_drawn, count=32),
}
"""Prompt and answer lengths. b1: one request, 64 tokens in, 128 out. b8 and b32: 8 and 32 requests, 16 to 128 tokens
in, uniform, and 8 to 256 out, log-normal with a median of 50."""


def make_workload(name: str, config: ModelConfig, seed: int) -> Workload:
    """`b1`, `b8` or `b32` of seeded random tokens, or the requests of a JSON file.

    The file holds `{"requests": [{"prompt": [token, ...], "max_new": tokens}, ...]}`.

    Raises:
        ConfigError: there is no such workload or file, or the model cannot answer a request.
    """
    if name in WORKLOADS:
        lengths = WORKLOADS[name](np.random.default_rng([seed, 1]))
        ids = np.random.default_rng([seed, 2])
        low = min(FIRST_TOKEN, config.vocab_size - 1)
        drawn = [(ids.integers(low, config.vocab_size, prompt).tolist(), answer) for prompt, answer in lengths]
    else:
        drawn = list(_read(Path(name)))
    if not drawn:
        raise ConfigError(f"{name} has no requests")
    for number, (prompt, answer) in enumerate(drawn):
        where = f"request {number} of {name}"
        if not prompt or answer < 1:
            raise ConfigError(f"{where} has {len(prompt)} prompt tokens and asks for {answer}; both must be at least 1")
        if not all(0 <= token < config.vocab_size for token in prompt):
            raise ConfigError(f"{where} has tokens outside of [0, {config.vocab_size})")
        if len(prompt) + answer > config.max_position:
            raise ConfigError(f"{where} is {len(prompt)} + {answer} tokens long; the model takes {config.max_position}")
    label = name if name in WORKLOADS else Path(name).stem
    return Workload(label, tuple(Request(tuple(prompt), answer) for prompt, answer in drawn))


def _read(file: Path) -> Iterator[tuple[list[int], int]]:
    wanted = f'--workload: {file} is neither {" nor ".join(WORKLOADS)} nor a file of {{"requests": [...]}}'
    try:
        requests = json.loads(file.read_text())["requests"]
        for one in requests:
            yield [int(token) for token in one["prompt"]], int(one["max_new"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{wanted}: {error}") from error


@dataclass(frozen=True, slots=True)
class Least:
    """The least that answering a workload takes, for any engine that computes what the model defines.

    Attributes:
        bytes_read: weights once for all prompts, once for each step of the longest answer; keys and values of each row.
        operations: of all prompts and answers.
        step_bytes: weights and head, once.
    """

    bytes_read: int
    operations: int
    step_bytes: int

    @classmethod
    def of(cls, workload: Workload, config: ModelConfig) -> Least:
        """Counted at full depth in float32."""
        cost, last = ModelCost.of(config, 4), config.n_layers
        tokens = [
            TokenCost(last, len(one.prompt) + i, (last,)) for one in workload.requests for i in range(1, one.max_new)
        ]
        steps = max(one.max_new for one in workload.requests)
        kv = sum(map(cost.kv_positions, tokens))
        operations = sum(map(cost.token_ops, tokens)) + sum(
            prefill_ops(cost, len(one.prompt)) for one in workload.requests
        )
        step_bytes = round(cost.step_bytes(last, 1, 0))
        return cls(steps * step_bytes + cost.itemsize * kv * cost.kv_per_token, operations, step_bytes)

    def seconds(self, bandwidth: float, arithmetic: float) -> float:
        """The later of memory and arithmetic, at rates in bytes and operations per second."""
        return max(self.bytes_read / bandwidth, self.operations / arithmetic)
