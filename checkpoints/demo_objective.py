"""What the demo model is trained to do: predict the next token at every exit, and agree with the last one.

Written for speed on a CPU with fast bfloat16 products as well as on a GPU: a product on XLA:CPU is quick only when it
contracts the columns of its left operand, so everything here is arranged in that form.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Bool, Float, Int

from eejax.core import ModelConfig
from eejax.model import bind
from pallas_kernels import Best

ATTENTION_TILE = 128
MASKED = -1e30


@dataclass(frozen=True)
class Objective:
    """Weights of the joint loss.

    Attributes:
        exit_weights: share of each exit point in the loss, in order of depth; they sum to 1.
        distill: share of an early exit's target that is the last exit's own distribution (held fixed) instead of the
            next token. It raises the agreement of early exits with full depth, which early exit lives on.
    """

    exit_weights: tuple[float, ...] = (0.2, 0.3, 0.5)
    distill: float = 0.5

    def distill_weights(self) -> tuple[float, ...]:
        """`distill` for every early exit and 0 for the last."""
        return (*[self.distill] * (len(self.exit_weights) - 1), 0.0)


@dataclass(frozen=True)
class Numerics:
    """How to compute: dtype of the products, whether attention runs head by head, tokens in one chunk of the loss."""

    dtype: jnp.dtype
    serial: bool
    chunk: int


def dot(a: Array, b: Array, over: tuple[int, int] = (1, 0)) -> Array:
    """Product of two matrices over these axes of theirs, summed in float32."""
    return jax.lax.dot_general(a, b, (((over[0],), (over[1],)), ((), ())), preferred_element_type=jnp.float32)


def transposed(a: Array) -> Array:
    """Transpose that XLA must carry out: as a mere change of layout it makes the product several times slower."""
    return with_layout_constraint(a.T, Layout(major_to_minor=(0, 1)))


def _tile_weights(q: Array, k_transposed: Array, segments: Array, start: int, stop: int) -> Float[Array, "S GQ"]:
    """Attention weights of queries `start..stop`, one column per head and query: softmax over keys `0..stop`."""
    dim, group, _ = q.shape
    scores = dot(k_transposed[:stop], q[:, :, start:stop].reshape(dim, -1)) * dim**-0.5
    causal = jnp.arange(stop)[:, None] <= jnp.arange(start, stop)
    seen = causal & (segments[:stop, None] == segments[start:stop])
    scores = jnp.where(seen[:, None], scores.reshape(stop, group, -1), MASKED).reshape(stop, -1)
    weights = jnp.exp(scores - jnp.max(scores, axis=0))
    return weights / jnp.sum(weights, axis=0)


def _tiles(length: int) -> list[tuple[int, int]]:
    return [(start, min(start + ATTENTION_TILE, length)) for start in range(0, length, ATTENTION_TILE)]


@jax.custom_vjp
def _head_attention(
    q: Float[Array, "C G T"], k: Float[Array, "C T"], v: Float[Array, "C T"], segments: Int[Array, " T"]
) -> Float[Array, "C G T"]:
    """Causal attention of one KV head and its group of query heads within segments, in float32."""
    k_transposed = transposed(k)
    parts = []
    for start, stop in _tiles(q.shape[2]):
        weights = _tile_weights(q, k_transposed, segments, start, stop).astype(v.dtype)
        parts.append(dot(v[:, :stop], weights).reshape(*q.shape[:2], -1))
    return jnp.concatenate(parts, axis=2)


def _head_attention_forward(q: Array, k: Array, v: Array, segments: Array) -> tuple[Array, tuple[Array, ...]]:
    out = _head_attention(q, k, v, segments)
    return out, (q, k, v, segments, out)


def _head_attention_backward(saved: tuple[Array, ...], d_out: Array) -> tuple[Array, Array, Array, None]:
    q, k, v, segments, out = saved
    dim, group, length = q.shape
    k_transposed, v_transposed = transposed(k), transposed(v)
    delta = jnp.sum(out * d_out, axis=0)
    d_out = d_out.astype(v.dtype)
    dq, dk, dv = [], jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
    for start, stop in _tiles(length):
        weights = _tile_weights(q, k_transposed, segments, start, stop)
        d_tile = d_out[:, :, start:stop].reshape(dim, -1)
        d_weights = dot(v_transposed[:stop], d_tile)
        d_scores = (weights * (d_weights - delta[:, start:stop].reshape(-1)) * dim**-0.5).astype(k.dtype)
        dq.append(dot(k[:, :stop], d_scores).reshape(dim, group, -1))
        dk = dk.at[:, :stop].add(dot(q[:, :, start:stop].reshape(dim, -1), d_scores, (1, 1)))
        dv = dv.at[:, :stop].add(dot(d_tile, weights.astype(v.dtype), (1, 1)))
    return jnp.concatenate(dq, axis=2).astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_head_attention.defvjp(_head_attention_forward, _head_attention_backward)


def attend_within(segments: Int[Array, "B T"], dtype: jnp.dtype, serial: bool) -> Callable:
    """The attention that `eejax.model.Block` asks for, causal within the segments of packed rows.

    Args:
        segments: number of the document that each position belongs to.
        dtype: dtype of the products.
        serial: one head of one row after the other, in tiles that stay in a CPU's cache.
    """

    def attend(q: Array, k: Array, v: Array, cache: None) -> tuple[Array, None]:
        (heads, dim, tokens), kv_heads = q.shape, k.shape[0]
        rows, length = segments.shape
        group, out_dtype = heads // kv_heads, q.dtype
        q, k, v = (x.astype(dtype).reshape(-1, dim, rows, length) for x in (q, k, v))
        if serial:
            q = q.reshape(kv_heads, group, dim, rows, length).transpose(3, 0, 2, 1, 4)
            k, v = (x.transpose(2, 0, 1, 3).reshape(-1, dim, length) for x in (k, v))
            each = jnp.repeat(segments, kv_heads, axis=0)
            o = jax.lax.map(lambda args: _head_attention(*args), (q.reshape(-1, dim, group, length), k, v, each))
            o = o.reshape(rows, kv_heads, dim, group, length).transpose(1, 3, 2, 0, 4)
        else:
            q = q.reshape(kv_heads, group, dim, rows, length)
            scores = jnp.einsum("kgcbt,kcbs->bkgts", q, k, preferred_element_type=jnp.float32) * dim**-0.5
            seen = jnp.tril(jnp.ones((length, length), bool)) & (segments[:, :, None] == segments[:, None])
            weights = jax.nn.softmax(jnp.where(seen[:, None, None], scores, MASKED), axis=-1).astype(dtype)
            o = jnp.einsum("bkgts,kcbs->kgcbt", weights, v, preferred_element_type=jnp.float32)
        return o.reshape(heads, dim, tokens).astype(out_dtype), cache

    return attend


def chunks(features: Float[Array, "E D N"], chunk: int) -> Float[Array, "n E D c"]:
    """Tokens in groups of `chunk`, in front."""
    return features.reshape(*features.shape[:2], -1, chunk).transpose(2, 0, 1, 3)


def _margins(output: Float[Array, "V D"], features: Float[Array, "D N"], chunk: int) -> Float[Array, " N"]:
    def margin(part: Array) -> Array:
        best = Best.of(dot(output, part))
        return (1 - jnp.exp(best.second - best.top)) / best.total

    return jax.lax.map(margin, chunks(features[None], chunk)[:, 0]).reshape(-1)


def exit_features(
    config: ModelConfig,
    numerics: Numerics,
    params: dict,
    batch: dict[str, Array],
    thresholds: Float[Array, "E-1 N"] | None = None,
) -> tuple[Float[Array, "E D N"], Bool[Array, "E N"]]:
    """Forward pass over packed rows, `N = B T`: products in the low dtype, residual stream in float32.

    Args:
        batch: `tokens` and `segments` of `checkpoints.demo_data.pack`.
        thresholds: margin (most likely minus second) at which a token leaves at each early exit. Its state is frozen
            then, and the blocks above make its K and V of that, as in decoding (CALM, arXiv 2207.07061, sec. 3.1).
            Without them all tokens run at full depth.

    Returns:
        Features at every exit point, and which tokens came as far.
    """
    model = bind(config, jax.tree.map(lambda p: p.astype(numerics.dtype), params))
    tokens = batch["tokens"]
    # The embedding is read from the float32 parameters, so that its gradient is summed in float32 too.
    # One token axis, since XLA:CPU is slower on three-dimensional activations.
    x = params["embedding"][tokens.reshape(-1)].T.astype(jnp.float32)
    turn = model.rotation(jnp.tile(jnp.arange(tokens.shape[1]), tokens.shape[0]))
    attend = attend_within(batch["segments"], numerics.dtype, numerics.serial)
    found, came, left = [], [], jnp.zeros(tokens.size, bool)
    for number, block in enumerate(model.blocks, start=1):
        out, middle, _ = block(x, turn, attend, None)
        x = out if thresholds is None else jnp.where(left, x, out)
        if number in config.exit_points:
            found.append(model.features(number, x, middle))
            came.append(~left)
            if thresholds is not None and number < config.n_layers:
                output, seen = jax.lax.stop_gradient((params["embedding"], found[-1]))
                margins = _margins(output.astype(numerics.dtype), seen.astype(numerics.dtype), numerics.chunk)
                left |= margins >= thresholds[len(found) - 1]
    return jnp.stack(found), jnp.stack(came)


def joint_loss(
    objective: Objective,
    output: Float[Array, "V D"],
    features: Float[Array, "E D N"],
    targets: Int[Array, " N"],
    weights: Float[Array, " N"],
    chunk: int,
) -> tuple[Float[Array, " E"], Float[Array, "V D"], Float[Array, "E D N"]]:
    """Mean next-token loss in nats of each exit, and the joint loss's gradients.

    The gradient is written down rather than derived: for one logit it is probability minus target, and so the logits of
    a chunk of tokens never leave the cache.

    Returns:
        Loss per exit, gradient of the output matrix, gradient of the features.
    """
    exits, dim, tokens = features.shape
    output_transposed, vocab = transposed(output), jnp.arange(output.shape[0])[:, None]
    total = jnp.maximum(jnp.sum(weights), 1.0)

    def step(carry: tuple[Array, Array], part: tuple[Array, Array, Array]) -> tuple[tuple[Array, Array], Array]:
        losses, d_output = carry
        f, target, weight = part
        hit = vocab == target
        nlls, d_features, last = [], [], (0.0, 0.0)
        # The last exit comes first, since the others learn from it. One product per exit keeps every array
        # two-dimensional, which XLA:CPU vectorises.
        for e in reversed(range(exits)):
            logits = dot(output, f[e])
            top = jnp.max(logits, axis=0)
            exp = jnp.exp(logits - top)
            norm = jnp.sum(exp, axis=0)
            nlls.insert(0, top + jnp.log(norm) - jnp.sum(jnp.where(hit, logits, 0.0), axis=0))
            share, distill = objective.exit_weights[e] * weight / total, objective.distill_weights()[e]
            d_logits = exp * (share / norm) - jnp.where(hit, share * (1 - distill), 0.0)
            if e == exits - 1:
                last = exp, norm
            elif distill:
                d_logits = d_logits - last[0] * (share * distill / last[1])
            d_logits = d_logits.astype(output.dtype)
            d_features.insert(0, dot(output_transposed, d_logits))
            d_output = d_output + dot(d_logits, f[e], (1, 1))
        return (losses + jnp.sum(jnp.stack(nlls) * weight, axis=1), d_output), jnp.stack(d_features)

    carry = (jnp.zeros((exits,), jnp.float32), jnp.zeros(output.shape, jnp.float32))
    parts = (chunks(features.astype(output.dtype), chunk), targets.reshape(-1, chunk), weights.reshape(-1, chunk))
    (losses, d_output), d_features = jax.lax.scan(step, carry, parts)
    return losses / total, d_output, d_features.transpose(1, 2, 0, 3).reshape(exits, dim, tokens)


def loss_and_grads(
    config: ModelConfig, objective: Objective, numerics: Numerics, params: dict, batch: dict[str, Array]
) -> tuple[Float[Array, " E"], dict]:
    """Loss per exit of one batch, and the joint loss's gradient for every parameter, in float32.

    Needs tied embeddings and a `shared` head, so that all exits use one output matrix, and knows no sliding window.
    """
    features, pull, _ = jax.vjp(lambda p: exit_features(config, numerics, p, batch), params, has_aux=True)
    losses, d_output, d_features = joint_loss(
        objective,
        params["embedding"].astype(numerics.dtype),
        features,
        batch["targets"].reshape(-1),
        batch["weights"].reshape(-1),
        numerics.chunk,
    )
    (grads,) = pull(d_features.astype(features.dtype))
    return losses, grads | {"embedding": grads["embedding"] + d_output}


CONFIDENCES = (0.0, 0.8, 0.9)


def exit_scores(
    config: ModelConfig, numerics: Numerics, params: dict, batch: dict[str, Array]
) -> dict[str, Float[Array, "E ..."]]:
    """Sums over the tokens of a batch whose weight is 1, per exit.

    Returns:
        nll `[E]` in nats; tokens and agree `[E, 3]`: tokens whose top probability reaches each of `CONFIDENCES`, and
        those of them whose top token is the last exit's.
    """
    features, _ = exit_features(config, numerics, params, batch)
    exits = features.shape[0]
    output = params["embedding"].astype(numerics.dtype)

    def step(part: tuple[Array, Array, Array]) -> dict[str, Array]:
        f, target, scored = part
        logits = jnp.stack([dot(output, f[e]) for e in range(exits)], axis=1)
        log_probs = jax.nn.log_softmax(logits, axis=0)
        nll = -jnp.take_along_axis(log_probs, target[None, None], axis=0)[0]
        best, top = jnp.argmax(logits, axis=0), jnp.exp(jnp.max(log_probs, axis=0))
        sure = (top[..., None] >= jnp.asarray(CONFIDENCES)) & scored[None, :, None]
        agree = sure & (best == best[-1])[..., None]
        return {
            "nll": jnp.sum(jnp.where(scored, nll, 0.0), axis=1),
            "tokens": jnp.sum(sure, axis=1, dtype=jnp.float32),
            "agree": jnp.sum(agree, axis=1, dtype=jnp.float32),
        }

    scored = (batch["weights"] == 1).reshape(-1, numerics.chunk)
    parts = (
        chunks(features.astype(numerics.dtype), numerics.chunk),
        batch["targets"].reshape(-1, numerics.chunk),
        scored,
    )
    return jax.tree.map(lambda x: jnp.sum(x, axis=0), jax.lax.map(step, parts))
