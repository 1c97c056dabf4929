"""The benchmarks' arithmetic on known numbers, and dry runs on a tiny model. No time is ever asserted."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from bench import common, latency, machine, throughput
from bench.__main__ import main
from bench.cost import (
    ModelCost,
    TokenCost,
    at_full_depth,
    decoded_tokens,
    heads_asked,
    ideal_from_bytes,
    ideal_from_operations,
    ideal_from_roofline,
    prefill_ops,
)
from bench.rounds import Answer, Round, request_params, run_round
from bench.shapes import shape
from eejax import ConfigError, EarlyExitParams, InvalidRequestError
from eejax.core import EngineOptions, ExitConfig, ModelConfig
from eejax.model.transformer import count_params, init_params

COST = ModelCost(
    n_layers=12,
    block_params=100,
    fill_params=10,
    head_params={4: 50, 8: 50, 12: 50},
    body_params={4: 5, 8: 5},
    kv_per_token=2,
    attention_ops=8,
    itemsize=4,
)
CEILING = common.Ceiling(bandwidth=1000.0, working_set=2**30, arithmetic=10_000.0)


def answer(*exit_layers: int, input_len: int = 5, first: float = 1.0, finish: float = 3.0) -> Answer:
    return Answer(input_len, exit_layers, arrival=0.0, first_token=first, finish=finish, token_ids=exit_layers)


def one_round(*answers: Answer, seconds: float = 4.0, steps: int = 2, blocks: int = 16, heads: int = 2) -> Round:
    return Round(seconds, answers, 0, steps, blocks, heads, row_blocks=blocks * len(answers), fills=0, compilations=0)


def test_costs_are_counted_from_the_real_parameters() -> None:
    for head, tied in (("shared", True), ("norm", False), ("mlp", True)):
        config = ModelConfig(
            vocab_size=20, hidden_size=8, intermediate_size=12, n_layers=3, n_heads=2, n_kv_heads=1, head_dim=4,
            exits=ExitConfig((1,), head, tied),  # pyright: ignore[reportArgumentType]
        )  # fmt: skip
        cost, params = ModelCost.of(config, 2), init_params(config)
        exits = count_params(params.get("exits", {}))
        # What is left out is the embedding (one row of it is read) and, with `shared`, counted twice the final norm.
        parts = 3 * cost.block_params + cost.head_params[3] + 20 * 8
        assert parts + exits == count_params(params)
        assert cost.head_params[1] == {"shared": 20 * 8 + 8, "norm": exits, "mlp": exits + 20 * 8}[head]
        assert (cost.fill_params, cost.kv_per_token, cost.attention_ops) == (2 * 4 * 8, 8, 32)


def test_token_costs_by_hand() -> None:
    token = TokenCost(exit_layer=4, context=7, heads=(4,))
    assert COST.token_bytes(token) == 4 * (4 * 100 + 4 * 7 * 2 + 50)
    assert COST.token_ops(token) == 4 * (200 + 7 * 8) + 100
    assert COST.fill_bytes(token) == 4 * 8 * 10
    assert COST.step_bytes(blocks=6.5, heads=1.5, kv_positions=70) == 4 * (650 + 75 + 140)
    assert prefill_ops(COST, 3) == 12 * (3 * 200 + (1 + 2 + 3) * 8) + 100
    assert at_full_depth([token], 12) == [TokenCost(12, 7, (12,))]


def test_heads_asked_on_the_way() -> None:
    points, limits = (4, 8, 12), (0.5, 0.5)
    assert heads_asked(points, limits, "softmax", 4) == (4,)
    assert heads_asked(points, limits, "margin", 12) == (4, 8, 12)
    assert heads_asked(points, (math.inf, 0.5), "softmax", 12) == (8, 12)
    assert heads_asked(points, (math.inf, math.inf), "softmax", 12) == (12,)
    for cheap in ("random", "similarity", "classifier"):
        assert heads_asked(points, limits, cheap, 12) == (12,)
        assert heads_asked(points, limits, cheap, 4) == (4,)


def test_decoded_tokens_leave_out_the_first() -> None:
    found = decoded_tokens((12, 4, 8), 5, (4, 8, 12), (0.5, 0.5), "softmax")
    assert found == [TokenCost(4, 6, (4,)), TokenCost(8, 7, (4, 8))]


def test_a_probe_is_asked_at_every_exit_before_the_last() -> None:
    limits = (0.5, math.inf)
    assert decoded_tokens((12, 4, 12), 5, (4, 8, 12), limits, "classifier") == [
        TokenCost(4, 6, (4,)),  # its head holds what the probe read
        TokenCost(12, 7, (12,), probes=(4,)),
    ]
    assert decoded_tokens((12, 12), 5, (4, 8, 12), limits, "similarity") == [TokenCost(12, 6, (12,))]
    token = TokenCost(12, 7, (12,), probes=(4, 8))
    assert COST.token_ops(token) == 12 * (200 + 7 * 8) + 2 * (50 + 5 + 5)
    assert COST.token_bytes(token) == 4 * (12 * (100 + 7 * 2) + 50 + 5 + 5)


def test_ideal_speedups_by_hand() -> None:
    tokens = [TokenCost(4, 10, (4,)), TokenCost(12, 10, (4, 8, 12))]
    full = 2 * (12 * 120 + 50)
    assert ideal_from_bytes(COST, tokens) == pytest.approx(full / (4 * 120 + 50 + 12 * 120 + 150))
    full = 2 * (12 * 280 + 100)
    early = 4 * 280 + 100 + 12 * 280 + 300
    assert ideal_from_operations(COST, tokens) == pytest.approx(full / early)
    assert ideal_from_operations(COST, tokens, extra=1000) == pytest.approx((full + 1000) / (early + 1000))
    assert ideal_from_bytes(COST, at_full_depth(tokens, 12)) == 1.0


def test_latency_figures_on_known_times() -> None:
    rounds = [one_round(answer(12, 4, 12, finish=1.0 + t)) for t in (2.0, 4.0, 9.0)]
    tokens = decoded_tokens((12, 4, 12), 5, (4, 8, 12), (0.5, 0.5), "random")
    found = latency.summary(rounds, tokens, COST, CEILING, batch_size=1)
    assert found["time_per_output_token_ms"]["p50"] == pytest.approx(2000)  # 4 s, two steps
    assert found["time_to_first_token_ms"]["p50"] == pytest.approx(1000)
    assert found["output_tokens_per_s"] == pytest.approx(0.5)
    assert (found["mean_exit_layer"], found["blocks_per_step"], found["heads_per_step"]) == (8, 8, 1)
    assert found["blocks_run_over_full_depth"] == pytest.approx(8 / 12)
    by_hand = 4 * (8 * 100 + 1 * 50 + 2 * (4 * 6 + 12 * 7) / 2)
    assert found["bytes_per_step"] == pytest.approx(by_hand)
    assert found["share_of_bandwidth_bound"] == pytest.approx(by_hand / 1000 / 2)
    assert found["row_blocks_over_full_depth"] == pytest.approx(16 / (2 * 12))
    assert found["operations_per_step"] == sum(map(COST.token_ops, tokens)) / 2


def test_a_mode_beside_the_bandwidth_over_its_own_bytes() -> None:
    mode = {"bytes_per_step": 3e9, "time_per_output_token_ms": {"p50": 2000.0}}
    found = latency.at_own_bandwidth(mode, rate=2e9)
    assert found == {"own_bandwidth_gb_s": 2.0, "share_of_own_bandwidth_bound": pytest.approx(0.75)}


def test_decode_window_of_a_batch() -> None:
    one = one_round(answer(12, 12, first=1.0, finish=5.0), answer(12, 12, first=2.0, finish=4.0))
    assert latency.decode_window(one) == (2.0, 3.0)


def test_quotient_of_known_times() -> None:
    tokens = [TokenCost(4, 10, (4,)), TokenCost(12, 10, (12,))]
    ideal = 2 * (12 * 120 + 50) / (16 * 120 + 100)
    found = latency.speedups(COST, tokens, CEILING, 1, full=6.0, early=5.0)
    assert found["ideal_speedup"] == pytest.approx(ideal)
    assert found["measured_speedup"] == pytest.approx(1.2)
    assert found["quotient"] == pytest.approx(1.2 / ideal)
    assert found["fill_in_share_of_full_depth_bytes"] == pytest.approx(8 * 10 / (2 * (12 * 120 + 50)))
    assert found["ideal_speedup_by_operations"] is None
    batch = latency.speedups(COST, tokens, CEILING, 2, full=6.0, early=5.0)
    roofline = ideal_from_roofline(COST, tokens, 2, bandwidth=1000.0, rate=10_000.0)
    assert 1 < roofline < ideal_from_operations(COST, tokens)  # two rows share the weights that they read
    assert batch["ideal_speedup"] == pytest.approx(roofline)
    assert batch["ideal_speedup_from"].startswith("roofline")
    assert batch["ideal_speedup_by_operations"] == pytest.approx(ideal_from_operations(COST, tokens))
    assert batch["quotient"] == pytest.approx(1.2 / roofline)
    assert batch["fill_in_share_of_full_depth_bytes"] is None


def test_throughput_figures_on_known_times() -> None:
    answers = (answer(12, 4, 12), answer(12, 12, input_len=7, finish=2.0))
    rounds = [one_round(*answers, seconds=seconds, blocks=20) for seconds in (1.0, 5.0, 2.0)]
    tokens = [TokenCost(4, 6, (4,)), TokenCost(12, 7, (12,)), TokenCost(12, 8, (12,))]
    found = throughput.summary(rounds, tokens, COST, CEILING)
    assert (found["requests_per_s"], found["output_tokens_per_s"], found["total_tokens_per_s"]) == (1.0, 2.5, 8.5)
    assert (found["rows_per_step"], found["blocks_full_depth"], found["output_tokens"]) == (1.5, 24, 5)
    assert found["row_blocks_over_full_depth"] == pytest.approx(40 / (3 * 12))
    ops = sum(map(COST.token_ops, tokens)) + prefill_ops(COST, 5) + prefill_ops(COST, 7)
    assert found["arithmetic_bound_s"] == pytest.approx(ops / 10_000)
    assert found["latency_s"]["p50"] == pytest.approx(2.5)
    modes = {"full_depth": {"output_tokens_per_s": 2.0}, "early_exit": found}
    ratio = throughput.speedups(COST, rounds[0], tokens, modes)
    assert ratio["measured_speedup"] == pytest.approx(1.25)
    prefill = prefill_ops(COST, 5) + prefill_ops(COST, 7)
    assert ratio["quotient"] == pytest.approx(1.25 / ideal_from_operations(COST, tokens, prefill))


def test_replay_thresholds_are_cumulative() -> None:
    found = common.replay_params((0.7, 0.2))
    assert found.measure == "random"
    assert found.threshold == pytest.approx((0.3, 0.1))
    assert common.replay_params((0.7, 0.2, 0.1)).threshold == pytest.approx((0.3, 0.1, 0.0))
    assert common.replay_params((0.0, 1.0)).threshold == (1.0, 0.0)
    for bad in ((0.7, 0.4), (-0.1, 0.5), (math.nan,)):
        with pytest.raises(ConfigError, match="--replay"):
            common.replay_params(bad)


def test_replay_follows_the_distribution_asked_for() -> None:
    args = latency.parser().parse_args(["--random", "tiny", "--replay", "0.7,0.2", "--batch-size", "16"])
    llm = common.ModelOptions.of(args).build(max_model_len=80, max_num_seqs=16)
    config = llm.config.model
    assert config.exit_points == (2, 4, 6)
    prompts = common.random_prompts(16, 8, config.vocab_size, seed=0)
    one = run_round(llm, prompts, request_params(16, 65, 0, common.early_exit_params(args, config), ignore_eos=True))
    layers = [layer for found in one.answers for layer in found.exit_layers[1:]]
    assert len(layers) == 16 * 64
    for depth, share in ((2, 0.7), (4, 0.2), (6, 0.1)):
        sampling_error = math.sqrt(share * (1 - share) / len(layers))
        assert abs(layers.count(depth) / len(layers) - share) < 4 * sampling_error
    # Rows draw for themselves: otherwise all of a step's rows would leave together.
    by_step = np.array([found.exit_layers[1:] for found in one.answers])
    assert (by_step.min(axis=0) < by_step.max(axis=0)).any()


def test_early_exit_options() -> None:
    def chosen(*flags: str) -> EarlyExitParams:
        args = latency.parser().parse_args(["--random", "tiny", *flags])
        return common.early_exit_params(args, shape("tiny", args.exit_layers))

    assert chosen() == EarlyExitParams(0.9, "softmax")
    assert chosen("--threshold", "0.5", "--measure", "margin") == EarlyExitParams(0.5, "margin")
    assert chosen("--threshold", "0.5,0.6") == EarlyExitParams((0.5, 0.6))
    assert chosen("--replay", "0.1,0.2,0.3", "--exit-layers", "1,2,3").measure == "random"
    with pytest.raises(InvalidRequestError, match=r"1 thresholds .* 2 exits"):
        chosen("--replay", "0.5")
    with pytest.raises(ConfigError, match="--replay"):
        chosen("--replay", "0.5,0.2", "--threshold", "0.5")
    with pytest.raises(ConfigError, match="do not exist"):
        chosen("--exit-layers", "2,6")


def test_engine_options() -> None:
    def chosen(*flags: str) -> common.ModelOptions:
        return common.ModelOptions.of(throughput.parser().parse_args(["--random", "tiny", *flags]))

    assert chosen().engine == EngineOptions()
    flags = "--compaction never --fill deferred --rebatching always --page-size 16 --seed 3".split()  # noqa: SIM905
    asked = chosen(*flags)
    assert asked.engine == EngineOptions(compaction="never", fill="deferred", rebatching="always", page_size=16, seed=3)
    config = asked.build(max_model_len=16, max_num_seqs=1).config
    assert (config.decode, config.cache.page_size, config.seed) == (asked.engine.decode_config, 16, 3)
    with pytest.raises(SystemExit):
        chosen("--fill", "late")


def test_random_prompts_are_seeded() -> None:
    one, same, other = (common.random_prompts(2, 50, 64, seed) for seed in (1, 1, 2))
    assert one == same
    assert one != other
    ids = [i for prompt in one for i in prompt["prompt_token_ids"]]
    assert len(ids) == 100
    assert min(ids) >= 3
    assert max(ids) < 64


def test_bandwidth_is_bytes_over_the_best_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(float(i) for i in range(1000))
    monkeypatch.setattr(machine, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    size = 4 * machine.COLUMNS * 10
    assert machine.read_bandwidth(size, repeats=2) == size  # every pass takes one second of this clock


def bench_output(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[dict, str]:
    """The result, and what was printed before it."""
    assert main([str(one) for one in arguments]) == 0
    *shown, result = capsys.readouterr().out.splitlines()
    return json.loads(result), "\n".join(shown)


def run_bench(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict:
    return bench_output(capsys, *arguments)[0]


@pytest.fixture(autouse=True)
def quick_ceiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure the ceilings on little data: what they come to does not matter here."""
    monkeypatch.setattr(machine, "GIB", 2**20)
    monkeypatch.setattr(machine, "ARITHMETIC_SIZE", 64)


