"""`bench claims`: its registry, what it reports of faked benchmarks, and the block that it writes. Nothing is timed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.__main__ import BENCHES, main
from bench.claims import command
from bench.claims.registry import BOUNDS, CLAIMS, EXITS_125M, EXITS_DEMO, PEERS, SCHEDULE, START, Measurement
from bench.process import ProcessFailedError

ROWS = ("static", "paper", "fcfs", "length_hidden")


def exits_result(alone: float, batch: float) -> dict[str, Any]:
    speed = {"1": {"rows": {"measured_speedup": alone}}, "32": {"rows": {"measured_speedup": batch}}}
    full = {"speed": {"1": {"rows": {"share_of_bound": 0.9}}}}
    return {"settings": [{"speed": speed, "quality": {"agreement": 0.99}}], "full_depth": full}


def schedule_result() -> dict[str, Any]:
    ratios = {f"requests_per_s_over_{one}": 9.0 for one in ("fcfs", "static")}
    ratios |= {f"latency_mean_over_{one}": 0.1 for one in ("fcfs", "static")}
    return {"regimes": {"limited": {"modes": {"full_depth": dict.fromkeys(ROWS, ratios)}}}}


def peers_result(other: float | None) -> dict[str, Any]:
    rows: dict[str, Any] = {"eejax": {"engine": "eejax", "output_tokens_per_s": 150.0, "peak_bytes": 5e8}}
    rows["ort"] = {"engine": "ort", "problem": "not installed"}
    if other is not None:
        rows["openvino"] = {"engine": "openvino", "output_tokens_per_s": other}
    return {"cases": {f"S {name}": {"rows": rows} for name in ("b1", "b32")}}


def results() -> dict[Measurement, dict[str, Any]]:
    """Benchmarks under which every claim holds."""
    return {
        EXITS_DEMO: exits_result(2.0, 1.5),
        EXITS_125M: exits_result(2.0, 1.5),
        SCHEDULE: schedule_result(),
        START: {"cold": {"first_token_s": 9.0}, "cached": {"first_token_s": 1.0}},
        PEERS: peers_result(100.0),
    }


@pytest.fixture
def faked(monkeypatch: pytest.MonkeyPatch) -> dict[Measurement, Any]:
    """What each benchmark returns, or raises, to be changed by a test."""
    found: dict[Measurement, Any] = results()

    def run(measurement: Measurement, quick: bool, limit: float) -> dict[str, Any]:
        assert 0 < limit <= measurement.limit
        if isinstance(found[measurement], Exception):
            raise found[measurement]
        return found[measurement]

    monkeypatch.setattr(command, "run", run)
    return found


def claims_run(capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[int, dict[str, Any], str]:
    """Exit code, the claims of the result, and what was printed before it."""
    code = main(["claims", *flags])
    *shown, last = capsys.readouterr().out.splitlines()
    return code, json.loads(last)["claims"], "\n".join(shown)


def test_every_claim_has_a_bound_and_a_benchmark() -> None:
    names = [claim.name for claim in CLAIMS]
    assert sorted(names) == sorted(BOUNDS) and len(set(names)) == len(names)
    assert {sign for sign, _ in BOUNDS.values()} == {">=", "<="}
    measurements = {claim.measurement for claim in CLAIMS}
    assert measurements == set(results())
    assert {one.command.split()[0] for one in measurements} <= set(BENCHES)


def test_every_command_line_is_understood() -> None:
    """The options of every measurement, with `--quick` too, by the parsers of the benchmarks themselves."""
    from bench import schedule, start
    from bench.exits.command import parser as exits_parser
    from bench.peers.command import parser as peers_parser

    parsers = {"exits": exits_parser, "peers": peers_parser, "schedule": schedule.parser, "start": start.parser}
    for one in {claim.measurement for claim in CLAIMS}:
        for quick in (False, True):
            name, *options = one.arguments(quick)
            if name == "schedule":
                options = ["--model", "checkpoints/demo", *options]  # which `schedule` adds where none is named
            parsers[name]().parse_args(options)


def test_all_hold(faked: dict[Measurement, Any], capsys: pytest.CaptureFixture[str]) -> None:
    code, found, shown = claims_run(capsys)
    assert code == 0
    assert {one["state"] for one in found.values()} == {"holds"}
    assert found["exits-demo-b1"]["figure"] == 2.0 and found["exits-demo-b1"]["bound"] == [
        ">=",
        BOUNDS["exits-demo-b1"][1],
    ]
    assert found["peers-b1"]["figure"] == 1.5 and found["memory-b32"]["figure"] == 500.0
    assert "no figure fell short" in shown


def test_short_falls_are_named(faked: dict[Measurement, Any], capsys: pytest.CaptureFixture[str]) -> None:
    faked[EXITS_DEMO] = exits_result(0.72, 1.5)
    faked[START]["cold"]["first_token_s"] = 1e3
    code, found, shown = claims_run(capsys)
    assert code == 1
    assert [name for name, one in found.items() if one["state"] == "short"] == ["exits-demo-b1", "start-cold"]
    assert "fell short: exits-demo-b1, start-cold" in shown


def test_figures_count_as_they_are_shown() -> None:
    claim = next(one for one in CLAIMS if one.name == "exits-demo-b1")
    _, bound = BOUNDS[claim.name]
    assert claim.holds(bound - 0.004) and not claim.holds(bound - 0.006)


def test_other_engines_that_are_missing_are_skipped(
    faked: dict[Measurement, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    faked[PEERS] = peers_result(None)
    code, found, _ = claims_run(capsys, "--only", "peers,memory-b32")
    assert code == 0
    assert {name: one["state"] for name, one in found.items()} == {
        "peers-b1": "skipped", "peers-b32": "skipped", "memory-b32": "holds",
    }  # fmt: skip


def test_benchmarks_that_fail_leave_the_others(
    faked: dict[Measurement, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    faked[SCHEDULE] = ProcessFailedError("stopped after 240 s")
    del faked[EXITS_125M]["settings"][0]["speed"]["32"]
    code, found, shown = claims_run(capsys, "--only", "length,exits-125m")
    assert code == 1
    assert found["exits-125m-b1"]["state"] == "holds"
    assert found["exits-125m-b32"]["state"] == found["length-fcfs"]["state"] == "failed"
    assert (
        "not measured: length-fcfs, length-fcfs-latency, length-static, length-static-latency: stopped after" in shown
    )


def test_unknown_names_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["claims", "--only", "exit"]) == 2
    assert "no claim 'exit'" in capsys.readouterr().err


def test_the_table_replaces_the_marked_block(
    faked: dict[Measurement, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    readme, kept = tmp_path / "README.md", tmp_path / "kept.json"
    readme.write_text(f"above\n{command.BEGIN}\nold\n{command.END}\nbelow\n")
    faked[EXITS_DEMO] = exits_result(0.72, 1.5)
    assert main(["claims", "--write", str(readme), "--output-json", str(kept)]) == 1
    text = readme.read_text()
    assert text.startswith(f"above\n{command.BEGIN}\n| |") and text.endswith(f".\n{command.END}\nbelow\n")
    assert "old" not in text
    assert len([line for line in text.splitlines() if line.startswith("|")]) == 2 + len(CLAIMS)
    assert "| 0.72 (falls short) | at least 1.27 |" in text.replace(f"{BOUNDS['exits-demo-b1'][1]:.2f}", "1.27")
    capsys.readouterr()
    # Figures that were measured before give the same table, and nothing is measured.
    faked.clear()
    assert main(["claims", "--from-json", str(kept), "--write", str(readme)]) == 1
    assert readme.read_text() == text


@pytest.mark.parametrize(
    "text", ["nothing", command.BEGIN, f"{command.END}{command.BEGIN}", command.BEGIN * 2 + command.END]
)
def test_files_without_a_block_are_left_alone(
    text: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "run", lambda *_: pytest.fail("measured first"))
    readme = tmp_path / "README.md"
    readme.write_text(text)
    assert main(["claims", "--write", str(readme)]) == 2
    assert readme.read_text() == text
    assert main(["claims", "--write", str(readme), "--quick"]) == 2


def test_a_benchmark_runs_in_a_process_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(ProcessFailedError, match="no benchmark 'none'"):
        command.run(Measurement("none", "", 60), quick=True, limit=60)


def test_no_benchmark_starts_without_time(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(command, "WHOLE_RUN", 0)
    code, found, _ = claims_run(capsys)
    assert code == 1
    assert all(one["problem"] == "no time was left of 0 s" for one in found.values())
