"""Engines that answer the same workload in turn, each in a fresh process on an idle machine, and their figures."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bench.common import median
from bench.peers.models import PeerModel, Workload

NOISY_CORES = 0.15
"""A round during which other processes used more cores than this counts as noisy."""
NEAR_TIE = 1e-3
"""Logits closer together than this may change places by rounding in another order."""


def busy_cores(seconds: float) -> float:
    """Mean number of cores that all processes keep busy during the next `seconds`; 0 where Linux does not say."""

    def busy() -> float:
        with open("/proc/stat") as file:
            ticks = [int(value) for value in file.readline().split()[1:9]]
        return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")

    try:
        before, start = busy(), time.monotonic()
        time.sleep(seconds)
        return (busy() - before) / (time.monotonic() - start)
    except OSError:
        return 0.0


def wait_until_idle(limit: float, window: float = 1.0) -> bool:
    """Wait for at most `limit` seconds until a window of `window` seconds was idle. Returns whether one was."""
    start = time.monotonic()
    while busy_cores(window) > NOISY_CORES:
        if time.monotonic() - start > limit:
            return False
    return True


@dataclass(slots=True)
class Entry:
    """A row of the table: an engine under some options, and what its rounds reported.

    Attributes:
        model: what the engine opens; None where it is not installed or the model could not be converted.
        problem: why it has no rounds, or fewer than others.
        exact: whether its tokens have to be those of the reference.
    """

    engine: str
    options: Mapping[str, Any]
    python: Path
    model: Path | None = None
    problem: str | None = None
    exact: bool = True
    rounds: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Case:
    """A model and a workload, which is in `file` for the engines' processes, and the rows by label."""

    model: PeerModel
    workload: Workload
    file: Path
    entries: dict[str, Entry]

    @property
    def label(self) -> str:
        return f"{self.model.name} {self.workload.name}"


def rotated(labels: Sequence[str], by: int) -> list[str]:
    """The labels in turn, beginning `by` places later."""
    start = by % len(labels) if labels else 0
    return [*labels[start:], *labels[:start]]


def summary(entry: Entry, workload: Workload, bound_seconds: float) -> dict[str, Any]:
    """Figures of one row, medians over its rounds; latencies over all requests of all rounds.

    Args:
        bound_seconds: the least time that the machine needs, at full depth.
    """
    if not entry.rounds:
        return {"engine": entry.engine, "problem": entry.problem}
    seconds = [one["seconds"] for one in entry.rounds]
    decoding = [one["seconds"] - one["prompts_seconds"] for one in entry.rounds]
    finish = [at for one in entry.rounds for at in one["finish"]]
    first = [at for one in entry.rounds for at in one["first"]]
    decoded = workload.output_tokens - len(workload.requests)
    return {
        "engine": entry.engine,
        "problem": entry.problem,
        "versions": entry.rounds[0]["versions"],
        "output_tokens_per_s": workload.output_tokens / median(seconds),
        "latency_s": _quantiles(finish),
        "time_to_first_token_s": _quantiles(first),
        "prompt_tokens_per_s": workload.prompt_tokens / median([one["prompts_seconds"] for one in entry.rounds]),
        "decode_tokens_per_s": decoded / median(decoding) if decoded and median(decoding) > 0 else None,
        "peak_bytes": median([one["peak_bytes"] for one in entry.rounds]),
        "serving_peak_bytes": median([one["serving_peak_bytes"] for one in entry.rounds]),
        "load_seconds": median([one["load_seconds"] for one in entry.rounds]),
        "warm_up_seconds": median([one["warm_up_seconds"] for one in entry.rounds]),
        "share_of_bound": bound_seconds / median(seconds) if entry.exact else None,
        "rounds_tokens_per_s": [workload.output_tokens / one for one in seconds],
        "rounds_other_cores": [one["other_cores"] for one in entry.rounds],
        "noisy_rounds": sum(one["other_cores"] > NOISY_CORES for one in entry.rounds),
        "facts": [one["facts"] for one in entry.rounds],
    }


def _quantiles(values: Sequence[float]) -> dict[str, float]:
    p50, p95 = np.percentile(np.asarray(values), [50, 95]).tolist()
    return {"p50": p50, "p95": p95}


def compare(entry: Entry, reference: Entry) -> dict[str, Any]:
    """How many requests have the reference's tokens, and where the others first differ.

    Each of those has the gap between the reference's two best logits at that place, where it is known; the
    tokens after it follow from another text and say nothing.
    """
    wanted, gaps = reference.rounds[0]["tokens"], reference.rounds[0].get("gaps")
    differing = []
    for number, (ours, theirs) in enumerate(zip(entry.rounds[0]["tokens"], wanted, strict=True)):
        place = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), None)
        if place is not None:
            gap = None if gaps is None else gaps[number][place]
            differing.append({"request": number, "place": place, "gap": gap})
    return {
        "requests": len(wanted),
        "equal": len(wanted) - len(differing),
        "near_ties": sum(one["gap"] is not None and one["gap"] < NEAR_TIE for one in differing),
        "differing": differing,
        "same_in_all_rounds": all(one["tokens"] == entry.rounds[0]["tokens"] for one in entry.rounds),
    }
