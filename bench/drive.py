"""Requests through an engine as they arrive, and what each device call did and took."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from bench.schedule_rows import Outcome
from bench.step_model import DecodeCall, PrefillCall, pages_visited
from eejax.core import CompletionOutput, LengthEstimate, MicroBatch, PromptLike, SamplingParams, StepResult
from eejax.schedule import LengthPredictor
from eejax.serve import Engine


@dataclass(slots=True)
class Record:
    """What the runner was asked for while it was watched.

    Attributes:
        calls: the last one's `seconds` is still 0 until the engine's step is over.
        pages: in use during the last call.
        prefilled, produced: tokens of the user's requests, not of perception's questions.
    """

    requests: frozenset[str]
    calls: list[DecodeCall | PrefillCall] = field(default_factory=list)
    pages: int = 0
    prefilled: int = 0
    produced: int = 0


@contextmanager
def watched(engine: Engine, requests: Sequence[str]) -> Iterator[Record]:
    """Note what the engine asks of its runner on behalf of these requests, while the context is open."""
    record, run, model = Record(frozenset(requests)), engine.runner.run, engine.config.model
    page_size, chunk = engine.config.cache.page_size, engine.runner.prefill_buckets[-1]

    def noted(batch: MicroBatch, wants_hidden: bool = False) -> StepResult:
        record.pages = engine.allocator.num_used
        lengths = [row.prefill_length - row.num_cached for row in batch.rows]
        result = run(batch, wants_hidden)
        counts = [len(row.token_ids) for row in result.rows]
        ours = [row.request.request_id in record.requests for row in batch.rows]
        record.produced += sum(count for count, mine in zip(counts, ours, strict=True) if mine)
        if batch.kind == "prefill":
            record.prefilled += sum(length for length, mine in zip(lengths, ours, strict=True) if mine)
            record.calls.append(PrefillCall.of(lengths, chunk))
        else:
            pages = pages_visited([row.num_tokens for row in batch.rows], counts, page_size)
            work = result.counts
            depth, row_depth = work.blocks_run / model.n_layers, work.row_blocks / model.n_layers
            record.calls.append(DecodeCall(work.steps, pages, depth, row_depth, work.row_heads))
        return result

    engine.runner.run = noted
    try:
        yield record
    finally:
        del engine.runner.run  # the method shows again


@dataclass(frozen=True, slots=True)
class Answers:
    """One round: what it came to, the answers in the order of the requests, and the device calls."""

    outcome: Outcome
    outputs: tuple[CompletionOutput, ...]
    calls: tuple[DecodeCall | PrefillCall, ...]


def answer_all(
    engine: Engine,
    prompts: Sequence[PromptLike],
    params: Sequence[SamplingParams],
    arrivals: Sequence[float] | None = None,
) -> Answers:
    """Answer all requests once, each submitted when it arrives; latencies count from there.

    The engine must have been rescheduled before: its counts are taken as the round's.

    Args:
        arrivals: seconds after the beginning, ascending; None for all at once.
    """
    due = arrivals or [0.0] * len(prompts)
    names = [str(i) for i in range(len(prompts))]
    done = {}
    submitted, page_seconds = 0, 0.0
    with watched(engine, names) as record:
        zero = time.monotonic()
        while len(done) < len(prompts):
            while submitted < len(prompts) and due[submitted] <= time.monotonic() - zero:
                engine.add_request(prompts[submitted], params[submitted], names[submitted])
                submitted += 1
            if not engine.has_unfinished:
                time.sleep(max(0.0, due[submitted] - (time.monotonic() - zero)))
                continue
            before, known = time.monotonic(), len(record.calls)
            outputs = engine.step()
            seconds = time.monotonic() - before
            done.update((output.request_id, output) for output in outputs if output.finished)
            if len(record.calls) > known:
                record.calls[-1] = replace(record.calls[-1], seconds=seconds)
                page_seconds += seconds * record.pages
        total = time.monotonic() - zero
    stats = engine.stats()
    ordered = [done[name] for name in names]
    answers = tuple(output.outputs[0] for output in ordered)
    times = [(output.metrics, zero + at) for output, at in zip(ordered, due, strict=True)]
    outcome = Outcome(
        seconds=total - due[0],
        prompt_tokens=sum(len(output.prompt_token_ids) for output in ordered),
        prefilled=record.prefilled,
        answer_tokens=sum(len(answer.token_ids) for answer in answers),
        produced=record.produced,
        steps=stats.steps,
        row_steps=stats.row_steps,
        parkings=stats.parkings,
        preemptions=stats.preemptions,
        page_seconds=page_seconds,
        num_pages=stats.num_pages,
        latencies=tuple(metrics.finish_time - arrival for metrics, arrival in times),
        first_tokens=tuple(metrics.first_token_time - arrival for metrics, arrival in times),
        schedule_seconds=stats.schedule_seconds,
    )
    return Answers(outcome, answers, tuple(record.calls))


class OraclePredictor(LengthPredictor):
    """Knows each answer's length, from having seen it: `lengths` by prompt."""

    def __init__(self, lengths: dict[tuple[int, ...], int]) -> None:
        self._lengths = lengths

    def predict(self, prompt_token_ids: Sequence[int], max_tokens: int) -> LengthEstimate:
        """Exactly the length; nothing of a prompt that was not seen."""
        length = self._lengths.get(tuple(prompt_token_ids))
        return LengthEstimate.unknown(max_tokens) if length is None else LengthEstimate.exactly(length, max_tokens)
