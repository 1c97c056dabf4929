"""What early exit gives and costs, by measure and threshold: `python -m bench exits --model checkpoints/demo`.

Quality: greedy answers to a file of prompts, beside those of full depth. Speed: full batches of fixed length at each
batch size, at full depth and under two rules, in turn, in one process over the same weights. `rows` is eejax's own rule
(unresolved rows go on by themselves, where that pays); `all` is the one of Miao et al. (arXiv 2407.20272): a step ends
when all its rows are resolved. With `--replay` exits are drawn, and only speed is measured. The ideal of a setting with
a gate counts every head, asked or not.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from bench import machine
from bench.common import (
    Ceiling,
    ModelOptions,
    add_replay,
    at_least,
    dtype_of,
    finish,
    model_facts,
    model_parser,
    numbers,
    options_of,
    random_prompts,
    text_prompts,
    words,
)
from bench.cost import ModelCost
from bench.exits.frontier import best_settings, plot_frontier
from bench.exits.quality import HeldOut, Quality
from bench.exits.settings import PROMPTS, add_gates, batch_sizes, label_of, settings_of
from bench.exits.speed import RULES, Cell, compare, prompts_at, time_cells
from bench.exits.tables import show
from bench.plots import require_matplotlib
from bench.shapes import shape
from eejax import LLM, EarlyExitParams
from eejax.core import LOGIT_MEASURES, MODEL_MEASURES, ConfigError, ExitCostWarning, ModelConfig, PromptLike
from eejax.serve import asked_and_left, exit_costs
from eejax.tune import read_documents, text_bytes


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = model_parser("exits", __doc__, default_model="checkpoints/demo")
    names = ",".join(MODEL_MEASURES)
    found.add_argument("--measures", type=words(MODEL_MEASURES), help=f"some of {names} (all the model has)")
    found.add_argument(
        "--thresholds", type=numbers, metavar="T,T", help="of every measure (a grid of its own for each)"
    )
    add_gates(found)
    add_replay(found)
    found.add_argument(
        "--batch-rule", choices=(*RULES, "both"), default="both", help="which rule to time (%(default)s)"
    )
    found.add_argument("--batch-sizes", type=batch_sizes, default=(1, 8, 32), metavar="B,B", help="requests at once")
    found.add_argument("--prompts", type=Path, metavar="FILE", default=PROMPTS, help="JSONL (the project's own)")
    found.add_argument("--input-len", type=at_least(1), default=32, help="prompt tokens, with --random (%(default)s)")
    found.add_argument("--output-len", type=at_least(2), default=128, help="tokens of a timed answer (%(default)s)")
    found.add_argument("--speed-prompts", type=at_least(1), default=8, help="fewest requests to time (%(default)s)")
    found.add_argument("--quality-prompts", type=at_least(0), default=120, help="answers to compare (%(default)s)")
    found.add_argument("--max-tokens", type=at_least(2), default=256, help="of an answer to compare (%(default)s)")
    found.add_argument(
        "--text", type=Path, metavar="FILE", help="held-out text (.txt, .jsonl, .jsonl.gz), bits per byte"
    )
    found.add_argument("--num-texts", type=at_least(1), default=100, help="its first documents (%(default)s)")
    found.add_argument("--num-iters-warmup", type=at_least(1), default=1, help="untimed rounds (%(default)s)")
    found.add_argument("--num-iters", type=at_least(1), default=5, help="timed rounds of each cell (%(default)s)")
    found.add_argument("--plot", type=Path, metavar="FILE.png", help="draw agreement against speed-up (matplotlib)")
    return found


def make_prompts(args: argparse.Namespace, llm: LLM) -> list[PromptLike]:
    """As many prompts as speed and quality need; random tokens for a model that reads no text."""
    needed = max(prompts_at(batch, args.speed_prompts) for batch in args.batch_sizes)
    if args.replay is None:
        needed = max(needed, args.quality_prompts)
    if llm.tokenizer is None:
        return random_prompts(needed, args.input_len, llm.config.model.vocab_size, args.seed)
    return text_prompts(llm, args.prompts, needed)


def held_out(args: argparse.Namespace, llm: LLM) -> HeldOut | None:
    """The text of `--text`, each document up to the model's length."""
    if args.text is None:
        return None
    if llm.tokenizer is None:
        raise ConfigError("--text needs a model with a tokenizer, so --model and not --random")
    documents = [ids[: llm.config.max_model_len] for ids in read_documents(args.text, llm.tokenizer)[: args.num_texts]]
    return HeldOut(documents, text_bytes(documents, llm.tokenizer))


def qualities(
    args: argparse.Namespace, llm: LLM, cost: ModelCost, prompts: list[PromptLike], settings: Sequence[EarlyExitParams]
) -> dict[EarlyExitParams | None, dict[str, Any]]:
    """Quality at full depth (None) and of each setting; nothing where no answers are to be compared."""
    if args.replay is not None or not args.quality_prompts:
        return {}
    asked, text = prompts[: args.quality_prompts], held_out(args, llm)
    quality = Quality(llm, cost, asked, max_tokens=args.max_tokens, seed=args.seed, held_out=text)
    console = Console(stderr=True)
    todo = track((None, *settings), "answers", console=console, transient=True, disable=not sys.stderr.isatty())
    return {one: quality.of(one) for one in todo}


