"""Compiled programs: in memory by kind and bucket, and as files, from which the next start loads them untraced.

JAX's own cache saves the next start the compiler, but its key is the program's text, which has to be traced and lowered
first. The file of a program is found by what the text is made of: its sources, the model, the machine. On the demo
(two cores) the first answer comes after 5.4 s instead of 7.5, and all programs of 32 slots are ready after 6.9 s
instead of 15.7.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import pickle
import platform
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path

import flax
import jax
from jax.experimental.serialize_executable import deserialize_and_load, serialize

import pallas_kernels
from eejax.core import EngineConfig, Stage, announce, compiler_options, log, replacing_file

UNITS = {"prefill": "token", "decode": "row", "score": "token"}

type ProgramKey = tuple[str, int, str]
"""Kind, bucket and variant."""


def use_compilation_cache() -> None:
    """Keep what XLA compiles in `xla` below the cache folder, unless the process has configured a cache for JAX."""
    base = pallas_kernels.cache_folder()
    if base is None or jax.config.jax_compilation_cache_dir is not None:
        return
    jax.config.update("jax_compilation_cache_dir", str(base / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@dataclass(slots=True)
class Compiled:
    """A runner's programs, and how many of them XLA had to compile."""

    files: ProgramFiles | None = None
    programs: dict[ProgramKey, jax.stages.Compiled] = field(default_factory=dict)
    compilations: int = 0

    def get(
        self, kind: str, bucket: int, lower: Callable[[], jax.stages.Lowered], variant: str = ""
    ) -> jax.stages.Compiled:
        """The program for `(kind, bucket, variant)`; on first use from its file, JAX's cache or the compiler."""
        key = (kind, bucket, variant)
        if key not in self.programs:
            start = time.perf_counter()
            what = f"{kind} for {bucket} {UNITS[kind]}{'s' * (bucket != 1)}{f' ({variant})' if variant else ''}"
            path = self.files.path(key) if self.files else None
            program, compiled = None, False
            if self.files and path and path.exists():
                announce(Stage(what))
                program = self.files.load(path)
            if program is None:
                announce(Stage(what, compiled=True))
                lowered = lower()
                program, compiled = _compile(lowered)
                if self.files and path:
                    self.files.keep(key, lowered, program if compiled else None)
            self.programs[key] = program
            _malloc_trim()(0)  # compiling leaves much memory unused, and loading some 15 MB
            self.compilations += compiled
            announce(Stage(what, time.perf_counter() - start, compiled=compiled))
        return self.programs[key]


def _compile(lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled, bool]:
    """The program, and whether XLA compiled it; otherwise it was in JAX's cache."""
    hits: list[str] = []

    def listen(event: str, **_: str | int) -> None:
        if event == "/jax/compilation_cache/cache_hits":
            hits.append(event)

    jax.monitoring.register_event_listener(listen)
    try:
        return lowered.compile(compiler_options=compiler_options(jax.default_backend())), not hits
    finally:
        jax.monitoring.unregister_event_listener(listen)


@cache
def _malloc_trim() -> Callable[[int], int]:
    """The function of glibc; one that does nothing elsewhere."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, TypeError, AttributeError):
        return lambda _: 0


@dataclass(frozen=True, slots=True)
class ProgramFiles:
    """The files of one model's programs under one configuration.

    A file holds machine code and is unpickled: the folder has to be as trustworthy as JAX's cache beside it.

    Attributes:
        folder: of all programs, `programs` below the cache folder.
        model: what they depend on besides the process: configuration, parameters, choice of kernels.
        device: the device that they run on.
    """

    folder: Path
    model: str
    device: jax.Device  # pyright: ignore[reportInvalidTypeForm]

    @classmethod
    def of(cls, config: EngineConfig, params: dict, kernels: object) -> ProgramFiles | None:
        """The files of a runner; None where no files are kept, or its parameters are not all on one device."""
        base = pallas_kernels.cache_folder()
        leaves = jax.tree.leaves_with_path(params)
        devices = {device for _, leaf in leaves if isinstance(leaf, jax.Array) for device in leaf.devices()}
        if base is None or not jax.config.jax_enable_compilation_cache or len(devices) != 1 or jax.process_count() != 1:
            return None
        shapes = [(path, leaf.shape, leaf.dtype) for path, leaf in leaves]
        limits = (config.scheduler.max_num_seqs, config.scheduler.max_chunk_steps, config.max_model_len)
        model = repr((config.model, config.cache, config.decode, limits, kernels, shapes))
        return cls(base / "programs", model, devices.pop())

    def path(self, key: ProgramKey, *made_of: str) -> Path:
        """The file of a program, made of the sources and the model by default; another one for any other process."""
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        known = (
            key[2],
            made_of or (_sources(), self.model),
            (jax.__version__, version("jaxlib"), flax.__version__, platform.python_version()),
            (pallas_kernels.processor(), cores),
            sorted((name, value) for name, value in os.environ.items() if name.startswith(("XLA_", "EEJAX_"))),
            (self.device, self.device.device_kind, self.device.client.platform_version),
            compiler_options(jax.default_backend()),
            sorted(jax.config.values.items()),
        )
        return self.folder / f"{key[0]}-{key[1]}-{hashlib.sha256(repr(known).encode()).hexdigest()[:32]}"

    def load(self, path: Path) -> jax.stages.Compiled | None:
        """The program in a file; None if it cannot be used, and the file is removed then."""
        try:
            serialized, in_tree, out_tree = pickle.loads(zlib.decompress(path.read_bytes()))
            return deserialize_and_load(
                serialized, in_tree, out_tree, backend=self.device.client, execution_devices=[self.device]
            )
        except Exception as error:  # whatever is wrong with it, compiling anew helps
            log.warning("%s cannot be used (%s: %s): compiling anew", path, type(error).__name__, error)
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
            return None

    def keep(self, key: ProgramKey, lowered: jax.stages.Lowered, program: jax.stages.Compiled | None) -> None:
        """Write a program that XLA has compiled, if it can be written.

        The file's own name is by the program's text, for other sources that come to the same text; the name by sources
        is a link to it. So a program that comes from JAX's cache needs only the link: written again it would lack its
        functions (XLA:CPU, jax 0.12).

        Args:
            program: None where it came from JAX's cache.
        """
        # Arguments that a program does not read are not in its text, but must have the shapes it was lowered for.
        path = self.path(key)
        by_text = self.path(key, lowered.as_text(), repr((lowered.args_info, lowered.out_tree)))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if program is not None:
                with replacing_file(by_text) as part:
                    part.write_bytes(zlib.compress(pickle.dumps(serialize(program)), level=1))
            if by_text.exists():
                path.unlink(missing_ok=True)
                path.hardlink_to(by_text)
        except Exception as error:  # a program with host callbacks, for instance, cannot be written
            log.info("%s was not kept: %s", path, error)


@cache
def _sources() -> str:
    """A digest of all Python that programs are traced from."""
    digest = hashlib.sha256()
    packages = (Path(__file__).parents[1], Path(pallas_kernels.__file__).parent)
    for path in sorted(path for package in packages for path in package.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
