"""`bench kernels`: bytes by hand, failures as rows, a dry run. No time is ever asserted."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bench import common
from bench.__main__ import main
from bench.kernels import attention, fill
from bench.kernels import command as kernels
from bench.kernels.attention import AttentionCase
from bench.kernels.fill import FillCase
from bench.kernels.timing import (
    COLD_BYTES,
    MAX_TURNS,
    Repetitions,
    Timing,
    compare,
    judge,
    relative_error,
    sets_for,
    turns_for,
)
from bench.shapes import SHAPES, shape
from eejax.model.transformer import count_params, param_shapes


def test_bytes_of_attention_by_hand() -> None:
    case = AttentionCase(batch=4, context=100, heads=8, kv_heads=2, active=3, head_dim=16, page_size=64, max_sets=5)
    # K and V of three rows; queries and results of four.
    assert case.bytes == 2 * (2 * 3 * 100 * 2 * 16 + 2 * 4 * 8 * 16)
    assert (case.pages_per_row, case.sets) == (2, 5)
    assert case.pool_bytes == 2 * (2 * 5 * 4 * 2 * 64 * 2 * 16)
    assert replace(case, dtype="float32").bytes == 2 * case.bytes
    large = AttentionCase(batch=128, context=16384, heads=32, kv_heads=32, active=1)
    assert large.sets == 1  # however few rows are active: the sets serve all shares


def test_bytes_of_fill_are_those_of_the_projections() -> None:
    case = FillCase("tiny", tokens=3, max_sets=2)
    block = 2 * (64 + 128 * 64 + 64)  # norm, K and V of one head of 64, the keys' norm
    assert case.weight_bytes == 2 * block
    assert replace(case, unneeded=1).weight_bytes == block
    assert case.bytes == 2 * block + 2 * 3 * (64 + 2 * 128)
    params = fill.make_params(case, seed=0)
    assert len(params["blocks"]) == 2 * 2
    assert case.model_bytes == 2 * sum(count_params(one) for one in params["blocks"].values()) - 4 * 2 * 2 * 64


def test_shares_that_round_to_the_same_rows_are_one_case() -> None:
    [one, eight] = attention.cases((1, 8), (256,), ((32, 8),), (0.1, 1.0, 0.5))
    assert [case.active for case in one] == [1]
    assert [case.active for case in eight] == [8, 4, 1]
    rows = attention.active_rows(eight[1], seed=3)
    assert (rows.dtype, int(rows.sum())) == (bool, 4)
    [group] = fill.cases(["llama-2-7b"], (1, 32))
    assert [(case.tokens, case.unneeded) for case in group] == [(1, 0), (32, 0), (1, 10)]


def test_programs_read_more_than_a_cache_holds() -> None:
    for size in (1_000_000, 50_000_000, COLD_BYTES, 20 * COLD_BYTES):
        sets, turns = sets_for(size), turns_for(size, bandwidth=3e12)
        assert sets * size >= min(COLD_BYTES, MAX_TURNS * size)
        assert sets <= turns <= MAX_TURNS
        assert turns >= 4


def test_pages_of_a_set_are_disjoint_and_no_two_rows_share_one() -> None:
    case = AttentionCase(batch=3, context=130, heads=2, kv_heads=1, active=3, head_dim=4, page_size=64, max_sets=4)
    data = attention.make_data(case, seed=1)
    tables = np.asarray(data["tables"])
    assert tables.shape == (4, 3, 3)
    assert sorted(tables.ravel()) == list(range(36))
    assert data["k"].shape == (1, 36, 1, 64, 4)
    assert not np.array_equal(data["k"], data["v"])


def add(amount: float):
    return lambda turn, state, data: state + amount * data


def broken(turn: jax.Array, state: jax.Array, data: jax.Array) -> jax.Array:
    raise NotImplementedError("no such\n   kernel")


def test_a_failing_or_wrong_implementation_becomes_a_row() -> None:
    found = compare(
        {"mosaic": broken, "wrong": add(1.02), "xla": add(1.0), "close": add(1.005), "other": add(7.0)},
        lambda turn, state, data: state,
        jnp.zeros(100_000),
        jnp.ones(100_000),
        repetitions=Repetitions(turns=3, repeats=1),
        result=lambda state: state,
        unchecked=("other",),
    )
    assert list(found) == ["mosaic", "wrong", "xla", "close", "other"]
    assert found["mosaic"] == Timing(reason="NotImplementedError: no such kernel")
    assert found["mosaic"].to_dict()["reason"] == "NotImplementedError: no such kernel"
    assert found["wrong"].relative_error == pytest.approx(0.02, rel=1e-2)
    assert found["close"].relative_error == pytest.approx(0.005, rel=1e-2)
    assert found["xla"].relative_error == 0
    assert found["other"].relative_error is None


def test_figures_that_cannot_be_used_say_why() -> None:
    assert "WRONG" in (judge(Timing(1.0, None, 0.02)).reason or "")
    assert "WRONG" in (judge(Timing(1.0, None, float("nan"))).reason or "")
    for seconds in (0.0, -1.0):
        found = judge(Timing(seconds, None, 0.0))
        assert found.seconds is None
        assert "empty program" in (found.reason or "")
    good = Timing(1.0, 0.5, 0.001)
    assert judge(good) == good
    assert good.to_dict(gb_s=2.0) == {"us": 1e6, "kernel_us": 5e5, "relative_error": 0.001, "gb_s": 2.0}
    assert relative_error(jnp.array([3.0, 4.0]), jnp.array([3.0, 0.0])) == pytest.approx(4 / 3)


def sweep(*flags: str) -> kernels.Sweep:
    args = kernels.parser().parse_args(["--dry-run", *flags])
    kernels.narrow(args)
    return kernels.Sweep(args)


def test_rates_by_hand() -> None:
    one = sweep()
    one.bandwidth = 1e6
    whole, case = {}, AttentionCase(batch=2, context=64, heads=1, kv_heads=1, active=2, head_dim=4)
    full = one._attention_figures("mosaic", Timing(seconds=case.bytes / 8e5), case, whole)
    assert full["of_copy_bandwidth"] == pytest.approx(0.8)
    assert full["time_per_byte_over_all_active"] is None
    half = replace(case, active=1)
    slow = one._attention_figures("mosaic", Timing(seconds=half.bytes / 4e5), half, whole)
    assert slow["time_per_byte_over_all_active"] == pytest.approx(2)  # twice the time for each byte
    assert one._attention_figures("xla", Timing(seconds=1.0), half, whole)["time_per_byte_over_all_active"] is None
    # Where a profiler looked, its times say what inactive rows cost.
    one._attention_figures("mosaic", Timing(1.0, case.bytes / 8e5), case, whole)
    alone = one._attention_figures("mosaic", Timing(1.0, half.bytes / 8e5), half, whole)
    assert alone["time_per_byte_over_all_active"] == pytest.approx(1)
    assert alone["kernel_of_copy_bandwidth"] == pytest.approx(0.8)
    fill = FillCase("tiny", 1)
    found = one._fill_figures("mosaic", Timing(seconds=fill.weight_bytes / 5e5), fill)
    assert found["over_weight_read"] == pytest.approx(2)
    assert one._fill_figures("full", Timing(seconds=1.0), fill) == {}


def test_dry_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "new" / "kernels.json"
    assert main(["kernels", "--dry-run", "--repeats", "1", "--output-json", str(file)]) == 0
    out = capsys.readouterr().out
    result = json.loads(out.splitlines()[-1])
    assert result == json.loads(file.read_text())
    assert "mean nothing" in out
    assert result["skipped"] == []
    assert [row["active"] for row in result["attention"]] == [2, 1]
    assert [row["unneeded_blocks"] for row in result["fill"]] == [0, 1]
    for row in (*result["attention"], *result["fill"]):
        assert row["implementations"]["mosaic"]["relative_error"] <= 1e-2
        assert row["implementations"]["xla"]["relative_error"] == 0
    assert all("torch" in row["implementations"]["torch"]["reason"] for row in result["attention"])
    assert "full" in result["fill"][0]["implementations"]
    assert "full" not in result["fill"][1]["implementations"]


def test_cells_that_do_not_fit_are_skipped_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    one = sweep("--ops", "attention")
    monkeypatch.setattr(kernels.Sweep, "_no_room", lambda self, size: f"takes {size}")
    one.run()
    assert one.result["attention"] == []
    [skipped] = one.result["skipped"]
    assert "takes" in skipped
    assert "batch 2, context 70" in skipped


@pytest.mark.parametrize(
    ("flags", "message"),
    [(("--dry-run", "--quick"), "--quick"), (("--batch", "0"), "--batch"), (("--active", "0"), "--active")],
)
def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], message: str) -> None:
    assert main(["kernels", *flags]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.parametrize("heads", ["32", "8/3", "8/0", "x/y"])
def test_heads_must_be_pairs(capsys: pytest.CaptureFixture[str], heads: str) -> None:
    with pytest.raises(SystemExit):
        main(["kernels", "--heads", heads])
    assert heads in capsys.readouterr().err


def test_random_parameters_are_made_in_their_own_dtype() -> None:
    config = shape("tiny")
    params = common.random_params(config, jnp.dtype(jnp.bfloat16), seed=0)
    jax.tree.map(lambda one, like: (one.shape, one.dtype) == (like.shape, jnp.bfloat16) or pytest.fail(str(like)),
                 params, param_shapes(config))  # fmt: skip
    first, second = params["blocks"][0], params["blocks"][1]
    assert jnp.all(first["attn_norm"] == 1)
    assert 0.015 < float(jnp.std(params["embedding"].astype(jnp.float32))) < 0.025
    assert not jnp.array_equal(first["wq"], second["wq"])
    other = common.random_params(config, jnp.dtype(jnp.bfloat16), seed=1)
    assert not jnp.array_equal(first["wq"], other["blocks"][0]["wq"])


def test_llama_7b_has_the_size_of_llama_2() -> None:
    assert count_params(param_shapes(SHAPES["llama-7b"])) == 6_738_415_616
