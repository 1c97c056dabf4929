"""One decode chunk under the profiler: its longest kernels, launches a step, the share of time in which they run."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import jax

from bench.common import random_params, random_prompts
from bench.gpu.decoding import RUNS, build
from bench.gpu.record import report
from bench.rounds import request_params
from bench.shapes import SHAPES, shape
from eejax.options import resolve_dtype

SHOWN = 30


@dataclass(frozen=True, slots=True)
class Event:
    """A kernel or copy that the device ran; times in nanoseconds."""

    name: str
    start: float
    length: float


def events(folder: Path) -> list[Event]:
    """Events of the device in the newest trace in `folder`; on a CPU, events of XLA's threads."""
    newest = max(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    planes = list(jax.profiler.ProfileData.from_file(str(newest)).planes)
    chosen = [plane for plane in planes if plane.name.startswith("/device:GPU")]
    found = []
    for plane in chosen or [plane for plane in planes if plane.name.startswith("/host:CPU")]:
        for line in plane.lines:
            # Other lines of a device repeat the events by module or by operation.
            if not chosen or line.name.startswith("Stream"):
                found += [Event(one.name, one.start_ns, one.duration_ns) for one in line.events]
    return sorted(found, key=lambda one: one.start)


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
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # Python's own calls would be most of the trace
        with jax.profiler.trace(str(folder), profiler_options=options):
            engine.step()
        summarise(f"{args.model} 1 {name}", events(folder), engine.stats().steps - steps)
        if engine.is_unfinished(request):
            engine.abort(request)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
