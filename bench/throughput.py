"""Throughput of many requests: `python -m bench throughput --random llama-125m --replay 0.7,0.2`.

All requests arrive at once and go through `LLM.generate`, at full depth and with early exit in turn, in one process;
figures are medians over the rounds, prefill included.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import machine
from bench.common import (
    Ceiling,
    ModelOptions,
    add_decode_options,
    at_least,
    dtype_of,
    early_exit_params,
    finish,
    median,
    model_facts,
    new_parser,
    options_of,
    percentiles,
    random_prompts,
    show_table,
    table_row,
    text_prompts,
)
from bench.cost import ModelCost, TokenCost, ideal_from_operations, prefill_ops
from bench.rounds import MODES, Round, request_params, run_interleaved, token_costs
from eejax import LLM
from eejax.core import PromptLike


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = new_parser("throughput", __doc__)
    add_decode_options(found)
    found.add_argument("--num-prompts", type=at_least(1), help="requests (32, or all of --prompts)")
    found.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help='JSONL of {"prompt": ...} instead of random tokens; answers may end before --output-len tokens',
    )
    found.add_argument("--input-len", type=at_least(1), default=64, help="tokens of a random prompt (%(default)s)")
    found.add_argument("--output-len", type=at_least(2), default=128, help="answer tokens (%(default)s)")
    found.add_argument("--max-num-seqs", type=at_least(1), default=32, help="slots (%(default)s)")
    found.add_argument("--num-iters-warmup", type=at_least(1), default=1, help="untimed rounds (%(default)s)")
    found.add_argument("--num-iters", type=at_least(1), default=5, help="timed rounds of each mode (%(default)s)")
    return found


def make_prompts(args: argparse.Namespace, llm: LLM) -> list[PromptLike]:
    """Random tokens, or the file's texts in the checkpoint's chat template."""
    if args.prompts is None:
        return random_prompts(args.num_prompts or 32, args.input_len, llm.config.model.vocab_size, args.seed)
    return text_prompts(llm, args.prompts, args.num_prompts)


def summary(rounds: Sequence[Round], tokens: Sequence[TokenCost], cost: ModelCost, ceiling: Ceiling) -> dict[str, Any]:
    """Figures of one mode. `tokens` are what one round's decoded tokens needed, the same in every round."""
    one = rounds[0]
    seconds = median([one.seconds for one in rounds])
    output_tokens = sum(len(answer.exit_layers) for answer in one.answers)
    total_tokens = output_tokens + sum(answer.input_len for answer in one.answers)
    ops = sum(map(cost.token_ops, tokens)) + sum(prefill_ops(cost, answer.input_len) for answer in one.answers)
    kv = sum(map(cost.kv_positions, tokens))
    read = cost.step_bytes(one.blocks_run, one.heads_run, kv, cost.mean_head(tokens))
    steps = max(1, one.steps)  # 0 when every answer is one token long
    answers = [answer for one in rounds for answer in one.answers]
    return {
        "seconds": seconds,
        "requests_per_s": len(one.answers) / seconds,
        "output_tokens_per_s": output_tokens / seconds,
        "total_tokens_per_s": total_tokens / seconds,
        "latency_s": percentiles([answer.finish - answer.arrival for answer in answers]),
        "time_to_first_token_s": percentiles([answer.first_token - answer.arrival for answer in answers]),
        "output_tokens": output_tokens,
        "steps": one.steps,
        "rows_per_step": len(tokens) / steps,
        "preemptions": sum(one.preemptions for one in rounds),
        "mean_exit_layer": sum(token.exit_layer for token in tokens) / max(1, len(tokens)),
        "blocks_run": one.blocks_run,
        "blocks_full_depth": one.steps * cost.n_layers,
        "blocks_run_over_full_depth": one.blocks_run / (steps * cost.n_layers),
        "row_blocks_over_full_depth": one.row_blocks / max(1, len(tokens) * cost.n_layers),
        "heads_per_step": one.heads_run / steps,
        "bytes_per_step": read / steps,
        "decode_bandwidth_bound_s": read / ceiling.bandwidth,
        "arithmetic_bound_s": ops / ceiling.arithmetic,
        "share_of_arithmetic_bound": ops / ceiling.arithmetic / seconds,
        "rounds_s": [one.seconds for one in rounds],
        "compilations_while_timed": sum(one.compilations for one in rounds),
    }


