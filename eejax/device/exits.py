"""Early exits: confidence measures, thresholds, and the test after a segment.

To add a measure: name it in `eejax.core.Measure` and compute it in `confidence`, from what `Observation` carries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from eejax.core import LOGIT_MEASURES, MEASURES
from eejax.device.decode_state import ExitRows, Pass, Step
from eejax.model import Block
from pallas_kernels import Best, PagedKVCache, Rotation, run_if

RANDOM_STREAM = 1
"""Sets the `random` measure's draws apart from the sampler's, which use the same per-token keys."""


@dataclass(frozen=True, slots=True)
class Observation:
    """What measures may look at, at one exit. What is None was not computed, and rows that need it do not exit.

    Attributes:
        best: what this exit's logits come to.
        similarity: cosine of the hidden states before and after the exit's block.
        probe: log-odds by the exit's linear probe.
        uniform: one draw per token.
    """

    best: Best | None = None
    similarity: Float[Array, " B"] | None = None
    probe: Float[Array, " B"] | None = None
    uniform: Float[Array, " B"] | None = None


def uses(rows: ExitRows, names: Sequence[str]) -> Bool[Array, " B"]:
    """Which rows use one of the named measures."""
    return jnp.isin(rows.measure, jnp.array([i for i, name in enumerate(MEASURES) if name in names]))


def may_exit(rows: ExitRows, exit_index: int) -> Bool[Array, " B"]:
    """Which rows take part in the test at an exit at all."""
    return jnp.isfinite(rows.thresholds[exit_index])


def thresholds_at(rows: ExitRows, exit_index: int, step: Int[Array, " B"]) -> Float[Array, " B"]:
    """Thresholds for answer token number `step` (from 0) at one exit; `DecayingThreshold` gives the formula."""
    base = rows.thresholds[exit_index]
    decayed = 0.9 * base + 0.1 * jnp.exp(-rows.tau * step.astype(jnp.float32) / rows.horizon)
    return jnp.where(rows.tau < 0, base, jnp.clip(decayed, 0.0, 1.0))


def token_keys(rows: ExitRows, step: Int[Array, " B"]) -> Array:
    """One random key per row for answer token number `step`: a function of the request alone, not of its batch."""
    return jax.vmap(lambda data, t: jax.random.fold_in(jax.random.wrap_key_data(data), t))(rows.keys, step)


def uniform_draw(rows: ExitRows, step: Int[Array, " B"]) -> Float[Array, " B"]:
    """The `random` measure: one number in [0, 1) per row and token, the same at every exit."""
    return jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, RANDOM_STREAM)))(token_keys(rows, step))


def similarity(before: Float[Array, "D B"], after: Float[Array, "D B"]) -> Float[Array, " B"]:
    """The `similarity` measure: cosine of the hidden states before and after a block, at most 1."""
    before, after = before.astype(jnp.float32), after.astype(jnp.float32)
    lengths = jnp.sum(before * before, axis=0) * jnp.sum(after * after, axis=0)
    cosine = jnp.sum(before * after, axis=0) * jax.lax.rsqrt(jnp.maximum(lengths, jnp.finfo(jnp.float32).tiny))
    return jnp.minimum(cosine, 1.0)


def confidence(rows: ExitRows, seen: Observation) -> Float[Array, " B"]:
    """Each row's confidence under its own measure, below every threshold where that was not observed."""
    found: dict[str, Array] = {}
    if seen.best is not None:
        best = seen.best
        found |= {"softmax": 1 / best.total, "margin": (1 - jnp.exp(best.second - best.top)) / best.total}
    if seen.similarity is not None:
        found["similarity"] = seen.similarity
    if seen.probe is not None:
        found["classifier"] = jax.nn.sigmoid(seen.probe)
    if seen.uniform is not None:
        found["random"] = seen.uniform
    result = jnp.full(rows.measure.shape, -jnp.inf)
    for index, name in enumerate(MEASURES):
        if name in found:
            result = jnp.where(rows.measure == index, found[name], result)
    return result


