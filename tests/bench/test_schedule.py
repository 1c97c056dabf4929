"""`bench schedule` and `bench simulate` on a tiny model: what is counted, compared and written. No time is asserted."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import pytest

from bench import schedule
from bench import simulate as simulate_command
from bench.__main__ import main
from bench.drive import answer_all
from bench.schedule import parser, poisson, rates, words
from bench.schedule_rows import COLUMNS
from bench.schedule_setup import REGIMES, ROWS, Bench, parsed
from bench.simulate import Machine, from_json, known_requests, run, to_json
from bench.simulator import SimulatedRequest
from bench.step_model import DecodeCall, StepModel
from eejax.core.errors import ConfigError
from eejax.core.lengths import LengthEstimate

TINY = (
    "--random", "tiny", "--num-prompts", "12", "--max-tokens", "40", "--max-num-seqs", "4", "--vbs-num-seqs", "4",
    "--page-size", "8", "--exit-layers", "3", "--replay", "0.6", "--num-iters", "1",
    "--num-iters-warmup", "0", "--num-pages", "22",
)  # fmt: skip
COST = StepModel(0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0)


@pytest.fixture(scope="module")
def bench() -> Bench:
    made = Bench(parsed(parser(), list(TINY)))
    made.learn_answers()
    return made


@pytest.fixture
def reused(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands take the engine that is there, which spares loading the programs again."""

    def again(args: argparse.Namespace) -> Bench:
        monkeypatch.setattr(bench, "args", args)
        return bench

    monkeypatch.setattr(schedule, "Bench", again)
    monkeypatch.setattr(simulate_command, "Bench", again)


def last_line(text: str) -> dict:
    return json.loads(text.splitlines()[-1])


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("name", ["static", "static_oracle", "paper", "fcfs", "length_oracle"])
def test_the_simulator_counts_as_the_engine_does(bench: Bench, name: str, regime: str) -> None:
    """Policies that no clock influences decide the same over a real device and a simulated one."""
    real = bench.run(ROWS[name], regime, "full_depth").outcome
    compacts = bench.engine.runner.compacts
    on = Machine(COST, 4, 4, bench.num_pages[regime], 8, bench.llm.config.model.exit_points, 256, compacts)
    virtual = run(name, known_requests(bench, "full_depth"), on, 0.75)
    counts = ["prompt_tokens", "prefilled", "answer_tokens", "produced", "num_pages"]
    if not name.startswith("length"):  # whose chunks and splits follow the measured steps
        counts += ["steps", "row_steps", "preemptions", "parkings"]
    assert [getattr(real, one) for one in counts] == [getattr(virtual, one) for one in counts]
    assert bench.differing == {"full_depth": set(), "early_exit": set()}


def test_calls_are_noted_with_their_steps_rows_and_depth(bench: Bench) -> None:
    one = bench.run(ROWS["fcfs"], "roomy", "early_exit")
    decodes = [call for call in one.calls if isinstance(call, DecodeCall)]
    assert sum(call.steps for call in decodes) == one.outcome.steps
    assert sum(call.row_depth for call in decodes) <= one.outcome.row_steps
    assert all(call.depth <= call.row_depth <= 4 * call.depth for call in decodes)
    assert all(call.row_heads >= call.steps for call in decodes)
    assert all(0 < call.depth <= call.steps and call.seconds > 0 for call in decodes)
    assert sum(call.depth for call in decodes) < one.outcome.steps
    assert "run" not in vars(bench.engine.runner)
    on = Machine(COST, 4, 4, bench.num_pages["roomy"], 8, bench.llm.config.model.exit_points, 256)
    assert run("fcfs", known_requests(bench, "early_exit"), on, 0.75).steps == one.outcome.steps


def test_tokens_that_differ_are_counted(bench: Bench) -> None:
    kept = bench.reference["full_depth"]
    wrong = replace(kept.outputs[5], token_ids=(*kept.outputs[5].token_ids[:-1], 63))
    bench.reference["full_depth"] = replace(kept, outputs=(*kept.outputs[:5], wrong, *kept.outputs[6:]))
    try:
        bench.run(ROWS["fcfs"], "roomy", "full_depth")
        assert bench.differing == {"full_depth": {5}, "early_exit": set()}
    finally:
        bench.reference["full_depth"] = kept
        bench.differing["full_depth"].clear()


def test_requests_are_submitted_when_they_arrive(bench: Bench) -> None:
    bench.engine.reschedule(bench.llm.config.scheduler)
    prompts, params = bench.requests("full_depth")
    waiting = []
    add = bench.engine.add_request
    bench.engine.add_request = lambda *a, **k: (waiting.append(bench.engine.has_unfinished), add(*a, **k))[1]
    try:
        found = answer_all(bench.engine, prompts[:3], params[:3], [0.0, 30e-3, 0.5])
    finally:
        del bench.engine.add_request
    assert len(waiting) == 3 and waiting[0] is False
    assert found.outcome.seconds >= 0.5
    assert min(found.outcome.first_tokens) > 0


def test_poisson_arrivals_are_seeded_and_have_their_rate() -> None:
    times = poisson(4000, 20.0, seed=3)
    assert times == poisson(4000, 20.0, seed=3) != poisson(4000, 20.0, seed=4)
    assert times[0] == 0 and times == sorted(times)
    assert times[-1] / 3999 == pytest.approx(1 / 20, rel=0.05)


