"""The stages of `bench/gpu_check.sh`, one after the other: `python -m bench.gpu --out DIR --work DIR [--dry-run]`.

Needs nothing but Python itself, and neither JAX nor the project's packages: a stage that lacks something fails alone.
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
from pathlib import Path

from bench.gpu import record, table
from bench.gpu.tasks import POLL, Task, keep_log

TOTAL = 400.0
"""Seconds after which no stage runs any more; the script itself ends at 420."""
AT_ONCE = 4
SMOKE = [f"{kernel} {model}" for model in ("llama-3-8b", "llama-2-7b", "llama-3.2-1b", "qwen3-0.6b")
         for kernel in ("attention", "fill")]  # fmt: skip
DRY_SMOKE = ["attention tiny", "fill tiny"]
LARGE_RUNS = ["full", "eager-cond", "deferred-cond", "eager-while", "asked"]
BATCH_RUNS = ["full", "eager-cond", "asked"]
GRAPHS = {"XLA_FLAGS": "--xla_gpu_enable_command_buffer=+WHILE,+CONDITIONAL"}


class Stopped(Exception):
    """The check was told to end."""


class Check:
    """All stages. `out` gets the four files, `work` all else."""

    def __init__(self, out: Path, work: Path, dry: bool, total: float) -> None:
        self.out, self.work, self.dry = out, work, dry
        self._end = time.monotonic() + total
        self._running: list[Task] = []
        self._kernels: dict[str, str] = {}  # variables of later stages
        self._broken: set[str] = set()

    def run(self) -> None:
        """Every stage that time allows, whatever became of those before it."""
        self._wheels()
        self._stage([self._task("environment", [], 30)])
        self._large = "tiny" if self.dry else "llama-7b"
        self._smoke()
        ahead = self._compile_ahead()
        self._demo()
        self._finish("compile-ahead", ahead)
        self._small()
        for op in ("attention", "fill"):
            without = ["--without", "mosaic"] if op in self._broken else []
            self._stage([self._task(op, [op, "--seconds", "38", *without], 48, module="kernels")])
        self._decode(self._large, 1, LARGE_RUNS, 80)
        raw = str(self.work / "raw")
        self._stage([self._task("profile", ["--model", self._large, "--raw", raw], 45)])
        self._decode(self._large, 2 if self.dry else 32, BATCH_RUNS[:2] if self.dry else BATCH_RUNS, 60)
        self._tests()
        self._decode("tiny" if self.dry else "llama-1b", 1, ["full", "eager-cond"], 60, again="once more" * self.dry)

    def close(self) -> None:
        """End what still runs, and leave everything readable."""
        for task in self._running:
            task.kill()
            task.over()
            keep_log(task, self.work / "logs", self.out / "log.txt")
        self._running = []
        self._save()

    def _task(self, name: str, arguments: Sequence[str], seconds: float, module: str = "", **variables: str) -> Task:
        """A stage's process."""
        command = [sys.executable, "-m", f"bench.gpu.{module or name}", *arguments, *["--dry-run"] * self.dry]
        return Task(name, command, seconds, self._kernels | variables)

    def _stage(self, tasks: list[Task], name: str = "") -> list[Task]:
        """Run tasks, some at a time, and report each, or all of them under one name."""
        todo = list(tasks)
        while todo or any(task in self._running for task in tasks):
            while todo and sum(task in self._running for task in tasks) < AT_ONCE:
                self._start(todo.pop(0))
            self._reap(name)
            time.sleep(POLL)
        if name:
            self._report(name, tasks)
        self._save()
        return tasks

    def _start(self, task: Task) -> None:
        left = self._end - time.monotonic()
        if left < 5:
            self._report(task.name, [task])
            return
        task.seconds = min(task.seconds, left)
        task.start(self.work / "logs")
        self._running.append(task)

    def _reap(self, name: str = "") -> None:
        """Take leave of tasks that have ended; what went wrong is printed at once."""
        for task in [task for task in self._running if task.over()]:
            self._running.remove(task)
            last = keep_log(task, self.work / "logs", self.out / "log.txt")
            if task.status != "ok":
                print(f"-- {task.name}: {task.status}\n{last}", flush=True)
            if not name:
                self._report(task.name, [task])

    def _report(self, name: str, tasks: list[Task]) -> None:
        """How a stage ended."""
        wrong = [f"{task.name}: {task.status}" if len(tasks) > 1 else task.status for task in tasks]
        wrong = [one for one in wrong if not one.endswith("ok")]
        begun = [task.started for task in tasks if task.started]
        seconds = max(task.ended for task in tasks) - min(begun) if begun else 0.0
        record.report("stages", name, status="; ".join(wrong) or "ok", seconds=max(0.0, seconds))

    def _save(self) -> None:
        found = record.results(self.out)
        (self.out / "table.txt").write_text("\n".join(table.lines(found, self.dry)) + "\n")
        record.pack(self.out, self.work)

    def _finish(self, name: str, tasks: list[Task]) -> None:
        """Wait for tasks that were begun before."""
        while any(task in self._running for task in tasks):
            self._reap(name)
            time.sleep(POLL)
        if tasks:
            self._report(name, tasks)

    def _wheels(self) -> None:
        folder, site = Path(".gpu-wheels"), self.work / "site"
        if folder.is_dir():
            self._stage([Task("wheels", [sys.executable, "-m", "bench.gpu.wheels", str(folder), str(site)], 40)])
        if site.is_dir():
            os.environ["PYTHONPATH"] = f"{site}:{os.environ['PYTHONPATH']}"

    def _smoke(self) -> None:
        """A kernel that fails at any shape is not used any more; a sanitizer looks at the first such shape."""
        names = DRY_SMOKE if self.dry else SMOKE
        tasks = [self._task(f"smoke {name}", name.split(), 60 if self.dry else 30, module="smoke") for name in names]
        self._stage(tasks, "smoke")
        wrong = [task for task in tasks if task.status != "ok"]
        if not wrong:
            return
        self._broken = {task.name.split()[1] for task in wrong}
        self._kernels = {"EEJAX_KERNELS": "xla"}
        record.report("smoke", "switched off", kernels=sorted(self._broken))
        if tool := shutil.which("compute-sanitizer"):
            command = [tool, "--tool", "memcheck", "--print-limit", "5", *wrong[0].command]
            self._stage([Task("sanitizer", command, 45)])
        else:
            record.report("stages", "sanitizer", status="compute-sanitizer is not installed", seconds=0.0)

    def _compile_ahead(self) -> list[Task]:
        """Programs of the decoding stages, compiled while the demo answers: nothing is measured then."""
        if self.dry:
            return []
        large, batch = self._large, "32"
        wanted = [("1", one) for one in LARGE_RUNS] + [(batch, one) for one in BATCH_RUNS]
        tasks = []
        for size, run in wanted:
            arguments = ["--model", large, "--batch", size, "--runs", run, "--compile-only"]
            tasks.append(self._task(f"compile {size} {run}", arguments, 110, module="decoding"))
            self._start(tasks[-1])
        return tasks

    def _demo(self) -> None:
        runs = ("xla", "float32") if self._broken else ("mosaic", "xla", "float32")
        tasks = [self._task(f"demo {run}", [run], 120 if self.dry else 70, module="demo") for run in runs]
        self._stage(tasks, "demo")
        if all(task.status == "ok" for task in tasks):
            self._stage([self._task("compared", ["compare"], 20, module="demo")])

    def _small(self) -> None:
        self._stage([self._task("small", [], 45)])
        more = self._task("branches", ["--only-branches", "+WHILE"], 20, module="small", **GRAPHS)
        if not self.dry:
            self._stage([more])

    def _decode(self, model: str, batch: int, runs: list[str], seconds: float, again: str = "") -> None:
        arguments = ["--model", model, "--batch", str(batch), "--runs", ",".join(runs)]
        name = " ".join(filter(None, ("decode", model, str(batch), again)))
        self._stage([self._task(name, arguments, seconds, module="decoding")])

    def _tests(self) -> None:
        """The suites of the kernels on the device; warnings judge nothing."""
        files = ["tests/test_paged_attention.py", "tests/test_kv_fill.py"]
        chosen = ["-k", "interpreted and layer_and_scale"] if self.dry else ["-m", "gpu"]
        command = [sys.executable, "-m", "pytest", "-q", "-n", "2" if self.dry else "4", "-W", "default"]
        command += ["-o", "minversion=7", "-o", "filterwarnings=default", "-p", "no:cacheprovider"]
        if not self.dry:
            command += ["--timeout", "40"]
        self._stage([Task("tests", [*command, *chosen, *files], 70 if not self.dry else 60, self._kernels)])
        log = self.work / "logs" / "tests.log"
        lines = log.read_text(errors="replace").splitlines() if log.exists() else []
        failed = [line[:160] for line in lines if line.startswith(("FAILED", "ERROR"))]
        record.report("tests", "pytest", last=lines[-1][:160] if lines else "", failed=failed[:20])


def main(arguments: list[str]) -> int:
    """Returns the exit status: 0 where every stage succeeded."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--dry-run", action="store_true")
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
