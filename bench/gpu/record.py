"""Figures and logs of a check, readable at every moment: lines are appended whole, the archive is replaced whole."""

from __future__ import annotations

import contextlib
import json
import math
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RESULTS = "EEJAX_GPU_RESULTS"
"""Environment variable that names the file which `report` appends to."""
NAMES = ("results.jsonl", "log.txt", "table.txt")
ARCHIVE = "gpu-check.tgz"
MOST_BYTES = 12 * 2**20
"""Of other files in the archive, before compression."""


def report(stage: str, name: str, **found: Any) -> None:
    """Add one result: a line of JSON, on standard output and in the file of `RESULTS`."""
    line = json.dumps({"stage": stage, "name": name, **_rounded(found)}, allow_nan=False)
    with contextlib.suppress(BrokenPipeError):  # nobody reads any more, and the file is what counts
        print(line, flush=True)
    if path := os.environ.get(RESULTS):
        append(Path(path), line + "\n")


def append(path: Path, text: str) -> None:
    """Add to a file in one write, which no other writer and no signal takes apart."""
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(file, text.encode())
    finally:
        os.close(file)


def _rounded(value: Any) -> Any:
    """Floats to six significant digits; what is no number becomes null."""
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(one) for one in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def results(out: Path) -> list[dict[str, Any]]:
    """What was reported so far, in order; of two reports of the same stage and name the later one, in its place."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for line in (out / "results.jsonl").read_text(errors="replace").splitlines():
        try:
            one = json.loads(line)
            found[one["stage"], one["name"]] = one
        except (ValueError, KeyError, TypeError):
            continue  # a line of something else
    return list(found.values())


def pack(out: Path, work: Path) -> None:
    """Write the archive anew: the files of `NAMES`, and what stages left in `work/raw`, as far as there is room."""
    part = out / f"{ARCHIVE}.part"
    with tarfile.open(part, "w:gz", compresslevel=3) as archive:
        for name in NAMES:
            if (out / name).exists():
                archive.add(out / name, f"gpu-check/{name}")
        for path in _small(work / "raw"):
            archive.add(path, f"gpu-check/raw/{path.relative_to(work / 'raw')}")
    part.replace(out / ARCHIVE)


def _small(folder: Path) -> Iterator[Path]:
    """Files below `folder`, the newest first, as long as their sizes add up to no more than `MOST_BYTES`."""
    files = [(path, path.stat()) for path in folder.rglob("*") if path.is_file()]
    left = MOST_BYTES
    for path, facts in sorted(files, key=lambda one: -one[1].st_mtime):
        if facts.st_size <= left:
            left -= facts.st_size
            yield path
