"""Latency of one batch: `python -m bench latency --random llama-125m --replay 0.7,0.2`.

The same batch is answered at full depth and with early exit, in turn, in one process; figures are medians over the
rounds. Prefill (at full depth in both) and decoding are timed apart: time to first token ends where the last request of
the batch has its first token, and decoding lasts from there to the last token, `output_len - 1` steps later.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
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
)
from bench.cost import (
    ModelCost,
    TokenCost,
    at_full_depth,
    ideal_from_bytes,
    ideal_from_operations,
    ideal_from_roofline,
)
from bench.rounds import MODES, Round, request_params, run_interleaved, token_costs

FROM_BYTES = "bytes of a token's blocks, heads and KV"
FROM_ROOFLINE = "roofline: for each segment and head the larger of bytes and operations, at the measured rates"
"""Where the ideal speed-up comes from, alone and in a batch."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = new_parser("latency", __doc__)
    add_decode_options(found)
    found.add_argument("--input-len", type=at_least(1), default=32, help="prompt tokens (%(default)s)")
    found.add_argument("--output-len", type=at_least(2), default=128, help="answer tokens (%(default)s)")
    found.add_argument("--batch-size", type=at_least(1), default=1, help="requests at once (%(default)s)")
    found.add_argument("--num-iters-warmup", type=at_least(1), default=2, help="untimed rounds (%(default)s)")
    found.add_argument("--num-iters", type=at_least(1), default=5, help="timed rounds of each mode (%(default)s)")
    return found


def decode_window(one: Round) -> tuple[float, float]:
    """Seconds from the first arrival to the batch's last first token, and from there to its last token."""
    first = max(answer.first_token for answer in one.answers)
    last = max(answer.finish for answer in one.answers)
    return first - min(answer.arrival for answer in one.answers), last - first


def summary(
    rounds: Sequence[Round], tokens: Sequence[TokenCost], cost: ModelCost, ceiling: Ceiling, batch_size: int
) -> dict[str, Any]:
    """Figures of one mode. `tokens` are what one round's decoded tokens needed, the same in every round."""
    steps = len(tokens) // batch_size
    windows = [decode_window(one) for one in rounds]
    step_times = [decode / steps for _, decode in windows]
    step = median(step_times)
    blocks, heads = rounds[0].blocks_run / rounds[0].steps, rounds[0].heads_run / rounds[0].steps
    kv = sum(map(cost.kv_positions, tokens)) / steps
    step_bytes = cost.step_bytes(blocks, heads, kv, cost.mean_head(tokens))
    step_ops = sum(cost.token_ops(token) for token in tokens) / steps
    return {
        "latency_ms": percentiles([one.seconds for one in rounds], 1e3),
        "time_to_first_token_ms": percentiles([first for first, _ in windows], 1e3),
        "time_per_output_token_ms": percentiles(step_times, 1e3),
        "output_tokens_per_s": batch_size / step,
        "mean_exit_layer": sum(token.exit_layer for token in tokens) / len(tokens),
        "blocks_per_step": blocks,
        "blocks_run_over_full_depth": blocks / cost.n_layers,
        "row_blocks_over_full_depth": rounds[0].row_blocks / (len(tokens) * cost.n_layers),
        "heads_per_step": heads,
        "bytes_per_step": step_bytes,
        "operations_per_step": step_ops,
        "bandwidth_bound_ms": 1e3 * step_bytes / ceiling.bandwidth,
        "share_of_bandwidth_bound": step_bytes / ceiling.bandwidth / step,
        "arithmetic_bound_ms": 1e3 * step_ops / ceiling.arithmetic,
        "share_of_arithmetic_bound": step_ops / ceiling.arithmetic / step,
        "rounds_ms_per_token": [1e3 * seconds for seconds in step_times],
        "compilations_while_timed": sum(one.compilations for one in rounds),
    }


def speedups(
    cost: ModelCost, tokens: Sequence[TokenCost], ceiling: Ceiling, batch_size: int, full: float, early: float
) -> dict[str, Any]:
    """Measured and ideal speed-up of decoding, and their quotient.

    Args:
        tokens: what the early-exit round's tokens needed.
        ceiling: rates of the ideal of a batch.
        full, early: time of a step in each mode, in any unit.
    """
    alone = batch_size == 1
    if alone:
        ideal = ideal_from_bytes(cost, tokens)
    else:
        ideal = ideal_from_roofline(cost, tokens, batch_size, ceiling.bandwidth, ceiling.arithmetic)
    whole = sum(cost.token_bytes(token) for token in at_full_depth(tokens, cost.n_layers))
    return {
        "ideal_speedup": ideal,
        "ideal_speedup_from": FROM_BYTES if alone else FROM_ROOFLINE,
        # Where arithmetic would limit every part of a step.
        "ideal_speedup_by_operations": None if alone else ideal_from_operations(cost, tokens),
        "measured_speedup": full / early,
        "quotient": full / early / ideal,
        # In a batch, fill-in is a by-product of the blocks that other rows run.
        "fill_in_share_of_full_depth_bytes": sum(map(cost.fill_bytes, tokens)) / whole if alone else None,
    }


