"""Conversion from Hugging Face: `python -m bench convert --random llama-1b`.

A random model is written as a Hugging Face folder once. Then `checkpoints/convert_hf.py` turns it into a checkpoint and
back, each in a process of its own, in turn with plain copying of the same files, the ceiling; medians over the rounds.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from bench import machine
from bench.common import at_least, finish, median, options_of
from bench.shapes import SHAPES, shape
from eejax.core import ModelConfig
from eejax.model import LazyArray, count_params, leaves, param_shapes
from eejax.model.huggingface import write_config, write_folder, write_leaves

SCRIPT = Path(__file__).parents[1] / "checkpoints" / "convert_hf.py"
GB, MB = 1e9, 1e6


@dataclass(frozen=True, slots=True)
class Run:
    """Wall time of one process, in seconds, and the most memory it had resident, in bytes."""

    seconds: float
    peak_bytes: int


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(prog="python -m bench convert", description=(__doc__ or "").partition("\n")[0])
    found.add_argument("--random", choices=sorted(SHAPES), default="llama-1b", help="shape of the model (%(default)s)")
    found.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="as stored")
    found.add_argument("--max-shard-bytes", type=at_least(1), default=2**40, help="of the source's files (one file)")
    found.add_argument("--num-iters", type=at_least(1), default=5, help="rounds (%(default)s)")
    found.add_argument("--folder", type=Path, help="where there is room (the system's temporary folder)")
    found.add_argument("--seed", type=at_least(0), default=0, help="of the weights (%(default)s)")
    found.add_argument("--output-json", type=Path, metavar="FILE", help="write the result here too")
    return found


def write_random(folder: Path, config: ModelConfig, dtype: str, max_shard_bytes: int, seed: int) -> None:
    """A Hugging Face folder of normal weights of scale 0.02."""

    def drawn(number: int, like: jax.ShapeDtypeStruct) -> LazyArray:
        def read() -> np.ndarray:
            values = np.random.default_rng([seed, number]).standard_normal(like.shape, dtype=np.float32)
            return (np.float32(0.02) * values).astype(jnp.dtype(dtype))

        return LazyArray(like.shape, np.dtype(jnp.dtype(dtype)), read)

    found = {name: drawn(number, leaf) for number, (name, leaf) in enumerate(leaves(param_shapes(config)))}
    write_config(folder, config)
    write_folder(folder, write_leaves(config, found), max_shard_bytes)


# A process begins with the peak of the one that forked it, so a small one stands between.
LAUNCHER = """
import os, sys, time
start = time.perf_counter()
child = os.posix_spawnp(sys.argv[1], sys.argv[1:], os.environ)
_, status, usage = os.wait4(child, 0)
print(time.perf_counter() - start, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024))
sys.exit(os.waitstatus_to_exitcode(status))
"""


def run(*command: str | Path) -> Run:
    """Run a command to its end. Raises `subprocess.CalledProcessError` when it fails."""
    launcher = [sys.executable, "-S", "-c", LAUNCHER, *map(str, command)]
    done = subprocess.run(launcher, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
    seconds, peak = done.stdout.split()
    return Run(float(seconds), int(peak))


def rounds(folder: Path, count: int) -> Iterator[dict[str, Run]]:
    """Copy, convert and reverse the model in `folder / "hf"`, `count` times."""
    for _ in range(count):
        found = {}
        for name, command in (
            ("copy", ("cp", "-r", folder / "hf", folder / "copy")),
            ("convert", (sys.executable, SCRIPT, folder / "hf", folder / "convert")),
            ("reverse", (sys.executable, SCRIPT, folder / "convert", folder / "reverse", "--reverse")),
        ):
            found[name] = run(*command)
        for name in found:
            shutil.rmtree(folder / name)
        yield found


def main(arguments: list[str]) -> None:
    """Run it and print the table."""
    args = parser().parse_args(arguments)
    config = shape(args.random, ())
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        (folder / "hf").mkdir()
        write_random(folder / "hf", config, args.dtype, args.max_shard_bytes, args.seed)
        stored = sum(file.stat().st_size for file in (folder / "hf").iterdir())
        measured = list(rounds(folder, args.num_iters))
    modes = {name: [one[name] for one in measured] for name in measured[0]}
    result: dict[str, Any] = {
        "benchmark": "convert",
        "options": options_of(args),
        "machine": machine.provenance(),
        "parameters": count_params(param_shapes(config)),
        "stored_bytes": stored,
        "modes": {
            name: {
                "seconds": median([one.seconds for one in runs]),
                "gb_per_s": stored / GB / median([one.seconds for one in runs]),
                "peak_bytes": max(one.peak_bytes for one in runs),
                "rounds": [one.seconds for one in runs],
            }
            for name, runs in modes.items()
        },
    }
    _show(result)
    finish(result, args.output_json)


def _show(result: dict[str, Any]) -> None:
    stored = result["stored_bytes"]
    table = Table()
    for column in ("", "s", "GB/s", "peak memory, MB", "of the stored size"):
        table.add_column(column, justify="right" if column else "left")
    for name, mode in result["modes"].items():
        peak = mode["peak_bytes"]
        figures = (mode["seconds"], ".1f"), (mode["gb_per_s"], ".2f"), (peak / MB, ".0f"), (peak / stored, ".2f")
        table.add_row(name, *(f"{figure:{form}}" for figure, form in figures))
    console = Console(highlight=False)
    console.print(f"{result['parameters'] / 1e9:.2f} billion parameters, {stored / GB:.2f} GB as safetensors")
    console.print(table)
