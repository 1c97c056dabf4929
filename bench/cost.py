"""What a decoded token must read and compute, and the speed-up that early exit could give at best.

Batch 1 is limited by memory: a token costs the bytes of the blocks it runs, of the heads it asks and of the keys and
values it reads. In a batch the weights are read once for all rows, and a row's own cost is its arithmetic: 2 operations
per weight of the blocks it runs and the heads it asks, plus attention over its own context, or over the sliding window
of a block that has one. A block that an exit owns is part of its head. Measures without logits ask one head, where the
token leaves; a probe asked on the way costs what its exit puts before the output matrix. The ideal speed-up is the
ratio of these costs, full depth over early exit, of the tokens that were really produced: it knows no fill-in of the
keys and values of blocks that a token did not run, no exit test beyond its head, no host work, and no row that waits
for another.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from eejax.config import ModelConfig
from eejax.exits import NEEDS_LOGITS
from eejax.model import count_params, param_shapes


@dataclass(frozen=True, slots=True)
class TokenCost:
    """What one decoded token needed.

    Attributes:
        exit_layer: blocks it ran.
        context: positions up to and with its own, which attention reads where no window hides them.
        heads: exit points whose head it asked.
        probes: exit layers where it asked a probe, and no head.
    """

    exit_layer: int
    context: int
    heads: tuple[int, ...]
    probes: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class ModelCost:
    """Sizes of a model's parts.

    Attributes:
        block_params: parameters of one block.
        fill_params: those of them that KV fill-in reads: the K and V projection.
        head_params: parameters read when logits are computed at an exit point, by exit point; a block that the exit
            owns among them.
        body_params: of those, what stands before the output matrix, by exit layer; a probe reads it.
        kv_per_token: key and value elements of one token in one block.
        attention_ops: arithmetic operations per query token, block and context position.
        itemsize: bytes of one weight or cache element.
        sliding_window, sliding_from: as in `ModelConfig`.
        block_exits: exit layers that own a block.
    """

    n_layers: int
    block_params: int
    fill_params: int
    head_params: dict[int, int]
    body_params: dict[int, int]
    kv_per_token: int
    attention_ops: int
    itemsize: int
    sliding_window: int | None = None
    sliding_from: int = 0
    block_exits: tuple[int, ...] = ()

    @classmethod
    def of(cls, config: ModelConfig, itemsize: int) -> ModelCost:
        """Sizes counted from the parameters of `config`, `itemsize` bytes each."""
        shapes = param_shapes(config)
        block = next(iter(shapes["blocks"].values()))
        matrix = shapes["embedding" if config.tie_embeddings else "output"].size
        heads, bodies = {config.n_layers: matrix + config.hidden_size}, {}
        for layer, name in zip(config.exits.layers, config.exit_names, strict=True):
            parts = shapes.get("exits", {}).get(name, {})
            # The probe itself, one number for each of the hidden state's, is not worth counting.
            own = sum(count_params(part) for key, part in parts.items() if key in ("norm", "mlp", "block"))
            bodies[layer] = own + (config.hidden_size if config.exits.head == "shared" else 0)
            heads[layer] = bodies[layer] + matrix
        return cls(
            n_layers=config.n_layers,
            block_params=count_params(block),
            fill_params=block["wkv"].size,
            head_params=heads,
            body_params=bodies,
            kv_per_token=2 * config.n_kv_heads * config.head_dim,
            attention_ops=4 * config.n_heads * config.head_dim,
            itemsize=itemsize,
            sliding_window=config.sliding_window,
            sliding_from=config.sliding_from,
            block_exits=config.exits.layers if config.exits.head == "block" else (),
        )

    def kv_positions(self, token: TokenCost) -> int:
        """Positions whose keys and values a token reads, added up over the blocks that it runs, exits' own included."""
        seen = token.context if self.sliding_window is None else min(token.context, self.sliding_window)
        below = min(token.exit_layer, self.sliding_from)
        own = sum(e in self.block_exits for e in (*token.heads, *token.probes))
        return (below + own) * token.context + (token.exit_layer - below) * seen

    def weights(self, token: TokenCost) -> int:
        """Parameters of all that a token runs and asks."""
        heads = sum(self.head_params[e] for e in token.heads)
        return token.exit_layer * self.block_params + heads + sum(self.body_params[e] for e in token.probes)

    def token_bytes(self, token: TokenCost) -> int:
        """Bytes that a token alone in its batch must read."""
        return self.itemsize * (self.weights(token) + self.kv_positions(token) * self.kv_per_token)

    def fill_bytes(self, token: TokenCost) -> int:
        """Bytes of weights that filling in the keys and values of the blocks which this token did not run reads."""
        unasked = sum(e not in (*token.heads, *token.probes) for e in self.block_exits)
        return self.itemsize * (self.n_layers - token.exit_layer + unasked) * self.fill_params

    def token_ops(self, token: TokenCost) -> int:
        """Arithmetic operations (additions and multiplications) that a token needs."""
        return 2 * self.weights(token) + self.kv_positions(token) * self.attention_ops

    def mean_head(self, tokens: Sequence[TokenCost]) -> float:
        """Parameters of a head, mean over those that the tokens asked; of the last one if they asked none."""
        asked = [self.head_params[e] for token in tokens for e in token.heads]
        return sum(asked) / len(asked) if asked else self.head_params[self.n_layers]

    def step_bytes(self, blocks: float, heads: float, kv_positions: float, head: float | None = None) -> float:
        """Bytes that one step of a batch reads: weights of blocks and heads once, keys and values of every row.

        Args:
            blocks: blocks the batch runs, mean over steps.
            heads: heads it asks, mean over steps.
            kv_positions: sum over rows of `kv_positions`, mean over steps.
            head: parameters of one of these heads (`mean_head`); of the last one when not given.
        """
        head = self.head_params[self.n_layers] if head is None else head
        return self.itemsize * (blocks * self.block_params + heads * head + kv_positions * self.kv_per_token)


