"""What `bench/gpu_check.sh` does beside running stages: compiles ahead, runs the latency cells, prints the table."""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

VARIANTS = {
    "while": {
        "XLA_FLAGS": "--xla_gpu_enable_command_buffer=+WHILE,+CONDITIONAL --xla_gpu_graph_min_graph_size=1",
    },
    "nograph": {"XLA_FLAGS": "--xla_gpu_enable_command_buffer="},
    "xla": {"EEJAX_KERNELS": "xla"},
}
"""Other ways to decode, by the environment that asks for them. `while`: the loops that decide which blocks run go into
CUDA graphs as far as they can be recorded, and the host is not asked; `nograph`: no graph at all; `xla`: no kernels.
An XLA that does not know a flag ends its process."""
COMPILE_SECONDS = 150
JOBS = 4


@dataclass(frozen=True, slots=True)
class Cell:
    """One run of `bench latency`. `variant` names one of `VARIANTS`; "" is what the package does by itself."""

    model: str
    batch: int
    fill: str
    variant: str = ""

    @property
    def name(self) -> str:
        return "-".join(filter(None, ("latency", self.model, str(self.batch), self.fill, self.variant)))

    def arguments(self, out: Path, dry_run: bool) -> list[str]:
        """The command line behind `python -m bench`."""
        sizes = {"input-len": 8, "output-len": 8, "num-iters-warmup": 1, "num-iters": 1}
        if not dry_run:
            sizes = {"input-len": 32, "output-len": 64, "num-iters-warmup": 1, "num-iters": 5}
        return [
            *("latency", "--random", self.model, "--dtype", "bfloat16", "--replay", "0.7,0.2"),
            *("--batch-size", str(self.batch), "--fill", self.fill, "--output-json", str(out / f"{self.name}.json")),
            *(part for name, value in sizes.items() for part in (f"--{name}", str(value))),
        ]


def cells(dry_run: bool) -> list[Cell]:
    """All of them, the most wanted first."""
    models, batches = (("tiny",), (1,)) if dry_run else (("llama-7b", "llama-1b"), (1, 8, 64))
    plain = [Cell(model, batch, fill) for model in models for batch in batches for fill in ("eager", "deferred")]
    return plain + [Cell(models[0], 1, "eager", variant) for variant in VARIANTS]


def compile_ahead(out: Path, dry_run: bool, alone: bool) -> int:
    """Fill the compilation cache. Returns the number of cells that could not be compiled.

    Args:
        alone: compile the first cell, with the device to itself: XLA times candidates for its matrix products there,
            and what it finds is kept for the cells that have the same products. Otherwise the others, some at a time.
    """
    todo = cells(dry_run)[:1] if alone else cells(dry_run)[1:]
    running: list[tuple[Cell, subprocess.Popen[bytes]]] = []
    failed, deadline = 0, time.monotonic() + COMPILE_SECONDS
    while todo or running:
        while todo and len(running) < JOBS:
            cell = todo.pop(0)
            command = [sys.executable, "-m", "bench", *cell.arguments(out, dry_run), "--compile-only"]
            command[command.index("--output-json") + 1] = os.devnull
            with (out / f"compile-{cell.name}.log").open("wb") as log:
                running.append((cell, subprocess.Popen(command, env=environment(cell), stdout=log, stderr=log)))
        if time.monotonic() > deadline:
            for _, process in running:
                process.kill()
            failed, todo = failed + len(todo), []
        for pair in [pair for pair in running if pair[1].poll() is not None]:
            running.remove(pair)
            if pair[1].returncode:
                failed += 1
                print(f"{pair[0].name}: not compiled ahead, exit status {pair[1].returncode}", flush=True)
        time.sleep(0.1)
    return failed


def environment(cell: Cell) -> dict[str, str]:
    """This process's own, with what the cell's variant adds."""
    found = dict(os.environ)
    for name, value in VARIANTS.get(cell.variant, {}).items():
        found[name] = f"{found.get(name, '')} {value}".strip() if name == "XLA_FLAGS" else value
    return found


def run_cells(todo: Iterable[Cell], out: Path, dry_run: bool, seconds: float) -> int:
    """Run cells, one after another; in this process, but variants, whose environment is read but once, in their own.

    Returns:
        The number of cells that failed, or were not begun because `seconds` were over.
    """
    from bench.__main__ import main as bench

    failed, deadline = 0, time.monotonic() + seconds
    for cell in todo:
        arguments, left = cell.arguments(out, dry_run), deadline - time.monotonic()
        if left <= 0:
            print(f"{cell.name}: not begun, {seconds:.0f} s are over", flush=True)
            failed += 1
            continue
        print(f"== {cell.name}", flush=True)
        try:
            if cell.variant:
                command = [sys.executable, "-m", "bench", *arguments]
                status = subprocess.run(command, env=environment(cell), timeout=left, check=False).returncode
            else:
                status = bench(arguments)
        except Exception as error:
            print(f"{cell.name}: {type(error).__name__}: {error}", flush=True)
            status = 1
        failed += status != 0
        gc.collect()  # the model's arrays go before the next one's come
    return failed


