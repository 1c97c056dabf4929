"""What exits are tuned to do, and how well they do it, over a backbone that stays as it is.

Hidden states come from one forward pass of the backbone, and heads and probes are trained on those, so that no gradient
passes through it. Logits exist for one chunk of tokens at a time: `chunk * V` of them, whatever the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from eejax.core import ModelConfig
from eejax.model import EarlyExitTransformer, bind
from pallas_kernels import rms_norm

type Arrays = Mapping[str, Any]

LOGITS_AT_ONCE = 2**20
MIN_CHUNK = 128
"""At least so many tokens are projected together: fewer would read a large output matrix too often."""


def chunk_size(config: ModelConfig) -> int:
    """Tokens whose logits exist at the same time."""
    return max(MIN_CHUNK, LOGITS_AT_ONCE // config.vocab_size)


def hidden_states(config: ModelConfig, params: dict, batch: Arrays) -> dict[str, Array]:
    """Full-depth forward of packed rows, causal within each document; `N = B T`.

    Args:
        batch: as `eejax.tune.tuning_data.pack` makes it.

    Returns:
        exits `[E, D, N]`: what each exit reads, the residual between attention and MLP of its block for an `mlp` exit
        and the state after it for the others; last `[D, N]`: the last block's features.
    """
    model = bind(config, params)
    turn, segments = model.rotation(batch["positions"].reshape(-1)), batch["segments"]
    same = segments[:, None, :, None] == segments[:, None, None, :]
    x = model.embed(batch["tokens"].reshape(-1))
    found = []
    for number, block in enumerate(model.blocks, start=1):
        x, middle, _ = block(x, turn, _attend_within(same, config.window_of(number - 1)), None)
        if number in config.exits.layers:
            found.append(middle if config.exits.head == "mlp" else x)
    return {"exits": jnp.stack(found), "last": rms_norm(model.norm[...], x, config.norm_eps)}


def _attend_within(same: Bool[Array, "B 1 T T"], window: int | None) -> Callable:
    rows, _, length, _ = same.shape

    def attend(q: Array, k: Array, v: Array, cache: None) -> tuple[Array, None]:
        by_row = lambda x: x.reshape(*x.shape[:2], rows, length).transpose(2, 3, 0, 1)  # noqa: E731
        o = jax.nn.dot_product_attention(
            *map(by_row, (q, k, v)),
            mask=same,
            is_causal=True,
            local_window_size=None if window is None else (window - 1, 0),
        )
        return o.transpose(2, 3, 0, 1).reshape(q.shape), cache

    return attend


def _features(model: EarlyExitTransformer, states: Float[Array, "E D N"]) -> list[Float[Array, "D N"]]:
    # An exit reads either the state or the residual before the MLP, and `hidden_states` has kept the one it reads.
    return [model.features(layer, x, x) for layer, x in zip(model.config.exits.layers, states, strict=True)]


def _chunks(arrays: Arrays, chunk: int) -> dict[str, Array]:
    """Cut the last axis into chunks and bring their number to the front, with zeros after the last token."""

    def cut(x: Array) -> Array:
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % chunk)])
        return jnp.moveaxis(x.reshape(*x.shape[:-1], -1, chunk), -2, 0)

    return {name: cut(x) for name, x in arrays.items()}


def _with_exits(config: ModelConfig, backbone: dict, exits: dict) -> EarlyExitTransformer:
    dtype = backbone["norm"].dtype
    return bind(config, backbone | {"exits": jax.tree.map(lambda leaf: leaf.astype(dtype), exits)})


def head_loss(
    config: ModelConfig, backbone: dict, heads: dict, probes: dict, batch: Arrays, chunk: int
) -> tuple[Float[Array, ""], dict]:
    """Cross-entropy of every exit to full depth's distribution in nats, and its gradient for `heads`.

    The mean over tokens, summed over the exits: no two of them share a parameter, so they need no weighting.

    Args:
        heads, probes: the exits' parameters, as `separated` returns them.
    """
    states = hidden_states(config, backbone | {"exits": merged(heads, probes)}, batch)
    weights = (batch["segments"] > 0).astype(jnp.float32).reshape(-1)
    total = jnp.maximum(jnp.sum(weights), 1.0)
    layers = config.exits.layers

    def loss(heads: dict, part: dict[str, Array]) -> Array:
        model = _with_exits(config, backbone, merged(heads, probes))
        target = jax.nn.softmax(model.logits(config.n_layers, part["last"]), axis=0)
        nats = jnp.zeros(target.shape[1], jnp.float32)
        for layer, features in zip(layers, _features(model, part["exits"]), strict=True):
            logits = model.logits(layer, features)
            nats += jax.nn.logsumexp(logits, axis=0) - jnp.sum(target * logits, axis=0)
        return jnp.sum(nats * part["weights"]) / total

    def step(carry: tuple[Array, dict], part: dict[str, Array]) -> tuple[tuple[Array, dict], None]:
        return jax.tree.map(jnp.add, carry, jax.value_and_grad(loss)(heads, part)), None

    carry = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, heads))
    return jax.lax.scan(step, carry, _chunks(states | {"weights": weights}, chunk))[0]


def balanced_loss(logits: Float[Array, " N"], agree: Bool[Array, " N"], seen: Bool[Array, " N"]) -> Float[Array, ""]:
    """Binary cross-entropy in nats of "this exit agrees with full depth", both classes weighing the same.

    Args:
        logits: log-odds that the probe gives.
        agree: the class of each token.
        seen: tokens that count. A class of which none is seen weighs nothing.
    """
    nats = jax.nn.softplus(jnp.where(agree, -logits, logits))
    loss = jnp.zeros((), nats.dtype)
    for members in (agree & seen, ~agree & seen):
        loss += 0.5 * jnp.sum(jnp.where(members, nats, 0.0)) / jnp.maximum(jnp.sum(members, dtype=nats.dtype), 1.0)
    return loss


def probe_loss(
    config: ModelConfig, backbone: dict, probes: dict, heads: dict, batch: Arrays, chunk: int
) -> tuple[Float[Array, ""], dict]:
    """`balanced_loss` of every exit's probe, summed, and its gradient for `probes` (CALM, arXiv 2207.07061, sec. 3.3).

    Args:
        probes, heads: the exits' parameters, as `separated` returns them; the heads decide which tokens agree.
    """
    found = observe(config, backbone, merged(heads, probes), batch, chunk)

    def loss(probes: dict) -> Array:
        model = _with_exits(config, backbone, merged(heads, probes))
        logits = _probe_logits(model, found["features"])
        return sum(
            (balanced_loss(z, agree, found["seen"]) for z, agree in zip(logits, found["agree"], strict=True)),
            jnp.zeros((), jnp.float32),
        )

    return jax.value_and_grad(loss)(probes)


def _probe_logits(model: EarlyExitTransformer, features: Float[Array, "E D N"]) -> list[Float[Array, " N"]]:
    return [model.probe_logit(layer, x) for layer, x in zip(model.config.exits.layers, features, strict=True)]


def merged(heads: dict, probes: dict) -> dict:
    """The exits' parameters from what `separated` returned."""
    return {name: heads[name] | probes[name] for name in heads}


