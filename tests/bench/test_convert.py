"""`bench convert`: a dry run on a tiny model. No time is asserted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.__main__ import main
from bench.shapes import shape
from eejax.model.transformer import count_params, init_params


def test_a_dry_run_of_convert(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--random", "tiny", "--num-iters", "1", "--max-shard-bytes", "9000", "--folder", str(tmp_path)]
    assert main(["convert", *options, "--output-json", str(tmp_path / "out.json")]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result == json.loads((tmp_path / "out.json").read_text())
    assert result["parameters"] == count_params(init_params(shape("tiny", ())))
    assert result["stored_bytes"] > 2 * result["parameters"]
    assert set(result["modes"]) == {"copy", "convert", "reverse"}
    assert all(mode["peak_bytes"] > 0 for mode in result["modes"].values())
    assert [file.name for file in tmp_path.iterdir()] == ["out.json"]
