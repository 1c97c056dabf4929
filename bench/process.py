"""A command in a process of its own, which ends in time and with the process that started it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

GRACE = 5.0
"""Seconds from SIGTERM to SIGKILL, in which a process can end what it started in other groups."""


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """A temporary folder, which is kept, with the logs in it, when an exception ends the context."""
    folder = Path(tempfile.mkdtemp(prefix="eejax-bench-"))
    yield folder
    shutil.rmtree(folder)


class ProcessFailedError(Exception):
    """A process ended with an error; the message is the last line that it printed."""


def run_process(command: Sequence[str | Path], log: Path, limit: float, environment: Mapping[str, str]) -> None:
    """Run a command to its end; all that it prints goes to `log`.

    If this process is interrupted or terminated meanwhile, the command and the processes that it started end too.

    Args:
        limit: seconds after which it is stopped.
        environment: variables in addition to this process's own.

    Raises:
        ProcessFailedError: it failed, or took too long.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    try:
        with log.open("wb") as out:
            process = subprocess.Popen(
                [str(part) for part in command],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
                start_new_session=True,  # a process group of its own, which can be ended as one
            )
        with _ended_on_error(process):
            code = process.wait(limit)
    except OSError as error:
        raise ProcessFailedError(str(error)) from error
    except subprocess.TimeoutExpired as error:
        raise ProcessFailedError(f"stopped after {limit:.0f} s") from error
    if code != 0:
        lines = log.read_text(errors="replace").strip().splitlines() or ["(it printed nothing)"]
        raise ProcessFailedError(f"exit code {code}, {lines[-1].strip()[:300]} (see {log})")


@contextmanager
def _ended_on_error(process: subprocess.Popen) -> Iterator[None]:
    """End the process and its group when waiting for it ends by an exception or by SIGTERM."""
    ours = threading.current_thread() is threading.main_thread()  # other threads may not set handlers
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number)) if ours else None
    try:
        yield
    except BaseException:
        _end(process)
        raise
    finally:
        if ours:
            signal.signal(signal.SIGTERM, before)


def _end(process: subprocess.Popen) -> None:
    """End a process and its group with SIGTERM, and what is left of them with SIGKILL."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
