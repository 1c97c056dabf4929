"""What an engine has done, and how busy it is. No jax here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counts since the engine started, and its present load.

    Attributes:
        tokens: answer tokens produced; `prompt_tokens` were prefilled (again after a preemption).
        steps: decode steps; one step is one token for every row of a micro-batch.
        blocks_run: blocks executed for whole batches while decoding; at full depth it would be `blocks_full_depth`.
        token_blocks: blocks that the decoded tokens themselves ran, summed over tokens.
        heads_run: vocabulary projections executed while decoding.
        row_steps: rows of each decode step, padding and rows already done included, summed over steps.
        row_blocks: rows computed in each block run, padding included, summed over blocks: what compaction saves;
            `row_heads`, the same for vocabulary projections.
        fills: blocks whose K and V projection was run for fill-in alone.
        schedule_seconds: time that the scheduler took, on the host.
        preemptions: how often a sequence lost its pages; `parkings`, how often one kept them and was left out of a
            chunk after having been in one.
        requests_running: sequences that hold pages; `requests_waiting`, those that do not.
        compilations: programs that XLA compiled; those found in the compilation cache do not count.
    """

    tokens: int
    prompt_tokens: int
    steps: int
    blocks_run: int
    blocks_full_depth: int
    token_blocks: int
    heads_run: int
    row_steps: int
    row_blocks: int
    row_heads: int
    fills: int
    schedule_seconds: float
    compilations: int
    preemptions: int
    parkings: int
    requests_running: int
    requests_waiting: int
    pages_in_use: int
    num_pages: int
