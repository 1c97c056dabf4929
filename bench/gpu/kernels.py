"""Paged attention and KV fill-in beside the bytes that must move: `bench kernels` at a few shapes.

    python -m bench.gpu.kernels attention --seconds 60

Shapes come in the order of their importance, since time may be over before the last one.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from typing import Any

from bench.gpu.record import report
from bench.kernels import command as kernels

ATTENTION = (
    ((32,), (2048,)),
    ((1,), (2048, 16384)),
    ((32,), (16384, 256)),
    ((8, 128), (2048,)),
    ((8,), (16384,)),
    ((1, 8, 128), (256,)),
    ((128,), (16384,)),
)
"""Batch sizes and contexts of each sweep."""


def flags(op: str, dry_run: bool) -> list[list[str]]:
    """Command lines of `bench kernels`, in turn."""
    if dry_run:
        return [["--dry-run", "--repeats", "1", "--ops", op]]
    if op == "fill":
        return [["--ops", "fill", "--models", model, "--tokens", "1,32,128"] for model in ("llama-2-7b", "llama-3-8b")]

    def listed(values: tuple[int, ...]) -> str:
        return ",".join(map(str, values))

    common = ["--ops", "attention", "--heads", "32/8", "--active", "1.0"]
    return [[*common, "--batch", listed(batch), "--context", listed(context)] for batch, context in ATTENTION]


def name_of(op: str, row: dict[str, Any]) -> str:
    """What to call a row."""
    if op == "attention":
        return f"batch {row['batch']} context {row['context']} heads {row['heads']}/{row['kv_heads']}"
    return f"{row['model']} tokens {row['tokens']} unneeded {row['unneeded_blocks']}"


def main(arguments: list[str]) -> int:
    """Returns the exit status: 1 if a shape was skipped for another reason than the time."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.kernels")
    parser.add_argument("op", choices=("attention", "fill"))
    parser.add_argument("--seconds", type=float, default=60.0, help="begin no shape after so long (%(default)s)")
    parser.add_argument("--without", help="an implementation to leave out")
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args(arguments)
    names = [name for name in kernels.IMPLEMENTATIONS if name != args.without]
    skipped: list[str] = []
    start = time.monotonic()
    sweeps = flags(args.op, args.dry_run)
    with kernels.interpreted() if args.dry_run else contextlib.nullcontext():
        for one in sweeps:
            parsed = kernels.parser().parse_args([*one, "--implementations", *names])
            kernels.narrow(parsed)
            parsed.time_limit = max(1, args.seconds - (time.monotonic() - start))
            sweep = kernels.Sweep(parsed, lambda op, row: report(op, name_of(op, row), **row))
            sweep.run()
            skipped += sweep.result["skipped"]
    for number, why in enumerate(skipped):
        report(args.op, f"skipped {number}", reason=why)
    return int(any("s are over" not in why for why in skipped))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