def at_own_bandwidth(mode: dict[str, Any], rate: float) -> dict[str, float]:
    """A mode beside `rate`, bytes per second over a working set as large as its own step's.

    A step that reads less may find more of it in the last-level cache, so the two modes' rates differ.
    """
    bound = mode["bytes_per_step"] / rate
    return {
        "own_bandwidth_gb_s": rate / 1e9,
        "share_of_own_bandwidth_bound": 1e3 * bound / mode["time_per_output_token_ms"]["p50"],
    }


def main(arguments: list[str]) -> None:
    """Run the benchmark."""
    args = parser().parse_args(arguments)
    chosen, batch = ModelOptions.of(args), args.batch_size
    llm = chosen.build(max_model_len=args.input_len + args.output_len, max_num_seqs=batch)
    config = llm.config.model
    cost = ModelCost.of(config, dtype_of(llm).itemsize)
    exits = dict(zip(MODES, (None, early_exit_params(args, config)), strict=True))
    params = {mode: request_params(batch, args.output_len, args.seed, exits[mode], ignore_eos=True) for mode in MODES}
    prompts = random_prompts(batch, args.input_len, config.vocab_size, args.seed)
    context = args.input_len + args.output_len // 2
    typical = TokenCost(cost.n_layers, context, (cost.n_layers,))
    step_bytes = cost.step_bytes(cost.n_layers, 1, batch * cost.kv_positions(typical))
    before = Ceiling.measure(step_bytes, dtype_of(llm))
    rounds = run_interleaved(llm, prompts, params, args.num_iters_warmup, args.num_iters)

    tokens = {mode: token_costs(rounds[mode][0], config, exits[mode]) for mode in MODES}
    ceiling = before.better(Ceiling.measure(step_bytes, dtype_of(llm)))
    modes = {mode: summary(rounds[mode], tokens[mode], cost, ceiling, batch) for mode in MODES}
    for found in modes.values():
        rate = machine.read_bandwidth(max(2**20, round(found["bytes_per_step"])), dtype_of(llm).name)
        found.update(at_own_bandwidth(found, rate))
    full, early = (modes[mode]["time_per_output_token_ms"]["p50"] for mode in MODES)
    result = {
        "bench": "latency",
        **machine.provenance(),
        "model": model_facts(llm, chosen.name, cost),
        "options": options_of(args),
        "machine": ceiling.to_dict(),
        "modes": modes,
        **speedups(cost, tokens["early_exit"], ceiling, batch, full, early),
    }
    _show(result)
    finish(result, args.output_json)


def _show(result: dict[str, Any]) -> None:
    modes, model, options = result["modes"], result["model"], result["options"]
    rows = [
        table_row("latency, ms (p50)", modes, "latency_ms.p50", digits=1),
        table_row("time to first token, ms (p50)", modes, "time_to_first_token_ms.p50", digits=1),
        table_row("time per output token, ms (p50)", modes, "time_per_output_token_ms.p50"),
        table_row("time per output token, ms (p90)", modes, "time_per_output_token_ms.p90"),
        table_row("time per output token, ms (p99)", modes, "time_per_output_token_ms.p99"),
        table_row("output tokens/s while decoding", modes, "output_tokens_per_s", digits=1),
        table_row("mean exit layer", modes, "mean_exit_layer"),
        table_row("blocks run / blocks at full depth", modes, "blocks_run_over_full_depth", digits=3),
        table_row("rows in blocks / rows at full depth", modes, "row_blocks_over_full_depth", digits=3),
        table_row("heads asked per step", modes, "heads_per_step"),
        table_row("MB read per step", modes, "bytes_per_step", unit=1e6, digits=1),
        table_row("bandwidth bound, ms per token", modes, "bandwidth_bound_ms"),
        table_row("share of bandwidth bound", modes, "share_of_bandwidth_bound", digits=3),
        table_row("bandwidth over that many bytes, GB/s", modes, "own_bandwidth_gb_s", digits=1),
        table_row("share of the bound by that", modes, "share_of_own_bandwidth_bound", digits=3),
        table_row("arithmetic bound, ms per token", modes, "arithmetic_bound_ms"),
    ]
    title = (
        f"latency: {model['name']}, {model['dtype']}, batch {options['batch_size']}, {options['input_len']} tokens in, "
        f"{options['output_len']} out, {options['num_iters']} rounds each"
    )
    operations = result["ideal_speedup_by_operations"]
    limit = "" if operations is None else f"; by operations alone {operations:.3f}"
    notes = [
        f"speed-up while decoding: measured {result['measured_speedup']:.3f}, ideal {result['ideal_speedup']:.3f} "
        f"(from {result['ideal_speedup_from']}{limit}), quotient {result['quotient']:.3f}"
    ]
    if options["batch_size"] == 1:
        shares = [mode["share_of_own_bandwidth_bound"] for mode in modes.values()]
        notes.append(f"quotient by the bandwidth over each mode's own bytes: {shares[1] / shares[0]:.3f}")
    fill = result["fill_in_share_of_full_depth_bytes"]
    if fill is not None:
        notes.append(f"fill-in of skipped blocks, not part of the ideal: {fill:.3f} of the bytes at full depth")
    show_table(title, modes, rows, notes, result["machine"])
