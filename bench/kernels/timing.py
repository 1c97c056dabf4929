"""Device time of one call: many calls inside one compiled program.

A program is a loop of a fixed number of turns, so that the device never asks the host whether to go on, and each turn
needs what the turn before it made. Its wall time, less that of a program that does nothing over the same arrays, is
divided by the number of calls. What prepares the next turn, a small kernel or two, counts as the call's: the figure is
an upper bound. On a GPU, CUPTI can also say how long the calls' kernels ran, without the gaps between them and without
the rest of the turn (`jax.experimental.mosaic.gpu.profiler.measure`).
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from bench.common import median

TARGET_SECONDS = 0.01
"""One program should take about so long at the speed of memory."""
COLD_BYTES = 256 * 2**20
"""Fewest bytes of all sets of arrays, which calls read one after another: five times the L2 of a Hopper GPU."""
MAX_TURNS = 256
MAX_SETS = MAX_TURNS
TOLERANCE = 1e-2
"""Relative error against XLA, both in bfloat16, above which a time counts for nothing."""

type Step[State, Data] = Callable[[jax.Array, State, Data], State]
"""`step(turn, state, data)`: one turn."""


@dataclass(frozen=True, slots=True)
class Timing:
    """One implementation's figures, or why it has none.

    Attributes:
        seconds: of one call, and of what prepares the next.
        kernel_seconds: of the call's kernels alone, where a profiler told.
        relative_error: against XLA, by Frobenius norms; None where XLA itself could not run.
        reason: why there is no figure, or why it counts for nothing.
    """

    seconds: float | None = None
    kernel_seconds: float | None = None
    relative_error: float | None = None
    reason: str | None = None

    def to_dict(self, **figures: float | None) -> dict[str, Any]:
        """Microseconds and whatever `figures` were derived from them; the reason alone where there is one."""
        if self.seconds is None:
            return {"reason": self.reason, "relative_error": self.relative_error}
        kernel = None if self.kernel_seconds is None else 1e6 * self.kernel_seconds
        found = {"us": 1e6 * self.seconds, "kernel_us": kernel, "relative_error": self.relative_error, **figures}
        return found if self.reason is None else {**found, "reason": self.reason}


def turns_for(call_bytes: float, bandwidth: float) -> int:
    """Turns of a program whose calls move `call_bytes` each: enough for the clock, and for all sets to be read."""
    wanted = max(TARGET_SECONDS * bandwidth / call_bytes, sets_for(call_bytes))
    return min(MAX_TURNS, max(4, round(wanted)))


def sets_for(call_bytes: float, most: int = MAX_SETS) -> int:
    """Sets of arrays that the calls take in turn, so that none is read from the cache."""
    return min(most, max(1, -(-COLD_BYTES // max(1, round(call_bytes)))))


@functools.cache
def program[State, Data](step: Step[State, Data], turns: int) -> Callable[[State, Data], State]:
    """`turns` turns of `step` in one program, compiled once for all data of the same shapes."""

    @jax.jit
    def run(state: State, data: Data) -> State:
        return jax.lax.fori_loop(0, turns, lambda turn, state: step(turn, state, data), state)

    return run


def one_line(error: BaseException) -> str:
    """What an error says, short enough for a table's foot."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return text if len(text) <= 300 else f"{text[:100]} ... {text[-190:]}"


