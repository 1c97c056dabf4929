"""How `bench.exits` shows what it found."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.exits.frontier import AGREEMENT

type Column = tuple[str, str, int]

QUALITY: tuple[Column, ...] = (
    ("mean_exit_layer", "mean exit", 2),
    ("agreement", "agreement", 4),
    ("agreement_of_tokens", "of tokens", 4),
    ("rouge_l", "ROUGE-L", 3),
    ("identical", "identical", 3),
    ("bits_per_byte", "bits/byte", 3),
    ("ideal_speedup_alone", "ideal alone", 3),
    ("ideal_speedup_in_batch", "by operations", 3),
)
SPEED: tuple[Column, ...] = (
    ("output_tokens_per_s", "tok/s", 1),
    ("mean_exit_layer", "mean exit", 2),
    ("row_blocks_over_full_depth", "row blocks", 3),
    ("blocks_run_over_full_depth", "blocks", 3),
    ("heads_per_step", "heads", 2),
    ("share_of_bound", "of bound", 3),
    ("measured_speedup", "measured", 3),
    ("ideal_speedup", "ideal", 3),
    ("ideal_speedup_by_operations", "by operations", 3),
    ("quotient", "quotient", 3),
)
"""Key in a setting's figures, heading, digits."""


def show(result: dict[str, Any]) -> None:
    """Print a table of quality, one of exits, one of speed for each batch size, and what is best."""
    console = Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=160)
    name, options, settings = result["model"]["name"], result["options"], result["settings"]
    everything = [{"label": "full depth", **result["full_depth"]}, *settings]
    if result["full_depth"]["quality"] is not None:
        title = (
            f"{name}: greedy answers to {options['quality_prompts']} prompts, {options['max_tokens']} tokens at most"
        )
        console.print(_table(title, QUALITY, [(one["label"], one["quality"]) for one in everything]))
    if settings[0]["exits"]:
        console.print(_exits_table(name, settings))
        console.print(
            "An exit pays where the share that left is above the break-even share. Each exit is taken by itself, as if "
            "whoever stays asked no later exit; weights are counted, without fill-in and attention, for each token by "
            "itself.",
            soft_wrap=True,
        )
    for batch, rules in result["full_depth"]["speed"].items():
        title = (
            f"{name}: decoding, batch {batch}, {options['output_len']} tokens out, {options['num_iters']} rounds each"
        )
        lines = [(f"{one['label']}, {rule}", one["speed"][batch][rule]) for one in everything for rule in rules]
        console.print(_table(title, SPEED, lines))
    for batch, rules in (result["best"] or {}).items():
        for rule, best in rules.items():
            found = (
                f"no setting reaches an agreement of {AGREEMENT}"
                if best is None
                else (
                    f"{best['measured_speedup']:.3f} times full depth at an agreement of {best['agreement']:.4f} "
                    f"({best['label']}), the fastest with at least {AGREEMENT}"
                )
            )
            console.print(f"batch {batch}, {rule}: {found}", soft_wrap=True)
    seen = result["machine"]
    console.print(
        f"read bandwidth {seen['read_bandwidth_gb_s']:.1f} GB/s (best pass over "
        f"{seen['read_bandwidth_working_set_mib']:.0f} MiB), arithmetic {seen['arithmetic_gop_s']:.0f} G operations/s",
        soft_wrap=True,
    )
    console.print(f"answers that differ between rules or rounds: {result['requests_that_differ']}", soft_wrap=True)
    if any(
        found["compilations_while_timed"]
        for one in everything
        for rules in one["speed"].values()
        for found in rules.values()
    ):
        console.print("WARNING: something was compiled while the clock ran", style="bold red")


def _exits_table(name: str, settings: Sequence[dict[str, Any]]) -> Table:
    title = f"{name}: of the tokens that ask an exit, the share that must leave there to pay for it, and that left"
    table = Table(title=title, title_justify="left", padding=(0, 0, 0, 1))
    table.add_column("")
    for one in settings[0]["exits"]:
        for heading in (f"exit {one['layer']}: cost, blocks", "break-even", "left"):
            table.add_column(heading, justify="right")
    for one in settings:
        cells = [
            "" if found[key] is None else f"{found[key]:.{digits}f}"
            for found in one["exits"]
            for key, digits in (("cost_in_blocks", 2), ("break_even_share", 3), ("share_left", 3))
        ]
        table.add_row(one["label"], *cells)
    return table


def _table(title: str, columns: Sequence[Column], lines: Sequence[tuple[str, dict[str, Any]]]) -> Table:
    table = Table(title=title, title_justify="left", padding=(0, 0, 0, 1))
    points = list(lines[0][1].get("share_at_exit", {}))
    for heading in ("", *(heading for _, heading, _ in columns), *(f"at {layer}" for layer in points)):
        table.add_column(heading, justify="right" if heading else "left")
    for label, figures in lines:
        values = [(figures.get(key), digits) for key, _, digits in columns]
        values += [(figures["share_at_exit"][layer], 3) for layer in points]
        table.add_row(label, *("" if value is None else f"{value:.{digits}f}" for value, digits in values))
    return table
