"""What takes long before the first token: weights to read, programs to compile. Who waits is told. No jax here."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from rich.console import Console

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Step:
    """A step of starting up that begins, or is over.

    Attributes:
        what: `weights` for instance, or a program: `prefill for 64 tokens`.
        seconds: that it took; None when it begins.
        program: whether it is a program.
        compiled: whether XLA compiled it, other than finding it in a cache.
    """

    what: str
    seconds: float | None = None
    program: bool = True
    compiled: bool = False

    def __str__(self) -> str:
        if self.seconds is None:
            return f"{'compiling' if self.compiled else 'loading'} {self.what}"
        how = "compiled" if self.compiled else "from the cache" if self.program else "ready"
        return f"{self.what}: {how} in {self.seconds:.2f} s"


_listeners: ContextVar[tuple[Callable[[Step], None], ...]] = ContextVar("listeners", default=())


def announce(step: Step) -> None:
    """Tell a step to the log (level INFO) and to whoever `heard` has open around it."""
    log.info("%s", step)
    for listener in _listeners.get():
        listener(step)


@contextmanager
def heard(listener: Callable[[Step], None]) -> Iterator[None]:
    """Call `listener` with every step of this thread while the context is open."""
    token = _listeners.set((*_listeners.get(), listener))
    try:
        yield
    finally:
        _listeners.reset(token)


@contextmanager
def status(idle: str) -> Iterator[list[Step]]:
    """A line on stderr, if that is a terminal, that says what is under way, `idle` between steps.

    Yields:
        The steps that are over; those of the body, when it has ended.
    """
    done: list[Step] = []
    with Console(stderr=True).status(idle) as line:

        def show(step: Step) -> None:
            if step.seconds is not None:
                done.append(step)
            line.update(idle if step.seconds is not None else str(step))

        with heard(show):
            yield done


def begun[T](pieces: Iterator[T], prepare: Callable[[], object], steps: list[Step]) -> Iterator[T]:
    """The pieces of an answer, the first of which is there already.

    Once text stands on a terminal, there is no room for a status line: what takes long has to come first.

    Args:
        prepare: makes ready what the later pieces need.
        steps: where those that this call took are added.
    """
    with status("reading the prompt") as done:
        prepare()
        first = next(pieces)
    steps += done
    return itertools.chain([first], pieces)


def describe(steps: Sequence[Step]) -> str:
    """What the steps that are over came to, as `weights 0.6 s, programs 3.1 s (1 compiled, 2 from the cache)`."""
    done = [step for step in steps if step.seconds is not None]
    others = [f"{step.what} {step.seconds:.1f} s" for step in done if not step.program]
    programs = [step for step in done if step.program]
    if programs:
        seconds, compiled = sum(step.seconds or 0 for step in programs), sum(step.compiled for step in programs)
        others.append(f"programs {seconds:.1f} s ({compiled} compiled, {len(programs) - compiled} from the cache)")
    return ", ".join(others)