def test_options_are_checked() -> None:
    assert rates("none") == () and rates("0.5,2") == (0.5, 2.0)
    for text in ("0", "-1,2", "fast", "inf", ""):
        with pytest.raises(argparse.ArgumentTypeError, match=r"numbers above 0"):
            rates(text)
    with pytest.raises(argparse.ArgumentTypeError, match=r"fifo is not among static"):
        words(list(ROWS))("fcfs,fifo")
    args = parsed(parser(), ["--num-prompts", "3"])
    assert (args.model, args.threshold, args.max_tokens) == ("checkpoints/demo", (0.5,), 512)
    assert parsed(parser(), ["--random=tiny", "--replay", "0.5,0.5"]).threshold is None


def test_rows_need_their_predictors(bench: Bench) -> None:
    names = list(bench.rows())
    assert "length_oracle" in names and "length_constant" in names
    assert not {"length_prompt", "length_hidden", "length_perception"} & set(names)
    with pytest.raises(ConfigError, match=r"train-length"):
        bench.predictor(ROWS["length_prompt"], "full_depth")


@pytest.mark.usefixtures("reused")
def test_schedule_prints_tables_and_json_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schedule", *TINY, "--rows", "length_hidden"]) == 2
    rows = ["static", "paper", "fcfs", "length_constant", "length_oracle"]
    files = ["--output-json", str(tmp_path / "a" / "r.json"), "--plot", str(tmp_path / "b" / "r.png")]
    assert main(["schedule", *TINY, "--rows", ",".join(rows), "--rates", "1.5", *files]) == 0
    out = capsys.readouterr().out
    result = last_line(out)
    assert result == last_line((tmp_path / "a" / "r.json").read_text())
    assert result["requests_that_differ"] == {"full_depth": 0, "early_exit": 0}
    assert result["compilations_while_timed"] == 0
    assert result["regimes"]["limited"]["num_pages"] == 22 < result["regimes"]["roomy"]["num_pages"]
    for regime in REGIMES:
        for mode, found in result["regimes"][regime]["modes"].items():
            assert list(found) == rows
            assert all(key in row for row in found.values() for key, _, _ in COLUMNS)
            assert found["static"]["requests_per_s_over_static"] == found["fcfs"]["latency_mean_over_fcfs"] == 1
            assert all(row["tokens_per_s"] > 0 and row["wasted_row_steps"] < 1 for row in found.values())
            assert result["ceiling"][mode]["decode_tokens_per_s"] > 0
    assert (result["arriving"]["regime"], result["arriving"]["mode"]) == ("limited", "full_depth")
    assert set(result["arriving"]["rates"]["1.5"]["rows"]) == set(rows)
    assert "req/s" in out and "12 requests at once, roomy" in out and "1.5 of fcfs at once" in out
    image = (tmp_path / "b" / "r.png").read_bytes()
    assert image.startswith(b"\x89PNG") and len(image) < 200_000


@pytest.mark.usefixtures("reused")
def test_simulate_fits_checks_and_goes_on_from_its_own_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(simulate_command, "FLEET_SLOTS", 8)
    stored, again, plot = tmp_path / "one.json", tmp_path / "two.json", tmp_path / "one.png"
    small = ["--queues", "20"]
    assert main(["simulate", *TINY, *small, "--fit", "--output-json", str(stored), "--plot", str(plot)]) == 0
    out = capsys.readouterr().out
    result = last_line(out)
    assert "simulated beside measured" in out and "20 requests at once, 8 slots" in out
    check = result["check"]["rows"]
    assert set(check) == set(REGIMES) and list(check["limited"]["early_exit"]) == [
        "static", "paper", "fcfs", "length_constant"
    ]  # fmt: skip
    assert all(value >= 0 for value in result["step_model"].values())
    assert len(result["requests"]) == 12
    assert plot.read_bytes().startswith(b"\x89PNG")

    assert main(["simulate", *TINY, *small, "--step-model", str(stored), "--output-json", str(again)]) == 0
    second = last_line(capsys.readouterr().out)
    assert second["check"] == {} and second["requests"] == result["requests"]
    # The fleet's costs are given, so its times are the same in any run.
    [one, other] = [found["queues"]["fleet_20"]["rows"] for found in (result, second)]
    assert [row["rounds_s"] for row in one.values()] == [row["rounds_s"] for row in other.values()]


def test_requests_are_read_back_from_a_result(tmp_path: Path) -> None:
    stored = [[9, 4, 40, 1, 2, 3, 5, 8], [7, 1, 2]]
    kept = {"step_model": COST.to_dict(), "options": {"page_size": 16}, "requests": stored}
    (tmp_path / "x.json").write_text(json.dumps(kept))
    cost, [one, two], page_size = from_json(tmp_path / "x.json")
    assert (cost, page_size) == (COST, 16)
    assert one == SimulatedRequest(9, 4, 40, LengthEstimate((1, 2, 3, 5, 8), 40))
    assert two == SimulatedRequest(7, 1, 2, LengthEstimate.unknown(2))
    assert to_json([one]) == stored[:1]


def test_a_file_that_holds_no_step_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("", "{}", '{"step_model": {"call": 1}, "options": {"page_size": 8}}', "no json"):
        (tmp_path / "x.json").write_text(text)
        assert main(["simulate", "--step-model", str(tmp_path / "x.json")]) == 2
        assert "is no result of" in capsys.readouterr().err
