"""Llama-family decoder with early exits, in Flax NNX.

Activations are feature-major: `[D, *N]`, with any number of token axes at the end. Weights are `[out, in]`, so a
projection is `W @ x`, the form that XLA:CPU runs fastest for few tokens; on GPUs it makes no difference.

One alphabet for shapes, here and in the rest of the package:

    D hidden size        F MLP size           V vocabulary     L blocks
    H query heads        K key/value heads    C head dimension (C2: half of it)
    B rows of a batch    T tokens of a row    N any token axes (`B`, `T` or `B T`)
    P pages              S slots of a page

The modules hold parameters and say how one block computes. Their callers (prefill, decode, training) pass attention as
a function, since only they know where keys and values are kept.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from eejax.core import ModelConfig, RopeScaling
from pallas_kernels import (
    Best,
    KVProjection,
    Norm,
    Rotation,
    finish_keys_values,
    head,
    linear,
    rms_norm,
    rope,
    rotation,
)

INIT_SCALE = 0.02

type Attend[Cache] = Callable[[Array, Array, Array, Cache], tuple[Array, Cache]]
"""`attend(q [H, C, *N], k [K, C, *N], v [K, C, *N], cache) -> (o [H, C, *N], cache)`"""


def rope_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> Float[Array, " C2"]:
    """Angular frequency of each rotated pair, radians per position; Llama-3 scaling where given."""
    freq = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if scaling is None:
        return freq
    turns = scaling.original_max_position * freq / (2 * jnp.pi)
    # Between the two factors the slowed and the original frequency are blended linearly.
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = jnp.clip(blend, 0.0, 1.0)
    return freq * (blend + (1 - blend) / scaling.factor)


def _normal(rngs: nnx.Rngs, *shape: int) -> nnx.Param:
    return nnx.Param(INIT_SCALE * jax.random.normal(rngs.params(), shape, jnp.float32))


def _ones(size: int) -> nnx.Param:
    return nnx.Param(jnp.ones((size,), jnp.float32))


class Mlp(nnx.Module):
    """SwiGLU: `W_down (silu(W_gate x) * W_up x)`; gate and up are one matrix, so that they are read together."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        self.gate_up = _normal(rngs, 2 * config.intermediate_size, config.hidden_size)
        self.down = _normal(rngs, config.hidden_size, config.intermediate_size)

    def __call__(
        self, x: Float[Array, "D *N"], norm: Norm, active: Bool[Array, " N"] | None = None
    ) -> Float[Array, "D *N"]:
        """`x` plus the MLP's output for `norm(x)`, in the columns that are `active` (None: all)."""
        gated = linear(self.gate_up[...], x, norm=norm, gated=True, active=active)
        return linear(self.down[...], gated, residual=x, active=active)


