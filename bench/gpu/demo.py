"""The demo's answers in bfloat16, by Mosaic's kernels and by XLA, beside XLA's in float32.

    python -m bench.gpu.demo RUN        one of `RUNS`, at full depth and with exits
    python -m bench.gpu.demo compare

In bfloat16 rounding decides near ties, so answers differ from float32's after some tokens. Mosaic's kernels are taken
for right if that happens about as late with them as with XLA's products in bfloat16.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.gpu.record import RESULTS, report, results
from bench.kernels.command import interpreted
from eejax import LLM, EarlyExitParams, SamplingParams
from eejax.core import ExitConfig, ModelConfig, PromptLike
from eejax.device import resolve_dtype
from eejax.model import load_checkpoint
from eejax.text import Tokenizer, load_tokenizer, prompt_ids, read_prompts
from pallas_kernels.implementation import VARIABLE

RUNS = {"mosaic": ("mosaic", "bfloat16"), "xla": ("xla", "bfloat16"), "float32": ("xla", "float32")}
ROOT = Path(__file__).parents[2]
MODES = {"full_depth": None, "early_exit": EarlyExitParams(0.6, "margin")}
WORST = 0.5
"""Mosaic's answers equal float32's for at least this share of the tokens for which XLA's do. A wrong kernel differs
within a few tokens; which near tie comes first is chance."""


def first_blocks(config: ModelConfig, params: dict, count: int) -> tuple[ModelConfig, dict]:
    """A model of the first blocks of another, with one exit. The interpreter takes seconds for each block."""
    exits = ExitConfig((count - 1,))
    kept = {"blocks": {number: params["blocks"][number] for number in range(count)}}
    return replace(config, n_layers=count, exits=exits), {key: params[key] for key in ("embedding", "norm")} | kept


def answer(llm: LLM, tokenizer: Tokenizer, count: int, tokens: int) -> dict[str, Any]:
    """Tokens and exit layers of the first prompts, by mode."""
    texts = read_prompts(ROOT / "bench" / "schedule_prompts.jsonl", count)
    prompts: list[PromptLike] = [{"prompt_token_ids": prompt_ids(tokenizer, text)} for text in texts]
    found = {}
    for mode, early_exit in MODES.items():
        params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, early_exit=early_exit)
        answers = [output.outputs[0] for output in llm.generate(prompts, params, use_tqdm=False)]
        found[mode] = {"tokens": [one.token_ids for one in answers], "exits": [one.exit_layers for one in answers]}
    return found


def common(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens before the first difference."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def compare(results: Sequence[dict[str, Any]]) -> bool:
    """Report for how many tokens bfloat16 answers equal float32's. Returns whether Mosaic's do for long enough.

    If Mosaic did not run, only XLA's answers are compared.
    """
    by_run = {one["name"]: one for one in results if one["stage"] == "demo"}
    right = True
    for mode in MODES:
        expected = by_run["float32"][mode]["tokens"]
        kept, found = {}, {}
        for run in ("mosaic", "xla"):
            if run in by_run:
                mine = by_run[run][mode]["tokens"]
                kept[run] = sum(map(common, mine, expected)) / sum(map(len, expected))
        if "mosaic" in by_run:
            mosaic, xla = by_run["mosaic"][mode], by_run["xla"][mode]
            pairs = list(zip(mosaic["tokens"], xla["tokens"], strict=True))
            equal = [
                a == b for pair in zip(mosaic["exits"], xla["exits"], strict=True) for a, b in zip(*pair, strict=True)
            ]
            found = {"equal_answers": sum(a == b for a, b in pairs), "equal_exit_layers": sum(equal) / len(equal)}
            right &= kept["mosaic"] >= WORST * kept["xla"]
        report("demo", f"compared {mode}", answers=len(expected), tokens_equal_to_float32=kept, **found)
    return right


def main(arguments: list[str]) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.demo")
    parser.add_argument("run", choices=(*RUNS, "compare"), help="`compare` compares the runs that were reported")
    parser.add_argument("--dry-run", action="store_true", help="two blocks, few tokens, kernels interpreted")
    args = parser.parse_args(arguments)
    if args.run == "compare":
        return int(not compare(results(Path(os.environ[RESULTS]).parent)))
    kernels, dtype = RUNS[args.run]
    os.environ[VARIABLE] = kernels
    count, tokens = (2, 3) if args.dry_run else (8, 32)
    start = time.perf_counter()
    with interpreted() if args.dry_run and kernels == "mosaic" else contextlib.nullcontext():
        folder = ROOT / "checkpoints" / "demo"
        config, params = load_checkpoint(folder, resolve_dtype(dtype))
        if args.dry_run:
            config, params = first_blocks(config, params, 2)
        length = 128 if args.dry_run else 256
        llm = LLM.from_params(config, params, dtype=dtype, max_model_len=length, max_num_seqs=count, compaction="never")
        found = answer(llm, load_tokenizer(folder), count, tokens)
    report("demo", args.run, **found, seconds=time.perf_counter() - start)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
