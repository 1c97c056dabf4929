"""What `bench.peers` found, as tables and as bars (matplotlib comes with the extra `bench`)."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.peers.engines import EEJAX
from bench.plots import require_matplotlib
from eejax.core import ConfigError

COLUMNS = (
    "", "tokens/s", "latency p50, s", "p95, s", "first token, s", "peak, MB",
    "of the bound", "prompts, tok/s", "decoding, tok/s", "equal",
)  # fmt: skip


def fastest_peer(rows: Mapping[str, Mapping[str, Any]]) -> str | None:
    """The label of the peer with the most tokens/s; None where none ran."""
    ran = {label: row for label, row in rows.items() if row["engine"] != EEJAX and "output_tokens_per_s" in row}
    return max(ran, key=lambda label: ran[label]["output_tokens_per_s"], default=None)


def show(result: Mapping[str, Any]) -> None:
    """Print a table for each case, with what was not equal, noisy or missing below it."""
    # A pipe has no width, and rich would cut the columns at 80.
    console = Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=140)
    for label, case in result["cases"].items():
        table = Table()
        for i, column in enumerate(COLUMNS):
            table.add_column(column, justify="right" if i else "left")
        notes = []
        for name, row in case["rows"].items():
            table.add_row(name, *_cells(row))
            notes += [f"{name}: {note}" for note in _notes(row)]
        work, ceiling = case["workload"], case["machine"]
        console.print(
            f"{label}: {case['parameters'] / 1e6:.0f}M parameters, float32, {work['requests']} requests, "
            f"{work['prompt_tokens']} tokens in, {work['output_tokens']} out, {result['options']['rounds']} rounds",
            style="bold", markup=False, soft_wrap=True,
        )  # fmt: skip
        console.print(table)
        for note in (*_standing(case["rows"]), *notes):
            console.print(note, markup=False, soft_wrap=True)
        console.print(
            f"bound: {case['bound_seconds']:.3f} s ({case['bound_by']}); {ceiling['read_bandwidth_gb_s']:.1f} GB/s "
            f"over {ceiling['read_bandwidth_working_set_mib']:.0f} MiB, {ceiling['arithmetic_gop_s']:.0f} G operations "
            f"a second; equal: requests with the tokens of {case['reference'] or 'no engine'}\n",
            markup=False, soft_wrap=True,
        )  # fmt: skip


def _cells(row: Mapping[str, Any]) -> list[str]:
    if "output_tokens_per_s" not in row:
        return ["not installed" if "install" in row else "failed", *[""] * (len(COLUMNS) - 2)]
    agreement = row["agreement"]
    decode = row["decode_tokens_per_s"]
    return [
        f"{row['output_tokens_per_s']:.1f}",
        f"{row['latency_s']['p50']:.2f}",
        f"{row['latency_s']['p95']:.2f}",
        f"{row['time_to_first_token_s']['p50']:.3f}",
        f"{row['peak_bytes'] / 1e6:.0f}",
        "" if row["share_of_bound"] is None else f"{row['share_of_bound']:.2f}",
        f"{row['prompt_tokens_per_s']:.0f}",
        "" if decode is None else f"{decode:.0f}",
        "" if agreement is None else f"{agreement['equal']}/{agreement['requests']}",
    ]


def _notes(row: Mapping[str, Any]) -> list[str]:
    """What a reader has to know about a row."""
    notes = []
    if "install" in row:
        notes.append(f"not installed; {row['install']}")
    elif row["problem"]:
        notes.append(row["problem"])
    if row.get("noisy_rounds"):
        cores = ", ".join(f"{one:.2f}" for one in row["rounds_other_cores"])
        notes.append(f"NOISY: cores that other processes kept busy: {cores}")
    if any(one.get("compilations_while_timed") for one in row.get("facts", ())):
        notes.append("NOISY: something was compiled while the clock ran")
    agreement = row.get("agreement")
    if agreement is not None:
        for one in agreement["differing"]:
            gap = "unknown" if one["gap"] is None else f"{one['gap']:.2g}"
            notes.append(f"request {one['request']} differs from token {one['place']} on; gap of the two best: {gap}")
        if not agreement["same_in_all_rounds"]:
            notes.append("its tokens differ between rounds")
    return notes


def _standing(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """eejax beside the fastest peer, and with exits beside full depth."""
    best, full = fastest_peer(rows), rows[EEJAX]
    if best is None or "output_tokens_per_s" not in full:
        return []
    peer = rows[best]
    notes = [
        f"eejax at full depth: {full['output_tokens_per_s'] / peer['output_tokens_per_s']:.2f} times the tokens/s of "
        f"the fastest peer ({best}), {full['peak_bytes'] / peer['peak_bytes']:.2f} times its peak memory"
    ]
    for label, row in rows.items():
        if row["engine"] == EEJAX and label != EEJAX and "output_tokens_per_s" in row:
            gain = row["output_tokens_per_s"] / full["output_tokens_per_s"]
            notes.append(f"{label}: {gain:.2f} times eejax at full depth")
    return notes


def plot(result: Mapping[str, Any], file: Path) -> None:
    """Tokens/s of each row as bars, a panel for each case; a line where the bound is.

    Raises:
        ConfigError: matplotlib is missing, or the file cannot be written.
    """
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cases = result["cases"]
    columns = min(2, len(cases))
    lines = -(-len(cases) // columns)
    figure = Figure(figsize=(5.5 * columns, 3.2 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for axis in axes[len(cases) :]:
        axis.set_axis_off()
    for axis, (label, case) in zip(axes, cases.items(), strict=False):
        ran = {name: row for name, row in case["rows"].items() if "output_tokens_per_s" in row}
        names = sorted(ran, key=lambda name: -ran[name]["output_tokens_per_s"])
        speeds = [ran[name]["output_tokens_per_s"] for name in names]
        colours = ["C0" if ran[name]["engine"] == EEJAX else "0.65" for name in names]
        bars = axis.barh(range(len(names)), speeds, 0.7, color=colours)
        axis.bar_label(bars, fmt="%.0f", padding=2, fontsize=8)
        axis.axvline(case["workload"]["output_tokens"] / case["bound_seconds"], color="0.3", linestyle=":", linewidth=1)
        axis.set_yticks(range(len(names)), names, fontsize=8)
        axis.invert_yaxis()
        axis.margins(x=0.12)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_title(f"{label}: output tokens/s (dotted: {case['bound_by']} bound)", fontsize=9)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        FigureCanvasAgg(figure).print_png(str(file))
    except OSError as error:
        raise ConfigError(f"cannot write {file}: {error}") from error
