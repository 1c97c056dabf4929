"""The code that one default request runs, by module: `python -m bench path`.

The demo is opened and one request answered (greedy, fcfs, CPU, end tokens ignored) in a fresh process with an empty
cache folder, so kernels are built and programs compiled as on a first start. `sys.monitoring` reports every function
that starts. A module counts with all its lines when at least one of its functions ran: what a reader has to know in
order to follow the request. Modules of which only the module body ran (imports, constants, classes), or a `__getattr__`
that imports a public name when it is first used, are counted apart. On commit e2a8ed9 this gives 42 modules and 7,297
lines of `eejax/`, with `pallas_kernels/` 51 and 8,463.
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import CodeType
from typing import Any

# Nothing of eejax is imported here: the fresh process runs this file, and only what the request imports may count.
ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("eejax", "pallas_kernels")
MODEL = "checkpoints/demo"
PROMPT = "What does `git stash` do?"
MAX_TOKENS = 16
TIME_LIMIT = 900.0


def record(root: Path, model: str) -> dict[str, int]:
    """Answer the request in this process. Returns by file, relative to `root`, how many of its functions ran.

    A file of which only the bodies of module and classes and `__getattr__` ran has 0. Files outside of `PACKAGES` are
    left out.
    """
    ran: dict[str, set[tuple[str, int]]] = {}
    monitoring = sys.monitoring
    tool = monitoring.PROFILER_ID
    folders = tuple(str(root / package) + os.sep for package in PACKAGES)

    def started(code: CodeType, _: int) -> object:
        if code.co_filename.startswith(folders):
            functions = ran.setdefault(code.co_filename, set())
            # Bodies of modules and classes are not optimised code.
            if code.co_flags & inspect.CO_OPTIMIZED and code.co_qualname != "__getattr__":
                functions.add((code.co_qualname, code.co_firstlineno))
        return monitoring.DISABLE  # the first call is all that counts

    monitoring.use_tool_id(tool, "bench path")
    monitoring.register_callback(tool, monitoring.events.PY_START, started)
    monitoring.set_events(tool, monitoring.events.PY_START)
    from eejax import LLM, SamplingParams

    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True)
    LLM(root / model).generate(PROMPT, params, use_tqdm=False)
    monitoring.set_events(tool, 0)
    monitoring.free_tool_id(tool)
    return {str(Path(file).relative_to(root)): len(functions) for file, functions in ran.items()}


def recorded(root: Path, model: str) -> dict[str, int]:
    """`record` in a fresh process with an empty cache folder.

    Raises:
        RuntimeError: the process failed; its last words are in the message.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "ran.json")
        settings = {"PYTHONPATH": str(root), "EEJAX_CACHE_DIR": str(Path(folder, "cache")), "JAX_PLATFORMS": "cpu"}
        # -P keeps bench/ itself off the path, where its module names could hide others.
        command = [sys.executable, "-P", __file__, str(root), model, str(out)]
        done = subprocess.run(
            command,
            cwd=root,
            env=os.environ | settings,
            capture_output=True,
            text=True,
            timeout=TIME_LIMIT,
            check=False,
        )
        if done.returncode != 0:
            raise RuntimeError(f"the request failed: {done.stderr.strip()[-2000:]}")
        return json.loads(out.read_text())


def counted(root: Path, ran: Mapping[str, int]) -> dict[str, Any]:
    """Modules with their lines and the functions that ran, by package, and totals with and without bare modules."""
    found: dict[str, Any] = {}
    for package in PACKAGES:
        modules = [
            {"file": file, "lines": len((root / file).read_text().splitlines()), "functions": functions}
            for file, functions in sorted(ran.items())
            if file.startswith(package + os.sep)
        ]
        found[package] = {"modules": modules, **totals(modules)}
    every = [module for package in PACKAGES for module in found[package]["modules"]]
    return {"packages": found, "all": totals(every)}


def totals(modules: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """Number and lines of the modules of which a function ran, and of all that were imported."""
    ran = [module for module in modules if module["functions"]]
    return {
        name: {"modules": len(some), "lines": sum(module["lines"] for module in some)}
        for name, some in (("ran", ran), ("imported", modules))
    }


def over(found: Mapping[str, Any], at_most_modules: int | None, at_most_lines: int | None) -> list[str]:
    """What of `eejax/` exceeds its limit, in words."""
    ran = found["packages"]["eejax"]["ran"]
    limits = (("modules", at_most_modules), ("lines", at_most_lines))
    return [
        f"eejax: {ran[name]} {name}, at most {most}" for name, most in limits if most is not None and ran[name] > most
    ]


def show(found: Mapping[str, Any]) -> None:
    """Print the modules and the totals."""
    print(f"{'lines':>6} {'functions':>9}  module")
    for package in found["packages"].values():
        for module in package["modules"]:
            functions = module["functions"] or "-"
            print(f"{module['lines']:>6} {functions:>9}  {module['file']}")
    print("\n-: only the module body ran\n")
    for name, total in (*found["packages"].items(), ("together", found["all"])):
        ran, imported = total["ran"], total["imported"]
        print(
            f"{name:<15} {ran['modules']:>3} modules, {ran['lines']:>6,} lines ran; with the bare ones "
            f"{imported['modules']:>3} modules, {imported['lines']:>6,} lines"
        )


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(prog="python -m bench path", description=(__doc__ or "").partition("\n")[0])
    found.add_argument("--root", type=Path, default=ROOT, help="another checkout to count (this one)")
    found.add_argument("--model", default=MODEL, help="checkpoint folder below the root (%(default)s)")
    found.add_argument("--at-most-modules", type=int, metavar="N", help="exit code 1 if more modules of eejax/ ran")
    found.add_argument("--at-most-lines", type=int, metavar="N", help="exit code 1 if they have more lines")
    found.add_argument("--json", action="store_true", help="print JSON instead of the table")
    return found


def main(arguments: list[str]) -> int:
    """Run the count. Returns 1 if a limit is exceeded."""
    args = parser().parse_args(arguments)
    root = args.root.resolve()
    found = counted(root, recorded(root, args.model))
    if args.json:
        print(json.dumps(found))
    else:
        show(found)
    exceeded = over(found, args.at_most_modules, args.at_most_lines)
    for line in exceeded:
        print(line, file=sys.stderr)
    return 1 if exceeded else 0


if __name__ == "__main__":
    Path(sys.argv[3]).write_text(json.dumps(record(Path(sys.argv[1]), sys.argv[2])))
