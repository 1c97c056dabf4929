"""From micro-batches to device calls: buckets, compilation, results. The package's only `jax.jit`.

Shapes are bucketed to powers of two (rows when decoding, tokens when prefilling), and everything else is data, so
that context length, page use and sampling parameters never compile anything anew.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence as Seq

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
from eejax.device.batch_arrays import logprobs_of, prefill_tokens, rows_of, state_of
from eejax.device.decode import ChunkLimits, decode_chunk
from eejax.device.decode_state import ANYTHING, Asks, Plan
from eejax.device.kernels import choose_kernels
from eejax.device.kv_cache import init_cache
from eejax.device.prefill import prefill
from eejax.device.programs import Compiled, ProgramFiles
from eejax.device.scoring import Scores, check_text, score_text
from pallas_kernels import cache_folder, use_huge_pages

DEFERRED_KV_BYTES = 2**20
"""K and V projections of at least this size are read for several tokens at once where a row is alone. Measured on CPU:
with 4.5 MiB (llama-125m) that is 7 % quicker, with 0.25 (the demo) 2 % slower."""
MAX_PREFILL_ROWS = 32
"""Rows whose tokens are prefilled in one call."""


def use_compilation_cache() -> None:
    """Keep compiled programs on disk, so that a second start compiles nothing.

    In `xla` below `pallas_kernels.cache_folder`. A cache that the process has configured for JAX already
    is left as it is.
    """
    base = cache_folder()
    if base is None or jax.config.jax_compilation_cache_dir is not None:
        return
    jax.config.update("jax_compilation_cache_dir", str(base / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


class Runner:
    """Owns parameters and KV cache on the device and runs micro-batches over them.

    Raises:
        ConfigError: `EEJAX_KERNELS` or `EEJAX_BRANCHES` has an unknown value, or a kernel is demanded that does not
            take this model.
    """

    def __init__(self, config: EngineConfig, params: dict) -> None:
        use_compilation_cache()
        self.config = config
        self.params = params
        dtype = jax.tree.leaves(params)[0].dtype
        kernels = choose_kernels(config.model, config.cache.page_size, dtype)
        # Without the kernel, attention gathers pages for every token of several rows: those go one after another.
        self._prefill_rows = MAX_PREFILL_ROWS if kernels["paged_attention"].implementation == "native" else 1
        self._leaves_rows_out = kernels["kv_fill"].implementation == "native"
        self.cache = init_cache(config.model, config.cache, dtype)
        use_huge_pages(jax.tree.leaves((params, self.cache)))
        self._compiled = Compiled(ProgramFiles.of(config, params, kernels))

    @property
    def compilations(self) -> int:
        """Programs that XLA compiled for this runner; those found in the compilation cache do not count."""
        return self._compiled.compilations

    @property
    def programs(self) -> int:
        """Number of programs that are loaded, whether they were compiled or found in a cache."""
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
        """Whether rows that have left are not computed any further: by default where kernels can leave rows out."""
        wish = self.config.decode.compaction
        return wish == "always" or (wish == "auto" and self._leaves_rows_out)

    @property
    def variants(self) -> list[Asks]:
        """Programs that decoding has for each batch size, by what the batch's rows may ask for.

        On a CPU there is one, since code that does not run costs no time there. On a GPU a branch makes the CUDA graph
        of a step longer, or divides it.
        """
        return [ANYTHING] if jax.default_backend() == "cpu" else Asks.every(self.config.model)

    def _defers(self, bucket: int) -> bool:
        """Whether fill-in is deferred in batches of `bucket` rows.

        By default where a row is alone, and reading the weights for K and V is what that costs: in a step of several
        some row nearly always enters a block that another skips, and K and V are then made beside its own.
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
            wants_hidden: of fresh prefills, also the last prompt token's hidden state (`RowResult.hidden`), float32.
        """
        if batch.kind == "prefill":
            return StepResult(rows=self._prefill(batch.rows, wants_hidden))
        return self._decode(batch)

    def decode_program(self, bucket: int, asks: Asks = ANYTHING) -> jax.stages.Compiled:
        """The compiled decode chunk for `bucket` rows (its `memory_analysis()` tells what it needs).

        Args:
            asks: what its rows ask for. If `variants` has no program for exactly that, the one for everything runs.
        """
        variants = self.variants
        asks = asks if asks in variants else variants[-1]

        def lower() -> jax.stages.Lowered:
            plan = Plan(self.compacts, asks.exits != "none" and self._defers(bucket), asks)
            chunk = functools.partial(decode_chunk, self.config.model, self.config.scheduler.max_chunk_steps, plan)
            rows, state = rows_of(self.config, (), bucket), state_of((), bucket)
            limits = ChunkLimits(np.int32(1), np.int32(1), np.bool_(False))
            return jax.jit(chunk, donate_argnums=1).lower(self.params, self.cache, rows, state, limits)

        return self._compiled.get("decode", bucket, lower, str(asks) if len(variants) > 1 else "")

    def decode_program_for(self, params: Seq[SamplingParams]) -> jax.stages.Compiled:
        """The program that decodes a batch of these requests."""
        return self.decode_program(self.decode_bucket(len(params)), Asks.of(params))

    def _prefill_program(self, bucket: int) -> jax.stages.Compiled:
        def lower() -> jax.stages.Lowered:
            tokens = prefill_tokens((), bucket, self._prefill_rows, self.config.model.n_layers)
            return jax.jit(functools.partial(prefill, self.config.model), donate_argnums=1).lower(
                self.params, self.cache, rows_of(self.config, (), len(tokens.last)), tokens
            )

        return self._compiled.get("prefill", bucket, lower)

    def _prefill(self, seqs: Seq[Sequence], wants_hidden: bool) -> tuple[RowResult, ...]:
        """Positions `num_cached .. prefill_length - 1` of each sequence; fresh ones get their first tokens.

        Tokens of all stand one behind another and are cut into chunks, wherever that falls.
        """
        results = [RowResult((), ()) for _ in seqs]
        for pieces in cut_prefill(
            [(seq.num_cached, seq.prefill_length) for seq in seqs], self.prefill_buckets[-1], self._prefill_rows
        ):
            bucket = bucket_of(sum(piece.length for piece in pieces), MIN_PREFILL_BUCKET)
            mine = [(seqs[piece.row], piece) for piece in pieces]
            tokens = prefill_tokens(mine, bucket, self._prefill_rows, self.config.model.n_layers)
            rows = rows_of(self.config, [seq for seq, _ in mine], len(tokens.last))
            self.cache, found = self._prefill_program(bucket)(self.params, self.cache, rows, tokens)
            wants = np.flatnonzero(tokens.wants_token).tolist()
            if not wants:
                continue
            chosen = np.asarray(found.tokens)
            asks = any(mine[row][0].request.params.logprobs is not None for row in wants)
            report = jax.device_get(found.logprobs) if asks else None
            hidden = np.asarray(found.hidden).astype(np.float32) if wants_hidden else None
            for row in wants:
                (seq, piece), token = mine[row], int(chosen[row])
                wanted = seq.request.params.logprobs
                logprobs = () if wanted is None or report is None else (logprobs_of(report, token, row, wanted),)
                state = None if hidden is None else hidden[:, row]
                results[piece.row] = RowResult((token,), (self.config.model.n_layers,), logprobs, state)
        jax.block_until_ready(self.cache)  # or its time would be taken for the next call's
        return tuple(results)

    def _decode(self, batch: MicroBatch) -> StepResult:
        count, height = len(batch.rows), self.config.scheduler.max_chunk_steps
        bucket = self.decode_bucket(max(count, batch.width))
        self.cache, out = self.decode_program(bucket, Asks.of(seq.request.params for seq in batch.rows))(
            self.params,
            self.cache,
            rows_of(self.config, batch.rows, bucket),
            state_of(batch.rows, bucket),
            ChunkLimits(np.int32(batch.n_steps), np.int32(batch.hold), np.bool_(batch.yield_on_free)),
        )
        packed = np.asarray(out.packed)
        split = len(packed) - len(COUNTERS)
        counts = Counts(*packed[split:].tolist())
        tokens, depths = packed[:split].reshape(2, height, bucket)[:, : counts.steps, :count]
        wanted = [seq.request.params.logprobs for seq in batch.rows]
        report = jax.device_get(out.logprobs) if any(w is not None for w in wanted) else None
        results = []
        for row in range(count):
            used = np.flatnonzero(depths[:, row])  # passes that gave it a token
            ids = tuple(tokens[used, row].tolist())
            logprobs: tuple[dict[int, Logprob], ...] = ()
            if report is not None and (top := wanted[row]) is not None:
                at = [jax.tree.map(lambda leaf, i=i: leaf[i], report) for i in used]
                logprobs = tuple(logprobs_of(one, token, row, top) for one, token in zip(at, ids, strict=True))
            results.append(RowResult(ids, tuple(depths[used, row].tolist()), logprobs))
        return StepResult(tuple(results), counts)

    def score(
        self,
        token_ids: Seq[int],
        thresholds: Seq[float] | None = None,
        measure: str = "softmax",
        start: int = 0,
    ) -> Scores:
        """What the model would have chosen behind every token of a text, each run as deep as decoding would run it.

        Nothing of the cache is read or written. Compiled for lengths in powers of two.

        Args:
            token_ids: the text (T tokens), from position 0.
            thresholds: one per exit; `inf` lets none leave there. All tokens run at full depth when None.
            measure: of confidence; all but `random`, which draws for requests.
            start: tokens before it, a prompt's, run at full depth.

        Returns:
            NumPy arrays `[T]`; token `t` of the text was drawn from what stands at `t - 1`.

        Raises:
            InvalidRequestError: the text is empty or longer than `max_model_len` or holds unknown tokens, `start` lies
                outside it, the number of thresholds differs from the number of exits, or this model cannot be asked
                for `measure`.
        """
        model, count = self.config.model, len(token_ids)
        limits = check_text(model, self.config.max_model_len, token_ids, thresholds, measure, start)
        tokens = np.zeros(bucket_of(count, MIN_PREFILL_BUCKET), np.int32)
        tokens[:count] = token_ids
        limit, which = np.asarray(limits, np.float32), np.int32(MEASURES.index(measure))
        program = self._score_program(len(tokens))
        scores = program(self.params, tokens, np.int32(count), np.int32(start), limit, which)
        return jax.tree.map(lambda leaf: np.asarray(leaf)[:count], scores)

    def _score_program(self, bucket: int) -> jax.stages.Compiled:
        def lower() -> jax.stages.Lowered:
            tokens, limits = np.zeros(bucket, np.int32), np.zeros(len(self.config.model.exits.layers), np.float32)
            zero = np.int32(0)
            score = jax.jit(functools.partial(score_text, self.config.model))
            return score.lower(self.params, tokens, zero, zero, limits, zero)

        return self._compiled.get("score", bucket, lower)
