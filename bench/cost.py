"""What a decoded token must read and compute, and the speed-up that early exit could give at best.

A token reads the bytes of the blocks it runs, of the heads it asks and of the keys and values of its context, and
computes 2 operations per weight of these blocks and heads, plus attention over its own context; a block with a sliding
window sees no more than that. A block that an exit owns is part of its head. Measures without logits ask one head,
where the token leaves; a probe asked on the way costs what its exit puts before the output matrix.

The ideal speed-up is the ratio of such costs, full depth over early exit, of the tokens that were really produced.
There are three:

* from bytes, of a row alone in its batch, which memory limits;
* from operations, of rows in a batch so large that arithmetic alone limits it: each row counts by itself;
* from a roofline, of a batch of any size: its rows share one reading of the weights, so a part that few tokens need is
  read in full wherever one row needs it, and each part takes the longer of reading and computing it.

None of them knows fill-in of the keys and values of blocks that a token did not run, an exit test beyond its head, or
host work. Nor do they know rows that wait for each other: rebatching, which runs deep blocks less often for more rows
at once, may come out ahead of the roofline's ideal. So may a machine that computes few rows far below the rate it is
given: arithmetic then limits it at smaller batches, where leaving early saves more than the roofline grants.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from eejax.core import LOGIT_MEASURES, ModelConfig
from eejax.serve import PartSizes


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
        tied_output: all exit points read the same output matrix; otherwise each has its own.
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
    tied_output: bool = True

    @classmethod
    def of(cls, config: ModelConfig, itemsize: int) -> ModelCost:
        """Sizes of the parameters of `config`, `itemsize` bytes each."""
        sizes = PartSizes.of(config)
        return cls(
            n_layers=config.n_layers,
            block_params=sizes.block,
            fill_params=sizes.fill,
            head_params=sizes.heads,
            body_params=sizes.bodies,
            kv_per_token=2 * config.n_kv_heads * config.head_dim,
            attention_ops=4 * config.n_heads * config.head_dim,
            itemsize=itemsize,
            sliding_window=config.sliding_window,
            sliding_from=config.sliding_from,
            block_exits=config.exits.layers if config.exits.head == "block" else (),
            tied_output=config.exits.tie_output,
        )

    def kv_positions(self, token: TokenCost) -> int:
        """Positions whose keys and values a token reads, added up over the blocks that it runs, exits' own included."""
        own = sum(e in self.block_exits for e in (*token.heads, *token.probes))
        return self.segment_positions(token, 0, token.exit_layer) + own * token.context

    def segment_positions(self, token: TokenCost, start: int, stop: int) -> int:
        """The same over the model's blocks `start..stop-1`, counted from 0, which the token must run."""
        seen = token.context if self.sliding_window is None else min(token.context, self.sliding_window)
        below = min(stop, self.sliding_from) - min(start, self.sliding_from)
        return below * token.context + (stop - start - below) * seen

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
    return (*(_tested(exit_points, thresholds, exit_layer) if measure in LOGIT_MEASURES else ()), exit_layer)


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


@dataclass(frozen=True, slots=True)
class _Part:
    """What a step runs at once for all rows that need it.

    Attributes:
        weights: its parameters.
        share: of the tokens, those that need it.
        kv_positions: positions whose keys and values such a token reads in it, mean over these tokens.
    """

    weights: int
    share: float
    kv_positions: float

    @classmethod
    def of(cls, weights: int, positions: Sequence[int], tokens: int) -> _Part:
        """A part that `len(positions)` of `tokens` tokens need; each reads its number of `positions` there."""
        return cls(weights, len(positions) / tokens, sum(positions) / max(1, len(positions)))


