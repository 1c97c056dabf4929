"""Micro-batches as the arrays that compiled programs take, and log-probabilities as the host reports them."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from typing import Any

import numpy as np

from eejax.core import MEASURES, DecayingThreshold, EngineConfig, Logprob, Piece, Sequence
from eejax.device.decode_state import ChunkLimits, DecodeState, ExitRows, Rows
from eejax.device.prefill import PrefillTokens
from eejax.device.sampling import SamplingRows, TokenLogprobs
from pallas_kernels import check_page_ids

MAX_DEVICE_STOP_IDS = 8
"""Stop ids that the device tests. The host tests all of them, so more than these cost a few steps, not correctness."""


def rows_of(config: EngineConfig, seqs: Seq[Sequence], bucket: int) -> Rows:
    """The parameters of `bucket` rows: first those of `seqs`, then padding."""
    exits = len(config.model.exits.layers)
    table = np.zeros((bucket, config.pages_per_seq), np.int32)
    stop_ids = np.full((bucket, MAX_DEVICE_STOP_IDS), -1, np.int32)
    thresholds = np.full((exits, bucket), np.inf, np.float32)
    measure, top_k = np.zeros(bucket, np.int32), np.zeros(bucket, np.int32)
    tau, horizon = np.full(bucket, -1, np.float32), np.ones(bucket, np.float32)
    gates = np.zeros(bucket, np.float32)
    keys = np.zeros((bucket, 2), np.uint32)
    temperature, min_p = np.zeros(bucket, np.float32), np.zeros(bucket, np.float32)
    top_p, logprobs = np.ones(bucket, np.float32), np.full(bucket, -1, np.int32)
    for i, seq in enumerate(seqs):
        request, params = seq.request, seq.request.params
        table[i, : len(seq.pages)] = seq.pages
        ids = sorted(request.stop_token_ids)[:MAX_DEVICE_STOP_IDS]
        stop_ids[i, : len(ids)] = ids
        if exits:
            thresholds[:, i] = request.thresholds
        if params.early_exit is not None:
            measure[i], gates[i] = MEASURES.index(params.early_exit.measure), params.early_exit.gate
            if isinstance(params.early_exit.threshold, DecayingThreshold):
                tau[i] = params.early_exit.threshold.tau
        horizon[i] = request.max_tokens
        keys[i] = request.seed, seq.index
        # top_k=1 keeps the likeliest token only: greedy, with ties decided as greedy decides them.
        temperature[i] = 0.0 if params.top_k == 1 else params.temperature
        top_k[i] = min(params.top_k, config.model.vocab_size)  # any integer is allowed, and the array is int32
        top_p[i], min_p[i] = params.top_p, params.min_p
        logprobs[i] = -1 if params.logprobs is None else params.logprobs
    check_page_ids(table, config.cache.num_pages)
    return Rows(
        _host(table),
        _host(stop_ids),
        ExitRows(*map(_host, (thresholds, measure, tau, horizon, gates, keys))),
        SamplingRows(*map(_host, (temperature, top_k, top_p, min_p, logprobs))),
    )


def state_of(seqs: Seq[Sequence], bucket: int) -> DecodeState:
    """How far the answers of `bucket` rows are: first those of `seqs`, then padding, which is not live."""
    numbers = np.zeros((4, bucket), np.int32)
    for i, seq in enumerate(seqs):
        numbers[:, i] = seq.output_token_ids[-1], seq.num_tokens - 1, len(seq.output_token_ids), seq.remaining
    return DecodeState(_host(numbers), live=_host(np.arange(bucket) < len(seqs)))


def limits_of(n_steps: int = 1, hold: int = 1, yield_on_free: bool = False) -> ChunkLimits:
    """A chunk's limits as scalars of their dtypes."""
    return ChunkLimits(*map(_host, (np.int32(n_steps), np.int32(hold), np.bool_(yield_on_free))))


def prefill_tokens(pieces: Seq[tuple[Sequence, Piece]], bucket: int, max_rows: int, n_layers: int) -> PrefillTokens:
    """The tokens of some pieces, at most `bucket`; padding follows, and rows up to `max_rows` or `bucket`."""
    count = min(max_rows, bucket)
    ids, rows, depths = np.zeros((3, bucket), np.int32)
    positions = np.full(bucket, -1, np.int32)
    last, wants_token = np.zeros(count, np.int32), np.zeros(count, bool)
    end = 0
    for row, (seq, piece) in enumerate(pieces):
        begin, end = end, end + piece.length
        here, stop = slice(begin, end), piece.start + piece.length
        ids[here], depths[here] = seq.prefill_tokens(piece.start, stop, n_layers)
        rows[here], positions[here] = row, np.arange(piece.start, stop)
        last[row] = end - 1
        wants_token[row] = not seq.output_token_ids and stop == seq.prefill_length
    return PrefillTokens(*map(_host, (ids, rows, positions, depths, last, wants_token)))


def _host(array: np.ndarray | np.generic) -> Any:
    """A host array where a device array is expected: it travels with the call."""
    return array


def logprobs_of(report: TokenLogprobs, token: int, row: int, count: int) -> dict[int, Logprob]:
    """The `count` likeliest tokens of one row and step, and the chosen one."""
    found = {
        int(i): Logprob(float(p), n)
        for n, (i, p) in enumerate(zip(report.top_ids[:count, row], report.top[:count, row], strict=True), start=1)
        if i >= 0
    }
    found.setdefault(token, Logprob(float(report.chosen[row]), int(report.rank[row])))
    return found
