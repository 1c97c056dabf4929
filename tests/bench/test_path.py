"""`bench path`: what it counts of recorded functions, and its limits. The request itself is faked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import path
from bench.__main__ import main


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout of three modules, of which two ran a function."""
    sizes = {"eejax/a.py": 10, "eejax/b.py": 5, "pallas_kernels/c.py": 3}
    for file, lines in sizes.items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text("pass\n" * lines)
    monkeypatch.setattr(path, "recorded", lambda *_: {"eejax/a.py": 4, "eejax/b.py": 0, "pallas_kernels/c.py": 1})
    return tmp_path


def test_counts_modules_that_ran_and_that_were_imported(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["path", "--root", str(root), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    eejax = found["packages"]["eejax"]
    assert eejax["ran"] == {"modules": 1, "lines": 10}
    assert eejax["imported"] == {"modules": 2, "lines": 15}
    assert found["all"] == {"ran": {"modules": 2, "lines": 13}, "imported": {"modules": 3, "lines": 18}}


@pytest.mark.parametrize(("lines", "code"), [(10, 0), (9, 1)])
def test_limits_are_of_eejax_alone(root: Path, lines: int, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    found = main(["path", "--root", str(root), "--at-most-modules", "1", "--at-most-lines", str(lines)])
    assert found == code
    shown = capsys.readouterr()
    assert ("eejax: 10 lines, at most 9" in shown.err) == (code == 1)
    assert "eejax/b.py" in shown.out


def test_functions_count_and_bodies_do_not(tmp_path: Path) -> None:
    """`record` itself, on a package that stands in for eejax."""
    package = tmp_path / "eejax"
    package.mkdir()
    (package / "__init__.py").write_text(
        "def __getattr__(name):\n import eejax.used as used, eejax.bare as bare\n"
        " return {'LLM': used, 'SamplingParams': bare}[name].__dict__[name]\n"
    )
    (package / "used.py").write_text("class LLM:\n def __init__(self, _): pass\n def generate(self, *_, **__): pass\n")
    (package / "bare.py").write_text("class SamplingParams(dict):\n x = 1\n")
    script = tmp_path / "run.py"
    script.write_text(
        "import json, sys\nfrom pathlib import Path\nfrom bench.path import record\n"
        "print(json.dumps(record(Path(sys.argv[1]), 'model')))\n"
    )
    paths = os.pathsep.join((str(tmp_path), str(path.ROOT)))
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)], env=os.environ | {"PYTHONPATH": paths}, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    assert json.loads(done.stdout) == {"eejax/__init__.py": 0, "eejax/used.py": 2, "eejax/bare.py": 0}