DRY = ("--random", "tiny", "--replay", "0.7,0.2", "--num-iters", 2, "--num-iters-warmup", 1, "--seed", 3)


@pytest.mark.parametrize("batch", [1, 3])
def test_latency_dry_run(capsys: pytest.CaptureFixture[str], tmp_path: Path, batch: int) -> None:
    file = tmp_path / "new" / "latency.json"
    sizes = ("--input-len", 9, "--output-len", 24, "--batch-size", batch)
    found, shown = bench_output(capsys, "latency", *DRY, *sizes, "--output-json", file)
    assert json.loads(file.read_text()) == found
    assert {"date", "device", "cpu_model", "jax", "git_commit", "machine", "options"} <= found.keys()
    assert found["model"]["exit_layers"] == [2, 4]
    full, early = found["modes"]["full_depth"], found["modes"]["early_exit"]
    assert (full["mean_exit_layer"], full["blocks_run_over_full_depth"], full["heads_per_step"]) == (6, 1, 1)
    assert early["mean_exit_layer"] < 6
    assert early["heads_per_step"] == 1  # a replayed exit asks no head but the last
    assert early["blocks_per_step"] >= early["mean_exit_layer"] - 1e-4
    if batch == 1:
        assert early["blocks_per_step"] == pytest.approx(early["mean_exit_layer"])
        assert (found["ideal_speedup_by_operations"], "by operations alone" in shown) == (None, False)
    else:
        assert found["ideal_speedup_from"].startswith("roofline")
        assert f"by operations alone {found['ideal_speedup_by_operations']:.3f}" in shown
    assert found["ideal_speedup"] > 1
    assert found["quotient"] == pytest.approx(found["measured_speedup"] / found["ideal_speedup"], rel=1e-4)
    assert len(early["rounds_ms_per_token"]) == 2
    assert full["compilations_while_timed"] == early["compilations_while_timed"] == 0


