"""What testing an exit costs, and what exiting there saves, in transformer blocks. No jax here.

The unit is the weights of one block that a token reads, so the figures are the same for bytes and for multiply-adds.
Attention over the context and fill-in of the keys and values of skipped blocks are not counted. Long contexts make
blocks more expensive and so raise the saving; fill-in lowers it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from eejax.core import ModelConfig

MIN_TOKENS = 256
"""Tokens that must have been decoded before anything is concluded from their exits."""


@dataclass(frozen=True, slots=True)
class PartSizes:
    """Parameters of a model's parts.

    Attributes:
        block: of one block; `fill` is the part that KV fill-in reads: the K and V projection's matrix.
        heads: read when logits are computed at an exit point, by exit point, including a block that the exit owns.
        bodies: of those, the part before the output matrix, by exit layer; a probe reads it. The probe itself, one
            number for each of the hidden state's, is not worth counting.
    """

    block: int
    fill: int
    heads: dict[int, int]
    bodies: dict[int, int]

    @classmethod
    def of(cls, config: ModelConfig) -> PartSizes:
        """Sizes of what `eejax.model` builds from `config`."""
        hidden, q_size = config.hidden_size, config.n_heads * config.head_dim
        kv_size = 2 * config.n_kv_heads * config.head_dim
        mlp = 3 * config.intermediate_size * hidden
        block = 2 * hidden + (2 * q_size + kv_size) * hidden + mlp
        block += config.attention_bias * (q_size + kv_size) + config.qk_norm * 2 * config.head_dim
        exits, matrix = config.exits, config.vocab_size * hidden
        body = exits.norm * hidden + {"mlp": mlp, "block": block}.get(exits.head, 0)
        heads = dict.fromkeys(exits.layers, body + matrix) | {config.n_layers: matrix + hidden}
        return cls(block, kv_size * hidden, heads, dict.fromkeys(exits.layers, body))


@dataclass(frozen=True, slots=True)
class ExitCost:
    """One exit, in blocks.

    Attributes:
        layer: blocks below it.
        asked: cost of testing it for one token.
        saved: what a token saves by exiting there: the blocks above, and the last head. The logits by which a token
            exits also give the next token; under other measures the exit's output matrix is read in place of the last.
    """

    layer: int
    asked: float
    saved: float

    @property
    def break_even(self) -> float:
        """Of the tokens tested, the share that must exit here so that testing costs nothing.

        The exit is taken by itself: a token that does not exit here tests no later exit and runs all blocks.
        """
        return self.asked / self.saved


def exit_costs(config: ModelConfig, *, with_logits: bool) -> tuple[ExitCost, ...]:
    """Each exit's costs, in ascending order.

    Args:
        with_logits: the measure needs the exit's vocabulary projection, not only the part before it.
    """
    sizes, last = PartSizes.of(config), config.n_layers
    found = []
    for layer in config.exits.layers:
        matrix = sizes.heads[layer] - sizes.bodies[layer]
        asked = sizes.bodies[layer] + (matrix if with_logits else 0)
        head_saved = sizes.heads[last] - (0 if with_logits else matrix)
        found.append(ExitCost(layer, asked / sizes.block, last - layer + head_saved / sizes.block))
    return tuple(found)


def asked_and_left(
    layers: Sequence[int], thresholds: Sequence[float], tokens_at: Mapping[int, int]
) -> dict[int, tuple[int, int]]:
    """By exit layer, how many tokens tested the exit, and how many of these exited there.

    Args:
        layers: the model's exits.
        thresholds: one per exit, infinite where it is not tested.
        tokens_at: number of tokens by blocks run.
    """
    return {
        layer: (sum(count for depth, count in tokens_at.items() if depth >= layer), tokens_at.get(layer, 0))
        if math.isfinite(threshold)
        else (0, 0)
        for layer, threshold in zip(layers, thresholds, strict=True)
    }


class ExitLedger:
    """What the exits of one model have cost and saved, over requests whose measure needs logits.

    Args:
        slots: sequences that decode together at most; the complaint names it.
    """

    def __init__(self, config: ModelConfig, slots: int) -> None:
        self._costs = exit_costs(config, with_logits=True)
        self._n_layers, self._slots = config.n_layers, slots
        self._without_logits = "similarity, classifier" if config.exits.probes else "similarity"
        self._tokens, self._complained = 0, False
        self._asked: Counter[int] = Counter()
        self._left: Counter[int] = Counter()

    def add(self, thresholds: Sequence[float], tokens_at: Mapping[int, int]) -> None:
        """Count an answer's decoded tokens; arguments as of `asked_and_left`."""
        self._tokens += sum(tokens_at.values())
        for layer, (asked, left) in asked_and_left([e.layer for e in self._costs], thresholds, tokens_at).items():
            self._asked[layer] += asked
            self._left[layer] += left

    def complaint(self) -> str | None:
        """A message for the user if exits have cost more than they saved; only once, and not before `MIN_TOKENS`."""
        if self._complained or self._tokens < MIN_TOKENS:
            return None
        paid = sum(e.asked * self._asked[e.layer] for e in self._costs) / self._tokens
        saved = sum(e.saved * self._left[e.layer] for e in self._costs) / self._tokens
        if paid <= saved:
            return None
        self._complained = True
        shares = ", ".join(
            f"{e.break_even:.2f} after block {e.layer} ({self._left[e.layer] / self._asked[e.layer]:.2f} did)"
            for e in self._costs
            if self._asked[e.layer]
        )
        return (
            f"the exits of this model cost more than they save: over {self._tokens} decoded tokens, a token paid "
            f"{paid:.2f} blocks for the exits that it tested and saved {saved:.2f} by exiting, of {self._n_layers} "
            "blocks (by weights read; the last head, which an exiting token does not run, counts as saved). An exit by "
            f"itself pays where at least this share of the tokens that test it exit there: {shares}. This counts each "
            f"token by itself: rows of a batch (up to {self._slots} slots here) read weights together, and a block is "
            "saved only where none of them needs it. To pay less, keep the exits that pay and set the thresholds of "
            "the others to infinity (or name the kept ones in exit_layers), choose a measure without logits "
            f"({self._without_logits}), or leave early_exit out"
        )