def _parts(cost: ModelCost, tokens: Sequence[TokenCost]) -> list[_Part]:
    """All that the steps of `tokens` run: segments, and the heads, bodies and output matrices apart."""
    found, start = [], 0
    # A probe reads a body alone, so a body may be needed where its output matrix is not.
    matrix = min(head - cost.body_params.get(e, 0) for e, head in cost.head_params.items())
    for stop in sorted(cost.head_params):
        runs = [cost.segment_positions(token, start, stop) for token in tokens if token.exit_layer >= stop]
        asks = [
            token.context if stop in cost.block_exits else 0
            for token in tokens
            if stop in token.heads or stop in token.probes
        ]
        found.append(_Part.of((stop - start) * cost.block_params, runs, len(tokens)))
        found.append(_Part.of(cost.head_params[stop] - matrix, asks, len(tokens)))
        start = stop
    # Logits that decide whether a token leaves are computed at their exit. All others only name the token, so they can
    # wait for the end of the step, where one reading of the output matrix that they share is enough.
    deciding = {e for token in tokens for e in token.heads if e < token.exit_layer}
    others = cost.head_params.keys() - deciding
    readings = [{e} for e in deciding] + ([others] if cost.tied_output else [{e} for e in others])
    for points in readings:
        asks = [0 for token in tokens if not points.isdisjoint(token.heads)]
        found.append(_Part.of(matrix, asks, len(tokens)))
    return found


def _binomial(count: int, share: float) -> np.ndarray:
    """Chances that 0 to `count` of `count` rows need what each needs with chance `share`.

    Row by row, so that nothing but positive numbers is ever added, no coefficient overflows, and 0 and 1 are exact.
    """
    chances = np.ones(1)
    for _ in range(count):
        chances = np.convolve(chances, (1 - share, share))
    return chances


def _step_seconds(
    cost: ModelCost, tokens: Sequence[TokenCost], batch_size: int, bandwidth: float, rate: float
) -> float:
    """Expected time of one step, as `ideal_from_roofline` has it."""
    seconds, rows = 0.0, np.arange(batch_size + 1)
    for part in _parts(cost, tokens):
        read = (rows > 0) * part.weights + rows * (part.kv_positions * cost.kv_per_token)
        ops = rows * (2 * part.weights + part.kv_positions * cost.attention_ops)
        times = np.maximum(cost.itemsize * read / bandwidth, ops / rate)
        seconds += float(_binomial(batch_size, part.share) @ times)
    return seconds


def ideal_from_roofline(
    cost: ModelCost, tokens: Sequence[TokenCost], batch_size: int, bandwidth: float, rate: float
) -> float:
    """Ideal speed-up of a batch: expected time of a step at full depth over that of a step with early exit.

    A step runs parts one after another: each segment (the blocks between two neighbouring exits), each head's body and
    each output matrix. A part of `w` parameters is needed by a share `p` of `tokens`, and a token that needs it reads
    `n` positions in it (mean). A step's rows need it or not independently of each other, so the number of rows that do
    is binomial, and the expected time of a step is

        sum over parts of sum over k of C(B, k) p^k (1 - p)^(B - k) max(bytes(k) / bandwidth, ops(k) / rate)

        bytes(k) = itemsize * (w + k * n * kv_per_token), or 0 where k is 0
        ops(k) = k * (2 * w + n * attention_ops)

    Weights are read once if any row needs them, keys and values by every row. Without a limit to the rate and at batch
    1 this is `ideal_from_bytes`, without a limit to the bandwidth `ideal_from_operations`.

    A body and its output matrix are needed by the same rows, but where probes read bodies alone. One reading of the
    output matrix serves all rows whose logits decide nothing, if their exit points share it.

    Args:
        batch_size: rows of every step, B above.
        bandwidth: bytes per second.
        rate: operations per second.
    """
    full = _step_seconds(cost, at_full_depth(tokens, cost.n_layers), batch_size, bandwidth, rate)
    return full / _step_seconds(cost, tokens, batch_size, bandwidth, rate)


def prefill_ops(cost: ModelCost, input_len: int) -> int:
    """Arithmetic operations of one prompt's prefill at full depth, logits of its last token only."""
    last = cost.n_layers
    weights = last * cost.block_params * input_len + cost.head_params[last]
    positions = sum(cost.kv_positions(TokenCost(last, context, (last,))) for context in range(1, input_len + 1))
    return 2 * weights + positions * cost.attention_ops
