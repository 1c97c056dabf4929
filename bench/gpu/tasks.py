"""Processes with a limit: started, waited for, killed with all that they started, their output kept."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.gpu.record import append

MOST_OUTPUT = 100_000
"""Characters of one process's output that go into the log: its end."""
POLL = 0.05
GRACE = 2.0


@dataclass(slots=True)
class Task:
    """One process. `name` is what the log calls it, `seconds` its limit."""

    name: str
    command: Sequence[str]
    seconds: float
    variables: Mapping[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    ended: float = 0.0
    overdue: bool = False

    def start(self, logs: Path) -> None:
        """Begin. `timeout` ends it even if nobody is left to look after it."""
        self.started = time.monotonic()
        command = ["timeout", "--kill-after=2", f"{self.seconds + GRACE:.1f}", *self.command]
        logs.mkdir(parents=True, exist_ok=True)
        with self.log(logs).open("wb") as log:
            self.process = subprocess.Popen(
                command,
                env=os.environ | dict(self.variables),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def log(self, logs: Path) -> Path:
        """Its output."""
        return logs / f"{self.name.replace(' ', '-')}.log"

    def over(self) -> bool:
        """Whether it has ended; one whose time is over is killed."""
        if self.process is None or self.ended:
            return True
        if self.process.poll() is None:
            if time.monotonic() - self.started < self.seconds:
                return False
            self.overdue = True
            self.kill()
        self.ended = time.monotonic()
        return True

    def kill(self) -> None:
        """End it and all that it started."""
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    @property
    def status(self) -> str:
        """`ok`, or how it ended."""
        if self.overdue:
            return f"FAILED: over {self.seconds:.0f} s"
        code = self.process.returncode if self.process else None
        if code is None:
            return "not begun: no time left"
        code = code - 128 if code > 128 else -code if code < 0 else None  # what `timeout` makes of signals
        if code is not None:
            return f"FAILED: {signal.Signals(code).name}" if code in set(signal.Signals) else f"FAILED: signal {code}"
        return "ok" if not self.process or not self.process.returncode else f"FAILED: exit {self.process.returncode}"

    @property
    def seconds_taken(self) -> float:
        """From its start to its end."""
        return max(0.0, self.ended - self.started)


def keep_log(task: Task, logs: Path, log: Path) -> str:
    """Append a task's output to the common log. Returns its last lines."""
    path = task.log(logs)
    text = path.read_text(errors="replace") if path.exists() else ""
    append(log, f"==== {task.name}: {task.status}, {task.seconds_taken:.1f} s\n{text[-MOST_OUTPUT:]}\n")
    return "\n".join(line[:300] for line in text.splitlines()[-12:])
