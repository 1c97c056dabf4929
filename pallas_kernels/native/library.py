"""The compiled kernels: built on first use, kept on disk, registered with XLA."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from pathlib import Path

import jax

from pallas_kernels.disk_cache import cache_folder, processor

HERE = Path(__file__).parent
SOURCES = ("threads.c", "linear.c", "tiles.c", "head.c", "attention.c", "write.c")
HEADERS = ("kernels.h", "columns.h", "product.h")
TARGETS = ("eejax_linear", "eejax_head", "eejax_paged_attention", "eejax_write")
COMPILERS = ("cc", "gcc", "clang")
TIME_LIMIT = 300.0
"""Seconds that the compiler may take."""


@functools.cache
def refusal() -> str | None:
    """Why the kernels cannot run in this process; None if they are loaded and registered."""
    if platform.system() == "Windows":
        return "they need a C compiler that knows GCC's vector extensions, and this is Windows"
    try:
        library = _loaded()
        for name in TARGETS:
            jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, name)), platform="cpu")
    except (OSError, AttributeError, subprocess.SubprocessError, NativeBuildError) as error:
        return f"they could not be built: {error}"
    return None


class NativeBuildError(RuntimeError):
    """The C compiler is missing or failed."""


def _loaded() -> ctypes.CDLL:
    """The shared library, compiled unless an earlier process has, from the same sources, for the same processor."""
    base = cache_folder()
    if base is None:
        with tempfile.TemporaryDirectory(prefix="eejax-native-") as folder:
            return ctypes.CDLL(str(_built(Path(folder))))
    path = _built(base / "native")
    try:
        return ctypes.CDLL(str(path))
    except OSError:  # cut short by a full disk, say
        path.unlink(missing_ok=True)
        return ctypes.CDLL(str(_built(path.parent)))


def _compiler() -> list[str]:
    """The command of the C compiler, with the arguments that `CC` may hold."""
    wish = shlex.split(os.environ.get("CC", ""))
    names = [wish[0]] if wish else list(COMPILERS)
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        raise NativeBuildError(f"no C compiler found ({', '.join(names)}; the environment variable CC names another)")
    return [found, *wish[1:]]


def _built(folder: Path) -> Path:
    """The shared library in `folder`, compiled if it is not there."""
    compiler = _compiler()
    include = Path(jax.ffi.include_dir())
    native = "-march=native" if platform.machine().lower() in ("x86_64", "amd64") else "-mcpu=native"
    flags = ["-O2", native, "-std=gnu11", "-fPIC", "-shared", f"-I{include}"]
    known = hashlib.sha256()
    for path in (*(HERE / name for name in (*HEADERS, *SOURCES)), include / "xla" / "ffi" / "api" / "c_api.h"):
        known.update(path.read_bytes())
    known.update("\0".join([*compiler, str(Path(compiler[0]).stat().st_mtime_ns), *flags, processor()]).encode())
    target = folder / f"kernels-{known.hexdigest()[:20]}.so"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        # Under a name of its own first: another process may be building the same.
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            unfinished = Path(scratch) / target.name
            sources = [str(HERE / name) for name in SOURCES]
            command = [*compiler, *flags, *sources, "-lm", "-lpthread", "-o", str(unfinished)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIME_LIMIT, check=False)
            if done.returncode:
                last = (done.stderr.strip().splitlines() or ["no message"])[-1]
                raise NativeBuildError(f"{compiler[0]} failed with {done.returncode}: {last}")
            unfinished.replace(target)
    return target
