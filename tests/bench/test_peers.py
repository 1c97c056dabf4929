"""`bench peers`: what it writes, counts and compares, and a dry run beside peers that are no engines."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from bench import machine
from bench.__main__ import main
from bench.cost import ModelCost, prefill_ops
from bench.peers import command as peers
from bench.peers import rounds as peer_rounds
from bench.peers.engines import (
    ENGINES,
    RUNNERS,
    Engine,
    converted,
    install_line,
    is_installed,
    python_of,
)
from bench.peers.models import MODELS, Least, PeerModel, Request, Workload, find_model, make_workload
from bench.peers.rounds import Case, Entry, compare, rotated, summary
from bench.peers.tables import fastest_peer
from bench.process import ProcessFailedError
from eejax.core.errors import ConfigError
from eejax.text.tokenizer import load_tokenizer

TINY = MODELS["tiny"]

PEER = f"""
import sys, time
sys.path.insert(0, {str(RUNNERS)!r})
import harness

class Engine:
    versions = {{"fake": "1.0"}}

    def __init__(self, model, threads, requests, options):
        assert open(model + "/converted").read() == "yes" and threads == 1 and len(requests) == 2

    def answer(self, requests):
        now = time.monotonic()
        return [harness.Answer([7] * (one["max_new"] - MISSING), now, now) for one in requests]

    def facts(self):
        return {{}}

harness.serve(Engine)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> PeerModel:
    return find_model("tiny", tmp_path_factory.mktemp("work"), seed=3)


def test_random_models_open_everywhere(model: PeerModel, tmp_path: Path) -> None:
    assert model.config.exits.layers == ()
    assert (model.config.n_layers, model.config.vocab_size) == (TINY.n_layers, 512)
    weights = load_file(model.folder / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {np.dtype(np.float32)}
    assert (weights["model.norm.weight"] == 1).all()
    assert weights["model.layers.0.mlp.down_proj.weight"].std() == pytest.approx(TINY.intermediate_size**-0.5, rel=0.1)
    # Every token of the model is one of the tokenizer, so that no engine finds an id without a name.
    assert load_tokenizer(model.folder).vocab_size == 512
    assert json.loads((model.folder / "config.json").read_text())["eos_token_id"] == 2
    # The seed is all there is to it, and what is there is not written again.
    again = find_model("tiny", tmp_path, seed=3)
    assert (again.folder / "model.safetensors").read_bytes() == (model.folder / "model.safetensors").read_bytes()
    (again.folder / "mark").touch()
    assert (find_model(str(again.folder), tmp_path, seed=0).folder / "mark").exists()
    assert (find_model("tiny", tmp_path, seed=3).folder / "mark").exists()


def test_workloads() -> None:
    one, some, many = (make_workload(name, TINY, seed=0) for name in ("b1", "b8", "b32"))
    assert [(len(request.prompt), request.max_new) for request in one.requests] == [(64, 128)]
    assert (len(some.requests), len(many.requests)) == (8, 32)
    assert {16 <= len(request.prompt) <= 128 and 8 <= request.max_new <= 256 for request in many.requests} == {True}
    assert min(token for request in many.requests for token in request.prompt) >= 300
    assert make_workload("b32", TINY, seed=0) == many != make_workload("b32", TINY, seed=1)
    assert make_workload("b1", TINY, seed=1) != one
    # Lengths are the same for every model.
    wide = make_workload("b32", MODELS["M"], seed=0)
    assert [(len(a.prompt), a.max_new) for a in wide.requests] == [(len(a.prompt), a.max_new) for a in many.requests]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"requests": [{"prompt": [], "max_new": 3}]}', "0 prompt tokens"),
        ('{"requests": [{"prompt": [5], "max_new": 0}]}', "asks for 0"),
        ('{"requests": [{"prompt": [512], "max_new": 3}]}', r"\[0, 512\)"),
        ('{"requests": [{"prompt": [5], "max_new": 512}]}', "1 \\+ 512 .* takes 512"),
        ('{"requests": [{"max_new": 512}]}', "prompt"),
        ('{"requests": []}', "no requests"),
        ("[]", "neither b1 nor b8 nor b32"),
        (None, "neither b1 nor b8 nor b32"),
    ],
)
def test_workloads_that_cannot_be(tmp_path: Path, text: str | None, message: str) -> None:
    file = tmp_path / "some.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        make_workload(str(file), TINY, seed=0)


