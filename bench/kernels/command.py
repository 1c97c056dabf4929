"""The kernels against the speed of memory: `python -m bench kernels --quick`.

Paged attention and KV fill-in, each implementation in turn, beside the bytes that must move and what a large copy on
the same device moves in that time. Cases that an implementation does not support are listed below the table.
`us` are an upper bound: wall time of a loop on the device. `kernel us` are a profiler's, the kernels alone.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

from bench import machine
from bench.common import at_least, finish, integers, numbers, options_of
from bench.kernels import attention, fill
from bench.kernels.attention import CUDNN, AttentionCase
from bench.kernels.fill import MODELS, FillCase
from bench.kernels.timing import Timing, copy_bandwidth, one_line
from eejax.core import require

COPY_BYTES = 2 * 2**30
DRY_COPY_BYTES = 2**22
DRY_TURNS = 2
IMPLEMENTATIONS = ("mosaic", "xla", "torch", "full")
DRY_RUN = "DRY RUN: tiny shapes, kernels interpreted on a CPU. The figures mean nothing."


def pairs(text: str) -> tuple[tuple[int, int], ...]:
    """`32/8,16/8` as pairs of query heads and KV heads."""
    found = []
    for part in text.split(","):
        query, _, kv = part.partition("/")
        if not (query.isdigit() and kv.isdigit() and int(kv) and int(query) and int(query) % int(kv) == 0):
            raise argparse.ArgumentTypeError(f"{part!r} is not query heads over KV heads, a divisor, such as 32/8")
        found.append((int(query), int(kv)))
    return tuple(found)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(prog="python -m bench kernels", description=(__doc__ or "").partition("\n")[0])
    found.add_argument("--ops", nargs="+", choices=("attention", "fill"), default=["attention", "fill"])
    found.add_argument("--implementations", nargs="+", choices=IMPLEMENTATIONS, default=list(IMPLEMENTATIONS))
    found.add_argument("--batch", type=integers, metavar="B,B", default=(1, 8, 32, 128))
    found.add_argument("--context", type=integers, metavar="T,T", default=(256, 2048, 16384), help="tokens of a row")
    found.add_argument("--heads", type=pairs, metavar="H/K,H/K", default=((32, 32), (32, 8), (16, 8)))
    found.add_argument("--active", type=numbers, metavar="F,F", default=(1.0, 0.5, 0.1), help="shares of active rows")
    found.add_argument("--models", nargs="+", choices=MODELS, default=[one for one in MODELS if one != "tiny"])
    found.add_argument("--tokens", type=integers, metavar="N,N", default=(1, 32, 128), help="tokens to fill in")
    found.add_argument("--repeats", type=at_least(1), default=5, help="timed runs of each program (%(default)s)")
    found.add_argument("--profile", action="store_true", help="also kernel times, from CUPTI")
    found.add_argument("--quick", action="store_true", help="the part of the sweep that has targets")
    found.add_argument("--dry-run", action="store_true", help="tiny shapes, kernels interpreted: shows that all runs")
    found.add_argument("--time-limit", type=at_least(1), metavar="SECONDS", help="begin no new cell after this")
    found.add_argument("--seed", type=at_least(0), default=0, help="of the arrays (%(default)s)")
    found.add_argument("--output-json", type=Path, metavar="FILE", help="write the result here too, as it grows")
    return found


def narrow(args: argparse.Namespace) -> None:
    """Let `--quick` and `--dry-run` choose the sweep."""
    require(not (args.quick and args.dry_run), "--quick and --dry-run choose different sweeps; give one")
    if args.quick:
        args.batch, args.context, args.heads, args.active = (32, 1), (2048, 16384), ((32, 8), (32, 32)), (1.0, 0.5, 0.1)
        args.models, args.tokens = ["llama-2-7b", "llama-3-8b"], (1, 32)
    if args.dry_run:
        args.batch, args.context, args.heads, args.active = (2,), (70,), ((2, 1),), (1.0, 0.5)
        args.models, args.tokens, args.repeats = ["tiny"], (2,), min(3, args.repeats)


def main(arguments: list[str]) -> None:
    """Run the benchmark."""
    args = parser().parse_args(arguments)
    narrow(args)
    for name in ("batch", "context", "tokens", "active"):
        require(min(getattr(args, name)) > 0, f"--{name} must be above 0, got {getattr(args, name)}")
    with interpreted() if args.dry_run else contextlib.nullcontext():
        sweep = Sweep(args)
        sweep.run()
    show(sweep.result)
    finish(sweep.result, args.output_json)


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """All runs on the CPU, Mosaic kernels too."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    with jax.default_device(jax.devices("cpu")[0]), plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        yield


