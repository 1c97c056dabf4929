"""Processes with a time limit. Each one is killed with all its children, and its output is kept."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.gpu.record import append

POLL = 0.05
"""Seconds between two looks at a process."""
GRACE = 2.0
"""Seconds after its limit until a process ends by itself, in case its parent was killed."""
MOST_OUTPUT = 100_000
"""Characters of one process's output that the log keeps: the last ones."""
SHOWN_LINES, SHOWN_COLUMNS = 12, 300
"""Of a failed process's output that is printed at once."""


@dataclass(slots=True)
class Task:
    """A process.

    Attributes:
        name: in the log and in results.
        seconds: its limit.
        variables: added to the environment.
        started, ended: by `time.monotonic`; 0 before.
        overdue: it was killed at its limit.
    """

    name: str
    command: Sequence[str]
    seconds: float
    variables: Mapping[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    ended: float = 0.0
    overdue: bool = False

    def start(self, logs: Path) -> None:
        """Start the process, with its output in a file in `logs`."""
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
        """The file with its output."""
        return logs / f"{self.name.replace(' ', '-')}.log"

    def over(self) -> bool:
        """Whether it has ended. Kills it if its time is over."""
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
        """Kill it with its children."""
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    @property
    def status(self) -> str:
        """`ok`, or how it failed."""
        if self.process is None:
            return "not begun: no time left"
        if self.overdue:
            return f"FAILED: over {self.seconds:.0f} s"
        code = self.process.returncode
        if not code:
            return "ok"
        number = -code if code < 0 else code - 128  # `timeout` reports a signal as 128 more
        return f"FAILED: {signal.Signals(number).name}" if number in set(signal.Signals) else f"FAILED: exit {code}"

    @property
    def seconds_taken(self) -> float:
        """From its start to its end."""
        return max(0.0, self.ended - self.started)


def keep_log(task: Task, logs: Path, log: Path) -> str:
    """Append the output of a task to the common log. Returns its last lines."""
    path = task.log(logs)
    text = path.read_text(errors="replace") if path.exists() else ""
    append(log, f"==== {task.name}: {task.status}, {task.seconds_taken:.1f} s\n{text[-MOST_OUTPUT:]}\n")
    return "\n".join(line[:SHOWN_COLUMNS] for line in text.splitlines()[-SHOWN_LINES:])
