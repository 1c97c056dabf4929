"""`bench.process`: commands that fail say why, and none outlives the process that started it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bench.process import ProcessFailedError, run_process, scratch_folder


def test_processes_that_fail_say_why(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "log"
    with pytest.raises(ProcessFailedError, match="exit code 3, no model"):
        run_process([sys.executable, "-c", "print('no model'); raise SystemExit(3)"], log, 60, {})
    with pytest.raises(ProcessFailedError, match="stopped after"):
        run_process([sys.executable, "-c", "import time; time.sleep(60)"], log, 0.05, {})
    with pytest.raises(ProcessFailedError, match="no/such"):
        run_process(["no/such/python"], log, 60, {})


PARENT = """
import sys
from pathlib import Path
from bench.process import run_process

script = "sh -c 'echo begun; sleep 10; echo survived' > $PIPE & wait"
run_process(["sh", "-c", script], Path("log"), 60, {"PIPE": sys.argv[1]})
"""


def test_sigterm_ends_the_engine_and_what_it_started(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    paths = os.pathsep.join(path for path in sys.path if path)
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, pipe], cwd=tmp_path, env=os.environ | {"PYTHONPATH": paths}
    )
    with pipe.open() as news:
        assert news.readline() == "begun\n"
        parent.send_signal(signal.SIGTERM)
        assert parent.wait(60) == 128 + signal.SIGTERM
        assert news.read() == ""  # ends with the last process that holds the pipe


def test_scratch_folders_are_kept_on_errors() -> None:
    with scratch_folder() as folder:
        assert folder.is_dir()
    assert not folder.exists()
    with pytest.raises(RuntimeError), scratch_folder() as folder:
        raise RuntimeError
    folder.rmdir()  # it is there, and empty
