"""A given text under early exit: what the model would have chosen after every token, and where it would have exited.

All tokens go through a block together, as in training. A token's exits depend on earlier blocks only, and its K and V
in later blocks are known once it has exited, so no token has to wait for the one before it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from eejax.core import MODEL_MEASURES, InvalidRequestError, ModelConfig
from eejax.device import exits
from eejax.device.decode_state import ExitRows
from eejax.device.exits import Observation
from eejax.model import Block, EarlyExitTransformer, attend_causal, bind
from pallas_kernels import Best, run_if

COLUMNS = 128
"""Tokens whose logits exist at a time: of a whole text they would take more memory than the model."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class Scores:
    """What was read at each of T tokens, on the device or the host.

    Attributes:
        choices: the greedy choice for the next token.
        logprobs: natural log-probability of the text's next token; after the last one, of the choice.
        exit_layers: blocks that the token ran.
    """

    choices: Int[Array, " T"]
    logprobs: Float[Array, " T"]
    exit_layers: Int[Array, " T"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, slots=True)
class _Read:
    """For each token: confidence at the last exit tested; choice and log-probability at the exit it took."""

    confidence: Float[Array, "*T"]
    choices: Int[Array, "*T"]
    logprobs: Float[Array, "*T"]


def check_text(
    config: ModelConfig,
    max_tokens: int,
    token_ids: Sequence[int],
    thresholds: Sequence[float] | None,
    measure: str,
    start: int,
) -> tuple[float, ...]:
    """Check the arguments of `Runner.score`, and raise its errors. Returns one threshold per exit."""
    layers, count = config.exits.layers, len(token_ids)
    allowed = [name for name in MODEL_MEASURES if name != "classifier" or config.exits.probes]
    limits = (math.inf,) * len(layers) if thresholds is None else tuple(thresholds)
    unknown = [token for token in token_ids if not 0 <= token < config.vocab_size][:8]
    for wrong, message in (
        (measure not in allowed, f"measure must be one of {', '.join(allowed)}, got {measure!r}"),
        (not 1 <= count <= max_tokens, f"a text must have 1 to {max_tokens} tokens, got {count}"),
        (bool(unknown), f"token ids {unknown} are outside the vocabulary (0..{config.vocab_size - 1})"),
        (not 0 <= start <= count, f"start must lie in 0..{count}, got {start}"),
        (len(limits) != len(layers), f"{len(limits)} thresholds {list(limits)} for {len(layers)} exits {list(layers)}"),
    ):
        if wrong:
            raise InvalidRequestError(message)
    return limits


def score_text(
    config: ModelConfig,
    params: dict,
    tokens: Int[Array, " T"],
    length: Int[Array, ""],
    start: Int[Array, ""],
    thresholds: Float[Array, " E"],
    measure: Int[Array, ""],
) -> Scores:
    """Run a text that starts at position 0, token by token as deep as decoding it would have run.

    Args:
        config: static; the model's shape and exits.
        tokens: `length` of them, then padding with anything.
        start: tokens before it run at full depth, as a prompt does.
        thresholds: of the exits, the same for every token; infinite where none may exit.
        measure: index into `eejax.core.MEASURES`.
    """
    model = bind(config, params)
    count = tokens.shape[0]
    places = jnp.arange(count)
    turn = model.rotation(places[None])
    x = model.embed(tokens[None])
    resolved = jnp.zeros(count, bool)
    decoded = (places >= start) & (places < length)
    exit_at = jnp.full(count, config.n_layers, jnp.int32)
    found = _Read(jnp.full(count, -jnp.inf), jnp.zeros(count, jnp.int32), jnp.zeros(count))
    successors = jnp.where(places < length - 1, jnp.roll(tokens, -1), -1)

    def run(block: Block, x: Array, window: int | None) -> tuple[Array, Array]:
        out, middle, _ = block(x, turn, functools.partial(attend_causal, window=window), None)
        return out, middle

    def ask(
        number: int,
        before: Array,
        x: Array,
        middle: Array,
        asks: Array,
        limit: Array,
        carry: tuple[_Read, Array, Array],
    ) -> tuple[_Read, Array, Array]:
        """Test the exit after block `number` for the tokens that ask for it."""
        found, resolved, exit_at = carry
        features = model.features(number, x, middle, lambda own, x: run(own, x, None)[0])[:, 0]
        similar = exits.similarity(before[:, 0], x[:, 0])
        probe = model.probe_logit(number, features) if config.exits.probes else None
        read = _read(model, number, features, successors, measure, similar, probe)
        leaving = asks & (read.confidence >= limit)
        return _keep(leaving, read, found), resolved | leaving, jnp.where(leaving, number, exit_at)

    middle = x
    for number, block in enumerate(model.blocks, start=1):
        before = x
        out, middle = run(block, x, config.window_of(number - 1))
        x = jnp.where(resolved, x, out)
        if number in config.exits.layers:
            limit = thresholds[config.exits.layers.index(number)]
            asks = decoded & ~resolved & jnp.isfinite(limit)
            at_exit = functools.partial(ask, number, before, x, middle, asks, limit)
            found, resolved, exit_at = run_if(jnp.any(asks), at_exit, (found, resolved, exit_at))
    features = model.features(config.n_layers, x, middle)[:, 0]
    found = _keep(~resolved, _read(model, config.n_layers, features, successors, measure, None, None), found)
    return Scores(found.choices, found.logprobs, exit_at)


def _keep(which: Bool[Array, " T"], new: _Read, old: _Read) -> _Read:
    return jax.tree.map(lambda a, b: jnp.where(which, a, b), new, old)


def _read(
    model: EarlyExitTransformer,
    layer: int,
    features: Float[Array, "D T"],
    successors: Int[Array, " T"],
    measure: Int[Array, ""],
    similar: Float[Array, " T"] | None,
    probe: Float[Array, " T"] | None,
) -> _Read:
    """Read every token at exit point `layer`, a few at a time."""
    count = features.shape[1]
    width = min(count, COLUMNS)
    never = jnp.zeros((len(model.config.exits.layers), width))
    zeros = jnp.zeros(width)
    rows = ExitRows(never, jnp.broadcast_to(measure, width), zeros, zeros, zeros, jnp.zeros((width, 2), jnp.uint32))

    def some(columns: tuple[Array, Array, Array | None, Array | None]) -> _Read:
        features, successors, similar, probe = columns
        logits = model.logits(layer, features.T)
        best = Best.of(logits)
        at = jnp.where(successors < 0, best.token, successors)[None]
        logprobs = jnp.take_along_axis(logits, at, axis=0)[0] - best.top - jnp.log(best.total)
        seen = Observation(best=best, similarity=similar, probe=probe)
        return _Read(exits.confidence(rows, seen), best.token, logprobs)

    columns = jax.tree.map(lambda a: a.reshape(-1, width, *a.shape[1:]), (features.T, successors, similar, probe))
    return jax.tree.map(lambda a: a.reshape(count), jax.lax.map(some, columns))
