"""The scheduler on a clock of its own: the very class and policies that serve, and `StepModel` for a device."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.schedule_rows import Outcome
from bench.step_model import DecodeCall, PrefillCall, StepModel, pages_visited
from eejax.core import (
    CacheConfig,
    Counts,
    LengthEstimate,
    MicroBatch,
    Request,
    RowResult,
    SamplingParams,
    SchedulerConfig,
    StepResult,
    batch_size,
)
from eejax.core import Sequence as Row
from eejax.schedule import PageAllocator, Scheduler, StepCost, check_integrity

STOP, TOKEN = 1, 2


@dataclass(frozen=True, slots=True)
class SimulatedRequest:
    """One request and, what only the simulator knows, its answer.

    Attributes:
        length: answer tokens; a stop token ends the answer before `max_tokens`.
        estimate: what a predictor says of `length`.
        arrival: seconds.
        exit_layers: blocks that each answer token runs, the first at full depth; empty: all tokens at full depth.
    """

    prompt_len: int
    length: int
    max_tokens: int
    estimate: LengthEstimate | None = None
    arrival: float = 0.0
    exit_layers: tuple[int, ...] = ()
    priority: int = 0


def simulate(
    requests: Sequence[SimulatedRequest],
    config: SchedulerConfig,
    *,
    cache: CacheConfig,
    cost: StepModel,
    scheduler: Callable[..., Scheduler] | None = None,
    learnt: StepCost | None = None,
    exits: tuple[int, ...] = (12,),
    prefill_chunk: int = 512,
) -> Outcome:
    """Answer all requests on a virtual clock. Deterministic but for `Outcome.schedule_seconds`.

    Args:
        cost: what the calls take.
        scheduler: makes the scheduler; `Scheduler` itself by default.
        learnt: the scheduler's knowledge of these costs, to which every step adds; None begins anew.
        exits: where tokens may exit, in blocks, the last being the depth of the model.
        prefill_chunk: prompt tokens in one prefill call at most.

    Raises:
        RuntimeError: a request was lost, answered twice or wrongly, or a page leaked.
    """
    allocator = PageAllocator(cache.num_pages)
    learnt = learnt or StepCost()
    scheduling = (scheduler or Scheduler)(config, allocator, page_size=cache.page_size, cost=learnt)
    device = _Device(cost, cache.page_size, exits, prefill_chunk, config.max_num_seqs, learnt.compacts)
    rows = [_request(i, request, exits[-1]).sequences[0] for i, request in enumerate(requests)]
    device.known = dict(zip(rows, requests, strict=True))
    coming = sorted(rows, key=lambda row: device.known[row].arrival)
    first: dict[Row, float] = {}
    last: dict[Row, float] = {}
    now = start = device.known[coming[0]].arrival if coming else 0.0
    arrived, page_seconds, schedule_seconds = 0, 0.0, 0.0
    while True:
        due = arrived
        while due < len(coming) and device.known[coming[due]].arrival <= now:
            due += 1
        before = time.thread_time()
        scheduling.add(coming[arrived:due])
        batch = scheduling.schedule()
        schedule_seconds += time.thread_time() - before
        arrived = due
        if batch is None:
            if arrived == len(coming):
                break
            now = device.known[coming[arrived]].arrival
            continue
        fresh = [row for row in batch.rows if not row.output_token_ids]
        result, seconds = device.run(batch)
        page_seconds += allocator.num_used * seconds
        now += seconds
        before = time.thread_time()
        scheduling.update(batch, result, seconds)
        schedule_seconds += time.thread_time() - before
        first.update((row, now) for row in fresh)
        for row in batch.rows:
            if row.finish_reason is not None:
                if row in last:
                    raise RuntimeError(f"request {row.request.request_id} was answered twice")
                last[row] = now
    _check(device.known, last, allocator)
    return Outcome(
        seconds=now - start,
        prompt_tokens=sum(request.prompt_len for request in requests),
        prefilled=device.prefilled,
        answer_tokens=sum(request.length for request in requests),
        produced=device.produced,
        steps=device.steps,
        row_steps=device.row_steps,
        parkings=sum(row.parkings for row in rows),
        preemptions=sum(row.preemptions for row in rows),
        page_seconds=page_seconds,
        num_pages=cache.num_pages,
        latencies=tuple(last[row] - device.known[row].arrival for row in rows),
        first_tokens=tuple(first[row] - device.known[row].arrival for row in rows),
        schedule_seconds=schedule_seconds,
    )


def _request(number: int, simulated: SimulatedRequest, depth: int) -> Request:
    if not 1 <= simulated.length <= simulated.max_tokens:
        raise ValueError(f"an answer has 1..{simulated.max_tokens} tokens, got a length of {simulated.length}")
    if simulated.exit_layers and len(simulated.exit_layers) != simulated.length:
        raise ValueError(f"{simulated.length} answer tokens have {len(simulated.exit_layers)} exit layers")
    request = Request(
        request_id=f"request-{number}",
        prompt=None,
        prompt_token_ids=(TOKEN,) * simulated.prompt_len,
        params=SamplingParams(max_tokens=simulated.max_tokens),
        max_tokens=simulated.max_tokens,
        thresholds=(0.5 if simulated.exit_layers else math.inf,),
        stop_token_ids=frozenset({STOP}),
        seed=number,
        priority=simulated.priority,
    )
    request.sequences[0].estimate = simulated.estimate
    return request


def _check(known: dict[Row, SimulatedRequest], last: dict[Row, float], allocator: PageAllocator) -> None:
    for row, request in known.items():
        if row not in last or len(row.output_token_ids) != request.length:
            raise RuntimeError(
                f"{row.request.request_id} has {len(row.output_token_ids)} of {request.length} tokens, "
                f"finish reason {row.finish_reason}"
            )
    check_integrity(allocator, [])


class _Device:
    """Does with a micro-batch what `Runner` does, at no cost but that of the model."""

    def __init__(
        self,
        cost: StepModel,
        page_size: int,
        exits: tuple[int, ...],
        prefill_chunk: int,
        max_num_seqs: int,
        compacts: bool,
    ) -> None:
        self.known: dict[Row, SimulatedRequest] = {}
        self.prefilled = self.produced = self.steps = self.row_steps = 0
        self._cost = cost
        self._page_size = page_size
        self._exits = exits
        self._chunk = prefill_chunk
        self._slots = max_num_seqs
        self._compacts = compacts

    def run(self, batch: MicroBatch) -> tuple[StepResult, float]:
        """The batch's result, and the seconds it took."""
        if batch.kind == "prefill":
            lengths = [row.prefill_length - row.num_cached for row in batch.rows]
            self.prefilled += sum(lengths)
            rows = [self._tokens(row, 0 if row.output_token_ids else 1) for row in batch.rows]
            return StepResult(tuple(rows)), self._cost.prefill_seconds(PrefillCall.of(lengths, self._chunk))
        left = [self.known[row].length - len(row.output_token_ids) for row in batch.rows]
        steps = min(batch.n_steps, min(left) if batch.yield_on_free else max(left))
        bucket = batch_size(max(len(batch.rows), batch.width), self._slots, self._compacts)
        taken = [min(steps, more) for more in left]
        blocks, row_blocks, heads, row_heads = self._work(batch.rows, taken, steps, bucket)
        pages = pages_visited([row.num_tokens for row in batch.rows], taken, self._page_size)
        call = DecodeCall(steps, pages, blocks / self._exits[-1], row_blocks / self._exits[-1], row_heads)
        rows = [self._tokens(row, count) for row, count in zip(batch.rows, taken, strict=True)]
        self.steps += steps
        self.row_steps += bucket * steps
        counts = Counts(steps, blocks, heads, bucket * steps, row_blocks, row_heads)
        return StepResult(tuple(rows), counts), self._cost.decode_seconds(call)

    def _work(self, rows: Sequence[Row], taken: Sequence[int], steps: int, bucket: int) -> tuple[int, int, int, int]:
        """Blocks run, rows computed in them, and the same of heads, summed over steps.

        A head is run after every segment if any row may exit early, else after the last one.
        """
        early = any(self.known[row].exit_layers for row in rows)
        blocks = row_blocks = heads = row_heads = 0
        for step in range(steps):
            depths = [
                self._depth(row, len(row.output_token_ids) + step)
                for row, count in zip(rows, taken, strict=True)
                if count > step
            ]
            above = 0
            for end in self._exits if early else self._exits[-1:]:
                if not (entered := sum(depth > above for depth in depths)):
                    break
                width = entered if self._compacts else bucket
                blocks, row_blocks = blocks + end - above, row_blocks + (end - above) * width
                heads, row_heads = heads + 1, row_heads + width
                above = end
        return blocks, row_blocks, heads, row_heads

    def _depth(self, row: Row, index: int) -> int:
        layers = self.known[row].exit_layers
        return layers[index] if layers else self._exits[-1]

    def _tokens(self, row: Row, count: int) -> RowResult:
        request, done = self.known[row], len(row.output_token_ids)
        ids = [TOKEN] * count
        if done + count == request.length < request.max_tokens and count:
            ids[-1] = STOP
        layers = request.exit_layers[done : done + count] or (self._exits[-1],) * count
        self.produced += count
        return RowResult(tuple(ids), layers)