def heads_asked(
    exit_points: Sequence[int], thresholds: Sequence[float], measure: str, exit_layer: int
) -> tuple[int, ...]:
    """Exit points whose head a token asks on its way to `exit_layer`.

    Args:
        exit_points: exit layers, then the number of blocks.
        thresholds: one per exit layer; infinite where the request may not leave.
        measure: those that need no logits ask no head to decide, only the last one for its token.
    """
    return (*(_tested(exit_points, thresholds, exit_layer) if measure in NEEDS_LOGITS else ()), exit_layer)


def _tested(exit_points: Sequence[int], thresholds: Sequence[float], exit_layer: int) -> tuple[int, ...]:
    """Exit layers below `exit_layer` where a token was tested."""
    return tuple(e for e, t in zip(exit_points[:-1], thresholds, strict=True) if e < exit_layer and math.isfinite(t))


def decoded_tokens(
    exit_layers: Sequence[int],
    input_len: int,
    exit_points: Sequence[int],
    thresholds: Sequence[float],
    measure: str,
) -> list[TokenCost]:
    """Costs of one answer's decoded tokens. Its first token comes from prefill and is left out.

    Answer token `i` is decoded from a context of the prompt and the `i` answer tokens before it.
    """
    needs = {}
    for layer in exit_points:
        probes = _tested(exit_points, thresholds, layer) if measure == "classifier" else ()
        needs[layer] = heads_asked(exit_points, thresholds, measure, layer), probes
    return [TokenCost(layer, input_len + i, *needs[layer]) for i, layer in enumerate(exit_layers) if i > 0]


def at_full_depth(tokens: Iterable[TokenCost], n_layers: int) -> list[TokenCost]:
    """The same tokens, had each run every block and asked the last head alone."""
    return [TokenCost(n_layers, token.context, (n_layers,)) for token in tokens]


def ideal_from_bytes(cost: ModelCost, tokens: Sequence[TokenCost]) -> float:
    """Ideal speed-up of a token alone in its batch."""
    full = sum(map(cost.token_bytes, at_full_depth(tokens, cost.n_layers)))
    return full / sum(map(cost.token_bytes, tokens))


def ideal_from_operations(cost: ModelCost, tokens: Sequence[TokenCost], extra: int = 0) -> float:
    """Ideal speed-up of rows in a batch; `extra` operations, prefill say, are the same in both."""
    full = sum(map(cost.token_ops, at_full_depth(tokens, cost.n_layers)))
    return (full + extra) / (sum(map(cost.token_ops, tokens)) + extra)


def prefill_ops(cost: ModelCost, input_len: int) -> int:
    """Arithmetic operations of one prompt's prefill at full depth, logits of its last token only."""
    last = cost.n_layers
    weights = last * cost.block_params * input_len + cost.head_params[last]
    positions = sum(cost.kv_positions(TokenCost(last, context, (last,))) for context in range(1, input_len + 1))
    return 2 * weights + positions * cost.attention_ops