def test_the_least_that_a_workload_takes() -> None:
    cost = ModelCost.of(TINY, 4)
    weights = TINY.n_layers * cost.block_params + cost.head_params[TINY.n_layers]
    prompt = Least.of(Workload("w", (Request((1, 2, 3), 1),)), TINY)
    assert prompt == Least(4 * weights, prefill_ops(cost, 3), 4 * weights)
    # Two rows share the weights of a step; the longest decides how many steps there are.
    both = Least.of(Workload("w", (Request((1, 2, 3), 3), Request((4,), 2))), TINY)
    positions = TINY.n_layers * (4 + 5 + 2)
    assert both.bytes_read == 4 * (3 * weights + positions * cost.kv_per_token)
    decoded = 3 * 2 * weights + positions * cost.attention_ops
    assert both.operations == prefill_ops(cost, 3) + prefill_ops(cost, 1) + decoded
    assert both.seconds(both.bytes_read / 2, both.operations / 3) == pytest.approx(3)


def one_round(seconds: float, tokens: list[list[int]], **more: Any) -> dict[str, Any]:
    times = {"first": [0.5, 1.0], "finish": [seconds / 2, seconds], "prompts_seconds": 1.0, "other_cores": 0.0}
    sizes = {"peak_bytes": 300, "serving_peak_bytes": 200, "load_seconds": 2.0, "warm_up_seconds": 3.0}
    return {"seconds": seconds, "tokens": tokens, "versions": {}, "facts": {}, **times, **sizes, **more}


def entry(*rounds: dict[str, Any], engine: str = "hf", problem: str | None = None) -> Entry:
    return Entry(engine, {}, Path("python"), Path("model"), problem, rounds=list(rounds))


def test_figures_of_a_row() -> None:
    workload = Workload("w", (Request((1,) * 10, 4), Request((1,) * 20, 6)))
    rounds = [one_round(seconds, [[], []]) for seconds in (2.0, 4.0, 6.0)]
    rounds[1]["other_cores"] = 0.5
    found = summary(entry(*rounds), workload, bound_seconds=1.0)
    assert found["output_tokens_per_s"] == 10 / 4
    assert found["rounds_tokens_per_s"] == pytest.approx([5, 2.5, 10 / 6])
    assert found["prompt_tokens_per_s"] == 30
    assert found["decode_tokens_per_s"] == pytest.approx(8 / 3)  # each first token comes with its prompt
    assert found["latency_s"]["p50"] == 2.5  # of 1, 2, 3 and 2, 4, 6
    assert found["time_to_first_token_s"] == {"p50": 0.75, "p95": 1.0}
    assert found["share_of_bound"] == 0.25
    assert (found["noisy_rounds"], found["peak_bytes"]) == (1, 300)
    assert summary(entry(problem="round 1 failed: no"), workload, 1.0) == {
        "engine": "hf",
        "problem": "round 1 failed: no",
    }


def test_tokens_are_compared_with_the_reference() -> None:
    tokens = [[1, 2, 3], [4, 5], [6], [7]]
    reference = entry(one_round(1, tokens, gaps=[[9, 1e-5, 9], [9, 0.5], [9], [8]]))
    same = compare(entry(one_round(1, tokens), one_round(1, tokens)), reference)
    assert same == {"requests": 4, "equal": 4, "near_ties": 0, "differing": [], "same_in_all_rounds": True}
    # Behind the first difference the texts are others, so nothing more is said of them.
    other = compare(entry(one_round(1, [[1, 7, 7], [4, 8], [6], [0]]), one_round(1, tokens)), reference)
    assert (other["equal"], other["near_ties"], other["same_in_all_rounds"]) == (1, 1, False)
    assert other["differing"] == [
        {"request": 0, "place": 1, "gap": 1e-5},
        {"request": 1, "place": 1, "gap": 0.5},
        {"request": 3, "place": 0, "gap": 8},
    ]
    unknown = compare(entry(one_round(1, [[1, 7, 7], [4, 5], [6], [7]])), entry(one_round(1, tokens)))
    assert (unknown["differing"][0]["gap"], unknown["near_ties"]) == (None, 0)


