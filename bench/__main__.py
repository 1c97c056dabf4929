"""`python -m bench NAME [options]`: runs one benchmark."""

from __future__ import annotations

import importlib
import sys

from eejax.core import EejaxError

BENCHES = {
    "latency": "one batch: time to first token, time per output token, early exit against full depth",
    "exits": "measures and thresholds: exits taken, agreement with full depth, speed-up under two batch rules",
    "calibration": "thresholds certified on some prompts, their risk on others, over many random splits",
    "claims": "every figure that the README promises, measured and compared with its bound",
    "convert": "a Hugging Face folder to a checkpoint and back: time, peak memory, copying beside it",
    "kernels": "paged attention and KV fill-in by themselves, beside the bytes that must move",
    "path": "the modules that one default request runs, with their lines",
    "peers": "the same requests by other engines, each in a process of its own: speed, memory, equal tokens",
    "schedule": "many requests under each scheduling policy: throughput, latency, waste, memory",
    "simulate": "the scheduler against a model of the device: its error, and fleets that no machine here can run",
    "start": "from starting Python to the first token, with nothing cached and with everything cached",
    "step": "one decode step on a CPU, split into parts: products, attention, KV writes, heads, copies, host",
    "throughput": "many requests: requests and tokens per second, early exit against full depth",
}


def main(arguments: list[str]) -> int:
    """Dispatch to `bench.NAME.main(arguments)`. Returns the exit code."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: python -m bench NAME [options]\n")
        for name, what in BENCHES.items():
            print(f"  {name:<12} {what}")
        print("\npython -m bench NAME --help lists a benchmark's options.")
        return 0 if arguments else 2
    name, *rest = arguments
    if name not in BENCHES:
        print(f"there is no benchmark {name!r}; there are {', '.join(BENCHES)}", file=sys.stderr)
        return 2
    try:
        return importlib.import_module(f"bench.{name}").main(rest) or 0
    except EejaxError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