class Block(nnx.Module):
    """One transformer layer. K and V have one matrix, apart from Q's, since KV fill-in needs them alone."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        self.config = config
        q_size, kv_size = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        self.attn_norm = _ones(config.hidden_size)
        self.wq = _normal(rngs, q_size, config.hidden_size)
        self.wkv = _normal(rngs, 2 * kv_size, config.hidden_size)
        self.wo = _normal(rngs, config.hidden_size, q_size)
        if config.attention_bias:
            self.bq = nnx.Param(jnp.zeros((q_size,), jnp.float32))
            self.bkv = nnx.Param(jnp.zeros((2 * kv_size,), jnp.float32))
        if config.qk_norm:
            self.q_norm = _ones(config.head_dim)
            self.k_norm = _ones(config.head_dim)
        self.mlp_norm = _ones(config.hidden_size)
        self.mlp = Mlp(config, rngs)

    @property
    def norm_before_mlp(self) -> Norm:
        """The norm between attention's residual and the MLP."""
        return Norm(self.mlp_norm[...], self.config.norm_eps)

    def _finish_queries(self, q: Array, turn: Rotation) -> Float[Array, "H C *N"]:
        config, tokens = self.config, turn.cos.shape[1:]
        if config.attention_bias:
            q = q + self.bq[...].reshape(-1, *[1] * len(tokens)).astype(q.dtype)
        q = q.reshape(config.n_heads, config.head_dim, *tokens)
        if config.qk_norm:
            q = rms_norm(self.q_norm[...], q, config.norm_eps, axis=1)
        return rope(q, turn)

    @property
    def kv_projection(self) -> KVProjection:
        """The parameters of this block's K and V, which are all that KV fill-in needs of it."""
        config = self.config
        return KVProjection(
            norm=self.attn_norm[...],
            wkv=self.wkv[...],
            bkv=self.bkv[...] if config.attention_bias else None,
            k_norm=self.k_norm[...] if config.qk_norm else None,
            eps=config.norm_eps,
        )

    def __call__[Cache](
        self,
        x: Float[Array, "D *N"],
        turn: Rotation,
        attend: Attend[Cache],
        cache: Cache,
        beside: Float[Array, "D M"] | None = None,
        active: tuple[Bool[Array, " N"], Bool[Array, " NM"]] | None = None,
    ) -> tuple[Float[Array, "D *N"], Float[Array, "D *N"], Cache]:
        """Run the block.

        Args:
            beside: states of M other tokens, which do not go through the block; it makes their K and V, in the same
                product. `attend` gets those after the ones of `x`, and `turn` has their angles after the ones of `x`,
                which has one token axis then.
            active: states of `x` that go through the block, while the others stay as they are; and states, of `x` and
                then `beside`, whose K and V are made, while the others may be anything. All when None.

        Returns:
            Its output; the residual between attention and MLP, which `mlp` exits read; the cache.
        """
        turn_of_x, norm = turn, Norm(self.attn_norm[...], self.config.norm_eps)
        runs, due = active or (None, None)
        if beside is None:
            q, kv = linear((self.wq[...], self.wkv[...]), x, norm=norm, active=active)
        else:
            turn_of_x = Rotation(turn.cos[:, : x.shape[1]], turn.sin[:, : x.shape[1]])
            q = linear(self.wq[...], x, norm=norm, active=runs)
            kv = linear(self.wkv[...], jnp.concatenate([x, beside], axis=1), norm=norm, active=due)
        q = self._finish_queries(q, turn_of_x)
        k, v = finish_keys_values(self.kv_projection, kv, turn)
        o, cache = attend(q, k, v, cache)
        middle = linear(self.wo[...], o.reshape(-1, *x.shape[1:]), residual=x, active=runs)
        return self.mlp(middle, self.norm_before_mlp, runs), middle, cache


