"""From starting Python to the first token: `python -m bench start --model checkpoints/demo`.

Two fresh processes a round open the model and answer one request (greedy). The first has an empty cache folder: the C
kernels are built and every program is compiled. The second finds both in that folder. Figures are medians.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from bench.process import run_process, scratch_folder

# Nothing of eejax or jax is imported here: importing them is part of what the fresh processes are timed at.
PROMPT = "What does `git stash` do?"
MAX_TOKENS = 16
KINDS = ("cold", "cached")
TIME_LIMIT = 600.0


def first_token(model: str) -> float:
    """Answer the request in this process. Returns when its first token was known, by `time.monotonic`."""
    from eejax import LLM, SamplingParams

    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True)
    [output] = LLM(model).generate(PROMPT, params, use_tqdm=False)
    if output.metrics is None or output.metrics.first_token_time is None:
        raise RuntimeError("the request came back without its times")
    return output.metrics.first_token_time


def run_once(model: str, folder: Path) -> float:
    """Seconds of one fresh process, from its start to its first token, with `folder/cache` as its cache."""
    out, root = folder / "out.json", Path(__file__).resolve().parents[1]
    settings = {"PYTHONPATH": str(root), "EEJAX_CACHE_DIR": str(folder / "cache")}
    start = time.monotonic()  # one clock for all processes of the machine
    # -P keeps bench/ itself off the path, where its module names could hide others.
    run_process([sys.executable, "-P", __file__, model, out], folder / "log", TIME_LIMIT, settings)
    return json.loads(out.read_text()) - start


def measure(model: str, rounds: int) -> dict[str, list[float]]:
    """Seconds to the first token of each round, with an empty cache folder and with a full one."""
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(rounds):
        with scratch_folder() as folder:
            for kind in KINDS:
                found[kind].append(run_once(model, folder))
    return found


def parser() -> argparse.ArgumentParser:
    """The command line."""
    from bench.common import at_least

    found = argparse.ArgumentParser(prog="python -m bench start", description=(__doc__ or "").partition("\n")[0])
    found.add_argument("--model", default="checkpoints/demo", metavar="PATH", help="checkpoint folder (%(default)s)")
    found.add_argument("--num-iters", type=at_least(1), default=5, help="rounds (%(default)s)")
    found.add_argument("--output-json", type=Path, metavar="FILE", help="write the result here too")
    return found


def main(arguments: list[str]) -> None:
    """Run the benchmark."""
    from bench import machine
    from bench.common import finish, median, options_of

    args = parser().parse_args(arguments)
    rounds = measure(os.path.abspath(args.model), args.num_iters)
    result: dict[str, Any] = {"bench": "start", **machine.provenance(), "options": options_of(args)}
    for kind, seconds in rounds.items():
        result[kind] = {"first_token_s": median(seconds), "rounds_s": seconds}
        print(f"{kind:<7} {median(seconds):.2f} s until the first token")
    finish(result, args.output_json)


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(first_token(sys.argv[1])))
