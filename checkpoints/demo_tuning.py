"""What the demo model is taught after its training: that an early exit's choice be full depth's, as often as can be.

Tokens leave early in the forward pass too, so that the blocks above learn to read K and V of frozen states, and states
that are frozen learn to be read.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from checkpoints.demo_objective import Numerics, chunks, dot, exit_features, transposed
from eejax.core import ModelConfig

PROBE_SCALE = 10.0
"""Probes are learnt at this fraction of their size: Adam then moves them as much faster as they need it."""

PROBE_START = 2.0
"""Log-odds that an untrained probe gives: most tokens of an answer agree."""

MARGINS = ((0.1, 0.6), (0.0, 0.4))
"""Range from which a row's threshold at each early exit is drawn."""

NEVER_FIRST = 0.15
"""Share of the rows that may not leave at the first exit, so that the second one sees easy tokens as well."""


@dataclass(frozen=True)
class Stage:
    """A stage of tuning. Half of its batches are documents, half are answers of the model's own.

    Every exit's target is a mixture. An early exit's is the distribution of full depth, of the model as it is at that
    moment; the last exit's the same, or (`held`) that of the model before all tuning. The shares below are taken by
    something else. A token that left counts at the exits that it came to.

    Attributes:
        steps: batches to learn from.
        peak_rate: learning rate after the warm-up; it then falls in a straight line to zero.
        exit_weights: share of each exit in the loss, in order of depth.
        choice: share of full depth's likeliest token, on own answers. An exit that learns the distribution is as unsure
            as full depth; one that learns the choice is sure where it makes the same.
        next_token: the last exit's share of the next token, on documents and on own answers.
        lower: the last exit's share of what the exit below it says.
        held: the last exit is to stay what it was.
        keep: the stage ends with a mean of weights: this share of what it learnt, the rest of the model before tuning.
        probe: weight of the probes' loss, which the blocks feel as well.
    """

    steps: int
    peak_rate: float
    exit_weights: tuple[float, ...]
    choice: float
    next_token: tuple[float, float]
    lower: float
    held: bool
    keep: float
    probe: float = 0.1


STAGES = {
    "join": Stage(545, 2e-4, (0.3, 0.35, 0.35), 0.7, next_token=(0.9, 0.3), lower=0.1, held=False, keep=0.65),
    "hold": Stage(160, 1.2e-4, (0.25, 0.3, 0.45), 0.7, next_token=(0.3, 0.0), lower=0.0, held=True, keep=1.0),
}
"""`join` lets all blocks give way to the exits, which costs full depth some quality; `hold` wins that back."""


def draw_thresholds(batch: dict[str, np.ndarray], rng: np.random.Generator) -> Float[np.ndarray, "E-1 N"]:
    """Margins at which the tokens of a packed batch leave. The first row runs at full depth.

    They are infinite where decoding runs at full depth: in questions, and at the first token of a document.
    """
    weights, segments = batch["weights"], batch["segments"]
    decoded = np.zeros(weights.shape, bool)
    decoded[:, 1:] = (weights[:, :-1] == 1) & (segments[:, 1:] == segments[:, :-1])
    drawn = np.stack([rng.uniform(low, high, len(weights)) for low, high in MARGINS])
    drawn[0, rng.random(len(weights)) < NEVER_FIRST] = np.inf
    drawn[:, 0] = np.inf
    return np.where(decoded, drawn[..., None], np.inf).astype(np.float32).reshape(len(drawn), -1)


def new_probes(config: ModelConfig) -> dict[str, Array]:
    """Probes to learn, of all exits together: `weight [E-1, D]` and `bias [E-1]`, both over `PROBE_SCALE`."""
    exits = len(config.exits.layers)
    return {
        "weight": jnp.zeros((exits, config.hidden_size)),
        "bias": jnp.full((exits,), PROBE_START / PROBE_SCALE, jnp.float32),
    }


def exit_params(config: ModelConfig, probes: dict[str, Array]) -> dict:
    """The probes as `eejax.model` keeps them: the parameters' `exits`."""
    weight, bias = (probes[name] * PROBE_SCALE for name in ("weight", "bias"))
    return {
        name: {"probe_weight": weight[e], "probe_bias": bias[e : e + 1]} for e, name in enumerate(config.exit_names)
    }


def mean_weights(untuned: dict, learnt: dict, keep: float) -> dict:
    """`keep` of what was learnt and the rest of the untuned model, for every parameter."""
    return jax.tree.map(lambda a, b: a + keep * (b - a), untuned, learnt)


def _chunked(
    features: Float[Array, "E D N"],
    came: Array,
    states: tuple[Array, Array],
    batch: dict[str, Array],
    chunk: int,
) -> tuple[Array, ...]:
    """What one pass over the vocabulary reads, cut into chunks of tokens; states in the dtype of the features."""
    return (
        chunks(features, chunk),
        chunks(came.astype(jnp.float32)[:, None], chunk)[:, :, 0],
        *(chunks(x[None].astype(features.dtype), chunk)[:, 0] for x in states),
        batch["targets"].reshape(-1, chunk),
        batch["weights"].reshape(-1, chunk),
    )