@dataclass(frozen=True, slots=True)
class ExitTest:
    """The test of one exit in one pass, after the rows that `ran` have run the segment before it.

    Attributes:
        rotation: of the rows' positions.
        before, middle, x: input of the exit's block, the segment's last; its residual between attention and MLP; its
            output.
        cache: with K and V of this pass.
    """

    ctx: Pass
    index: int
    ran: Bool[Array, " B"]
    rotation: Rotation
    before: Float[Array, "D B"]
    middle: Float[Array, "D B"]
    x: Float[Array, "D B"]
    cache: PagedKVCache

    @property
    def layer(self) -> int:
        """Blocks before the exit."""
        return self.ctx.model.config.exits.layers[self.index]

    def apply(self, step: Step) -> Step:
        """Test the rows that may exit here, and resolve those that pass."""
        rows = self.ctx.rows.exits
        asks = may_exit(rows, self.index) & self.ran
        with jax.named_scope("confidence"):
            if self.ctx.plan.asks.exits == "heads":
                return run_if(jnp.any(asks), partial(self._by_head, asks), step)
            by_logits = asks & uses(rows, LOGIT_MEASURES)
            step = run_if(jnp.any(by_logits), partial(self._by_head, by_logits), step)
            others = asks & ~by_logits
            return run_if(jnp.any(others), partial(self._without_head, others), step)

    def _by_head(self, asking: Bool[Array, " B"], step: Step) -> Step:
        """Test by the exit's logits, of rows whose gate the exit's probe passes."""
        model, features = self.ctx.model, self._features(asking)
        if not model.config.exits.probes:
            return self._ask_head(asking, features, step)
        asking &= jax.nn.sigmoid(model.probe_logit(self.layer, features)) >= self.ctx.rows.exits.gates
        return run_if(jnp.any(asking), partial(self._ask_head, asking, features), step)

    def _ask_head(self, asking: Bool[Array, " B"], features: Float[Array, "D B"], step: Step) -> Step:
        plan = self.ctx.plan
        with jax.named_scope("heads"):
            best, logits = self.ctx.model.best(
                self.layer,
                features,
                active=plan.computed(asking),
                logits=step.logits,
                wanted=asking & self.ctx.rows.sampling.needs_logits,
            )
        exiting = asking & self._passes(Observation(best=best))
        # Rows that exit here are scored by these very logits: no second projection.
        best = jax.tree.map(partial(jnp.where, exiting), best, step.best)
        step = replace(self._exit(exiting, features, step), best=best, logits=logits, scored=step.scored | exiting)
        return step.counting(heads_run=1, row_heads=plan.count(asking))

    def _without_head(self, asking: Bool[Array, " B"], step: Step) -> Step:
        """Test by measures that need no logits."""
        model, features = self.ctx.model, self._features(asking)
        seen = Observation(
            similarity=similarity(self.before, self.x),
            probe=model.probe_logit(self.layer, features) if model.config.exits.probes else None,
            uniform=uniform_draw(self.ctx.rows.exits, self.ctx.state.generated),
        )
        return self._exit(asking & self._passes(seen), features, step)

    def _features(self, asking: Bool[Array, " B"]) -> Float[Array, "D B"]:
        """What the exit's output matrix multiplies, for the rows that ask."""
        run_block, active = partial(self._run_own_block, asking), self.ctx.plan.computed(asking)
        return self.ctx.model.features(self.layer, self.x, self.middle, run_block, active)

    def _run_own_block(self, asking: Bool[Array, " B"], block: Block, x: Float[Array, "D B"]) -> Float[Array, "D B"]:
        """The block that the exit owns. Its K and V have been written, for rows that do not ask as well."""
        (own,) = self.ctx.model.exit_blocks(self.layer)
        active = (asking, jnp.zeros_like(asking)) if self.ctx.plan.compacts else None
        return block(x, self.rotation, partial(self.ctx.attend, own, asking, None), self.cache, active=active)[0]

    def _passes(self, seen: Observation) -> Bool[Array, " B"]:
        rows = self.ctx.rows.exits
        return confidence(rows, seen) >= thresholds_at(rows, self.index, self.ctx.state.generated)

    def _exit(self, exiting: Bool[Array, " B"], features: Float[Array, "D B"], step: Step) -> Step:
        """Resolve the rows that exit here."""
        return replace(
            step,
            features=jnp.where(exiting, features, step.features),
            exit_at=jnp.where(exiting, self.layer, step.exit_at),
        ).placed(segment=jnp.where(exiting, len(self.ctx.model.config.segments), step.segment))