def speedups(
    cost: ModelCost, early: Round, tokens: Sequence[TokenCost], modes: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """Measured and ideal speed-up of output tokens per second, and their quotient.

    The ideal compares the early-exit round with the same tokens at full depth, since answers that end by themselves may
    differ in length between the modes. It counts each row's own operations, prefill at full depth included.
    """
    prefill = sum(prefill_ops(cost, answer.input_len) for answer in early.answers)
    ideal = ideal_from_operations(cost, tokens, prefill)
    measured = modes["early_exit"]["output_tokens_per_s"] / modes["full_depth"]["output_tokens_per_s"]
    return {
        "ideal_speedup": ideal,
        "ideal_speedup_from": "operations of each row, prefill included",
        "measured_speedup": measured,
        "quotient": measured / ideal,
    }


def main(arguments: list[str]) -> None:
    """Run the benchmark."""
    args = parser().parse_args(arguments)
    chosen = ModelOptions.of(args)
    longest = None if args.prompts else args.input_len + args.output_len
    llm = chosen.build(max_model_len=longest, max_num_seqs=args.max_num_seqs)
    config = llm.config.model
    cost = ModelCost.of(config, dtype_of(llm).itemsize)
    exits = dict(zip(MODES, (None, early_exit_params(args, config)), strict=True))
    prompts = make_prompts(args, llm)
    fixed = args.prompts is None
    params = {
        mode: request_params(len(prompts), args.output_len, args.seed, exits[mode], ignore_eos=fixed) for mode in MODES
    }
    step_bytes = cost.step_bytes(cost.n_layers, 1, 0)
    before = Ceiling.measure(step_bytes, dtype_of(llm))
    rounds = run_interleaved(llm, prompts, params, args.num_iters_warmup, args.num_iters)

    tokens = {mode: token_costs(rounds[mode][0], config, exits[mode]) for mode in MODES}
    ceiling = before.better(Ceiling.measure(step_bytes, dtype_of(llm)))
    modes = {mode: summary(rounds[mode], tokens[mode], cost, ceiling) for mode in MODES}
    result = {
        "bench": "throughput",
        **machine.provenance(),
        "model": model_facts(llm, chosen.name, cost),
        "options": options_of(args),
        "machine": ceiling.to_dict(),
        "num_prompts": len(prompts),
        "modes": modes,
        **speedups(cost, rounds["early_exit"][0], tokens["early_exit"], modes),
    }
    _show(result)
    finish(result, args.output_json)


def _show(result: dict[str, Any]) -> None:
    modes, model, options = result["modes"], result["model"], result["options"]
    rows = [
        table_row("seconds for all", modes, "seconds"),
        table_row("requests/s", modes, "requests_per_s"),
        table_row("output tokens/s", modes, "output_tokens_per_s", digits=1),
        table_row("total tokens/s", modes, "total_tokens_per_s", digits=1),
        table_row("request latency, s (p50)", modes, "latency_s.p50"),
        table_row("request latency, s (p99)", modes, "latency_s.p99"),
        table_row("time to first token, s (p50)", modes, "time_to_first_token_s.p50"),
        table_row("output tokens", modes, "output_tokens", digits=0),
        table_row("decode steps", modes, "steps", digits=0),
        table_row("rows per step", modes, "rows_per_step"),
        table_row("preemptions", modes, "preemptions", digits=0),
        table_row("mean exit layer", modes, "mean_exit_layer"),
        table_row("blocks run / blocks at full depth", modes, "blocks_run_over_full_depth", digits=3),
        table_row("rows in blocks / rows at full depth", modes, "row_blocks_over_full_depth", digits=3),
        table_row("heads asked per step", modes, "heads_per_step"),
        table_row("MB read per step", modes, "bytes_per_step", unit=1e6, digits=1),
        table_row("bandwidth bound of decoding, s", modes, "decode_bandwidth_bound_s"),
        table_row("arithmetic bound of all, s", modes, "arithmetic_bound_s"),
        table_row("share of arithmetic bound", modes, "share_of_arithmetic_bound", digits=3),
    ]
    title = (
        f"throughput: {model['name']}, {model['dtype']}, {result['num_prompts']} prompts, at most "
        f"{options['max_num_seqs']} at once, {options['num_iters']} rounds each"
    )
    notes = [
        f"speed-up of output tokens/s: measured {result['measured_speedup']:.3f}, ideal {result['ideal_speedup']:.3f} "
        f"(from {result['ideal_speedup_from']}), quotient {result['quotient']:.3f}"
    ]
    show_table(title, modes, rows, notes, result["machine"])
