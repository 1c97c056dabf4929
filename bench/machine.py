"""What the machine can do at best, measured in the same run as the benchmark, and what it is."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp

GIB = 2**30
COLUMNS = 2048
ARITHMETIC_SIZE = 2048


def _best_seconds(run: Callable[[], object], repeats: int) -> float:
    jax.block_until_ready(run())
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        best = min(best, time.perf_counter() - start)
    return best


@jax.jit
def _sums(arrays: list[jax.Array]) -> list[jax.Array]:
    return [jnp.sum(array, dtype=jnp.float32) for array in arrays]


@jax.jit
def _products(arrays: list[jax.Array], x: jax.Array) -> list[jax.Array]:
    return [array @ x for array in arrays]


def read_bandwidth(total_bytes: int, dtype: str = "float32", repeats: int = 8) -> float:
    """Bytes per second that the device reads: the best of `repeats` passes over `total_bytes` of arrays.

    Two compiled passes compete, a sum of every array and a product of every array with a vector, which is what decoding
    at batch 1 does; both use all threads that the backend uses. A working set well above the last-level cache
    measures memory, a smaller one the cache.
    """
    itemsize = jnp.dtype(dtype).itemsize
    count = min(16, max(1, total_bytes // (32 * 2**20)))
    rows = max(1, total_bytes // (count * COLUMNS * itemsize))
    arrays = [jnp.full((rows, COLUMNS), i + 1, dtype) for i in range(count)]
    x = jnp.ones((COLUMNS,), dtype)
    jax.block_until_ready(arrays)
    seconds = min(_best_seconds(partial(_sums, arrays), repeats), _best_seconds(partial(_products, arrays, x), repeats))
    return count * rows * COLUMNS * itemsize / seconds


def arithmetic_rate(dtype: str = "float32", repeats: int = 8) -> float:
    """Operations per second of a square matrix product, the best of `repeats`."""
    # A GPU multiplies what keeps a CPU busy in the time that a launch takes.
    size = ARITHMETIC_SIZE if jax.default_backend() == "cpu" else 4 * ARITHMETIC_SIZE
    a = jnp.ones((size, size), dtype)
    multiply = jax.jit(lambda a, b: jnp.dot(a, b, preferred_element_type=jnp.float32))
    return 2 * size**3 / _best_seconds(partial(multiply, a, a), repeats)


def last_level_cache_bytes() -> int:
    """Size of the largest CPU cache as Linux reports it; 0 where it does not, or on another device."""
    if jax.default_backend() != "cpu":
        return 0
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        unit = {"K": 2**10, "M": 2**20, "G": 2**30}.get(text[-1:], 0)
        sizes.append(int(text[:-1]) * unit if unit else 0)
    return max(sizes)


def cpu_model() -> str:
    """Name of the processor."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _git(*arguments: str) -> str | None:
    """A git command's output in this repository, None outside one or without git."""
    try:
        done = subprocess.run(
            ("git", *arguments), cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def provenance() -> dict[str, object]:
    """When, where and with what a result was made."""
    status = _git("status", "--porcelain", "--untracked-files=no")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": f"{jax.default_backend()}: {jax.devices()[0].device_kind}",
        "cpu_model": cpu_model(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": None if status is None else bool(status),
    }
