"""Tiny models of every shape, and requests to them whose decisions are clear-cut.

Random initialisation at scale 0.02 gives nearly uniform logits: no token would ever leave early and greedy text would
be constant. Here every matrix has the scale that keeps a normalised input's variance, times a gain, so confidences
spread over (0, 1), attention matters, and an error in one K or V shows in the text.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from eejax.core import DecayingThreshold, EarlyExitParams, ExitConfig, ModelConfig, RopeScaling
from eejax.model.transformer import param_shapes
from tests.reference import Reference, ReferenceResult, confidence, generate

CLEAR = 1e-4
"""Float32 results are promised to the token where the reference's margins exceed this."""

MAX_POSITION = 128

BASE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "n_layers": 4,
    "n_heads": 4,
    "n_kv_heads": 2,
    "head_dim": 8,
    "max_position": MAX_POSITION,
    "exits": ExitConfig((1, 3)),
}
# Wavelengths of head_dim 8 at theta 10000 are 6, 63, 628 and 6283 positions: kept, blended, and twice slowed down.
LLAMA3 = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=64)

SHAPES: dict[str, dict] = {
    "gqa": {},
    "mha": {"n_kv_heads": 4, "n_layers": 3, "exits": ExitConfig((1, 2))},
    "mqa": {"n_kv_heads": 1, "n_layers": 3, "exits": ExitConfig((1,))},
    "deep": {"n_layers": 6, "exits": ExitConfig((2, 4, 5))},
    "norm_tied": {"exits": ExitConfig((1, 3), "norm")},
    "norm_own": {"exits": ExitConfig((2, 3), "norm", tie_output=False), "vocab_size": 53},
    "mlp_tied": {"exits": ExitConfig((1, 3), "mlp")},
    "mlp_own": {"exits": ExitConfig((1, 2, 3), "mlp", tie_output=False)},
    "bare": {"exits": ExitConfig((1, 3), "norm", norm=False)},  # the LM head on hidden states as they are
    "normless": {"exits": ExitConfig((1, 3), "norm", norm=False, tie_output=False)},
    "block_tied": {"exits": ExitConfig((1, 3), "block")},
    "block_own": {"exits": ExitConfig((1, 2, 3), "block", norm=False, tie_output=False), "n_kv_heads": 1},
    "bias": {"attention_bias": True},
    "qk_norm": {"qk_norm": True},
    "llama3_rope": {"rope_scaling": LLAMA3},
    "tied_embeddings": {"tie_embeddings": True},
    "probes": {"n_layers": 3, "exits": ExitConfig((1, 2), probes=True)},
    "window": {"sliding_window": 5},
    "window_above": {"sliding_window": 11, "sliding_from": 2, "n_layers": 3, "exits": ExitConfig((1, 2))},
    "odd_sizes": {
        "vocab_size": 37,
        "hidden_size": 22,
        "intermediate_size": 35,
        "n_heads": 3,
        "n_kv_heads": 3,
        "head_dim": 10,
        "n_layers": 5,
        "exits": ExitConfig((2, 3)),
    },
    "everything": {
        "vocab_size": 67,
        "n_heads": 6,
        "head_dim": 6,
        "n_layers": 5,
        "attention_bias": True,
        "qk_norm": True,
        "rope_scaling": LLAMA3,
        "rope_theta": 500000.0,
        "norm_eps": 1e-3,
        "tie_embeddings": True,
        "exits": ExitConfig((1, 2, 4), "mlp", tie_output=False),
    },
    "everything_else": {
        "n_heads": 6,
        "n_kv_heads": 3,
        "head_dim": 6,
        "n_layers": 4,
        "qk_norm": True,
        "rope_theta": 1000.0,
        "tie_embeddings": True,
        "sliding_window": 7,
        "sliding_from": 1,
        "exits": ExitConfig((1, 3), "block", tie_output=False, probes=True),
    },
}


def shape_config(shape: str = "gqa", **overrides) -> ModelConfig:
    """The configuration of a named shape."""
    return ModelConfig(**{**BASE, **SHAPES[shape], **overrides})


