"""The shapes of `--random` have the sizes that their names say."""

from __future__ import annotations

import pytest

from bench.cost import ModelCost
from bench.shapes import SHAPES


def test_shapes_have_the_sizes_they_are_named_after() -> None:
    sizes = {"llama-20m": 22e6, "llama-125m": 125e6, "llama-1b": 1.1e9}
    for name, size in sizes.items():
        config = SHAPES[name]
        cost = ModelCost.of(config, 4)
        output = 0 if config.tie_embeddings else config.vocab_size * config.hidden_size
        total = config.n_layers * cost.block_params + cost.head_params[config.n_layers] + output
        assert total == pytest.approx(size, rel=0.01)
        assert [round(3 * layer / config.n_layers) for layer in config.exits.layers] == [1, 2]
