"""What one answering of all requests came to, measured or simulated, and the columns that are shown of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich.table import Table


@dataclass(frozen=True, slots=True)
class Outcome:
    """All requests answered once.

    Attributes:
        seconds: from the first arrival to the last token.
        prompt_tokens: of all prompts, each counted once; `prefilled` what the device prefilled.
        answer_tokens: of all answers; `produced` those that the device sampled, the discarded ones included.
        steps: decode steps; `row_steps` rows computed in them, padding included.
        page_seconds: used pages, each for as long as it was used.
        latencies, first_tokens: seconds from each request's arrival to its last and its first token.
        schedule_seconds: the scheduler's own time, of the clock; of the processor where the rest is simulated.
    """

    seconds: float
    prompt_tokens: int
    prefilled: int
    answer_tokens: int
    produced: int
    steps: int
    row_steps: int
    parkings: int
    preemptions: int
    page_seconds: float
    num_pages: int
    latencies: tuple[float, ...]
    first_tokens: tuple[float, ...]
    schedule_seconds: float = field(default=0.0, compare=False)

    @property
    def recomputed(self) -> int:
        """Tokens that were computed although they had been: prefilled again, or sampled again after being discarded."""
        return (self.prefilled - self.prompt_tokens) + (self.produced - self.answer_tokens)

    @property
    def wasted(self) -> float:
        """Share of the rows computed in decode steps that brought no token of an answer. First tokens are prefill's."""
        useful = self.answer_tokens - len(self.latencies)
        return 1 - useful / self.row_steps if self.row_steps else 0.0


def figures(outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """The columns of one row: medians over its outcomes, each figure on its own; seconds, shares and counts.

    Percentiles are of the latencies within one outcome, interpolated linearly.
    """

    def middle(values: Sequence[float]) -> float:
        return float(np.median(values))

    def latency(q: float) -> float:
        return middle([float(np.percentile(one.latencies, q)) for one in outcomes])

    return {
        "seconds": middle([one.seconds for one in outcomes]),
        "requests_per_s": middle([len(one.latencies) / one.seconds for one in outcomes]),
        "tokens_per_s": middle([one.answer_tokens / one.seconds for one in outcomes]),
        "latency_mean_s": middle([float(np.mean(one.latencies)) for one in outcomes]),
        "latency_p50_s": latency(50),
        "latency_p95_s": latency(95),
        "latency_p99_s": latency(99),
        "first_token_mean_s": middle([float(np.mean(one.first_tokens)) for one in outcomes]),
        "wasted_row_steps": middle([one.wasted for one in outcomes]),
        "page_use": middle([one.page_seconds / one.seconds / one.num_pages for one in outcomes]),
        "parkings": middle([one.parkings for one in outcomes]),
        "preemptions": middle([one.preemptions for one in outcomes]),
        "recomputed_tokens": middle([one.recomputed for one in outcomes]),
        "schedule_share": middle([one.schedule_seconds / one.seconds for one in outcomes]),
        "rounds_s": [one.seconds for one in outcomes],
    }


def with_ratios(rows: Mapping[str, dict[str, Any]], baselines: Sequence[str] = ("static", "fcfs")) -> None:
    """Add to each row its requests/s and mean latency over those of each baseline that is among the rows."""
    for baseline in baselines:
        if baseline not in rows:
            continue
        base = {key: rows[baseline][key] for key in ("requests_per_s", "latency_mean_s")}
        for row in rows.values():
            row[f"requests_per_s_over_{baseline}"] = row["requests_per_s"] / base["requests_per_s"]
            row[f"latency_mean_over_{baseline}"] = row["latency_mean_s"] / base["latency_mean_s"]


COLUMNS = (
    ("requests_per_s", "req/s", 2),
    ("requests_per_s_over_static", "× static", 2),
    ("requests_per_s_over_fcfs", "× fcfs", 2),
    ("tokens_per_s", "tok/s", 0),
    ("latency_mean_s", "mean s", 2),
    ("latency_mean_over_fcfs", "× fcfs", 2),
    ("latency_p50_s", "p50", 2),
    ("latency_p95_s", "p95", 2),
    ("latency_p99_s", "p99", 2),
    ("first_token_mean_s", "ttft", 2),
    ("wasted_row_steps", "wasted", 2),
    ("page_use", "pages", 2),
    ("parkings", "park", 0),
    ("preemptions", "preem", 0),
    ("recomputed_tokens", "recomp", 0),
    ("schedule_share", "sched", 3),
)
"""Key in a row's figures, heading, digits."""


def rows_table(title: str, rows: Mapping[str, Mapping[str, Any]]) -> Table:
    """One line for each row; a ratio whose baseline was not run is left out."""
    columns = [column for column in COLUMNS if any(column[0] in row for row in rows.values())]
    table = Table(title=title, title_justify="left", padding=(0, 0, 0, 1))
    table.add_column("")
    for _, heading, _ in columns:
        table.add_column(heading, justify="right")
    for name, row in rows.items():
        table.add_row(name, *(f"{row[key]:.{digits}f}" for key, _, digits in columns))
    return table
