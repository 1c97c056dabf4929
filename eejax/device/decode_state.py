"""What a decode program reads and carries: the batch's rows, where each one is, and how the program was built."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from eejax.core import COUNTERS, LOGIT_MEASURES, ModelConfig, SamplingParams
from eejax.device.sampling import SamplingRows
from eejax.model import EarlyExitTransformer
from pallas_kernels import Best, PagedKVCache, Slots, paged_attention, write

WAITING_PER_ROW = 4
"""Tokens of a row whose K and V may wait at a time."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class ExitRows:
    """Per-row exit parameters, fixed for a request.

    Attributes:
        thresholds: `inf` where the row may not exit (E exits, ascending).
        measure: index into `eejax.core.MEASURES`.
        tau: decay of CALM eq. 5, per answer; negative for a constant threshold.
        horizon: the N of that equation, the request's `max_tokens`.
        gates: probability by an exit's probe below which its head is not computed; 0 computes it always.
        keys: raw random key of the row's request.
    """

    thresholds: Float[Array, "E B"]
    measure: Int[Array, " B"]
    tau: Float[Array, " B"]
    horizon: Float[Array, " B"]
    gates: Float[Array, " B"]
    keys: UInt32[Array, "B 2"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class Rows:
    """The requests of a batch of B rows, fixed during a chunk.

    Attributes:
        page_table: physical pages by position; entries after the reserved ones may hold any valid id.
        stop_ids: tokens that end the row, padded with -1 (Z of them).
    """

    page_table: Int[Array, "B M"]
    stop_ids: Int[Array, "B Z"]
    exits: ExitRows
    sampling: SamplingRows


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class ChunkLimits:
    """How far a chunk goes.

    Attributes:
        n_steps: passes at most.
        hold: rows that are gathered before a segment, see `decode.run_pass`; 1 gives every row a token in every pass.
        yield_on_free: end the chunk as soon as a row stops.
    """

    n_steps: Int[Array, ""]
    hold: Int[Array, ""]
    yield_on_free: Bool[Array, ""]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class DecodeState:
    """How far each row's answer is.

    Attributes:
        numbers: `tokens`, `positions`, `generated` and `budget`.
        live: rows that are still running; false for padding.
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
        """One token later in rows that are `resolved`; rows that have `stopped` are no longer live."""
        moved = resolved.astype(jnp.int32)
        tokens = jnp.where(resolved, tokens, self.tokens)
        numbers = jnp.stack([tokens, self.positions + moved, self.generated + moved, self.budget - moved])
        return DecodeState(numbers, self.live & ~stopped)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class Waiting:
    """Tokens of B rows that exited, W for each row, and whose K and V are not written in every block yet.

    Attributes:
        x: hidden states they exited with.
        positions: theirs.
        filled: segments in which their K and V are written; all of the model's where the place is free.
    """

    x: Float[Array, "D W B"]
    positions: Int[Array, "W B"]
    filled: Int[Array, "W B"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class Step:
    """Rows on their way through the network. A row is resolved when it has exited or run the last segment.

    Attributes:
        x: hidden states; those of resolved rows are frozen.
        places: `segment`, `filled` and `held`.
        exit_at: blocks that each row ran.
        features: input of the output matrix, of resolved rows.
        best: what the logits come to, of rows that are `scored`.
        logits: of those that `SamplingRows.needs_logits`; None where the program is for greedy rows.
        scored: rows whose logits have been computed.
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

    @classmethod
    def start(cls, ctx: Pass, cache: PagedKVCache) -> Step:
        """No row has begun."""
        config, dtype, count = ctx.model.config, ctx.model.embedding[...].dtype, ctx.state.live.shape[0]
        size, done, shape = config.hidden_size, len(config.segments), (WAITING_PER_ROW, count)
        zeros, none = jnp.zeros((count,), jnp.int32), jnp.zeros((count,), bool)
        last = jnp.full((count,), done, jnp.int32)
        states = jnp.zeros((size, count), dtype)
        return cls(
            cache=cache,
            x=states,
            places=jnp.stack([last, last, zeros]),
            exit_at=zeros,
            features=states,
            best=Best.unknown(count),
            logits=jnp.zeros((config.vocab_size, count), jnp.float32) if ctx.plan.asks.choice == "any" else None,
            scored=none,
            waiting=Waiting(
                x=jnp.zeros((size, *shape), dtype),
                positions=jnp.zeros(shape, jnp.int32),
                filled=jnp.full(shape, done, jnp.int32),
            )
            if ctx.plan.deferred
            else None,
            counts=jnp.zeros((len(COUNTERS),), jnp.int32),
        )

    @property
    def segment(self) -> Int[Array, " B"]:
        """The segment each row runs next; the number of segments for rows that are resolved or not live."""
        return self.places[0]

    @property
    def filled(self) -> Int[Array, " B"]:
        """Segments in which K and V of the row's token are written."""
        return self.places[1]

    @property
    def held(self) -> Int[Array, " B"]:
        """Passes for which the row has waited to run its segment."""
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
        compacts: a block computes only the rows that run it; else all, and keeps the former states of the others.
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


@dataclass(frozen=True, slots=True)
class Pass:
    """What the functions of one pass read and do not change."""

    model: EarlyExitTransformer
    plan: Plan
    rows: Rows
    state: DecodeState

    def attend(
        self,
        layer: int,
        active: Bool[Array, " B"],
        slots: Slots | None,
        q: Float[Array, "H C B"],
        k: Float[Array, "K C N"],
        v: Float[Array, "K C N"],
        cache: PagedKVCache,
    ) -> tuple[Float[Array, "H C B"], PagedKVCache]:
        """Write K and V of cached block `layer`, then let each active row's query read up to its own position.

        Args:
            slots: where K and V go; None: they have been written before.
        """
        cache = cache if slots is None else write(cache, layer, slots, k, v)
        positions, window = self.state.positions, self.model.config.window_of(layer)
        q, lengths = jnp.moveaxis(q, -1, 0), positions + 1
        table = self.rows.page_table
        o = paged_attention(q, cache, table, lengths, layer=layer, active=active, sliding_window=window)
        return jnp.moveaxis(o, 0, -1), cache
