"""Shapes of the random-weight models that `--random` builds. Nothing here imports jax."""

from __future__ import annotations

import dataclasses

from eejax.core import ConfigError, ExitConfig, ModelConfig


def _llama(
    vocab_size: int, hidden: int, mlp: int, layers: int, heads: int, kv_heads: int, tied: bool, positions: int = 2048
) -> ModelConfig:
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=mlp,
        n_layers=layers,
        n_heads=heads,
        n_kv_heads=kv_heads,
        head_dim=hidden // heads,
        max_position=positions,
        tie_embeddings=tied,
        exits=ExitConfig(layers=(round(layers / 3), round(2 * layers / 3))),
    )


SHAPES = {
    "tiny": _llama(vocab_size=64, hidden=16, mlp=32, layers=6, heads=2, kv_heads=1, tied=False, positions=256),
    "llama-20m": _llama(vocab_size=8192, hidden=384, mlp=1024, layers=12, heads=6, kv_heads=2, tied=True),
    "llama-125m": _llama(vocab_size=32000, hidden=768, mlp=2048, layers=12, heads=12, kv_heads=4, tied=False),
    "llama-1b": _llama(vocab_size=32000, hidden=2048, mlp=5632, layers=22, heads=32, kv_heads=4, tied=False),
    "llama-7b": _llama(vocab_size=32000, hidden=4096, mlp=11008, layers=32, heads=32, kv_heads=32, tied=False),
}
"""22M, 125M, 1.1B and 6.7B parameters, the last being Llama 2's; exits after a third and two thirds of the blocks,
through the shared head. `tiny` is for dry runs: its times say nothing."""


def shape(name: str, exit_layers: tuple[int, ...] | None = None) -> ModelConfig:
    """The shape of that name, with other exits where given."""
    if name not in SHAPES:
        raise ConfigError(f"--random {name!r} is not a known shape; there are {', '.join(SHAPES)}")
    config = SHAPES[name]
    if exit_layers is None:
        return config
    return dataclasses.replace(config, exits=ExitConfig(layers=exit_layers))
