"""`bench/gpu_check.sh`: it ends in time and readable whatever happens, and a broken kernel costs its own line.

The dry run itself takes minutes: `bench/gpu_check.sh --dry-run`. Here its parts run by themselves.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from bench.gpu import decoding, demo, kernels, profile, record, table, wheels
from bench.gpu.__main__ import BATCH_RUNS, DRY, GPU, LARGE_RUNS, Check
from bench.gpu.smoke import FAULT
from bench.gpu.tasks import Task, keep_log
from bench.kernels.command import narrow
from bench.kernels.command import parser as kernels_parser
from bench.kernels.fill import MODELS
from bench.shapes import SHAPES
from eejax.core import ExitConfig

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "bench" / "gpu_check.sh"


def check_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, total: float = 100.0) -> Check:
    out, work = tmp_path / "out", tmp_path / "work"
    out.mkdir()
    work.mkdir()
    for name in ("results.jsonl", "log.txt"):
        (out / name).touch()
    monkeypatch.setenv(record.RESULTS, str(out / "results.jsonl"))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return Check(out, work, dry=True, total=total)


def archived(out: Path) -> set[str]:
    with tarfile.open(out / record.ARCHIVE) as archive:
        return set(archive.getnames())


def statuses(out: Path) -> dict[str, str]:
    return {one["name"]: one["status"] for one in record.results(out) if one["stage"] == "stages"}


# ------------------------------------------------------------------------------------------------------ ends in any way


def started(tmp_path: Path, **options) -> subprocess.Popen:
    environment = os.environ | {"PYTHON": sys.executable, "EEJAX_GPU_WORK": str(tmp_path / "work")}
    command = ["bash", str(SCRIPT), "--dry-run", "--out", str(tmp_path / "out")]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, **options)


@pytest.mark.parametrize("moment", ["archive", '"machine"', '"stages", "name": "environment"'])
def test_killed_at_any_moment_it_leaves_what_it_has(tmp_path, moment):
    """Killed with all its processes, before the first result, within a stage, and after one."""
    out = tmp_path / "out"
    with started(tmp_path, start_new_session=True) as script:
        while not (out / record.ARCHIVE).exists() or (moment != "archive" and moment not in text(out)):
            assert script.poll() is None
            time.sleep(0.02)
        os.killpg(script.pid, signal.SIGKILL)
    found = [json.loads(line) for line in text(out).splitlines()]
    assert [one["stage"] for one in found] == [one["stage"] for one in record.results(out)]
    assert {"results.jsonl", "log.txt"} <= {name.removeprefix("gpu-check/") for name in archived(out)}
    assert len(list(out.iterdir())) <= 8
    assert moment == "archive" or moment in text(out)


def text(out: Path) -> str:
    return (out / "results.jsonl").read_text()


def test_told_to_end_it_says_so(tmp_path):
    with started(tmp_path) as script:
        assert script.stdout is not None
        assert '"stages"' in script.stdout.readline()
        script.send_signal(signal.SIGTERM)
        shown = script.stdout.read()
        assert script.wait() == 1
    assert statuses(tmp_path / "out")["all"] == "stopped by SIGTERM"
    assert "stopped by SIGTERM" in shown and "DRY RUN" in shown.splitlines()[-1]
    assert "gpu-check/table.txt" in archived(tmp_path / "out")


def test_a_kernel_that_aborts_costs_its_own_line(tmp_path, monkeypatch):
    check = check_of(tmp_path, monkeypatch)
    monkeypatch.setenv(FAULT, "fill tiny")
    check.smoke()
    out = tmp_path / "out"
    found = {one["name"]: one for one in record.results(out) if one["stage"] == "smoke"}
    assert found["attention tiny"]["right"] is True
    assert "fill tiny" not in found
    assert found["switched off"]["kernels"] == ["fill"]
    assert "smoke fill tiny: FAILED: SIGABRT" in statuses(out)["smoke"]
    assert "sanitizer" in statuses(out)
    # Later stages run on XLA, and those that measure kernels without this one alone.
    assert check.task("demo", [], 1).variables == {"EEJAX_KERNELS": "xla"}
    assert check.broken == {"fill"}
    assert "fill tiny: FAILED" in (out / "table.txt").read_text()


def test_without_time_stages_are_named_and_not_begun(tmp_path, monkeypatch):
    check = check_of(tmp_path, monkeypatch, total=1.0)
    check.stage([check.task("environment", [], 30)])
    check.decode("decode", ("tiny", 1), ["full"], 30)
    assert set(statuses(tmp_path / "out").values()) == {"not begun: no time left"}
    assert list(statuses(tmp_path / "out")) == ["environment", "decode"]


# ------------------------------------------------------------------------------------------------------------ processes


def run(task: Task, logs: Path) -> Task:
    task.start(logs)
    while not task.over():
        time.sleep(0.02)
    return task


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("print('fine')", "ok"),
        ("raise SystemExit(3)", "FAILED: exit 3"),
        ("import os; os.abort()", "FAILED: SIGABRT"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "FAILED: SIGSEGV"),
        ("import os; os._exit(200)", "FAILED: exit 200"),
    ],
)
def test_how_a_process_ended(tmp_path, code, status):
    task = run(Task("one two", [sys.executable, "-c", code], 20), tmp_path / "logs")
    assert task.status == status
    last = keep_log(task, tmp_path / "logs", tmp_path / "log.txt")
    assert f"==== one two: {status}" in (tmp_path / "log.txt").read_text()
    assert ("fine" in last) == (status == "ok")


def test_a_process_over_its_time_is_killed_with_its_children(tmp_path):
    code = "import subprocess as s, time; print(s.Popen(['sleep', '600']).pid, flush=True); time.sleep(600)"
    task = Task("slow", [sys.executable, "-c", code], 600)
    task.start(tmp_path)
    while not task.log(tmp_path).read_text().endswith("\n"):
        assert not task.over()
        time.sleep(0.02)
    task.seconds = 0.0  # its time is over
    assert task.over()
    assert task.status == "FAILED: over 0 s"
    child = Path(f"/proc/{int(task.log(tmp_path).read_text())}/stat")
    while child.exists() and child.read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.02)  # it sleeps far longer than any test may take


# -------------------------------------------------------------------------------------------------------------- records


def test_of_two_reports_the_later_counts_and_other_lines_do_not(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(record.RESULTS, str(tmp_path / "results.jsonl"))
    record.report("small", "norm", us=1.23456789, gb_s=float("nan"))
    record.append(tmp_path / "results.jsonl", '{"stage": "cut off\n')
    record.report("small", "other", us=2.0)
    record.report("small", "norm", us=3.0)
    assert record.results(tmp_path) == [
        {"stage": "small", "name": "norm", "us": 3.0},
        {"stage": "small", "name": "other", "us": 2.0},
    ]
    assert '"us": 1.23457, "gb_s": null' in capsys.readouterr().out


def test_the_archive_holds_what_fits(tmp_path, monkeypatch):
    out, raw = tmp_path / "out", tmp_path / "work" / "raw" / "trace"
    out.mkdir()
    raw.mkdir(parents=True)
    (out / "results.jsonl").write_text("{}\n")
    (raw / "small").write_bytes(b"1" * 100)
    (raw / "large").write_bytes(b"1" * 2000)
    monkeypatch.setattr(record, "MOST_BYTES", 1000)
    record.pack(out, tmp_path / "work")
    assert archived(out) == {"gpu-check/results.jsonl", "gpu-check/raw/trace/small"}
    assert sorted(path.name for path in out.iterdir()) == [record.ARCHIVE, "results.jsonl"]


def test_the_table_has_no_more_than_40_lines():
    mode = {"time_per_output_token_ms": {"p50": 5.125}, "share_of_bandwidth_bound": 0.81}
    speed = {"measured_speedup": 1.5, "ideal_speedup": 1.6}
    cell = {"mosaic": {"us": 91.25, "of_copy_bandwidth": 0.875}, "xla": {"reason": "no"}}
    results = [
        {"stage": "environment", "name": "machine", "device": "gpu: H100", "versions": {"jax": "0.11.2"}},
        {"stage": "environment", "name": "copy", "gb_s": 2912.3},
        *({"stage": "stages", "name": f"s{i}", "status": "FAILED: exit 1", "seconds": 1.0} for i in range(20)),
        *({"stage": "attention", "name": f"batch {i}", "implementations": cell} for i in range(20)),
        {"stage": "attention", "name": "skipped 0", "reason": "50 s are over"},
        *({"stage": "fill", "name": f"tokens {i}", "implementations": cell} for i in range(20)),
        {"stage": "decode", "name": "llama-7b 1 full", **mode, **speed},
        *({"stage": "decode", "name": f"llama-7b {i} eager", **mode, **speed} for i in range(20)),
    ]
    shown = table.lines(results, dry=True)
    assert len(shown) <= table.MOST_LINES and max(map(len, shown)) <= table.WIDTH
    for text in (
        "gpu: H100",
        "2912 GB/s",
        "s0: FAILED: exit 1",
        "91 (0.88/-)",
        "5.125 ms, 0.81",
        "1.50x of ideal 1.60x",
    ):
        assert any(text in line for line in shown), text
    assert sum("1.50x" in line for line in shown) == 9  # full depth beside itself says nothing
    assert "DRY RUN" in shown[-1]
    assert len(table.lines([], dry=False)) == 3


# --------------------------------------------------------------------------------------------------------------- stages


@pytest.mark.parametrize("sizes", [GPU, DRY])
def test_sizes_name_models_that_there_are(sizes):
    assert set(sizes.smoke) <= MODELS.keys()
    assert {sizes.large, sizes.last[0]} <= SHAPES.keys()
    assert {*LARGE_RUNS, *BATCH_RUNS} <= decoding.RUNS.keys()


def test_sweeps_of_kernels_cover_every_batch_and_context():
    cells = []
    for line in kernels.flags("attention", dry_run=False):
        args = kernels_parser().parse_args(line)
        narrow(args)
        cells += [(batch, context) for batch in args.batch for context in args.context]
    assert sorted(cells) == [(batch, context) for batch in (1, 8, 32, 128) for context in (256, 2048, 16384)]
    assert cells[0] == (32, 2048)


def test_answers_are_held_against_float32(monkeypatch, capsys):
    def results(mosaic, xla):
        runs = {"mosaic": mosaic, "xla": xla, "float32": [1, 2, 3, 4]}
        modes = {
            name: {mode: {"tokens": [tokens], "exits": [[2] * 4]} for mode in demo.MODES}
            for name, tokens in runs.items()
        }
        return [{"stage": "demo", "name": name, **found} for name, found in modes.items()]

    monkeypatch.delenv(record.RESULTS, raising=False)
    assert demo.compare(results([1, 2, 9, 9], [1, 2, 3, 9]))
    assert '"mosaic": 0.5, "xla": 0.75' in capsys.readouterr().out
    assert not demo.compare(results([1, 9, 3, 4], [1, 2, 3, 4]))
    assert demo.compare(results([1, 9], [1, 9, 3, 4])[1:])  # Mosaic did not run


def test_the_device_is_busy_where_events_overlap():
    spans = [(0, 4), (2, 3), (5, 1), (10, 5), (12, 9)]
    assert list(profile.busy(profile.Event("", start, length) for start, length in spans)) == [6, 11]
    assert list(profile.busy([])) == []


def test_what_is_compiled_ahead_is_what_a_run_needs(monkeypatch, capsys):
    # Its widths are its own, so that no other test has compiled these programs into the cache.
    small = replace(SHAPES["tiny"], n_layers=2, hidden_size=24, head_dim=12, exits=ExitConfig((1,)))
    monkeypatch.setitem(SHAPES, "tiny", small)
    monkeypatch.setitem(decoding.RUNS, "mine", decoding.Run("deferred", "while", decoding.replay_params((0.5,))))
    monkeypatch.setenv(decoding.VARIABLE, "auto")  # what the runs set ends with the test
    assert decoding.compile_ahead("tiny", 1, (5, 11), ["mine"]) == 2
    assert decoding.compile_ahead("tiny", 1, (5, 11), ["mine"]) == 0
    monkeypatch.setattr(decoding.Ceiling, "measure", lambda *_: decoding.Ceiling(1e10, 1, 1e11))
    built = []
    original = decoding.LLM.from_params

    def build(*args, **options):
        built.append(original(*args, **options))
        return built[-1]

    monkeypatch.setattr(decoding.LLM, "from_params", build)
    decoding.measure("tiny", 1, (5, 11), ["mine"], rounds=1)
    assert built[0].stats().compilations == 0
    [first, second] = [json.loads(line) for line in capsys.readouterr().out.splitlines() if '"decode"' in line]
    assert first["name"] == second["name"] == "tiny 1 mine"


# --------------------------------------------------------------------------------------------------------------- wheels


def test_what_is_missing_or_too_old_is_lacking(monkeypatch):
    versions = {"flax": "0.12.0", "rich": "15.0", "numpy": "1.0"}

    def version(name: str) -> str:
        if name not in versions:
            raise wheels.importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(wheels.importlib.metadata, "version", version)
    needed = [Requirement(one) for one in ("flax>=0.12.10", "rich>=14.0", "numpy>=2", "jax>=0.11.2", "typer>=0.20")]
    assert [one.name for one in wheels.lacking(needed)] == ["flax", "typer"]


def test_wheels_are_found_by_name_and_what_has_none_is_named(tmp_path, monkeypatch, capsys):
    (tmp_path / "orbax_checkpoint-0.12.8-py3-none-any.whl").touch()
    assert wheels.wheel_of(Requirement("orbax-checkpoint>=0.11"), tmp_path) is not None
    assert wheels.wheel_of(Requirement("flax"), tmp_path) is None
    monkeypatch.delenv(record.RESULTS, raising=False)
    monkeypatch.setattr(wheels, "lacking", lambda needed: [Requirement("flax>=0.12.10")])
    assert wheels.main([str(tmp_path), str(tmp_path / "site")]) == 1
    assert json.loads(capsys.readouterr().out)["missing"] == ["flax>=0.12.10"]


def test_requirements_are_the_core_s():
    names = {one.name for one in wheels.requirements(ROOT / "pyproject.toml")}
    assert {"jax", "flax", "orbax-checkpoint"} <= names and "matplotlib" not in names


def test_the_script_refuses_unknown_options():
    done = subprocess.run(["bash", str(SCRIPT), "--dry"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--dry" in done.stderr
