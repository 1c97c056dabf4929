"""Answers piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from eejax.core import FinishReason, RequestOutput

STREAM_STEPS = 4
"""Decode steps between two pieces of a streamed answer: few, so that text flows; more than one, to spare the host."""


@dataclass(frozen=True, slots=True)
class StreamDelta:
    """A piece of a streamed answer: new text that is final, and new tokens with their exit layers.

    Text may come later than its tokens, where a character or a possible stop string is still incomplete.
    """

    text: str
    token_ids: tuple[int, ...]
    exit_layers: tuple[int, ...]
    finish_reason: FinishReason | None


def deltas_of(
    request: str,
    news: dict[str, RequestOutput | None],
    step: Callable[[int], object],
    abort: Callable[[list[str]], object],
) -> Iterator[StreamDelta]:
    """The pieces of a request's answer; the first is empty and comes at once. Closing the iterator aborts the request.

    Args:
        news: where `step` leaves the request's latest output.
        step: runs at most so many decode steps, of whatever requests there are.
        abort: ends requests that are unfinished.
    """
    shown, seen, finished = 0, 0, False
    news[request] = None
    try:
        yield StreamDelta("", (), (), None)
        while not finished:
            output, news[request] = news[request], None
            if output is None:
                step(STREAM_STEPS)
                continue
            answer, finished = output.outputs[0], output.finished
            yield StreamDelta(
                answer.text[shown:], answer.token_ids[seen:], answer.exit_layers[seen:], answer.finish_reason
            )
            shown, seen = len(answer.text), len(answer.token_ids)
    finally:
        del news[request]
        if not finished:
            abort([request])
