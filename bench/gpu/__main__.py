"""The stages of `bench/gpu_check.sh`, one after another: `python -m bench.gpu --out DIR --work DIR [--dry-run]`.

This process needs only Python itself: where JAX or another package is missing, the stages that need it fail alone.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.gpu import record, table
from bench.gpu.tasks import POLL, Task, keep_log

TOTAL = 400.0
"""Seconds for all stages; the script itself ends before 420."""
LEAST = 5.0
"""Seconds without which no process is started."""
AT_ONCE = 4
"""Processes of one stage that run at the same time."""
KERNELS = ("attention", "fill")
LARGE_RUNS = ("full", "eager-cond", "deferred-cond", "eager-while", "asked")
BATCH_RUNS = ("full", "eager-cond", "asked")
GRAPHS = "--xla_gpu_enable_command_buffer=+WHILE,+CONDITIONAL"
TEST_FILES = ("tests/kernels/test_paged_attention.py", "tests/kernels/test_kv_fill.py")


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a check runs. A dry run has the same stages at tiny shapes.

    Attributes:
        smoke: models (of `bench.kernels.fill`) whose shapes every kernel is tried at.
        large, batch: the model of the decoding stages, and the rows of the second one.
        last: model and rows of the decoding stage for which time may be left.
        ahead: compile the programs of the decoding stages before they are needed.
        tests: arguments of pytest.
    """

    smoke: tuple[str, ...]
    large: str
    batch: int
    last: tuple[str, int]
    ahead: bool
    tests: tuple[str, ...]


GPU = Sizes(
    smoke=("llama-3-8b", "llama-2-7b", "llama-3.2-1b", "qwen3-0.6b"),
    large="llama-7b",
    batch=32,
    last=("llama-1b", 1),
    ahead=True,
    tests=("-m", "gpu", "-n", "4", "--timeout", "40"),
)
DRY = Sizes(
    smoke=("tiny",),
    large="tiny",
    batch=2,
    last=("tiny", 1),
    ahead=False,
    tests=("-k", "interpreted and layer_and_scale", "-n", "2"),
)


class Stopped(Exception):
    """The check was told to end."""


