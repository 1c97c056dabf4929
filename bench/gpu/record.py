"""Results and logs of a check, readable at every moment: a line is appended whole, the archive is replaced whole."""

from __future__ import annotations

import contextlib
import json
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.rounding import rounded

RESULTS = "EEJAX_GPU_RESULTS"
"""Environment variable with the path of the file that `report` appends to."""
NAMES = ("results.jsonl", "log.txt", "table.txt")
ARCHIVE = "gpu-check.tgz"
MOST_BYTES = 12 * 2**20
"""Limit of the raw files in the archive, before compression."""


def report(stage: str, name: str, **found: Any) -> None:
    """Print one result as a line of JSON, and append it to the file that `RESULTS` names, if it is set."""
    line = json.dumps({"stage": stage, "name": name, **rounded(found)}, allow_nan=False)
    with contextlib.suppress(BrokenPipeError):  # the file is the result, even if the output is not read
        print(line, flush=True)
    if path := os.environ.get(RESULTS):
        append(Path(path), line + "\n")


def append(path: Path, text: str) -> None:
    """Append to a file in one write, which neither another writer nor a signal interrupts."""
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(file, text.encode())
    finally:
        os.close(file)


def results(out: Path) -> list[dict[str, Any]]:
    """All results so far. A later result replaces an earlier one with the same stage and name, in its place."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for line in (out / "results.jsonl").read_text(errors="replace").splitlines():
        try:
            one = json.loads(line)
            found[one["stage"], one["name"]] = one
        except (ValueError, KeyError, TypeError):
            continue  # not a result
    return list(found.values())


def pack(out: Path, work: Path) -> None:
    """Replace the archive: the files of `NAMES`, and files of `work/raw` up to `MOST_BYTES`."""
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