def test_latency_counts_the_heads_of_real_measures(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--random", "tiny", "--threshold", "1.0", "--num-iters", 1, "--num-iters-warmup", 1, "--output-len", 5)
    found = run_bench(capsys, "latency", *flags)
    assert found["modes"]["early_exit"]["mean_exit_layer"] == 6
    assert found["modes"]["early_exit"]["heads_per_step"] == 3
    assert found["ideal_speedup"] < 1  # two heads more, nothing saved


def test_throughput_dry_run(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ("--num-prompts", 5, "--input-len", 9, "--output-len", 12, "--max-num-seqs", 2)
    found = run_bench(capsys, "throughput", *DRY, *sizes)
    full, early = found["modes"]["full_depth"], found["modes"]["early_exit"]
    assert found["num_prompts"] == 5
    assert full["output_tokens"] == early["output_tokens"] == 60
    assert full["blocks_run"] == full["blocks_full_depth"] == 6 * full["steps"]
    assert early["blocks_run"] < early["blocks_full_depth"]
    assert 1 < full["rows_per_step"] <= 2
    assert full["total_tokens_per_s"] == pytest.approx(full["output_tokens_per_s"] * 105 / 60, rel=1e-4)
    assert found["quotient"] == pytest.approx(found["measured_speedup"] / found["ideal_speedup"], rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "no benchmark 'nothing'"),
        (["latency", "--random", "tiny", "--replay", "0.9,0.2"], "--replay"),
        (["latency", "--model", "no/such/folder"], "no/such/folder"),
        (["throughput", "--random", "tiny", "--prompts", "no/such/file"], "--model"),
        (["throughput", "--random", "tiny", "--exit-layers", "9"], "9"),
    ],
)
def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert main(arguments) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.parametrize(
    "arguments",
    [["--random", "llama-9t"], ["--random", "tiny", "--batch-size", "0"], ["--random", "tiny", "--replay", "x"], []],
)
def test_usage_errors(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["latency", *arguments])
    assert stopped.value.code == 2
    assert "usage" in capsys.readouterr().err
