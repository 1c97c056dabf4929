"""Random models as Transformers saves them, and what it computes from them: the fixtures of test_transformers.py.

Runs in the oracle's environment (`make oracle`), not in the project's, and imports nothing of eejax. For every model it
writes, below `--out`:

    NAME/               the folder that `save_pretrained` leaves
    NAME.json           the model's shape in plain words, and how clear-cut its greedy choices are
    NAME.safetensors    what Transformers makes of that folder, computed in float32 on one CPU thread:
        text         [64]           a prompt
        logits       [64, V]        after each of its tokens
        exit_logits  [L-1, 8, V]    after the last 8, by the model cut off after 1, 2, … L-1 blocks
        prompts      [P, longest]   more prompts, padded with -1
        tokens       [P, 32]        their greedy continuations
        top_ids      [P, 32, 8]     the likeliest tokens at each of these steps, likeliest first
        top_logprobs [P, 32, 8]     their natural log-probabilities
        exit_tokens  [L-1, 32]      continuations of the third prompt whose first token comes from the whole model, all
                                    others from the one cut off after 1, 2, … L-1 blocks: decoding with a fixed exit
        exit_logprobs [L-1, 32]     their log-probabilities

The same seed, versions (`versions.json`) and kind of CPU give the same bytes.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import platform
import shutil
import zlib
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils import logging

TEXT_LENGTH = 64
PROMPT_LENGTHS = (1, 5, 17, 40)
EXIT_PROMPT = 2
NEW_TOKENS = 32
TOP = 8
EXIT_POSITIONS = 8
MARGIN = 1e-3
"""Least difference of the two best logits wherever a token is chosen: ten times what eejax may be off."""
DISTINCT = 4
"""Least number of different tokens in a continuation: one that repeats itself would hide a wrong cache."""

FAMILIES = {"llama": 67, "mistral": 67, "qwen2": 71, "qwen3": 57}
"""Model types and vocabulary sizes, all odd. Mistral's models are Llama's in shape: one compilation serves both."""
DTYPES = ("float32", "bfloat16", "float16", "bfloat16", "float16")
THETAS = (10000.0, 500000.0, 1000000.0)
# Of the three wavelengths of head_dim 6 at theta 500000 this keeps one, blends one and slows one.
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 1024}


@dataclass(frozen=True)
class Spec:
    """One model. No two of the sizes given here are equal, so that none is taken for another unnoticed.

    head_dim: hidden_size / n_heads when None.
    sliding_from: blocks below this one see everything (Qwen's `max_window_layers`).
    old_config: config.json is written as Transformers 4 wrote it.
    max_shard_size: bytes of weights in one file at the most; None writes one file and no index.
    """

    family: str
    vocab_size: int
    dtype: str = "float32"
    tied: bool = False
    hidden_size: int = 24
    intermediate_size: int = 30
    n_layers: int = 3
    n_heads: int = 4
    n_kv_heads: int = 2
    head_dim: int | None = 10
    max_position: int = 128
    rope_theta: float = 10000.0
    llama3_rope: dict | None = None
    norm_eps: float = 1e-6
    sliding_window: int | None = None
    sliding_from: int = 0
    old_config: bool = False
    max_shard_size: int | None = None


def product(head_dims: tuple[int | None, ...]) -> dict[str, Spec]:
    """Every family, tied and untied, with fewer and with as many key heads, with every head size.

    What a file may differ in besides (dtype, age of config.json, base of the rotary embedding, epsilon) goes round.
    """
    shapes = list(enumerate(itertools.product((True, False), (2, 4), head_dims)))
    specs = {}
    for family, (shape, (tied, n_kv_heads, head_dim)) in itertools.product(FAMILIES, shapes):
        heads = "mha" if n_kv_heads == 4 else "gqa"
        name = f"{family}-{'tied' if tied else 'untied'}-{heads}{'' if head_dim else '-plain'}"
        specs[name] = Spec(
            family,
            FAMILIES[family],
            dtype=DTYPES[len(specs) % len(DTYPES)],
            tied=tied,
            n_kv_heads=n_kv_heads,
            head_dim=head_dim,
            rope_theta=THETAS[shape % len(THETAS)],
            norm_eps=(1e-6, 1e-5)[shape % 2],
            old_config=(shape + list(FAMILIES).index(family)) % 2 == 1,
        )
    return specs


def special() -> dict[str, Spec]:
    """What only some families, or only some files, have."""
    llama, qwen2 = Spec("llama", FAMILIES["llama"], "bfloat16"), Spec("qwen2", FAMILIES["qwen2"], "bfloat16")
    mistral, qwen3 = Spec("mistral", FAMILIES["mistral"], "bfloat16"), Spec("qwen3", FAMILIES["qwen3"], "float16")
    llama3 = replace(llama, tied=True, head_dim=None, rope_theta=500000.0, llama3_rope=LLAMA3, max_position=8192)
    return {
        "llama3-rope": llama3,
        "llama3-rope-old": replace(llama3, old_config=True),
        "mistral-window": replace(mistral, sliding_window=16),
        "qwen2-window-sharded": replace(qwen2, head_dim=None, sliding_window=13, sliding_from=1, max_shard_size=10_000),
        "qwen3-window": replace(qwen3, sliding_window=16, sliding_from=2, old_config=True),
    }


def specs(full: bool) -> dict[str, Spec]:
    """The models that are committed; with `full`, those of the live test."""
    return product((10, None) if full else (10,)) | special()


def new_model(spec: Spec, rng: np.random.Generator) -> PreTrainedModel:
    """A model of this shape with random weights."""
    options = {} if spec.head_dim is None else {"head_dim": spec.head_dim}
    if spec.family == "qwen3" and spec.head_dim is None:
        options["head_dim"] = spec.hidden_size // spec.n_heads  # 128 otherwise, whatever the other sizes
    if spec.family == "mistral":
        options["sliding_window"] = spec.sliding_window
    elif spec.sliding_window is not None:
        options |= {"use_sliding_window": True, "sliding_window": spec.sliding_window}
        options["max_window_layers"] = spec.sliding_from
    rope = {"rope_type": "default"} if spec.llama3_rope is None else {"rope_type": "llama3", **spec.llama3_rope}
    config = AutoConfig.for_model(
        spec.family,
        vocab_size=spec.vocab_size,
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        num_hidden_layers=spec.n_layers,
        num_attention_heads=spec.n_heads,
        num_key_value_heads=spec.n_kv_heads,
        max_position_embeddings=spec.max_position,
        rope_parameters={"rope_theta": spec.rope_theta, **rope},
        rms_norm_eps=spec.norm_eps,
        tie_word_embeddings=spec.tied,
        bos_token_id=None,
        eos_token_id=None,
        **options,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomise(model, spec.tied, rng)
    return model


@torch.no_grad()
def randomise(model: PreTrainedModel, tied: bool, rng: np.random.Generator) -> None:
    """Weights that make lively text: logits with a standard deviation of about 3, no norm all ones, no bias zero.

    A matrix keeps the variance of a normalised input, times a gain; o_proj and down_proj weigh the blocks against the
    embedding, and have to weigh more where the output matrix is the embedding, or else every token repeats itself.
    """
    gains = {"embed_tokens": 3.0, "lm_head": 3.0, "q_proj": 1.5}
    gains |= {"o_proj": 4.0, "down_proj": 6.0} if tied else {"o_proj": 1.5, "down_proj": 2.0}
    for name, parameter in model.named_parameters():
        shape, module = tuple(parameter.shape), name.split(".")[-2]
        if name.endswith(".bias"):
            values = 0.5 * rng.standard_normal(shape)
        elif len(shape) == 1:
            values = rng.uniform(0.6, 1.4, shape)
        else:
            values = gains.get(module, 1.0) / np.sqrt(shape[-1]) * rng.standard_normal(shape)
        parameter.copy_(torch.from_numpy(values.astype(np.float32)))


def rewrite_config(file: Path, spec: Spec) -> None:
    """Write config.json as Transformers 4 did: rotary options beside the others, `torch_dtype`, defaults left out."""
    values = json.loads(file.read_text())
    rope = values.pop("rope_parameters")
    values["rope_theta"] = rope.pop("rope_theta")
    values["rope_scaling"] = rope if rope["rope_type"] != "default" else None
    values["torch_dtype"] = values.pop("dtype")
    values.pop("layer_types", None)
    if spec.head_dim is None and spec.family != "qwen3":
        values.pop("head_dim", None)
    if spec.family == "llama" and spec.n_kv_heads == spec.n_heads:
        values.pop("num_key_value_heads")
    if spec.family.startswith("qwen") and spec.sliding_window is None:
        values |= {"use_sliding_window": False, "sliding_window": 16, "max_window_layers": 1}
    values["transformers_version"] = "4.45.0"
    file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def open_model(folder: Path) -> PreTrainedModel:
    """The model in `folder` as Transformers opens it, in float32. Raises if a tensor is missing, extra or misshaped."""
    model, report = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    problems = {kind: found for kind, found in report.items() if found}
    if problems:
        raise ValueError(f"{folder}: {problems}")
    return model.eval()


@torch.no_grad()
def logits_of(model: PreTrainedModel, tokens: np.ndarray) -> np.ndarray:
    """Logits `[T, V]` after each of `tokens [T]`."""
    ids = torch.from_numpy(np.asarray(tokens, np.int64))[None]
    return model(ids, use_cache=False).logits[0].numpy()


def cut_off(model: PreTrainedModel, n_layers: int) -> PreTrainedModel:
    """The first `n_layers` blocks, then the final norm and head: LayerSkip's early exit (arXiv 2404.16710)."""
    shorter = copy.deepcopy(model)
    shorter.model.layers = shorter.model.layers[:n_layers]
    shorter.config.num_hidden_layers = n_layers
    return shorter


def continuation(model: PreTrainedModel, prompt: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Greedy tokens `[count]` after `prompt`, by Transformers' own `generate`, and the logits `[count, V]` behind."""
    ids = torch.from_numpy(np.asarray(prompt, np.int64))[None]
    found = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        generation_config=GenerationConfig(
            max_new_tokens=count, do_sample=False, pad_token_id=0, output_logits=True, return_dict_in_generate=True
        ),
    )
    return found.sequences[0, len(prompt) :].numpy(), torch.cat(found.logits).float().numpy()


def clear_prompt(models: list[PreTrainedModel], length: int, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """The first random prompt that each model continues in a clear-cut and varied way.

    Returns:
        The prompt `[length]`, the tokens `[models, 32]` and their logits `[models, 32, V]`. The first token of all is
        that of the first model, the whole one.
    """
    for _ in range(500):
        prompt = rng.integers(0, models[0].config.vocab_size, length)
        found = []
        for model in models:
            if not found:
                tokens, logits = continuation(model, prompt, NEW_TOKENS)
            else:
                first, behind = found[0][0][:1], found[0][1][:1]
                tokens, logits = continuation(model, np.append(prompt, first), NEW_TOKENS - 1)
                tokens, logits = np.append(first, tokens), np.concatenate([behind, logits])
            if margin(logits) <= MARGIN or len(set(tokens.tolist())) < DISTINCT:
                break
            found.append((tokens, logits))
        else:
            return prompt, np.stack([one[0] for one in found]), np.stack([one[1] for one in found])
    raise ValueError(f"no random prompt of {length} tokens has clear-cut, varied continuations")


def margin(logits: np.ndarray) -> float:
    """Smallest difference between the two largest of each row of `logits [..., V]`."""
    ordered = np.sort(logits, axis=-1)
    return float(np.min(ordered[..., -1] - ordered[..., -2]))


def expected(model: PreTrainedModel, rng: np.random.Generator) -> tuple[dict[str, np.ndarray], float]:
    """The arrays of NAME.safetensors, and the smallest margin of all greedy choices in them."""
    text = rng.integers(0, model.config.vocab_size, TEXT_LENGTH)
    exits = [cut_off(model, depth) for depth in range(1, model.config.num_hidden_layers)]
    prompts, tokens, logits = [], [], []
    for number, length in enumerate(PROMPT_LENGTHS):
        found = clear_prompt([model, *exits] if number == EXIT_PROMPT else [model], length, rng)
        prompts.append(np.pad(found[0], (0, max(PROMPT_LENGTHS) - length), constant_values=-1))
        tokens.append(found[1])
        logits.append(found[2])
    logprobs = [torch.log_softmax(torch.from_numpy(one).double(), dim=-1).numpy() for one in logits]
    full = np.stack([one[0] for one in logprobs])
    top = np.argsort(-full, axis=-1, kind="stable")[..., :TOP]
    exit_tokens = tokens[EXIT_PROMPT][1:]
    exit_logprobs = np.take_along_axis(logprobs[EXIT_PROMPT][1:], exit_tokens[..., None], axis=-1)[..., 0]
    arrays = {
        "text": text.astype(np.int8),
        "logits": logits_of(model, text),
        "exit_logits": np.stack([logits_of(one, text)[-EXIT_POSITIONS:] for one in exits]),
        "prompts": np.stack(prompts).astype(np.int8),
        "tokens": np.stack([one[0] for one in tokens]).astype(np.int8),
        "top_ids": top.astype(np.int8),
        "top_logprobs": np.take_along_axis(full, top, axis=-1).astype(np.float32),
        "exit_tokens": exit_tokens.astype(np.int8),
        "exit_logprobs": exit_logprobs.astype(np.float32),
    }
    return arrays, min(margin(one) for one in logits)


def write(out: Path, name: str, spec: Spec, seed: int) -> None:
    """Write NAME/, and what Transformers computes from the model that it reads back from there."""
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    folder = out / name
    shutil.rmtree(folder, ignore_errors=True)
    model = new_model(spec, rng).to(getattr(torch, spec.dtype))
    model.save_pretrained(folder, max_shard_size=spec.max_shard_size or "1GB")
    if spec.old_config:
        rewrite_config(folder / "config.json", spec)
    model = open_model(folder)
    arrays, smallest = expected(model, rng)
    save_file({key: np.ascontiguousarray(value) for key, value in arrays.items()}, out / f"{name}.safetensors")
    about = asdict(spec) | {"logit_std": float(np.std(arrays["logits"])), "margin": smallest}
    (out / f"{name}.json").write_text(json.dumps(about, indent=1) + "\n")
    print(f"{name}: logits have std {about['logit_std']:.2f}, greedy margin {smallest:.4f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write random models and what Transformers makes of them.")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write to")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these models only")
    parser.add_argument("--full", action="store_true", help="the whole product of what a model can differ in")
    parser.add_argument("--seed", type=int, default=0, help="other weights and prompts")
    options = parser.parse_args()
    wanted = specs(options.full)
    unknown = sorted(set(options.only or ()) - set(wanted))
    if unknown:
        parser.error(f"no model is called {', '.join(unknown)}; there are {', '.join(wanted)}")

    logging.disable_progress_bar()
    torch.set_num_threads(1)  # sums in another order would give other bytes
    torch.use_deterministic_algorithms(True)
    options.out.mkdir(parents=True, exist_ok=True)
    packages = ("torch", "transformers", "safetensors", "numpy")
    versions = {"python": ".".join(platform.python_version_tuple()[:2]), **{name: version(name) for name in packages}}
    (options.out / "versions.json").write_text(json.dumps(versions, indent=1) + "\n")
    for name in options.only or wanted:
        write(options.out, name, wanted[name], options.seed)


if __name__ == "__main__":
    main()
