"""`bench exits`: its arithmetic on known answers and times, and dry runs on a tiny model. No time is asserted."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from bench import machine
from bench.__main__ import main
from bench.common import Ceiling
from bench.cost import ModelCost, TokenCost, ideal_from_bytes, ideal_from_operations, ideal_from_roofline
from bench.exits import command as exits
from bench.exits import settings
from bench.exits.frontier import best_settings, plot_frontier
from bench.exits.quality import HeldOut, Quality
from bench.exits.speed import Cell, compare, prompts_at, step_seconds
from bench.rounds import Answer, Round
from bench.shapes import shape
from eejax import ConfigError, EarlyExitParams, InvalidRequestError

CONFIG = shape("tiny")  # exits after 2 and 4 of 6 blocks
COST = ModelCost.of(CONFIG, 4)
CEILING = Ceiling(bandwidth=1e9, working_set=2**30, arithmetic=1e9)
LEAVES = EarlyExitParams(0.5)


def parsed(*flags: str):
    return exits.parser().parse_args(["--random", "tiny", *flags])


def test_settings_are_measures_times_thresholds() -> None:
    found = settings.settings_of(parsed("--measures", "margin,similarity", "--thresholds", "0.9,0.2"), CONFIG)
    assert [(one.measure, one.threshold) for one in found] == [
        ("margin", 0.2), ("margin", 0.9), ("similarity", 0.2), ("similarity", 0.9),
    ]  # fmt: skip
    # What this model has, each with a grid of its own; it has no probes.
    known = settings.settings_of(parsed(), CONFIG)
    assert {one.measure for one in known} == {"softmax", "margin", "similarity"}
    assert [one.threshold for one in known if one.measure == "margin"] == sorted(settings.GRIDS["margin"])
    [replay] = settings.settings_of(parsed("--replay", "0.7,0.2"), CONFIG)
    assert replay.measure == "random"
    assert replay.threshold == pytest.approx((0.3, 0.1))


@pytest.mark.parametrize(
    ("flags", "error", "message"),
    [
        (("--replay", "0.7,0.2", "--thresholds", "0.5"), ConfigError, "--thresholds"),
        (("--replay", "0.7,0.2", "--plot", "x.png"), ConfigError, "--plot"),
        (("--replay", "0.7"), InvalidRequestError, "1 thresholds"),
        (("--measures", "classifier"), InvalidRequestError, "probe"),
    ],
)
def test_settings_that_cannot_be(flags: tuple[str, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        settings.settings_of(parsed(*flags), CONFIG)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--random", "tiny", "--output-len", "300"], "300"),
        (["--random", "tiny", "--text", "some.txt", "--quality-prompts", "1"], "--text"),
        (["--model", "no/such/folder"], "no/such/folder"),
    ],
)
def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert main(["exits", *arguments]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.parametrize("flags", [["--batch-sizes", "0,8"], ["--measures", "random"], ["--batch-rule", "none"]])
def test_usage_errors(capsys: pytest.CaptureFixture[str], flags: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["exits", "--random", "tiny", *flags])
    assert stopped.value.code == 2
    assert flags[0] in capsys.readouterr().err


def test_every_batch_is_full() -> None:
    assert parsed("--batch-sizes", "8,1").batch_sizes == (1, 8)
    assert [prompts_at(batch, 8) for batch in (1, 3, 8, 32)] == [8, 9, 8, 32]


def one_round(seconds: float, *exit_layers: tuple[int, ...], ids: tuple[int, ...] = (1, 2, 3)) -> Round:
    """Answers that all have their first token after a second, and their last `seconds` later."""
    answers = tuple(Answer(5, layers, 0.0, 1.0, 1.0 + seconds, token_ids=ids) for layers in exit_layers)
    return Round(1.0 + seconds, answers, 0, 2, blocks_run=10, heads_run=4, row_blocks=9, fills=1, compilations=0)


def test_decoding_is_timed_over_all_batches() -> None:
    runs = [(one_round(2.0, (6, 6, 6)), one_round(4.0, (6, 6, 6))), (one_round(8.0, (6, 6, 6)),)]
    assert step_seconds(runs) == [1.5, 4.0]  # 6 s for 2 + 2 steps; 8 s for 2


def test_rules_are_compared_with_the_fastest_full_depth() -> None:
    full, early = (6, 6, 6), (6, 2, 4)
    runs = {
        Cell("rows", None, 1): [(one_round(s, full),) for s in (9.0, 6.0, 7.0)],
        Cell("rows", LEAVES, 1): [(one_round(4.0, early),)] * 3,
        Cell("all", None, 1): [(one_round(s, full),) for s in (5.0, 6.0, 1.0)],
        Cell("all", LEAVES, 1): [(one_round(2.5, early, ids=(1, 2, 9)),)] * 3,
        Cell("rows", None, 2): [(one_round(8.0, full, full),)],
        Cell("rows", LEAVES, 2): [(one_round(4.0, early, full),)],
    }
    llm: Any = SimpleNamespace(config=SimpleNamespace(model=CONFIG))
    found = compare({"rows": llm, "all": llm}, runs, COST, CEILING)
    assert found[1]["full_depth"]["rows"]["time_per_output_token_ms"] == 3500
    [leaves] = found[1]["early_exit"]
    tokens = [TokenCost(2, 6, (2,)), TokenCost(4, 7, (2, 4))]
    for rule, speedup in (("rows", 5 / 4), ("all", 5 / 2.5)):
        assert leaves[rule]["measured_speedup"] == pytest.approx(speedup)
        assert leaves[rule]["ideal_speedup"] == pytest.approx(ideal_from_bytes(COST, tokens))
        assert leaves[rule]["quotient"] == pytest.approx(speedup / ideal_from_bytes(COST, tokens))
    assert leaves["rows"]["mean_exit_layer"] == 3
    assert leaves["rows"]["output_tokens_per_s"] == pytest.approx(1 / 2)
    assert leaves["rows"]["blocks_run_over_full_depth"] == pytest.approx(10 / (2 * 6))
    assert leaves["rows"]["row_blocks_over_full_depth"] == pytest.approx(9 / (2 * 6))
    assert (leaves["rows"]["heads_per_step"], leaves["rows"]["fills_per_step"]) == (2, 0.5)
    pair = found[2]["early_exit"][0]["rows"]
    assert pair["measured_speedup"] == pytest.approx(8 / 4)
    tokens += [TokenCost(6, 6, (2, 4, 6)), TokenCost(6, 7, (2, 4, 6))]
    roofline = ideal_from_roofline(COST, tokens, 2, CEILING.bandwidth, CEILING.arithmetic)
    assert pair["ideal_speedup"] == pytest.approx(roofline)
    assert roofline < 0.99 * ideal_from_operations(COST, tokens)
    assert pair["quotient"] == pytest.approx(8 / 4 / roofline)
    assert pair["ideal_speedup_by_operations"] == pytest.approx(ideal_from_operations(COST, tokens))
    assert pair["output_tokens_per_s"] == pytest.approx(2 / 2)
    assert {batch: one["requests_that_differ"] for batch, one in found.items()} == {1: 1, 2: 0}


def output(answer: list[int], layers: list[int], prompt: tuple[int, ...] = (7, 8)) -> SimpleNamespace:
    first = SimpleNamespace(token_ids=tuple(answer), exit_layers=tuple(layers), text=" ".join(map(str, answer)))
    return SimpleNamespace(prompt_token_ids=prompt, outputs=[first], error=None)


class FakeLLM:
    """Answers as it is told; full depth chooses, behind every token, the token plus one, at a probability of 1/4."""

    tokenizer = None
    config = SimpleNamespace(model=CONFIG)

    def __init__(self, full: list, early: list) -> None:
        self.engine = SimpleNamespace(runner=self)
        self.answers = {True: full, False: early}
        self.asked: list[tuple] = []

    def generate(self, prompts: list, params: list, use_tqdm: bool) -> list:
        assert all(one.temperature == 0 and not one.ignore_eos for one in params)
        return self.answers[params[0].early_exit is None]

    def score(self, ids: list[int], start: int, thresholds: tuple = (), measure: str = "softmax") -> SimpleNamespace:
        self.asked.append((len(ids), start, thresholds, measure))
        return SimpleNamespace(choices=np.array(ids) + 1, logprobs=np.full(len(ids), -math.log(4), np.float32))


def test_quality_of_known_answers() -> None:
    full = [output([9, 10, 11, 12], [6] * 4), output([5], [6])]
    # Three decoded tokens: 21 is not what full depth says behind 9; 22 is what it says behind 21; 9 is not.
    early = [output([9, 21, 22, 9], [6, 2, 4, 4]), output([5], [6])]
    llm: Any = FakeLLM(full, early)
    text = HeldOut([np.arange(5), np.arange(9)], text_bytes=6)
    quality = Quality(llm, COST, [{"prompt_token_ids": [7, 8]}] * 2, max_tokens=4, seed=0, held_out=text)
    found = quality.of(LEAVES)
    assert (found["decoded_tokens"], found["mean_exit_layer"]) == (3, pytest.approx(10 / 3))
    assert found["share_at_exit"] == {"2": pytest.approx(1 / 3), "4": pytest.approx(2 / 3), "6": 0}
    assert found["agreement"] == pytest.approx((1 / 3 + 1) / 2)
    assert found["agreement_of_tokens"] == pytest.approx(1 / 3)
    assert found["rouge_l"] == pytest.approx((1 / 4 + 1) / 2)  # 9 alone is common to the first pair of four
    assert found["identical"] == 0.5
    assert found["bits_per_byte"] == pytest.approx((4 + 8) * 2 / 6)
    tokens = [TokenCost(2, 3, (2,)), TokenCost(4, 4, (2, 4)), TokenCost(4, 5, (2, 4))]
    assert found["ideal_speedup_alone"] == pytest.approx(ideal_from_bytes(COST, tokens))
    assert found["ideal_speedup_in_batch"] == pytest.approx(ideal_from_operations(COST, tokens))
    # Agreement is asked of full depth, bits per byte of the setting.
    assert llm.asked == [(6, 2, (), "softmax"), (3, 2, (), "softmax")] + [(n, 1, (0.5, 0.5), "softmax") for n in (5, 9)]
    itself = quality.of(None)
    assert (itself["agreement"], itself["rouge_l"], itself["identical"], itself["mean_exit_layer"]) == (1, 1, 1, 6)


def setting(threshold: float, agreement: float, rows: float, everyone: float) -> dict:
    speed = {"rows": {"measured_speedup": rows}, "all": {"measured_speedup": everyone}}
    name = {"label": f"softmax {threshold}", "measure": "softmax", "threshold": threshold}
    return {**name, "quality": {"agreement": agreement}, "speed": {1: speed}}


SETTINGS = [setting(0.3, 0.9, 2.0, 1.4), setting(0.5, 0.98, 1.5, 1.1), setting(0.9, 0.999, 1.2, 1.2)]


def test_the_best_setting_agrees_well_enough() -> None:
    best, other = (best_settings(SETTINGS, 1, rule) for rule in ("rows", "all"))
    name = {"label": "softmax 0.5", "measure": "softmax", "threshold": 0.5}
    assert best == {**name, "agreement": 0.98, "measured_speedup": 1.5}
    assert other is not None
    assert other["label"] == "softmax 0.9"
    assert best_settings(SETTINGS[:1], 1, "rows") is None
    assert best_settings([{**SETTINGS[2], "quality": None}], 1, "rows") is None


def test_the_frontier_is_drawn(tmp_path: Path) -> None:
    result = {"model": {"name": "tiny"}, "settings": SETTINGS, "full_depth": {"speed": {1: {}}}}
    plot_frontier(result, tmp_path / "new" / "frontier.png")
    assert (tmp_path / "new" / "frontier.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match="cannot write"):
        plot_frontier(result, tmp_path)


@pytest.fixture
def quick_ceiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure the ceilings on little data: what they come to does not matter here."""
    monkeypatch.setattr(machine, "GIB", 2**20)
    monkeypatch.setattr(machine, "ARITHMETIC_SIZE", 64)


