"""Training of exits over a frozen backbone, and their evaluation."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from eejax.core import ConfigError, ModelConfig, is_number, require, require_integer, require_positive_int
from eejax.device import use_compilation_cache
from eejax.tune.exit_objective import chunk_size, head_loss, merged, observe, probe_loss, separated
from eejax.tune.tuning_data import pack, shuffled_forever

THRESHOLDS = (0.5, 0.7, 0.9)
"""Confidences at which the evaluation reports how many tokens would exit, and how many of those agree."""
DEFAULT_SEQ_LEN = 512
WARM_UP_SHARE = 0.05

type Loss = Callable[[ModelConfig, dict, dict, dict, dict, int], tuple[Any, dict]]
"""`head_loss` or `probe_loss`: `(config, backbone, trained, fixed, batch, chunk) -> (nats, gradient of trained)`"""


@dataclass(frozen=True, slots=True)
class TuningOptions:
    """How exits are tuned.

    Attributes:
        steps: steps that the heads learn, and then as many that the probes learn; 0 only evaluates.
        batch_tokens: tokens of one step, a multiple of `seq_len` or rounded down to one.
        seq_len: tokens that a document is read by at once; by default 512, or fewer where the model or the batch is
            smaller.
        lr: peak of the learning rate, relative to the size of what is learnt.
        eval_share: share of the documents that is held out, where no text for evaluation is given.
        seed: of the split and of the order of documents.
        dtype: what the backbone computes in; by default float32 on CPU and bfloat16 elsewhere.
    """

    steps: int = 300
    batch_tokens: int = 4096
    seq_len: int | None = None
    lr: float = 0.02
    eval_share: float = 0.05
    seed: int = 0
    dtype: str | None = None

    def __post_init__(self) -> None:
        require_positive_int("TuningOptions", batch_tokens=self.batch_tokens)
        if self.seq_len is not None:
            require_positive_int("TuningOptions", seq_len=self.seq_len)
            require(
                self.seq_len <= self.batch_tokens,
                f"batch_tokens ({self.batch_tokens}) must be at least seq_len ({self.seq_len})",
            )
        require_integer("TuningOptions", 0, steps=self.steps, seed=self.seed)
        require(is_number(self.lr) and math.isfinite(self.lr) and self.lr > 0, f"lr must be positive, got {self.lr!r}")
        require(
            is_number(self.eval_share) and 0 < self.eval_share < 1,
            f"eval_share must lie between 0 and 1, got {self.eval_share!r}",
        )

    def shape(self, model: ModelConfig) -> tuple[int, int]:
        """Rows and length of a batch for `model`. Raises `ConfigError` when `seq_len` is more than it can read."""
        length = self.seq_len or min(DEFAULT_SEQ_LEN, model.max_position, self.batch_tokens)
        require(
            length <= model.max_position,
            f"seq_len {length} is above the model's {model.max_position} positions",
        )
        return self.batch_tokens // length, length


class Tuner:
    """The exits of one model while they are tuned: their parameters in float32, the backbone's as they were loaded."""

    def __init__(self, config: ModelConfig, params: dict, options: TuningOptions, progress: bool = False) -> None:
        use_compilation_cache()
        self.config, self.options, self.progress = config, options, progress
        self.shape, self.chunk = options.shape(config), chunk_size(config)
        self.backbone = {name: leaf for name, leaf in params.items() if name != "exits"}
        # Copies, since an exit's own leaves may be the very arrays of the backbone.
        own = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32, copy=True), params.get("exits", {}))
        self.heads, self.probes = separated(own)
        self._look = self._compiled(
            lambda backbone, exits, batch: {
                name: found
                for name, found in observe(config, backbone, exits, batch, self.chunk).items()
                if name != "features"
            }
        )

    @staticmethod
    def _compiled(function: Callable, **options: Any) -> Callable:
        return jax.jit(function, **options)  # noqa: TID251  nothing is served here

    @property
    def exits(self) -> dict:
        """The exits' parameters; empty where they have none."""
        return merged(self.heads, self.probes)

    def train(self, documents: list[np.ndarray], stored: Any) -> None:
        """Tune the heads, then the probes over the heads as they will be stored, in dtype `stored`.

        Raises:
            ConfigError: the learning rate was too high; the exits hold no numbers any more.
        """
        batches = pack(shuffled_forever(documents, self.options.seed), *self.shape)
        if jax.tree.leaves(self.heads):
            self.heads = _rounded(self._descend("heads", head_loss, self.heads, self.probes, batches), stored)
        if jax.tree.leaves(self.probes):
            self.probes = _rounded(self._descend("probes", probe_loss, self.probes, self.heads, batches), stored)
        finite = all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(self.exits))
        require(finite, f"tuning diverged; lr must be lower than {self.options.lr!r}")

    def _descend(self, name: str, loss: Loss, trained: dict, fixed: dict, batches: Iterator[dict]) -> dict:
        rule = optimiser(self.options, self.config.hidden_size)

        def step(backbone: dict, fixed: dict, trained: dict, moments: Any, batch: dict) -> tuple[dict, Any, Any]:
            nats, grads = loss(self.config, backbone, trained, fixed, batch, self.chunk)
            with jax.numpy_dtype_promotion("standard"):  # optax raises floats to the power of an integer step count
                updates, moments = rule.update(grads, moments, trained)
            return jax.tree.map(jnp.add, trained, updates), moments, nats

        compiled = self._compiled(step, donate_argnums=(2, 3))
        moments = rule.init(trained)
        with self._bar(f"tuning {name}", self.options.steps) as advance:
            for _, batch in zip(range(self.options.steps), batches, strict=False):
                trained, moments, nats = compiled(self.backbone, fixed, trained, moments, batch)
                advance(int(np.count_nonzero(batch["segments"])), nats)
        return trained

    def evaluate(self, documents: list[np.ndarray], n_bytes: int, name: str = "evaluating") -> dict[str, Any]:
        """Bits per byte and agreement with full depth at every exit, and how well its confidences predict agreement.

        Args:
            n_bytes: bytes of the text that is predicted.
        """
        batches = list(pack(documents, *self.shape))
        found: dict[str, list[np.ndarray]] = {}
        with self._bar(name, len(batches)) as advance:
            for batch in batches:
                seen = jax.device_get(self._look(self.backbone, self.exits, batch))
                which = seen.pop("seen")
                for kind, values in seen.items():
                    found.setdefault(kind, []).append(values[:, which])
                advance(int(np.count_nonzero(which)), None)
        every = {kind: np.concatenate(parts, axis=1) for kind, parts in found.items()}
        bits = np.sum(every["nats"], axis=1, dtype=np.float64) / math.log(2) / max(n_bytes, 1)
        measures = [kind for kind in ("softmax", "classifier") if kind in every]
        return {
            "full_depth": {"bits_per_byte": float(bits[-1])},
            "exits": {
                str(layer): {
                    "bits_per_byte": float(bits[i]),
                    "agreement": float(np.mean(every["agree"][i])),
                    "confidence": {kind: confidence_report(every[kind][i], every["agree"][i]) for kind in measures},
                }
                for i, layer in enumerate(self.config.exits.layers)
            },
        }

    @contextmanager
    def _bar(self, name: str, total: int) -> Iterator[Callable[[int, Any], None]]:
        """A progress bar on stderr: loss, tokens a second, time to go."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[says]}"),
        )
        with Progress(*columns, console=Console(stderr=True), disable=not self.progress, transient=True) as bar:
            task, tokens, start = bar.add_task(name, total=total, says="compiling"), 0, 0.0

            def advance(count: int, loss: Any) -> None:
                nonlocal tokens, start
                if not self.progress:  # reading the loss would wait for the device
                    return
                says = "" if loss is None else f"loss {float(loss):.4f}  "
                if start:
                    tokens += count
                    says += f"{tokens / (time.perf_counter() - start):,.0f} tokens/s"
                else:
                    start = time.perf_counter()  # the first step has compiled
                bar.update(task, advance=1, says=says)

            yield advance


def _rounded(params: dict, dtype: Any) -> dict:
    return jax.tree.map(lambda leaf: leaf.astype(dtype).astype(leaf.dtype), params)


def import_optax() -> Any:
    """The optimisers, which only training needs. Raises `ConfigError` saying how to install them."""
    try:
        import optax
    except ImportError as error:
        raise ConfigError("tuning exits needs optax: pip install 'eejax[train]'") from error
    return optax


def optimiser(options: TuningOptions, hidden_size: int) -> Any:
    """Adam; a linear warm-up, then half a cosine to zero.

    Steps are relative to the size of each parameter, so that one rate suits gains near 1 as well as matrices, whatever
    their width. Parameters smaller than a matrix over `hidden_size` inputs commonly is, the probes' zeros among them,
    count as that large.
    """
    optax = import_optax()
    warm_up = round(WARM_UP_SHARE * options.steps)
    return optax.chain(
        optax.scale_by_adam(),
        optax.scale_by_param_block_rms(min_scale=hidden_size**-0.5),
        optax.scale_by_learning_rate(
            optax.warmup_cosine_decay_schedule(0.0, options.lr, warm_up, max(options.steps, warm_up + 1))
        ),
    )


def confidence_report(confidence: np.ndarray, agree: np.ndarray) -> dict[str, Any]:
    """How well `confidence [N]` tells tokens that agree with full depth from those that do not.

    Returns:
        auroc: chance that an agreeing token is surer than one that does not agree, None where there is only one kind;
        at: for each of `THRESHOLDS`, the share of tokens that reach it and how many of those agree, None of none.
    """
    yes, no = confidence[agree], np.sort(confidence[~agree])
    auroc = None
    if yes.size and no.size:
        below, upto = (np.searchsorted(no, yes, side) for side in ("left", "right"))
        auroc = float(np.mean(below + upto) / 2 / no.size)
    at = {}
    for threshold in THRESHOLDS:
        leaves = confidence >= threshold
        agreement = float(np.mean(agree[leaves])) if leaves.any() else None
        at[str(threshold)] = {"coverage": float(np.mean(leaves)), "agreement": agreement}
    return {"auroc": auroc, "at": at}