def exits_of(config: ModelConfig, one: EarlyExitParams, tokens_at_exit: Mapping[str, int]) -> list[dict[str, Any]]:
    """What each exit costs under this setting, in blocks, and who must leave there for that and who did.

    Args:
        tokens_at_exit: decoded tokens of the setting, by the blocks that they ran.
    """
    tokens_at = {int(layer): count for layer, count in tokens_at_exit.items()}
    counts = asked_and_left(config.exits.layers, one.thresholds_for(config), tokens_at)
    return [
        {
            "layer": exit_.layer,
            "cost_in_blocks": exit_.asked,
            "break_even_share": exit_.break_even,
            "tokens_asked": asked,
            "tokens_left": left,
            "share_left": left / asked if asked else None,
        }
        for exit_ in exit_costs(config, with_logits=one.measure in LOGIT_MEASURES)
        for asked, left in [counts[exit_.layer]]
    ]


def build(args: argparse.Namespace) -> dict[str, LLM]:
    """An engine for each rule that is asked for, over the same weights."""
    rules = list(RULES) if args.batch_rule == "both" else [args.batch_rule]
    chosen, slots = ModelOptions.of(args), max(args.batch_sizes)
    length = None
    if args.random is not None:
        answer = args.output_len if args.replay else max(args.output_len, args.max_tokens)
        length = min(args.input_len + answer, shape(args.random).max_position)
    found: dict[str, LLM] = {}
    for rule in rules:
        if not found:
            found[rule] = chosen.build(max_model_len=length, max_num_seqs=slots, **asdict(RULES[rule]))
            continue
        first = found[rules[0]]
        found[rule] = LLM.from_params(
            first.config.model,
            first.engine.runner.params,
            dtype=dtype_of(first).name,
            max_model_len=first.config.max_model_len,
            max_num_seqs=slots,
            num_pages=first.config.cache.num_pages,
            page_size=args.page_size,
            seed=args.seed,
            **asdict(RULES[rule]),
        )
    return found


def main(arguments: list[str]) -> None:
    """Run the benchmark."""
    args = parser().parse_args(arguments)
    # Settings that do not pay are asked for on purpose, and the tables say which they are.
    warnings.simplefilter("ignore", ExitCostWarning)
    args.model = None if args.random else args.model
    if args.plot is not None:
        require_matplotlib()
    llms = build(args)
    llm = next(iter(llms.values()))
    config = llm.config.model
    settings, prompts = settings_of(args, config), make_prompts(args, llm)
    longest = max(len(prompt["prompt_token_ids"]) for prompt in prompts if isinstance(prompt, dict))
    if longest + args.output_len > llm.config.max_model_len:
        raise ConfigError(
            f"--output-len {args.output_len} after a prompt of {longest} tokens exceeds the model's length"
        )
    cost = ModelCost.of(config, dtype_of(llm).itemsize)
    quality = qualities(args, llm, cost, prompts, settings)
    step_bytes = cost.step_bytes(cost.n_layers, 1, 0)
    before = Ceiling.measure(step_bytes, dtype_of(llm))
    cells = [Cell(rule, one, batch) for batch in args.batch_sizes for rule in llms for one in (None, *settings)]
    runs = time_cells(
        llms,
        cells,
        prompts,
        least=args.speed_prompts,
        output_len=args.output_len,
        warmup=args.num_iters_warmup,
        iterations=args.num_iters,
        seed=args.seed,
    )
    ceiling = before.better(Ceiling.measure(step_bytes, dtype_of(llm)))
    speed = compare(llms, runs, cost, ceiling)
    # Where no answers were compared, the timed ones tell who left, under any rule: the tokens are the same.
    timed = [next(iter(rules.values())) for rules in speed[max(speed)]["early_exit"]]
    shares = ", ".join(f"{share:g}" for share in args.replay or ())
    rows = [
        {
            "label": f"replay {shares}" if shares else label_of(one),
            "measure": one.measure,
            "threshold": one.threshold,
            "gate": one.gate,
            "exits": exits_of(config, one, (quality.get(one) or timed[i])["tokens_at_exit"]),
            "quality": quality.get(one),
            "speed": {batch: found["early_exit"][i] for batch, found in speed.items()},
        }
        for i, one in enumerate(settings)
    ]
    result = {
        "bench": "exits",
        **machine.provenance(),
        "model": model_facts(llm, ModelOptions.of(args).name, cost),
        "options": options_of(args),
        "machine": ceiling.to_dict(),
        "full_depth": {
            "quality": quality.get(None),
            "speed": {batch: found["full_depth"] for batch, found in speed.items()},
        },
        "settings": rows,
        "requests_that_differ": {batch: found["requests_that_differ"] for batch, found in speed.items()},
        "best": {batch: {rule: best_settings(rows, batch, rule) for rule in llms} for batch in speed}
        if quality
        else None,
    }
    show(result)
    if args.plot is not None:
        plot_frontier(result, args.plot)
    finish(result, args.output_json)