DRY = ("--random=tiny", "--batch-sizes=2", "--num-iters=1")


def test_exits_beside_their_break_even_shares() -> None:
    """`tiny`: a block of 2,336 parameters, heads of 65 * 16."""
    first, second = exits.exits_of(CONFIG, LEAVES, {"2": 30, "4": 10, "6": 60})
    head = 65 * 16 / 2336
    assert first == {
        "layer": 2, "cost_in_blocks": pytest.approx(head), "break_even_share": pytest.approx(head / (4 + head)),
        "tokens_asked": 100, "tokens_left": 30, "share_left": 0.3,
    }  # fmt: skip
    assert (second["tokens_asked"], second["share_left"]) == (70, pytest.approx(1 / 7))
    assert second["break_even_share"] == pytest.approx(head / (2 + head))
    norm = 16 / 2336  # no logits to decide: the exit's matrix is asked where the token leaves, in place of the last
    similar = EarlyExitParams((0.5, 0.5), "similarity", exit_layers=(2, 4), min_layers=3)
    first, second = exits.exits_of(CONFIG, similar, {"2": 0, "4": 10, "6": 0})
    assert (first["tokens_asked"], first["share_left"]) == (0, None)
    assert (second["cost_in_blocks"], second["share_left"]) == (pytest.approx(norm), 1)
    assert second["break_even_share"] == pytest.approx(norm / (2 + norm))