class Sweep:
    """All cells, one after the other. `result` grows with each, and is whole when `run` returns.

    Args:
        on_row: called with the operation and each new row.
    """

    def __init__(self, args: argparse.Namespace, on_row: Callable[[str, dict[str, Any]], None] | None = None) -> None:
        self._args, self._start, self._on_row = args, time.monotonic(), on_row
        self._options = {"repeats": args.repeats, "profile": args.profile, "seed": args.seed}
        if args.dry_run:
            self._options["turns"] = DRY_TURNS
        self.bandwidth = copy_bandwidth(DRY_COPY_BYTES if args.dry_run else COPY_BYTES, max(5, args.repeats))
        self.result: dict[str, Any] = {
            "bench": "kernels",
            **machine.provenance(),
            "options": options_of(args),
            "dry_run": args.dry_run,
            "clock": "us: wall time of a loop on the device, with what prepares each call; kernel us: CUPTI",
            "copy_bandwidth_gb_s": self.bandwidth / 1e9,
            "attention": [],
            "fill": [],
            "skipped": [],
        }

    def run(self) -> None:
        """Every cell that fits in memory and in time."""
        if "attention" in self._args.ops:
            self._attention()
        if "fill" in self._args.ops:
            self._fill()

    def _attention(self) -> None:
        names = [name for name in self._args.implementations if name != "full"]
        small = {"head_dim": 64, "max_sets": DRY_TURNS} if self._args.dry_run else {}
        for cases in attention.cases(self._args.batch, self._args.context, self._args.heads, self._args.active):
            group = [replace(case, **small) for case in cases]
            first = group[0]
            label = f"attention, batch {first.batch}, context {first.context}, heads {first.heads}/{first.kv_heads}"
            whole: dict[str, float] = {}

            def measure(case: AttentionCase, data: Any, whole: dict[str, float] = whole) -> dict[str, Any]:
                found = attention.measure(case, data, names, self.bandwidth, **self._options)
                return {
                    "batch": case.batch,
                    "context": case.context,
                    "heads": case.heads,
                    "kv_heads": case.kv_heads,
                    "head_dim": case.head_dim,
                    "active": case.active,
                    "bytes": case.bytes,
                    "implementations": {
                        name: timing.to_dict(**self._attention_figures(name, timing, case, whole))
                        for name, timing in found.items()
                    },
                }

            self._group("attention", label, group, first.pool_bytes, attention.make_data, measure)

    def _attention_figures(
        self, name: str, timing: Timing, case: AttentionCase, whole: dict[str, float]
    ) -> dict[str, float | None]:
        """Rates; and how time per byte compares with that of the same case with every row active."""
        if timing.seconds is None:
            return {}
        rate, kernel = case.bytes / timing.seconds, timing.kernel_seconds
        best = case.bytes / kernel if kernel else rate
        if case.active == case.batch:
            whole[name] = best
        return {
            "gb_s": rate / 1e9,
            "of_copy_bandwidth": rate / self.bandwidth,
            "kernel_of_copy_bandwidth": best / self.bandwidth if kernel else None,
            "time_per_byte_over_all_active": whole[name] / best if name in whole and case.active < case.batch else None,
        }

    def _fill(self) -> None:
        names = [name for name in self._args.implementations if name != "torch"]

        def measure(case: FillCase, params: Any) -> dict[str, Any]:
            found = fill.measure(case, params, names, self.bandwidth, **self._options)
            return {
                "model": case.model,
                "tokens": case.tokens,
                "blocks": case.config.n_layers,
                "unneeded_blocks": case.unneeded,
                "weight_bytes": case.weight_bytes,
                "bytes": case.bytes,
                "implementations": {
                    name: timing.to_dict(**self._fill_figures(name, timing, case)) for name, timing in found.items()
                },
            }

        small = {"max_sets": DRY_TURNS} if self._args.dry_run else {}
        for cases in fill.cases(self._args.models, self._args.tokens):
            group = [replace(case, **small) for case in cases]
            label = f"fill, {group[0].model}"
            self._group("fill", label, group, group[0].model_bytes, fill.make_params, measure)

    def _fill_figures(self, name: str, timing: Timing, case: FillCase) -> dict[str, float | None]:
        """Time over that of reading the needed weights at the speed of the copy; blocks in full read other ones."""
        if timing.seconds is None or name == "full":
            return {}
        kernel, read = timing.kernel_seconds, case.weight_bytes / self.bandwidth
        return {
            "gb_s": case.bytes / timing.seconds / 1e9,
            "over_weight_read": timing.seconds / read,
            "kernel_over_weight_read": kernel / read if kernel else None,
        }

    def _group[Case, Data](
        self,
        op: str,
        label: str,
        group: Sequence[Case],
        size: int,
        make: Callable[[Case, int], Data],
        measure: Callable[[Case, Data], dict[str, Any]],
    ) -> None:
        """Cells that share `size` bytes of arrays."""
        reason = self._no_room(size) or self._no_time()
        try:
            data = None if reason else jax.block_until_ready(make(group[0], self._args.seed))
        except Exception as error:  # no memory, most likely
            reason, data = one_line(error), None
        for case in group:
            reason = reason or self._no_time()
            if reason or data is None:
                self._skip(label, reason or "no data")
                break
            try:
                row = measure(case, data)
            except Exception as error:
                self._skip(label, one_line(error))
                continue
            self.result[op].append(row)
            print(f"{label}: {json.dumps(row['implementations'])}", file=sys.stderr, flush=True)
            if self._on_row is not None:
                self._on_row(op, row)
            if self._args.output_json is not None:  # what is there if the rest never comes
                self._args.output_json.parent.mkdir(parents=True, exist_ok=True)
                self._args.output_json.write_text(json.dumps({**self.result, "complete": False}) + "\n")

    def _skip(self, label: str, reason: str) -> None:
        self.result["skipped"].append(f"{label}: {reason}")
        print(f"skipped {label}: {reason}", file=sys.stderr, flush=True)

    def _no_room(self, size: int) -> str | None:
        stats = jax.local_devices()[0].memory_stats() or {}
        if "bytes_limit" not in stats:
            return None
        free = stats["bytes_limit"] - stats["bytes_in_use"]
        # A tenth for what programs need beside their arguments.
        return None if size < 0.9 * free else f"takes {size / 1e9:.1f} GB of the {free / 1e9:.1f} GB that are free"

    def _no_time(self) -> str | None:
        limit = self._args.time_limit
        return f"{limit} s are over" if limit and time.monotonic() - self._start > limit else None


