"""Files and folders that appear whole: written under a temporary name, then renamed."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from eejax.core.errors import CheckpointError


@contextmanager
def replacing_file(path: str | Path) -> Iterator[Path]:
    """A temporary file name to write to; the file replaces `path` at the end, and an error leaves `path` as it was.

    Raises:
        CheckpointError: the file cannot be written; the message names `path`.
    """
    path = Path(path)
    try:
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
            temporary = Path(folder) / path.name
            yield temporary
            temporary.chmod(0o644)
            temporary.replace(path)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror or error}") from error


@contextmanager
def replacing_folder(path: str | Path) -> Iterator[Path]:
    """A temporary sibling of `path` to fill; it replaces `path` at the end, and an error leaves `path` as it was."""
    path = Path(path).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        temporary.chmod(0o755)
        yield temporary
        old = temporary.with_name(temporary.name + ".old")
        if path.exists():
            path.rename(old)
        temporary.rename(path)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
