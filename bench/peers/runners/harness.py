"""What the processes of all engines share: options, the clock, memory, and the result. Python 3.11, no packages.

A runner hands `serve` a class, an engine over one model:

    Engine(model, threads, requests, options)   loads; `requests` are those that will be answered, to size caches by
    engine.versions                             names and versions of what it runs on
    engine.answer(requests)                     answers all of them, submitted at once: a list of `Answer`
    engine.facts()                              more to report, called after the timed passes

A process answers everything once untimed, and then once timed, the prompts alone (one token each) and in full.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import dataclass


@dataclass
class Answer:
    """Tokens of one request, and when the first and the last of them were known, by `time.monotonic`."""

    tokens: list[int]
    first: float
    finish: float


def _busy_seconds() -> float:
    """Processor time that all processes together have taken, in seconds; 0 where Linux does not say."""
    try:
        with open("/proc/stat") as file:
            ticks = [int(value) for value in file.readline().split()[1:9]]
    except OSError:
        return 0.0
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")


def _peak_bytes() -> int:
    """Most memory that this process had resident. `getrusage` would begin with that of the process that forked it."""
    try:
        with open("/proc/self/status") as file:
            [line] = [line for line in file if line.startswith("VmHWM:")]
        return int(line.split()[1]) * 1024
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _forget_peak() -> None:
    """Reset the peak, where Linux supports it."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        pass


def _timed(engine, requests: list[dict]) -> dict:
    busy, own, start = _busy_seconds(), sum(os.times()[:4]), time.monotonic()
    answers = engine.answer(requests)
    seconds = time.monotonic() - start
    others = _busy_seconds() - busy - (sum(os.times()[:4]) - own)
    for number, (request, answer) in enumerate(zip(requests, answers, strict=True)):
        if len(answer.tokens) != request["max_new"]:
            raise RuntimeError(f"request {number}: {len(answer.tokens)} tokens instead of {request['max_new']}")
    return {
        "seconds": seconds,
        "first": [answer.first - start for answer in answers],
        "finish": [answer.finish - start for answer in answers],
        "tokens": [[int(token) for token in answer.tokens] for answer in answers],
        "other_cores": max(0.0, others / seconds),
    }


def serve(engine_class) -> None:
    """Run the passes that the command line asks for, and write what came of them to `--out`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--workload", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--options", type=json.loads, default={})
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    with open(args.workload) as file:
        requests = json.load(file)["requests"]
    start = time.monotonic()
    engine = engine_class(args.model, args.threads, requests, args.options)
    loaded = time.monotonic()
    alone = [{**request, "max_new": 1} for request in requests]
    engine.answer(alone)
    engine.answer(requests)
    warm = time.monotonic()
    peak = _peak_bytes()
    _forget_peak()
    prompts = _timed(engine, alone)
    full = _timed(engine, requests)
    serving = _peak_bytes()
    result = {
        **full,
        "versions": engine.versions,
        "prompts_seconds": prompts["seconds"],
        "load_seconds": loaded - start,
        "warm_up_seconds": warm - loaded,
        "peak_bytes": max(peak, serving),
        "serving_peak_bytes": serving,
        "facts": engine.facts(),
    }
    if args.options.get("gaps"):
        result["gaps"] = engine.gaps(requests, full["tokens"])
    with open(args.out, "w") as file:
        json.dump(result, file)
