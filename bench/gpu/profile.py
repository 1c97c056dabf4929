"""One decode chunk under the profiler: its longest kernels, launches a step, the share of time in which they run."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from bench.common import random_params, random_prompts
from bench.gpu.decoding import RUNS, build
from bench.gpu.record import report
from bench.rounds import request_params
from bench.shapes import SHAPES, shape
from bench.xla_profile import Event, device_events, trace
from eejax.device import resolve_dtype

SHOWN = 30


def busy(ordered: Iterable[Event]) -> Iterator[float]:
    """Lengths of the intervals in which at least one event ran."""
    start = end = None
    for one in ordered:
        if start is None or end is None:
            start, end = one.start, one.start + one.length
        elif one.start > end:
            yield end - start
            start, end = one.start, one.start + one.length
        else:
            end = max(end, one.start + one.length)
    if start is not None and end is not None:
        yield end - start


def summarise(name: str, found: list[Event], steps: int) -> None:
    """Report one chunk of `steps` steps."""
    if not found:
        raise ValueError("the trace has no events of the device")
    span = max(one.start + one.length for one in found) - found[0].start
    lengths: dict[str, list[float]] = {}
    for one in found:
        kernel = re.sub(r"[_.]\d+$", "", one.name)[:60]  # copies of a kernel differ in a number
        lengths.setdefault(kernel, []).append(one.length)
    longest = sorted(((sum(many), len(many), kernel) for kernel, many in lengths.items()), reverse=True)
    intervals = list(busy(found))
    report(
        "profile",
        name,
        steps=steps,
        launches_a_step=len(found) / steps,
        span_ms_a_step=span / steps / 1e6,
        busy_share=sum(intervals) / span,
        gaps_a_step=(len(intervals) - 1) / steps,
        kernels=[[kernel, count, total / 1e3] for total, count, kernel in longest[:SHOWN]],
    )


def main(arguments: list[str]) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.profile")
    parser.add_argument("--model", choices=sorted(SHAPES), required=True)
    parser.add_argument("--raw", type=Path, required=True, help="folder for the traces")
    parser.add_argument("--dry-run", action="store_true", help="few tokens")
    args = parser.parse_args(arguments)
    before, after = (8, 8) if args.dry_run else (32, 96)
    config = shape(args.model)
    params = random_params(config, resolve_dtype("bfloat16"), seed=0)
    prompts = random_prompts(1, before, config.vocab_size, seed=0)
    llm = build(args.model, params, 1, before + after, RUNS["full"])
    for name in ("full", "eager-cond"):  # one engine serves both
        [requests] = request_params(1, after, 0, RUNS[name].early_exit, ignore_eos=True)
        llm.generate(prompts, requests, use_tqdm=False)
        engine = llm.engine
        request = engine.add_request(prompts[0], requests)
        engine.step()  # prefill
        steps, folder = engine.stats().steps, args.raw / name
        with trace(folder):
            engine.step()
        summarise(f"{args.model} 1 {name}", device_events(folder), engine.stats().steps - steps)
        if engine.is_unfinished(request):
            engine.abort(request)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