class Check:
    """All stages. The four files go to `out`, everything else to `work`."""

    def __init__(self, out: Path, work: Path, dry: bool, total: float) -> None:
        self.out, self.work, self.dry = out, work, dry
        self.sizes = DRY if dry else GPU
        self.broken: set[str] = set()
        self._end = time.monotonic() + total
        self._running: list[Task] = []

    def run(self) -> None:
        """Run every stage that time allows, whatever became of those before it."""
        sizes = self.sizes
        self.wheels()
        self.stage([self.task("environment", [], 30)])
        self.smoke()
        ahead = self.compile_ahead() if sizes.ahead else []
        self.demo()
        self.finish("compile-ahead", ahead)
        self.small()
        for kernel in KERNELS:
            without = ["--without", "mosaic"] if kernel in self.broken else []
            self.stage([self.task(kernel, [kernel, "--seconds", "38", *without], 48, module="kernels")])
        self.decode("decode", (sizes.large, 1), LARGE_RUNS, 80)
        self.stage([self.task("profile", ["--model", sizes.large, "--raw", str(self.work / "raw")], 45)])
        self.decode("decode batch", (sizes.large, sizes.batch), BATCH_RUNS, 60)
        self.tests()
        self.decode("decode last", sizes.last, ("full", "eager-cond"), 60)

    def close(self) -> None:
        """Kill what still runs, and leave every file readable."""
        for task in self._running:
            task.kill()
            task.over()
            keep_log(task, self.work / "logs", self.out / "log.txt")
        self._running = []
        self._save()

    # ------------------------------------------------------------------------------------------------- running a stage

    def task(self, name: str, arguments: Sequence[str], seconds: float, module: str = "", **variables: str) -> Task:
        """The process of a stage. No kernel is used that has failed before."""
        command = [sys.executable, "-m", f"bench.gpu.{module or name}", *arguments, *["--dry-run"] * self.dry]
        return Task(name, command, seconds, self._kernels() | variables)

    def stage(self, tasks: list[Task], name: str = "") -> None:
        """Run tasks, `AT_ONCE` at a time, and report the status of each, or of all of them under one name."""
        todo = list(tasks)
        while todo or any(task in self._running for task in tasks):
            while todo and sum(task in self._running for task in tasks) < AT_ONCE:
                self._start(todo.pop(0))
            self._reap()
            time.sleep(POLL)
        for part, several in ((name, tasks),) if name else ((task.name, [task]) for task in tasks):
            self._report(part, several)
        self._save()

    def finish(self, name: str, tasks: list[Task]) -> None:
        """Wait for tasks that were started before, and report them under one name."""
        while any(task in self._running for task in tasks):
            self._reap()
            time.sleep(POLL)
        if tasks:
            self._report(name, tasks)

    def _kernels(self) -> dict[str, str]:
        return {"EEJAX_KERNELS": "xla"} if self.broken else {}

    def _start(self, task: Task) -> None:
        left = self._end - time.monotonic()
        if left >= LEAST:
            task.seconds = min(task.seconds, left)
            task.start(self.work / "logs")
            self._running.append(task)

    def _reap(self) -> None:
        """Remove tasks that have ended, and print the end of the output of those that failed."""
        for task in [task for task in self._running if task.over()]:
            self._running.remove(task)
            last = keep_log(task, self.work / "logs", self.out / "log.txt")
            if task.status != "ok":
                print(f"-- {task.name}: {task.status}\n{last}", flush=True)

    def _report(self, name: str, tasks: list[Task]) -> None:
        failed = [task for task in tasks if task.status != "ok"]
        wrong = [task.status if len(tasks) == 1 else f"{task.name}: {task.status}" for task in failed]
        begun = [task for task in tasks if task.started]
        seconds = max(task.ended for task in begun) - min(task.started for task in begun) if begun else 0.0
        record.report("stages", name, status="; ".join(wrong) or "ok", seconds=seconds)

    def _save(self) -> None:
        found = record.results(self.out)
        (self.out / "table.txt").write_text("\n".join(table.lines(found, self.dry)) + "\n")
        record.pack(self.out, self.work)

    # ------------------------------------------------------------------------------------------------------ the stages

    def wheels(self) -> None:
        """Install the packages that this machine lacks, if wheels came along."""
        folder, site = Path(".gpu-wheels"), self.work / "site"
        if folder.is_dir():
            self.stage([Task("wheels", [sys.executable, "-m", "bench.gpu.wheels", str(folder), str(site)], 40)])
        if site.is_dir():
            os.environ["PYTHONPATH"] = f"{site}:{os.environ['PYTHONPATH']}"

    def smoke(self) -> None:
        """Try every kernel at every shape. A sanitizer runs at the first shape where one fails."""
        names = [f"{kernel} {model}" for model in self.sizes.smoke for kernel in KERNELS]
        tasks = [self.task(f"smoke {name}", name.split(), 60 if self.dry else 30, module="smoke") for name in names]
        self.stage(tasks, "smoke")
        failed = [task for task in tasks if task.status != "ok"]
        if not failed:
            return
        self.broken = {task.name.split()[1] for task in failed}
        record.report("smoke", "switched off", kernels=sorted(self.broken))
        if tool := shutil.which("compute-sanitizer"):
            command = [tool, "--tool", "memcheck", "--print-limit", "5", *failed[0].command]
            self.stage([Task("sanitizer", command, 45)])
        else:
            record.report("stages", "sanitizer", status="compute-sanitizer is not installed", seconds=0.0)

    def compile_ahead(self) -> list[Task]:
        """Start compiling the programs of the decoding stages. The stages meanwhile measure nothing."""
        wanted = [(1, run) for run in LARGE_RUNS] + [(self.sizes.batch, run) for run in BATCH_RUNS]
        tasks = []
        for batch, run in wanted:
            arguments = ["--model", self.sizes.large, "--batch", str(batch), "--runs", run, "--compile-only"]
            tasks.append(self.task(f"compile {batch} {run}", arguments, 110, module="decoding"))
            self._start(tasks[-1])
        return tasks

    def demo(self) -> None:
        """Answer prompts with the demo model, and compare the answers."""
        runs = ("xla", "float32") if self.broken else ("mosaic", "xla", "float32")
        tasks = [self.task(f"demo {run}", [run], 120 if self.dry else 70, module="demo") for run in runs]
        self.stage(tasks, "demo")
        if all(task.status == "ok" for task in tasks):
            self.stage([self.task("compared", ["compare"], 20, module="demo")])

    def small(self) -> None:
        """Small measurements; those of branches also with loops in CUDA graphs."""
        flags = f"{os.environ.get('XLA_FLAGS', '')} {GRAPHS}".strip()
        self.stage([self.task("small", [], 45)])
        self.stage([self.task("branches", ["--only-branches", "+WHILE"], 20, module="small", XLA_FLAGS=flags)])

    def decode(self, name: str, size: tuple[str, int], runs: Sequence[str], seconds: float) -> None:
        """Measure decoding of a model with a number of rows."""
        arguments = ["--model", size[0], "--batch", str(size[1]), "--runs", ",".join(runs)]
        self.stage([self.task(name, arguments, seconds, module="decoding")])

    def tests(self) -> None:
        """Run the suites of the kernels on the device. No warning fails a test."""
        warnings = ("-W", "default", "-o", "filterwarnings=default", "-o", "minversion=7", "-p", "no:cacheprovider")
        command = [sys.executable, "-m", "pytest", "-q", *warnings, *self.sizes.tests, *TEST_FILES]
        task = Task("tests", command, 70, self._kernels())
        self.stage([task])
        log = task.log(self.work / "logs")
        lines = log.read_text(errors="replace").splitlines() if log.exists() else []
        failed = [line[:160] for line in lines if line.startswith(("FAILED", "ERROR"))]
        record.report("tests", "pytest", last=lines[-1][:160] if lines else "", failed=failed[:20])


def main(arguments: list[str]) -> int:
    """Returns the exit status: 0 where every stage succeeded."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu")
    parser.add_argument("--out", type=Path, required=True, help="folder of the four files")
    parser.add_argument("--work", type=Path, required=True, help="folder for everything else")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes, kernels interpreted")
    parser.add_argument("--seconds", type=float, default=TOTAL, help="for all stages (%(default)s)")
    args = parser.parse_args(arguments)
    os.environ[record.RESULTS] = str(args.out / "results.jsonl")

    def stop(number: int, _: object) -> None:
        raise Stopped(signal.Signals(number).name)

    for one in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(one, stop)
    check = Check(args.out, args.work, args.dry_run, args.seconds)
    try:
        check.run()
    except Stopped as why:
        record.report("stages", "all", status=f"stopped by {why}", seconds=0.0)
    finally:
        check.close()
    with contextlib.suppress(BrokenPipeError):
        print((args.out / "table.txt").read_text(), end="", flush=True)
    stages = [one for one in record.results(args.out) if one["stage"] == "stages"]
    return int(any(one["status"] != "ok" for one in stages))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