def random_params(config: ModelConfig, seed: int = 0, sharpness: float = 3.0) -> dict:
    """Seeded float32 parameters; `sharpness` is the standard deviation of the logits. No norm is all ones."""
    rng = np.random.default_rng(seed)
    # Most matrices multiply what a norm put out. `wo` and `down` do not, and weigh blocks against the embedding.
    gains = {"wo": 1.5, "down": 2.0, "wq": 1.5, "output": sharpness, "embedding": sharpness}
    if config.tie_embeddings:  # or else the likeliest token is most often the one just read
        gains |= {"wo": 4.0, "down": 6.0}

    def leaf(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name.endswith("norm"):
            return rng.uniform(0.6, 1.4, shape).astype(np.float32)
        scale = gains.get(name, 1.0) / np.sqrt(shape[-1]) if len(shape) == 2 else 0.5
        return (scale * rng.standard_normal(shape)).astype(np.float32)

    def walk(tree: dict) -> dict:
        return {k: walk(v) if isinstance(v, dict) else leaf(k, v.shape) for k, v in tree.items()}

    params = walk(param_shapes(config))
    if not config.exits.norm and not config.exits.tie_output:
        for head in params.get("exits", {}).values():
            head["output"] *= np.float32(0.4)  # features are larger than those a norm puts out
    return params


@functools.cache
def random_model(shape: str = "gqa", seed: int = 0, sharpness: float = 3.0, **overrides) -> tuple[ModelConfig, dict]:
    """A named shape with seeded parameters."""
    config = shape_config(shape, **overrides)
    return config, random_params(config, seed, sharpness)


def random_prompt(config: ModelConfig, length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng([seed, length]).integers(0, config.vocab_size, length).tolist()


@dataclass(frozen=True)
class Case:
    """A request together with the answer it must get."""

    prompt: tuple[int, ...]
    max_tokens: int
    early_exit: EarlyExitParams | None
    expected: ReferenceResult
    stop_token_ids: tuple[int, ...] = ()
    eos_id: int | None = None


def thresholds_letting(
    config: ModelConfig, params: dict, measure: str, share: float, texts: Sequence[Sequence[int]] | None = None
) -> tuple[float, ...]:
    """One threshold per exit such that about `share` of the tokens that come there would leave.

    Measured on `texts` at full depth; on one random text when not given.
    """
    texts = [random_prompt(config, 48, 1000)] if texts is None else texts
    watched = [Reference(config, params).watch(text) for text in texts]
    found = {
        e: [
            confidence(measure, seen[e].at(i))
            for seen, text in zip(watched, texts, strict=True)
            for i in range(len(text))
        ]
        for e in config.exits.layers
    }
    return tuple(max(0.0, float(np.quantile(found[e], 1 - share))) for e in config.exits.layers)  # cosines go below 0


def exit_settings(config: ModelConfig, params: dict, measure: str) -> Iterator[tuple[str, EarlyExitParams, set[int]]]:
    """The forms in which a threshold can be given, and the exits that a telling case of each has to show."""
    layers, depth = config.exits.layers, config.n_layers
    each = thresholds_letting(config, params, measure, 0.4)
    yield "per_exit", EarlyExitParams(each, measure), {*layers, depth}
    yield "one_number", EarlyExitParams(float(np.mean(each)), measure), {layers[0], depth}
    yield "decaying", EarlyExitParams(DecayingThreshold(each, tau=3.0), measure), {*layers, depth}
    yield "always", EarlyExitParams(0.0, measure), {layers[0]}
    yield "subset", EarlyExitParams(each[-1:], measure, exit_layers=layers[-1:]), {layers[-1], depth}
    yield "min_layers", EarlyExitParams(each, measure, min_layers=layers[-1]), {layers[-1], depth}


def draw_case(
    config: ModelConfig,
    params: dict,
    *,
    early_exit: EarlyExitParams | None,
    prompt_length: int = 7,
    max_tokens: int = 14,
    want_exits: frozenset[int] | set[int] = frozenset(),
    wanted: Callable[[tuple[int, ...], ReferenceResult], bool] = lambda prompt, result: True,
    seeds: range = range(400),
    **stops,
) -> Case:
    """The first prompt, in order of seeds, whose answer is clear-cut and in which tokens left at all of `want_exits`.

    The first answer token comes from the prompt and counts for no exit. `wanted` may ask for more.
    """
    for seed in seeds:
        prompt = tuple(random_prompt(config, prompt_length, seed))
        expected = generate(config, params, prompt, max_tokens=max_tokens, early_exit=early_exit, **stops)
        clear = expected.margins.smallest > CLEAR and set(want_exits) <= set(expected.exit_layers[1:])
        if clear and wanted(prompt, expected):
            return Case(prompt, max_tokens, early_exit, expected, **stops)
    raise AssertionError(f"no seed in {seeds} gives a clear-cut case with exits {sorted(want_exits)} for {early_exit}")
