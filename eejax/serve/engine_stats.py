"""Counters of an engine, and its present load. No jax here."""

from __future__ import annotations

from dataclasses import dataclass

from eejax.core import Counts


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats(Counts):
    """Counts since the engine started, and its present load. The fields of `Counts` are about decoding.

    Attributes:
        tokens: answer tokens produced; `prompt_tokens` were prefilled (again after a preemption).
        blocks_full_depth: what `blocks_run` would be at full depth.
        token_blocks: blocks that the decoded tokens themselves ran, summed over tokens.
        schedule_seconds: time that the scheduler took, on the host.
        preemptions: how often a sequence lost its pages; `parkings`, how often one kept them and was left out of a
            chunk after having been in one.
        requests_running: sequences that hold pages; `requests_waiting`, those that do not.
        compilations: programs that XLA compiled; those found in the compilation cache do not count.
    """

    tokens: int
    prompt_tokens: int
    blocks_full_depth: int
    token_blocks: int
    schedule_seconds: float
    compilations: int
    preemptions: int
    parkings: int
    requests_running: int
    requests_waiting: int
    pages_in_use: int
    num_pages: int