def load(out: Path) -> dict[str, dict[str, Any]]:
    """Results by file name, without those that cannot be read."""
    found = {}
    for file in sorted(out.glob("*.json")):
        try:
            found[file.stem] = json.loads(file.read_text())
        except ValueError:
            print(f"{file.name} is not whole")
    return found


def show(out: Path, dry_run: bool) -> None:
    """Print the short table of all that was measured."""
    results = load(out)
    console = Console(highlight=False, width=130)
    stages = [line.split("\t") for line in (out / "stages.tsv").read_text().splitlines()]
    _print(console, "stages", ("stage", "result", "s"), stages)
    kernels = [one for name, one in results.items() if name.startswith("kernels")]
    columns = ("batch", "context", "heads", "active", "mosaic us", "of copy", "kernel", "t/byte", "xla us", "torch us")
    _print(console, "paged attention", columns, (line for one in kernels for line in _attention_lines(one)))
    columns = (
        "model",
        "tokens",
        "blocks",
        "unneeded",
        "mosaic us",
        "x weights",
        "kernel",
        "xla us",
        "blocks in full us",
    )
    _print(console, "KV fill-in", columns, (line for one in kernels for line in _fill_lines(one)))
    columns = ("cell", "full ms", "of bound", "early ms", "of bound", "speed-up", "ideal", "quotient")
    order = {cell.name: None for cell in cells(dry_run)}
    latency = ((name, results[name]) for name in order if name in results)
    _print(console, "decoding, ms a token", columns, (_latency_line(name, one) for name, one in latency))
    for one in kernels[:1]:
        console.print("kernel: the same by the kernels' own time", markup=False)
        console.print(f"{one['device']}; copy bandwidth {one['copy_bandwidth_gb_s']:.0f} GB/s", markup=False)
    if dry_run:
        console.print("DRY RUN: tiny shapes; the figures mean nothing.", style="bold red")


def _print(console: Console, title: str, columns: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    if table.row_count:
        console.print(table)


def _figure(found: dict[str, Any], key: str, digits: int) -> str:
    value = found.get(key)
    wrong = "!" if key == "us" and "reason" in found and value is not None else ""
    return "-" if value is None else f"{value:.{digits}f}{wrong}"


def _attention_lines(result: dict[str, Any]) -> Iterator[list[str]]:
    for row in result["attention"]:
        mosaic, xla, torch = (row["implementations"].get(name, {}) for name in ("mosaic", "xla", "torch"))
        yield [
            *(str(row["batch"]), str(row["context"]), f"{row['heads']}/{row['kv_heads']}", str(row["active"])),
            *(_figure(mosaic, "us", 1), _figure(mosaic, "of_copy_bandwidth", 2)),
            *(_figure(mosaic, "kernel_of_copy_bandwidth", 2), _figure(mosaic, "time_per_byte_over_all_active", 2)),
            *(_figure(xla, "us", 1), _figure(torch, "us", 1)),
        ]


def _fill_lines(result: dict[str, Any]) -> Iterator[list[str]]:
    for row in result["fill"]:
        mosaic, xla, full = (row["implementations"].get(name, {}) for name in ("mosaic", "xla", "full"))
        yield [
            *(str(row[key]) for key in ("model", "tokens", "blocks", "unneeded_blocks")),
            *(_figure(mosaic, "us", 1), _figure(mosaic, "over_weight_read", 2)),
            _figure(mosaic, "kernel_over_weight_read", 2),
            *(_figure(xla, "us", 1), _figure(full, "us", 1)),
        ]


def _latency_line(name: str, result: dict[str, Any]) -> list[str]:
    line = [name.removeprefix("latency-")]
    for mode in ("full_depth", "early_exit"):
        found = result["modes"][mode]
        line += [f"{found['time_per_output_token_ms']['p50']:.3f}", f"{found['share_of_bandwidth_bound']:.2f}"]
    return line + [f"{result[key]:.2f}" for key in ("measured_speedup", "ideal_speedup", "quotient")]


def main(arguments: list[str]) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_check", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", choices=("compile-first", "compile-rest", "models", "latency", "variants", "table"))
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--dry-run", action="store_true", help="a tiny model instead of the large ones")
    parser.add_argument("--model", help="whose latency cells to run")
    parser.add_argument("--seconds", type=float, default=120.0, help="begin no latency cell after this (%(default)s)")
    args = parser.parse_args(arguments)
    every = cells(args.dry_run)
    if args.what == "models":
        print(*dict.fromkeys(cell.model for cell in every))
        return 0
    if args.what == "table":
        show(args.out, args.dry_run)
        return 0
    if args.what in ("latency", "variants"):
        mine = [cell for cell in every if bool(cell.variant) == (args.what == "variants")]
        mine = [cell for cell in mine if args.model in (None, cell.model)]
        return int(run_cells(mine, args.out, args.dry_run, args.seconds) > 0)
    return int(compile_ahead(args.out, args.dry_run, alone=args.what == "compile-first") > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