class ExitHead(nnx.Module):
    """Parameters that an exit owns, as `ExitConfig` describes them; a `shared` exit owns none but its probe."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        exits = config.exits
        if exits.head != "shared" and exits.norm:
            self.norm = _ones(config.hidden_size)
        if exits.head == "mlp":
            self.mlp = Mlp(config, rngs)
        if exits.head == "block":
            self.block = Block(config, rngs)
        if not exits.tie_output:
            self.output = _normal(rngs, config.vocab_size, config.hidden_size)
        if exits.probes:
            self.probe_weight = nnx.Param(jnp.zeros((config.hidden_size,), jnp.float32))
            self.probe_bias = nnx.Param(jnp.zeros((1,), jnp.float32))


class EarlyExitTransformer(nnx.Module):
    """Decoder whose logits can be read after every exit point (`ModelConfig.exit_points`)."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.embedding = _normal(rngs, config.vocab_size, config.hidden_size)
        self.blocks = nnx.List([Block(config, rngs) for _ in range(config.n_layers)])
        self.norm = _ones(config.hidden_size)
        if not config.tie_embeddings:
            self.output = _normal(rngs, config.vocab_size, config.hidden_size)
        if config.exits.has_params:
            self.exits = nnx.Dict({name: ExitHead(config, rngs) for name in config.exit_names})

    def frequencies(self) -> Float[Array, " C2"]:
        """Rotary frequencies of this model, constants of the programs that use them."""
        with jax.ensure_compile_time_eval():
            return rope_frequencies(self.config.head_dim, self.config.rope_theta, self.config.rope_scaling)

    def rotation(self, positions: Int[Array, "*N"]) -> Rotation:
        """The rotation of queries and keys of tokens at these positions."""
        return rotation(positions, self.frequencies())

    def embed(self, tokens: Int[Array, "*N"]) -> Float[Array, "D *N"]:
        """Hidden states that enter block 0."""
        return jnp.moveaxis(self.embedding[...][tokens], -1, 0)

    @property
    def cached_blocks(self) -> tuple[Block, ...]:
        """Blocks that keep K and V, in the order of the cache: the network's, then those that `block` exits own."""
        owners = self.config.exit_names if self.config.exits.head == "block" else ()
        return (*self.blocks, *(self.exits[name].block for name in owners))

    def exit_blocks(self, layer: int) -> tuple[int, ...]:
        """Indices into `cached_blocks` of those that exit point `layer` owns: one at a `block` exit, none elsewhere.

        It keeps K and V of every token, tested there or not: of the state after block `layer`, or of the frozen state
        of a token that exited before.
        """
        exits = self.config.exits
        owns = exits.head == "block" and layer in exits.layers
        return (self.config.n_layers + exits.layers.index(layer),) if owns else ()

    def features(
        self,
        layer: int,
        x: Float[Array, "D *N"],
        middle: Float[Array, "D *N"],
        run_block: Callable[[Block, Float[Array, "D *N"]], Float[Array, "D *N"]] | None = None,
        active: Bool[Array, " N"] | None = None,
    ) -> Float[Array, "D *N"]:
        """What the output matrix at exit point `layer` multiplies.

        Args:
            layer: an exit point: an exit layer or `n_layers`.
            x: hidden state after block `layer`.
            middle: that block's residual between attention and MLP.
            run_block: returns a block's output for `x`; the caller knows its attention. Only `block` exits need it.
            active: columns that are needed, all when None; the others may be anything.

        Raises:
            ValueError: a `block` exit without `run_block`.
        """
        eps = self.config.norm_eps
        if layer == self.config.n_layers or self.config.exits.head == "shared":
            return rms_norm(self.norm[...], x, eps)
        own = self.exits[f"after_{layer}"]
        if self.config.exits.head == "mlp":
            x = own.mlp(middle, self.blocks[layer - 1].norm_before_mlp, active)
        if self.config.exits.head == "block":
            if run_block is None:
                raise ValueError(f"features of the block exit after block {layer} need run_block")
            x = run_block(own.block, x)
        return rms_norm(own.norm[...], x, eps) if self.config.exits.norm else x

    def probe_logit(self, layer: int, features: Float[Array, "D *N"]) -> Float[Array, "*N"]:
        """Log-odds, by exit `layer`'s linear probe, that its likeliest token is the last block's (CALM, sec. 3.3)."""
        own = self.exits[f"after_{layer}"]
        weight = own.probe_weight[...].astype(jnp.float32)
        return jnp.tensordot(weight, features.astype(jnp.float32), 1) + own.probe_bias[...].astype(jnp.float32)[0]

    def output_matrix(self, layer: int) -> Float[Array, "V D"]:
        """The matrix that turns features at exit point `layer` into logits."""
        if layer != self.config.n_layers and not self.config.exits.tie_output:
            return self.exits[f"after_{layer}"].output[...]
        return self.embedding[...] if self.config.tie_embeddings else self.output[...]

    def logits(self, layer: int, features: Float[Array, "D *N"]) -> Float[Array, "V *N"]:
        """Float32 logits at exit point `layer`."""
        return linear(self.output_matrix(layer), features.astype(jnp.float32))

    def best(
        self,
        layer: int,
        features: Float[Array, "D N"],
        *,
        active: Bool[Array, " N"] | None = None,
        logits: Float[Array, "V N"] | None = None,
        wanted: Bool[Array, " N"] | None = None,
        confidence: bool = True,
    ) -> tuple[Best, Float[Array, "V N"] | None]:
        """What decoding needs of the logits at exit point `layer`, see `pallas_kernels.head`."""
        matrix = self.output_matrix(layer)
        return head(matrix, features, active=active, logits=logits, wanted=wanted, confidence=confidence)


def init_params(config: ModelConfig, seed: int = 0) -> dict:
    """Random parameters as a nested dict of float32 arrays; matrices normal with scale 0.02, norms one."""
    model = EarlyExitTransformer(config, rngs=nnx.Rngs(seed))
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def param_shapes(config: ModelConfig) -> dict:
    """The nested dict of `jax.ShapeDtypeStruct` that parameters of this configuration must match."""
    return jax.eval_shape(lambda: init_params(config))


def bind(config: ModelConfig, params: dict) -> EarlyExitTransformer:
    """The model over `params`, for use while tracing (it costs nothing per call of the compiled function)."""
    model = nnx.eval_shape(lambda: EarlyExitTransformer(config, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(model)
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graph, state)


def count_params(params: dict) -> int:
    """Number of parameters in a nested dict of arrays or of their shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