def separated(exits: dict) -> tuple[dict, dict]:
    """The exits' parameters as those of the heads and those of the probes."""
    probes = {name: {k: v for k, v in leaves.items() if k.startswith("probe_")} for name, leaves in exits.items()}
    heads = {name: {k: v for k, v in leaves.items() if k not in probes[name]} for name, leaves in exits.items()}
    return heads, probes


def observe(config: ModelConfig, backbone: dict, exits: dict, batch: Arrays, chunk: int) -> dict[str, Array]:
    """Cross-entropy, agreement and confidence of every exit at every token of a batch; `E` exits, `N = B T` tokens.

    Returns:
        nats `[E+1, N]`: cross-entropy to the next token, full depth last.
        agree `[E, N]`: the likeliest token is that of full depth.
        softmax and, with probes, classifier `[E, N]`: confidence by these measures.
        features `[E, D, N]`: what the output matrices multiply. seen `[N]`: false for padding.
    """
    states = hidden_states(config, backbone | {"exits": exits}, batch)
    model = _with_exits(config, backbone, exits)
    features = jnp.stack(_features(model, states["exits"]))
    layers, count = config.exits.layers, len(config.exits.layers)

    def look(part: dict[str, Array]) -> dict[str, Array]:
        model = _with_exits(config, backbone, exits)
        found: dict[str, list[Array]] = {"nats": [], "best": [], "softmax": []}
        for layer, x in zip((*layers, config.n_layers), (*part["features"], part["last"]), strict=True):
            logits = model.logits(layer, x)
            total = jax.nn.logsumexp(logits, axis=0)
            found["nats"].append(total - jnp.take_along_axis(logits, part["targets"][None], axis=0)[0])
            found["best"].append(jnp.argmax(logits, axis=0))
            found["softmax"].append(jnp.exp(jnp.max(logits, axis=0) - total))
        return {name: jnp.stack(values) for name, values in found.items()}

    parts = {"features": features, "last": states["last"], "targets": batch["targets"].reshape(-1)}
    found = jax.lax.map(look, _chunks(parts, chunk))
    seen = (batch["segments"] > 0).reshape(-1)
    nats, best, softmax = (
        jnp.moveaxis(found[name], 0, 1).reshape(count + 1, -1)[:, : seen.size] for name in ("nats", "best", "softmax")
    )
    result = {"nats": nats, "agree": best[:-1] == best[-1], "softmax": softmax[:-1], "features": features, "seen": seen}
    if config.exits.probes:
        result["classifier"] = jax.nn.sigmoid(jnp.stack(_probe_logits(model, features)))
    return result
