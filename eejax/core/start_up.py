"""Stages of start-up that take long: reading weights, compiling programs. Each is logged and announced. No jax here."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Stage:
    """A stage of start-up that begins or has ended.

    Attributes:
        what: for instance `weights`, or a program: `prefill for 64 tokens`.
        seconds: time it took; None when it begins.
        program: whether it is a program.
        compiled: whether XLA compiles it; otherwise it is read from a cache.
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


_listeners: ContextVar[tuple[Callable[[Stage], None], ...]] = ContextVar("listeners", default=())


def announce(stage: Stage) -> None:
    """Report a stage to the log (level INFO) and to every listener of `heard`."""
    log.info("%s", stage)
    for listener in _listeners.get():
        listener(stage)


@contextmanager
def announced(what: str) -> Iterator[None]:
    """Announce begin and end of a stage that is no program: the body of the context."""
    start = time.perf_counter()
    announce(Stage(what, program=False))
    yield
    announce(Stage(what, time.perf_counter() - start, program=False))


@contextmanager
def heard(listener: Callable[[Stage], None]) -> Iterator[None]:
    """Call `listener` with every stage of this thread while the context is open."""
    token = _listeners.set((*_listeners.get(), listener))
    try:
        yield
    finally:
        _listeners.reset(token)
