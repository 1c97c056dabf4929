"""The runner: micro-batches become calls of compiled programs. It holds the package's only `jax.jit`.

Shapes are bucketed to powers of two (rows when decoding, tokens when prefilling), and everything else is data, so
that no context length, page use or sampling parameter needs another program.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence as Seq
from typing import TYPE_CHECKING

import jax
import numpy as np

from eejax.core import (
    COUNTERS,
    MEASURES,
    MIN_PREFILL_BUCKET,
    Counts,
    EngineConfig,
    Logprob,
    MicroBatch,
    RowResult,
    SamplingParams,
    Sequence,
    StepResult,
    batch_size,
    bucket_of,
    cut_prefill,
)
from eejax.device.batch_arrays import limits_of, logprobs_of, prefill_tokens, rows_of, state_of
from eejax.device.decode import decode_chunk
from eejax.device.decode_state import ANYTHING, Asks, Plan
from eejax.device.prefill import prefill
from eejax.device.programs import Compiled, ProgramFiles, use_compilation_cache
from eejax.device.setup import choose_kernels, init_cache
from pallas_kernels import use_huge_pages

if TYPE_CHECKING:
    from eejax.device.scoring import Scores

DEFERRED_KV_BYTES = 2**20
"""K and V projections of at least this size are read for several tokens at once where a row is alone. Measured on CPU:
with 4.5 MiB (llama-125m) that is 7 % quicker, with 0.25 (the demo) 2 % slower."""
MAX_PREFILL_ROWS = 32
"""Rows whose tokens are prefilled in one call."""


class Runner:
    """Owns parameters and KV cache on the device and runs micro-batches.

    Raises:
        ConfigError: `EEJAX_KERNELS` or `EEJAX_BRANCHES` has an unknown value, or a kernel is demanded that does not
            support this model.
    """

    def __init__(self, config: EngineConfig, params: dict) -> None:
        use_compilation_cache()
        self.config = config
        self.params = params
        dtype = jax.tree.leaves(params)[0].dtype
        kernels = choose_kernels(config.model, config.cache.page_size, dtype)
        # Without the kernel, attention gathers pages for every token, so rows are prefilled one after another.
        self._prefill_rows = MAX_PREFILL_ROWS if kernels["paged_attention"].implementation == "native" else 1
        self._leaves_rows_out = kernels["kv_fill"].implementation == "native"
        self.cache = init_cache(config.model, config.cache, dtype)
        use_huge_pages(jax.tree.leaves((params, self.cache)))
        self._compiled = Compiled(ProgramFiles.of(config, params, kernels))

    @property
    def compilations(self) -> int:
        """Programs that XLA compiled for this runner; those found in a cache do not count."""
        return self._compiled.compilations

    @property
    def programs(self) -> int:
        """Programs that are loaded, compiled or found in a cache."""
        return len(self._compiled.programs)

    @property
    def decode_buckets(self) -> list[int]:
        """Batch sizes that decoding is compiled for."""
        return sorted({self.decode_bucket(count + 1) for count in range(self.config.scheduler.max_num_seqs)})

    def decode_bucket(self, count: int) -> int:
        """The size of the program that decodes `count` rows."""
        return batch_size(count, self.config.scheduler.max_num_seqs, self.compacts and self._leaves_rows_out)

    @property
    def prefill_buckets(self) -> list[int]:
        """Token counts that prefill is compiled for."""
        top = min(self.config.prefill_chunk, bucket_of(self.config.max_model_len, MIN_PREFILL_BUCKET))
        first = MIN_PREFILL_BUCKET.bit_length() - 1
        return [1 << i for i in range(first, top.bit_length())]

    @property
    def compacts(self) -> bool:
        """Whether only rows still running are computed: by default where kernels can leave rows out."""
        wish = self.config.decode.compaction
        return wish == "always" or (wish == "auto" and self._leaves_rows_out)

    @property
    def variants(self) -> list[Asks]:
        """Programs that decoding has for each batch size, by what the batch's rows may ask for.

        On a CPU there is one, since code that does not run costs no time. On a GPU a branch makes the CUDA graph of a
        step longer, or divides it.
        """
        return [ANYTHING] if jax.default_backend() == "cpu" else Asks.every(self.config.model)

    def _defers(self, bucket: int) -> bool:
        """Whether fill-in is deferred in batches of `bucket` rows.

        By default where a row is alone and the weights for K and V are large, since reading them is the cost. In a step
        of several rows one nearly always enters a block that another skips, whose K and V are then made beside its own.
        """
        wish, config = self.config.decode.fill, self.config.model
        kv_weights = 2 * config.n_kv_heads * config.head_dim * config.hidden_size * self.cache.k.dtype.itemsize
        return wish == "deferred" or (wish == "auto" and bucket == 1 and kv_weights >= DEFERRED_KV_BYTES)

    def warm_up(self) -> None:
        """Compile every bucket now, so that no request ever waits for a compilation."""
        for bucket in self.prefill_buckets:
            self._prefill_program(bucket)
        for bucket in self.decode_buckets:
            for asks in self.variants:
                self.decode_program(bucket, asks)

    def run(self, batch: MicroBatch, wants_hidden: bool = False) -> StepResult:
        """Run one micro-batch to its end; the only wait for the device is the copy of its results.

        Args:
            wants_hidden: for fresh prompts, also return the last token's hidden state (`RowResult.hidden`), float32.
        """
        if batch.kind == "prefill":
            return StepResult(rows=self._prefill(batch.rows, wants_hidden))
        return self._decode(batch)

    def decode_program(self, bucket: int, asks: Asks = ANYTHING) -> jax.stages.Compiled:
        """The compiled decode chunk for `bucket` rows (its `memory_analysis()` gives its memory).

        Args:
            asks: what its rows ask for; the program for everything where `variants` has none for exactly that.
        """
        variants = self.variants
        asks = asks if asks in variants else variants[-1]

        def lower() -> jax.stages.Lowered:
            plan = Plan(self.compacts, asks.exits != "none" and self._defers(bucket), asks)
            chunk = functools.partial(decode_chunk, self.config.model, self.config.scheduler.max_chunk_steps, plan)
            rows, state = rows_of(self.config, (), bucket), state_of((), bucket)
            return jax.jit(chunk, donate_argnums=1).lower(self.params, self.cache, rows, state, limits_of())

        return self._compiled.get("decode", bucket, lower, str(asks) if len(variants) > 1 else "")

    def decode_program_for(self, params: Seq[SamplingParams]) -> jax.stages.Compiled:
        """The program that decodes a batch of these requests."""
        return self.decode_program(self.decode_bucket(len(params)), Asks.of(params))

    def _prefill_program(self, bucket: int) -> jax.stages.Compiled:
        def lower() -> jax.stages.Lowered:
            tokens = prefill_tokens((), bucket, self._prefill_rows, self.config.model.n_layers)
            rows = rows_of(self.config, (), len(tokens.last))
            call = functools.partial(prefill, self.config.model)
            return jax.jit(call, donate_argnums=1).lower(self.params, self.cache, rows, tokens)

        return self._compiled.get("prefill", bucket, lower)

    def _prefill(self, seqs: Seq[Sequence], wants_hidden: bool) -> tuple[RowResult, ...]:
        """Positions `num_cached .. prefill_length - 1` of each sequence; fresh ones get their first tokens.

        The tokens of all, one sequence after another, are cut into calls of the largest bucket.
        """
        results = [RowResult((), ()) for _ in seqs]
        spans = [(seq.num_cached, seq.prefill_length) for seq in seqs]
        for call in cut_prefill(spans, self.prefill_buckets[-1], self._prefill_rows):
            pieces = [(seqs[piece.row], piece) for piece in call]
            bucket = bucket_of(sum(piece.length for piece in call), MIN_PREFILL_BUCKET)
            tokens = prefill_tokens(pieces, bucket, self._prefill_rows, self.config.model.n_layers)
            rows = rows_of(self.config, [seq for seq, _ in pieces], len(tokens.last))
            self.cache, found = self._prefill_program(bucket)(self.params, self.cache, rows, tokens)
            wants = np.flatnonzero(tokens.wants_token).tolist()
            if not wants:
                continue
            chosen = np.asarray(found.tokens)
            asks = any(pieces[row][0].request.params.logprobs is not None for row in wants)
            report = jax.device_get(found.logprobs) if asks else None
            hidden = np.asarray(found.hidden).astype(np.float32) if wants_hidden else None
            for row in wants:
                (seq, piece), token = pieces[row], int(chosen[row])
                top = seq.request.params.logprobs
                logprobs = () if top is None or report is None else (logprobs_of(report, token, row, top),)
                state = None if hidden is None else hidden[:, row]
                results[piece.row] = RowResult((token,), (self.config.model.n_layers,), logprobs, state)
        jax.block_until_ready(self.cache)  # otherwise its time would count for the next call
        return tuple(results)

    def _decode(self, batch: MicroBatch) -> StepResult:
        count, height = len(batch.rows), self.config.scheduler.max_chunk_steps
        bucket = self.decode_bucket(max(count, batch.width))
        params = [seq.request.params for seq in batch.rows]
        limits = limits_of(batch.n_steps, batch.hold, batch.yield_on_free)
        rows, state = rows_of(self.config, batch.rows, bucket), state_of(batch.rows, bucket)
        self.cache, out = self.decode_program(bucket, Asks.of(params))(self.params, self.cache, rows, state, limits)
        packed = np.asarray(out.packed)
        counts = Counts(*packed[-len(COUNTERS) :].tolist())
        tokens, depths = packed[: -len(COUNTERS)].reshape(2, height, bucket)[:, : counts.steps, :count]
        report = jax.device_get(out.logprobs) if any(one.logprobs is not None for one in params) else None
        results = []
        for row in range(count):
            used = np.flatnonzero(depths[:, row])  # passes that gave it a token
            ids, top = tuple(tokens[used, row].tolist()), params[row].logprobs
            logprobs: tuple[dict[int, Logprob], ...] = ()
            if report is not None and top is not None:
                logprobs = tuple(
                    logprobs_of(report.at(int(i)), token, row, top) for i, token in zip(used, ids, strict=True)
                )
            results.append(RowResult(ids, tuple(depths[used, row].tolist()), logprobs))
        return StepResult(tuple(results), counts)

    def score(
        self, token_ids: Seq[int], thresholds: Seq[float] | None = None, measure: str = "softmax", start: int = 0
    ) -> Scores:
        """What the model would have chosen after every token of a text, each run as deep as decoding would run it.

        Nothing of the cache is read or written. Compiled for lengths in powers of two.

        Args:
            token_ids: the text (T tokens), from position 0.
            thresholds: one per exit; `inf` lets no token exit there. All tokens run at full depth when None.
            measure: of confidence; all but `random`, which draws for requests.
            start: tokens before it, a prompt's, run at full depth.

        Returns:
            NumPy arrays `[T]`; entry `t` is about the token that follows token `t`.

        Raises:
            InvalidRequestError: the text is empty or longer than `max_model_len` or holds unknown tokens, `start` lies
                outside it, the number of thresholds differs from the number of exits, or this model cannot be asked
                for `measure`.
        """
        from eejax.device.scoring import check_text, score_text  # only calibration scores texts

        model, count = self.config.model, len(token_ids)
        limits = check_text(model, self.config.max_model_len, token_ids, thresholds, measure, start)
        tokens = np.zeros(bucket_of(count, MIN_PREFILL_BUCKET), np.int32)
        tokens[:count] = token_ids
        numbers = np.int32(count), np.int32(start), np.asarray(limits, np.float32), np.int32(MEASURES.index(measure))

        def lower() -> jax.stages.Lowered:
            return jax.jit(functools.partial(score_text, model)).lower(self.params, tokens, *numbers)

        scores = self._compiled.get("score", len(tokens), lower)(self.params, tokens, *numbers)
        return jax.tree.map(lambda leaf: np.asarray(leaf)[:count], scores)