@pytest.mark.usefixtures("quick_ceiling")
def test_a_dry_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    sizes = {"output-len": 6, "input-len": 5, "speed-prompts": 2, "quality-prompts": 2, "max-tokens": 6}
    flags = [*DRY, "--measures=similarity", "--thresholds=0,2", *(f"--{name}={size}" for name, size in sizes.items())]
    file, plot = tmp_path / "exits.json", tmp_path / "exits.png"
    assert main(["exits", *flags, "--output-json", str(file), "--plot", str(plot)]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert json.loads(file.read_text()) == found
    assert plot.exists()
    assert {"date", "cpu_model", "jax", "git_commit", "machine", "options"} <= found.keys()
    assert (found["options"]["random"], found["options"]["model"]) == ("tiny", None)
    always, never = found["settings"]
    assert always["quality"]["share_at_exit"] == {"2": 1, "4": 0, "6": 0}
    assert never["quality"]["share_at_exit"] == {"2": 0, "4": 0, "6": 1}
    # Two answers of six tokens, the first of which is prefill's.
    assert [(one["tokens_asked"], one["share_left"]) for one in always["exits"]] == [(10, 1), (0, None)]
    assert [one["tokens_asked"] for one in never["exits"]] == [0, 0]
    assert (never["quality"]["agreement"], never["quality"]["identical"]) == (1, 1)
    assert always["quality"]["agreement"] < 1
    assert found["full_depth"]["quality"]["mean_exit_layer"] == 6
    assert found["requests_that_differ"] == {"2": 0}
    assert found["best"]["2"]["all"]["threshold"] == 2
    assert set(found["full_depth"]["speed"]["2"]) == {"rows", "all"}
    for rule in ("rows", "all"):
        one = always["speed"]["2"][rule]
        assert (one["mean_exit_layer"], one["heads_per_step"]) == (2, 1)
        assert one["blocks_run_over_full_depth"] == pytest.approx(1 / 3, rel=1e-4)
        assert one["quotient"] == pytest.approx(one["measured_speedup"] / one["ideal_speedup"], rel=1e-4)
        assert one["compilations_while_timed"] == 0


@pytest.mark.usefixtures("quick_ceiling")
def test_a_dry_run_of_drawn_exits(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--replay=0.7,0.2", "--batch-rule=all", "--output-len=40", "--input-len=5")
    assert main(["exits", *DRY, *flags]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    [replay] = found["settings"]
    assert (replay["label"], replay["quality"], found["best"]) == ("replay 0.7, 0.2", None, None)
    assert set(replay["speed"]["2"]) == {"all"}
    one = replay["speed"]["2"]["all"]
    assert 2 < one["mean_exit_layer"] < 6
    left = [found["tokens_left"] for found in replay["exits"]]
    assert left == list(one["tokens_at_exit"].values())[:2]
    assert [found["tokens_asked"] for found in replay["exits"]] == [8 * 39, 8 * 39 - left[0]]
    # Nobody leaves a step of this rule before the last of its rows is resolved.
    assert one["row_blocks_over_full_depth"] == one["blocks_run_over_full_depth"] > one["mean_exit_layer"] / 6