def _probe_grads(
    weight: Float[Array, " D"], bias: Array, features: Float[Array, "D c"], agrees: Array, share: Array
) -> tuple[Float[Array, "D c"], Float[Array, " D"], Array]:
    """Gradients of one probe's binary cross-entropy for the features, and for the probe's scaled weight and bias."""
    wide = features.astype(jnp.float32)
    d_odds = share * (jax.nn.sigmoid(weight @ wide + bias) - agrees)
    return weight[:, None] * d_odds, PROBE_SCALE * (wide @ d_odds), PROBE_SCALE * jnp.sum(d_odds)


def tuning_loss_and_grads(
    config: ModelConfig,
    stage: Stage,
    numerics: Numerics,
    params: dict,
    probes: dict[str, Array],
    untuned: dict,
    batch: dict[str, Array],
) -> tuple[Float[Array, "E 3"], dict, dict[str, Array]]:
    """What one batch teaches. Gradients are written down logit by logit, as in `joint_loss`; targets are held fixed.

    Needs tied embeddings and a `shared` head, and knows no sliding window.

    Args:
        params, probes: what is learnt: parameters without `exits`, and probes as `new_probes` returns them.
        untuned: the parameters before all tuning.
        batch: of `demo_data.pack`, with `thresholds` (`draw_thresholds`) and `own` (1 for own answers, else 0).

    Returns:
        Per exit: tokens of answers that came to it, how many of them chose as full depth, their nats in all; the
        gradients of parameters and of probes.
    """
    full = exit_features(config, numerics, params, batch)[0][-1]
    aim, aim_params = (
        (exit_features(config, numerics, untuned, batch)[0][-1], untuned) if stage.held else (full, params)
    )
    features, pull, came = jax.vjp(
        lambda p: exit_features(config, numerics, p, batch, batch["thresholds"]), params, has_aux=True
    )
    output, aim_output = (p["embedding"].astype(numerics.dtype) for p in (params, aim_params))
    output_transposed, vocab = transposed(output), jnp.arange(output.shape[0])[:, None]
    weights, own, last = batch["weights"].reshape(-1), batch["own"], features.shape[0] - 1
    total = jnp.maximum(jnp.sum(weights), 1.0)
    choice, next_token = stage.choice * own, stage.next_token[0] * (1 - own) + stage.next_token[1] * own
    probe = jax.tree.map(lambda leaf: leaf * PROBE_SCALE, probes)

    def is_token(token: Array) -> Float[Array, "V c"]:
        return (vocab == token).astype(jnp.float32)

    def step(carry: tuple[Array, dict, Array], part: tuple[Array, ...]) -> tuple[tuple[Array, dict, Array], Array]:
        d_output, d_probe, seen = carry
        f, came, full, aim, following, weight = part
        full = jax.nn.softmax(dot(output, full), axis=0)
        aim = jax.nn.softmax(dot(aim_output, aim), axis=0) if stage.held else full
        best = jnp.argmax(full, axis=0)
        d_features, counts, below = [], [], full
        for e in range(last + 1):
            if e < last:
                target = (1 - choice) * full + choice * is_token(best)
            else:
                target = (1 - next_token - stage.lower) * aim + next_token * is_token(following) + stage.lower * below
            log_probs = jax.nn.log_softmax(dot(output, f[e]), axis=0)
            below = jnp.exp(log_probs)
            agrees = (jnp.argmax(log_probs, axis=0) == best).astype(jnp.float32)
            share = weight * came[e] / total
            d_logits = (stage.exit_weights[e] * share * (below - target)).astype(output.dtype)
            d_output = d_output + dot(d_logits, f[e], (1, 1))
            d_feature = dot(output_transposed, d_logits)
            if e < last:
                d_probed, d_weight, d_bias = _probe_grads(
                    probe["weight"][e], probe["bias"][e], f[e], agrees, stage.probe * share
                )
                d_feature = d_feature + d_probed
                d_probe = {"weight": d_probe["weight"].at[e].add(d_weight), "bias": d_probe["bias"].at[e].add(d_bias)}
            d_features.append(d_feature)
            scored = jnp.where(weight == 1, came[e], 0.0)
            nats = -jnp.sum(target * log_probs, axis=0)
            counts.append(jnp.stack([jnp.sum(scored), jnp.sum(scored * agrees), jnp.sum(scored * nats)]))
        return (d_output, d_probe, seen + jnp.stack(counts)), jnp.stack(d_features)

    parts = _chunked(features.astype(output.dtype), came, (full, aim), batch, numerics.chunk)
    carry = (jnp.zeros(output.shape, jnp.float32), jax.tree.map(jnp.zeros_like, probes), jnp.zeros((last + 1, 3)))
    (d_output, d_probe, seen), d_features = jax.lax.scan(step, carry, parts)
    d_features = d_features.transpose(1, 2, 0, 3).reshape(features.shape)
    (grads,) = pull(d_features.astype(features.dtype))
    return seen, grads | {"embedding": grads["embedding"] + d_output}, d_probe