def show(result: dict[str, Any]) -> None:
    """Print the tables."""
    console = Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=150)
    if result["dry_run"]:
        console.print(DRY_RUN, style="bold red")
    reasons: dict[str, None] = {}
    if result["attention"]:
        dim = result["attention"][0]["head_dim"]
        table = Table(title=f"paged attention, head dimension {dim}, bfloat16; us (share of the copy's bandwidth)")
        for column in ("batch", "context", "heads", "active", "MB", "mosaic", "kernel us", "t/byte", "xla", "torch"):
            table.add_column(column, justify="right")
        for row in result["attention"]:
            found = row["implementations"]
            mosaic = found.get("mosaic", {})
            table.add_row(
                *(str(row[name]) for name in ("batch", "context")),
                f"{row['heads']}/{row['kv_heads']}",
                str(row["active"]),
                f"{row['bytes'] / 1e6:.1f}",
                _cell(found, "mosaic", "of_copy_bandwidth", reasons),
                _kernel(mosaic, "kernel_of_copy_bandwidth"),
                _figure(mosaic, "time_per_byte_over_all_active", 2),
                *(_cell(found, name, "of_copy_bandwidth", reasons) for name in ("xla", "torch")),
            )
        console.print(table)
        console.print("t/byte: time per byte over that with all rows active (mosaic)", soft_wrap=True)
    if result["fill"]:
        table = Table(title="KV fill-in, bfloat16; us (times the time to read the needed weights)")
        for column in ("model", "tokens", "blocks", "unneeded", "MB", "mosaic", "kernel us", "xla", "blocks in full"):
            table.add_column(column, justify="right")
        for row in result["fill"]:
            found = row["implementations"]
            table.add_row(
                *(str(row[name]) for name in ("model", "tokens", "blocks", "unneeded_blocks")),
                f"{row['weight_bytes'] / 1e6:.1f}",
                _cell(found, "mosaic", "over_weight_read", reasons),
                _kernel(found.get("mosaic", {}), "kernel_over_weight_read"),
                _cell(found, "xla", "over_weight_read", reasons),
                _cell(found, "full", "", reasons),
            )
        console.print(table)
    for note in (*reasons, CUDNN, *(f"skipped {one}" for one in result["skipped"])):
        console.print(note, markup=False, soft_wrap=True)
    rate = result["copy_bandwidth_gb_s"]
    console.print(f"copy bandwidth {rate:.0f} GB/s, read and written; {result['clock']}", markup=False, soft_wrap=True)


def _cell(found: dict[str, Any], name: str, figure: str, reasons: dict[str, None]) -> str:
    """Time and a figure beside it; `-` where there is none, its reason kept for below the table."""
    one = found.get(name)
    if one is None:
        return ""
    if "reason" in one:
        reasons[f"{name}: {one['reason'].removeprefix(f'{name}: ')}"] = None
    if "us" not in one:
        return "-"
    beside = f" ({one[figure]:.2f})" if one.get(figure) is not None else ""
    return f"{one['us']:.1f}{beside}{'!' if 'reason' in one else ''}"


def _kernel(one: dict[str, Any], figure: str) -> str:
    """Time of the kernels alone, and a figure beside it, where a profiler told."""
    return "" if one.get("kernel_us") is None else f"{one['kernel_us']:.1f} ({one[figure]:.2f})"


def _figure(one: dict[str, Any], name: str, digits: int = 1) -> str:
    value = one.get(name)
    return "" if value is None else f"{value:.{digits}f}"