def test_rounds_begin_with_another_engine_each() -> None:
    assert [rotated(["a", "b", "c"], by) for by in (0, 1, 5)] == [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"]]


def test_busy_machines_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = iter([1.5, 0.9, 0.01])
    monkeypatch.setattr(peer_rounds, "busy_cores", lambda window: next(seen))
    assert peer_rounds.wait_until_idle(limit=60)
    assert next(seen, None) is None
    monkeypatch.setattr(peer_rounds, "busy_cores", lambda window: 1.0)
    assert not peer_rounds.wait_until_idle(limit=0)


def test_replayed_exits_part_the_model_evenly() -> None:
    assert peers.replay_options((0.7, 0.2), TINY) == {"exit_layers": (2, 4), "thresholds": pytest.approx((0.3, 0.1))}
    [row] = [row for row in peers.make_entries(parsed("--replay", "0.7,0.2"), TINY).values() if not row.exact]
    assert (row.engine, row.options["exit_layers"]) == ("eejax", (2, 4))


def parsed(*flags: str):
    return peers.parser().parse_args(["--model", "tiny", *flags])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--peer", "tgi"], "no tgi"),
        (["--peer", "eejax"], "no eejax"),
        (["--peer-python", "hf"], "'hf'"),
        (["--peer-python", "tgi=/usr/bin/python3"], "'tgi=/usr/bin/python3'"),
        (["--model", "no/such/folder"], "no/such/folder"),
        (["--workload", "no/such.json"], "no/such.json"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], message: str
) -> None:
    assert main(["peers", "--model", "tiny", "--no-wait", "--work", str(tmp_path), *flags]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_peers_that_are_not_installed(tmp_path: Path) -> None:
    python = python_of("openvino", {}, tmp_path)
    assert python == tmp_path / "venv-openvino" / "bin" / "python"
    assert not is_installed("openvino", python)
    assert not is_installed("openvino", Path(sys.executable))  # a Python without its modules
    line = install_line("openvino", tmp_path)
    assert line.startswith(f"python3.11 -m venv {python.parents[1]} && ")
    assert "openvino-genai" in line and line.endswith("uninstall -y torchvision")
    assert python_of("hf", {"hf": Path("/other/python")}, tmp_path) == Path("/other/python")


def fake(tmp_path: Path, missing: int) -> Engine:
    """A peer whose answers are all sevens, `missing` too few. Its model is a converted copy."""
    script = tmp_path / f"fake-{missing}.py"
    script.write_text(PEER.replace("MISSING", str(missing)))
    write = "import os, sys; os.mkdir(sys.argv[1]); open(sys.argv[1] + '/converted', 'x').write('yes')"
    return Engine("Fake", script, suffix=".fake", convert=lambda python, source, target: (python, "-c", write, target))


def test_models_are_converted_once_and_whole(model: PeerModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = Path(sys.executable)
    monkeypatch.setitem(ENGINES, "fake", fake(tmp_path, 0))
    folder = tmp_path / "models"
    found = converted("fake", python, model.folder, folder, 60)
    assert (found.name, (found / "converted").read_text()) == ("tiny-3.fake", "yes")
    stamp = found.stat().st_mtime_ns
    assert converted("fake", python, model.folder, folder, 60) == found
    assert found.stat().st_mtime_ns == stamp
    half = "import os, sys; os.mkdir(sys.argv[1]); raise SystemExit('half way')"
    broken = Engine("Broken", found, suffix=".b", convert=lambda python, source, target: (python, "-c", half, target))
    monkeypatch.setitem(ENGINES, "broken", broken)
    with pytest.raises(ProcessFailedError, match="half way"):
        converted("broken", python, model.folder, folder, 60)
    assert sorted(one.name for one in folder.iterdir() if one.is_dir()) == ["tiny-3.fake"]


def test_dry_run_beside_a_peer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine, "read_bandwidth", lambda *_: 1e9)
    monkeypatch.setattr(machine, "arithmetic_rate", lambda *_: 1e9)
    monkeypatch.setitem(ENGINES, "fake", fake(tmp_path, 0))
    monkeypatch.setitem(ENGINES, "short", fake(tmp_path, 1))
    workload = tmp_path / "few.json"
    workload.write_text(json.dumps({"requests": [{"prompt": [301, 302], "max_new": 3}, {"prompt": [5], "max_new": 2}]}))
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    code = main(
        [
            "peers", "--model", "tiny", "--workload", str(workload), "--peer", "fake,short,hf", "--rounds", "1",
            "--peer-python", f"fake={sys.executable}", "--peer-python", f"short={sys.executable}", "--threads", "1",
            "--peer-python", "hf=no/such/python", "--no-wait", "--work", str(tmp_path / "work"),
            "--output-json", str(tmp_path / "out.json"), "--plot", str(tmp_path / "plot.png"),
        ]
    )  # fmt: skip
    shown = capsys.readouterr()
    assert code == 0, shown.err
    result = json.loads((tmp_path / "out.json").read_text())
    assert json.loads(shown.out.splitlines()[-1]) == result
    case = result["cases"]["tiny few"]
    rows = case["rows"]
    assert list(rows) == ["eejax", "fake", "short", "hf"]
    assert rows["eejax"]["facts"][0]["compilations_while_timed"] == 0
    assert rows["eejax"]["facts"][0]["decode_steps"] >= 2
    assert rows["eejax"]["agreement"]["equal"] == 2
    assert case["reference"] == "eejax"  # the first that ran, where Transformers did not
    assert [one["place"] for one in rows["fake"]["agreement"]["differing"]] == [0, 0]
    assert rows["fake"]["versions"] == {"fake": "1.0"}
    assert rows["fake"]["peak_bytes"] >= rows["fake"]["serving_peak_bytes"] > 2**20
    assert "2 tokens instead of 3" in rows["short"]["problem"] or "0 tokens instead of 1" in rows["short"]["problem"]
    assert "torch" in rows["hf"]["install"]
    assert fastest_peer(rows) == "fake"
    for text in ("not installed", "failed", "fake: request 0 differs from token 0 on", "fastest peer (fake)"):
        assert text in shown.out
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert allowed is None or os.sched_getaffinity(0) == allowed


def test_rows_that_failed_run_no_more(tmp_path: Path, model: PeerModel, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = []

    def run(name: str, *_: object) -> dict[str, Any]:
        ran.append(name)
        if name == "hf":
            raise ProcessFailedError("it broke")
        return one_round(1.0, [[1]])

    monkeypatch.setattr(peers, "run_engine", run)
    rows = {name: Entry(name, {}, Path("python"), model.folder) for name in ("eejax", "hf", "vllm")}
    rows["vllm"].model = None
    case = Case(model, Workload("w", (Request((1,), 1),)), tmp_path / "w.json", rows)
    peers.run_rounds([case], parsed("--rounds", "2", "--no-wait"), peers.Console(quiet=True))
    assert ran == ["eejax", "hf", "eejax"]
    assert rows["hf"].problem == "round 1 failed: it broke"


@pytest.mark.parametrize(("cores", "runs", "kept"), [((0.5, 0.3, 0.4), 3, 0.3), ((0.5, 0.1, 0.0), 2, 0.1)])
def test_disturbed_rounds_are_repeated(
    model: PeerModel, monkeypatch: pytest.MonkeyPatch, cores: tuple[float, ...], runs: int, kept: float
) -> None:
    found = [one_round(1.0, [[1]], other_cores=one) for one in cores]
    left = iter(found)
    monkeypatch.setattr(peers, "run_engine", lambda *_: next(left))
    monkeypatch.setattr(peers, "wait_until_idle", lambda _: True)
    row = Entry("hf", {}, Path("python"), model.folder)
    case = Case(model, Workload("w", (Request((1,), 1),)), Path("w.json"), {"hf": row})
    peers.run_rounds([case], parsed("--rounds", "1"), peers.Console(quiet=True))
    assert len(list(left)) == 3 - runs
    assert [one["other_cores"] for one in row.rounds] == [kept]
