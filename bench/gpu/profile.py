"""One decode chunk under the profiler: the kernels that take longest, launches a step, how long the device waits."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import jax

from bench.common import random_params, random_prompts
from bench.gpu.decoding import RUNS
from bench.gpu.record import report
from bench.rounds import request_params
from bench.shapes import SHAPES, shape
from eejax import LLM
from eejax.options import resolve_dtype

SHOWN = 30


@dataclass(frozen=True, slots=True)
class Event:
    """Something that the device ran; nanoseconds."""

    name: str
    start: float
    length: float


def events(folder: Path) -> list[Event]:
    """What ran on the device, from the newest trace in `folder`; on a CPU, what XLA's threads ran."""
    newest = max(folder.rglob("*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    planes = list(jax.profiler.ProfileData.from_file(str(newest)).planes)
    chosen = [plane for plane in planes if plane.name.startswith("/device:GPU")]
    found = []
    for plane in chosen or [plane for plane in planes if plane.name.startswith("/host:CPU")]:
        for line in plane.lines:
            # Other lines of a device say the same once more, by module or by operation.
            if not chosen or line.name.startswith("Stream"):
                found += [Event(one.name, one.start_ns, one.duration_ns) for one in line.events]
    return sorted(found, key=lambda one: one.start)


def busy(ordered: Iterable[Event]) -> Iterator[float]:
    """Lengths of the stretches in which something ran."""
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
    stretches = list(busy(found))
    report(
        "profile",
        name,
        steps=steps,
        launches_a_step=len(found) / steps,
        span_ms_a_step=span / steps / 1e6,
        busy_share=sum(stretches) / span,
        gaps_a_step=len(stretches) / steps,
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
    os.environ.pop("EEJAX_BRANCHES", None)
    for name in ("full", "eager-cond"):
        options = {"max_model_len": before + after, "max_num_seqs": 1, "dtype": "bfloat16"}
        llm = LLM.from_params(config, params, fill=RUNS[name].fill, rebatching="never", **options)
        [requests] = request_params(1, after, 0, RUNS[name].early_exit, ignore_eos=True)
        llm.generate(prompts, requests, use_tqdm=False)
        engine = llm.engine
        engine.add_request(prompts[0], requests)
        engine.step()  # the prompt
        steps, folder = engine.stats().steps, args.raw / name
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # Python's own calls would be most of the trace
        with jax.profiler.trace(str(folder), profiler_options=options):
            engine.step()
        summarise(f"{args.model} 1 {name}", events(folder), engine.stats().steps - steps)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
