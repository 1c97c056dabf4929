"""What a batch brings to a chunk of decode steps, and where its rows stand on their way through the network."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from eejax.core import COUNTERS, LOGIT_MEASURES, ModelConfig, SamplingParams
from eejax.device import kv_fill
from eejax.device.exits import ExitRows
from eejax.device.kv_fill import Waiting
from eejax.device.sampling import SamplingRows
from eejax.model import EarlyExitTransformer
from pallas_kernels import Best, PagedKVCache


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class Rows:
    """What a batch of B rows brings along, fixed during a chunk. Padding rows have `live` false.

    Attributes:
        page_table: physical pages by position; entries behind the reserved ones may hold any valid id.
        stop_ids: tokens that end the row, padded with -1 (Z of them).
    """

    page_table: Int[Array, "B M"]
    stop_ids: Int[Array, "B Z"]
    exits: ExitRows
    sampling: SamplingRows


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class DecodeState:
    """Where each row stands in its answer.

    Attributes:
        numbers: `tokens`, `positions`, `generated` and `budget`.
        live: whether the row takes part.
    """

    numbers: Int[Array, "4 B"]
    live: Bool[Array, " B"]

    @property
    def tokens(self) -> Int[Array, " B"]:
        """The next step's input."""
        return self.numbers[0]

    @property
    def positions(self) -> Int[Array, " B"]:
        """That token's position."""
        return self.numbers[1]

    @property
    def generated(self) -> Int[Array, " B"]:
        """Answer tokens so far."""
        return self.numbers[2]

    @property
    def budget(self) -> Int[Array, " B"]:
        """Answer tokens that may still follow."""
        return self.numbers[3]

    def after(self, tokens: Int[Array, " B"], resolved: Bool[Array, " B"], stopped: Bool[Array, " B"]) -> DecodeState:
        """One token later in rows that are `resolved`; those that have `stopped` take no part any more."""
        moved = resolved.astype(jnp.int32)
        tokens = jnp.where(resolved, tokens, self.tokens)
        numbers = jnp.stack([tokens, self.positions + moved, self.generated + moved, self.budget - moved])
        return DecodeState(numbers, self.live & ~stopped)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class Step:
    """Rows on their way through the network.

    Attributes:
        x: hidden states; of resolved rows, frozen.
        places: `segment`, `filled` and `held`.
        exit_at: blocks that each row ran.
        features: what the output matrix multiplies, of resolved rows.
        best: what their logits come to, of rows that are `scored`.
        logits: of those that `SamplingRows.needs_logits`; None where the program is for greedy rows.
        scored: rows to whose features the output matrix has been applied.
        waiting: for deferred fill-in; None where it is eager.
        counts: the fields of `eejax.core.Counts` so far in this chunk.
    """

    cache: PagedKVCache
    x: Float[Array, "D B"]
    places: Int[Array, "3 B"]
    exit_at: Int[Array, " B"]
    features: Float[Array, "D B"]
    best: Best
    logits: Float[Array, "V B"] | None
    scored: Bool[Array, " B"]
    waiting: Waiting | None
    counts: Int[Array, " 7"]

    @property
    def segment(self) -> Int[Array, " B"]:
        """Where each row stands; the number of segments for rows that are resolved, or take no part."""
        return self.places[0]

    @property
    def filled(self) -> Int[Array, " B"]:
        """Segments in which K and V of the row's token are written."""
        return self.places[1]

    @property
    def held(self) -> Int[Array, " B"]:
        """Passes that the row has been standing there."""
        return self.places[2]

    def placed(self, segment: Array | None = None, filled: Array | None = None, held: Array | None = None) -> Step:
        """With some places changed."""
        given = zip((segment, filled, held), self.places, strict=True)
        return replace(self, places=jnp.stack([old if new is None else new for new, old in given]))

    def counting(self, **more: int | Array) -> Step:
        """With some counters advanced."""
        return replace(self, counts=self.counts + jnp.stack([jnp.int32(more.get(name, 0)) for name in COUNTERS]))


type ExitsAsked = Literal["none", "heads", "any"]
type ChoiceAsked = Literal["greedy", "any"]


@dataclass(frozen=True, slots=True)
class Asks:
    """What the rows of a batch may ask for. A decode program has no code for anything else.

    Attributes:
        exits: `none`: all rows run at full depth; `heads`: rows may exit by a measure that needs logits
            (`LOGIT_MEASURES`); `any`: by any measure.
        choice: `greedy`: no row samples or wants log-probabilities; `any`: rows may.
    """

    exits: ExitsAsked = "any"
    choice: ChoiceAsked = "any"

    @classmethod
    def of(cls, params: Iterable[SamplingParams]) -> Asks:
        """What these requests ask for, and no more."""
        params = tuple(params)
        measures = {one.early_exit.measure for one in params if one.early_exit is not None}
        greedy = all((one.temperature <= 0 or one.top_k == 1) and one.logprobs is None for one in params)
        exits = "none" if not measures else "heads" if measures.issubset(LOGIT_MEASURES) else "any"
        return cls(exits, "greedy" if greedy else "any")

    @classmethod
    def every(cls, model: ModelConfig) -> list[Asks]:
        """All that the rows of a model's batches can ask for; the last one includes the others."""
        exits = get_args(ExitsAsked.__value__) if model.exits.layers else ("none",)
        return [cls(kind, choice) for kind in exits for choice in get_args(ChoiceAsked.__value__)]

    def __str__(self) -> str:
        return f"exits-{self.exits}-choice-{self.choice}"


ANYTHING = Asks()


@dataclass(frozen=True, slots=True)
class Plan:
    """How segments are run; fixed when the program is compiled.

    Attributes:
        compacts: a block computes the rows that run it and no others; else all, and keeps what others had.
        deferred: fill-in is deferred.
        asks: what rows may ask for.
    """

    compacts: bool
    deferred: bool
    asks: Asks = ANYTHING

    @property
    def straight(self) -> bool:
        """Whether every step runs every block, so that it needs no branch."""
        return self.asks.exits == "none"

    def computed(self, rows: Bool[Array, " B"]) -> Bool[Array, " B"] | None:
        """The rows that are computed where these are needed; None: all."""
        return rows if self.compacts else None

    def count(self, rows: Bool[Array, " B"]) -> Int[Array, ""] | int:
        """How many that are."""
        return jnp.sum(rows, dtype=jnp.int32) if self.compacts else rows.shape[0]


def begin(model: EarlyExitTransformer, plan: Plan, cache: PagedKVCache, count: int) -> Step:
    """`count` rows, none of which has begun."""
    config, dtype = model.config, model.embedding[...].dtype
    zeros, none = jnp.zeros((count,), jnp.int32), jnp.zeros((count,), bool)
    last = jnp.full((count,), len(config.segments), jnp.int32)
    states = jnp.zeros((config.hidden_size, count), dtype)
    return Step(
        cache=cache,
        x=states,
        places=jnp.stack([last, last, zeros]),
        exit_at=zeros,
        features=states,
        best=Best.unknown(count),
        logits=jnp.zeros((config.vocab_size, count), jnp.float32) if plan.asks.choice == "any" else None,
        scored=none,
        waiting=kv_fill.nobody_waits(model, count, dtype) if plan.deferred else None,
        counts=jnp.zeros((len(COUNTERS),), jnp.int32),
    )