def seconds_of(run: Callable[[], object]) -> float:
    """Wall time of `run` until the device is done with it."""
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def copy_bandwidth(size: int, repeats: int = 5) -> float:
    """Bytes read plus bytes written per second by a copy of `size` bytes on the device: the median of several.

    Adding one keeps XLA from seeing that nothing happens; it moves what a copy moves.
    """
    count, copies = max(1, size // 4), 8
    copy, source = jax.jit(lambda x: x + jnp.uint32(1)), jnp.zeros(count, jnp.uint32)

    def run() -> jax.Array | None:
        target = None
        for _ in range(copies):  # the device takes them one after another, and the host does not wait
            target = copy(source)
        return target

    jax.block_until_ready(run())
    return 2 * 4 * count * copies / median([seconds_of(run) for _ in range(repeats)])


@dataclass(frozen=True, slots=True)
class Repetitions:
    """Programs are timed `repeats` times; each takes `turns` turns, and a turn makes `calls_per_turn` calls."""

    turns: int
    repeats: int
    calls_per_turn: int = 1


def compare[State, Data](
    steps: Mapping[str, Step[State, Data]],
    empty: Step[State, Data],
    state: State,
    data: Data,
    *,
    repetitions: Repetitions,
    result: Callable[[State], jax.Array],
    unchecked: tuple[str, ...] = (),
    profiled: tuple[str, ...] = (),
) -> dict[str, Timing]:
    """Time implementations in turn, A B A B ..., and compare each one's result with that of `xla`.

    Args:
        steps: by name; one that cannot be compiled or run gets a reason instead of a time.
        empty: a turn that touches the same state, without the call. One such turn is what starting a program costs.
        result: what to compare, of the state after all turns.
        unchecked: names whose result is not comparable.
        profiled: names whose kernels are timed by a profiler as well.
    """
    turns = repetitions.turns
    ready: dict[str, Callable[[], State]] = {"": lambda: program(empty, 1)(state, data)}
    jax.block_until_ready(ready[""]())
    results: dict[str, jax.Array] = {}
    found: dict[str, Timing] = {}
    for name, step in steps.items():
        try:
            run = functools.partial(program(step, turns), state, data)
            results[name] = jax.block_until_ready(result(run()))
            ready[name] = run
        except Exception as error:
            found[name] = Timing(reason=one_line(error))
    samples: dict[str, list[float]] = {name: [] for name in ready}
    for _ in range(repetitions.repeats):
        for name, run in ready.items():
            samples[name].append(seconds_of(run))
    calls = turns * repetitions.calls_per_turn
    for name, value in results.items():
        error = None if name in unchecked or "xla" not in results else relative_error(value, results["xla"])
        seconds = (median(samples[name]) - median(samples[""])) / calls
        kernels = None
        if name in profiled:
            kernels = _kernel_seconds(program(steps[name], turns), program(empty, turns), state, data)
        found[name] = judge(Timing(seconds, None if kernels is None else kernels / calls, error))
    return {name: found[name] for name in steps}


def judge(timing: Timing) -> Timing:
    """The same, with a reason where the figures cannot be used."""
    seconds, error = timing.seconds, timing.relative_error
    if seconds is None or seconds <= 0:
        return Timing(relative_error=error, reason="takes no longer than an empty program: too short for this clock")
    if error is not None and not error <= TOLERANCE:
        reason = f"WRONG: relative error {error:.2g} against XLA, at most {TOLERANCE:g} is allowed"
        return Timing(seconds, timing.kernel_seconds, error, reason)
    return timing


def relative_error(value: jax.Array, reference: jax.Array) -> float:
    """`|value - reference| / |reference|`, by Frobenius norms in float32."""
    value, reference = value.astype(jnp.float32), reference.astype(jnp.float32)
    return float(jnp.linalg.norm(value - reference) / jnp.linalg.norm(reference))


def _kernel_seconds[State, Data](
    run: Callable[[State, Data], State], empty: Callable[[State, Data], State], state: State, data: Data
) -> float | None:
    """Seconds that a program's kernels run, less those of the empty one; None where nothing can tell."""
    from jax.experimental.mosaic.gpu import profiler

    try:
        measured = [profiler.measure(one)(state, data)[1] for one in (run, empty)]
    except Exception as error:  # CUPTI is missing, or another tool holds it
        print(f"no kernel times: {one_line(error)}", file=sys.stderr, flush=True)
        return None
    whole, rest = (one if isinstance(one, float) else 0.0 for one in measured)
    return (whole - rest) / 1e3 if whole > rest else None
