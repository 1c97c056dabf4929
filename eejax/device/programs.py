"""Compiled programs: by kind and bucket while they run, and as files, so that the next start does not even trace them.

JAX's own cache spares the next start the compiler, but its key is the program's text, and to write that takes longer
than to load what was compiled of it. The files here are found by what the text is made of.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import pickle
import platform
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path

import flax
import jax
from jax.experimental.serialize_executable import deserialize_and_load, serialize

import pallas_kernels
from eejax.core import EngineConfig, Stage, announce, compiler_options, log

UNITS = {"prefill": "token", "decode": "row", "score": "token"}


@contextmanager
def _count_cache_hits() -> Iterator[Callable[[], int]]:
    """Count programs that come from JAX's compilation cache while the context is open."""
    hits: list[str] = []

    def listen(event: str, **_: str | int) -> None:
        if event == "/jax/compilation_cache/cache_hits":
            hits.append(event)

    jax.monitoring.register_event_listener(listen)
    try:
        yield lambda: len(hits)
    finally:
        jax.monitoring.unregister_event_listener(listen)


@cache
def _sources() -> str:
    """A digest of all Python that programs are traced from."""
    digest = hashlib.sha256()
    packages = (Path(__file__).parents[1], Path(pallas_kernels.__file__).parent)
    for path in sorted(path for package in packages for path in package.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class ProgramFiles:
    """Where programs of one model under one configuration lie.

    A file holds machine code and is unpickled: the folder has to be as trustworthy as JAX's cache beside it.

    Attributes:
        folder: of all programs, `programs` below the cache folder.
        model: what they depend on besides the process: configuration, parameters, choice of kernels.
        device: that they run on.
    """

    folder: Path
    model: str
    device: jax.Device  # pyright: ignore[reportInvalidTypeForm]

    @classmethod
    def of(cls, config: EngineConfig, params: dict, kernels: object) -> ProgramFiles | None:
        """Those of a runner; None where no files are kept, or its parameters are not all on one device."""
        base = pallas_kernels.cache_folder()
        leaves = jax.tree.leaves_with_path(params)
        devices = {device for _, leaf in leaves if isinstance(leaf, jax.Array) for device in leaf.devices()}
        if base is None or not jax.config.jax_enable_compilation_cache or len(devices) != 1 or jax.process_count() != 1:
            return None
        shapes = [(path, leaf.shape, leaf.dtype) for path, leaf in leaves]
        limits = (config.scheduler.max_num_seqs, config.scheduler.max_chunk_steps, config.max_model_len)
        model = repr((config.model, config.cache, config.decode, limits, kernels, shapes))
        return cls(base / "programs", model, devices.pop())

    def path(self, kind: str, bucket: int, variant: str = "") -> Path:
        """The file of a program: another one as soon as anything differs that it may depend on."""
        return self._named(kind, bucket, _sources(), self.model, variant)

    def path_by_text(self, kind: str, bucket: int, lowered: jax.stages.Lowered) -> Path:
        """The file by what the program says, for sources that differ and come to the same.

        Arguments that it does not read are not in its text, but must have the shapes it was lowered for.
        """
        return self._named(kind, bucket, lowered.as_text(), repr((lowered.args_info, lowered.out_tree)))

    def _named(self, kind: str, bucket: int, *made_of: str) -> Path:
        system = (
            jax.__version__,
            version("jaxlib"),
            flax.__version__,
            platform.python_version(),
            pallas_kernels.processor(),
        )
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        settings = {name: value for name, value in os.environ.items() if name.startswith(("XLA_", "EEJAX_"))}
        device = (self.device, self.device.device_kind, self.device.client.platform_version)
        options = compiler_options(jax.default_backend())
        known = repr((made_of, system, cores, sorted(settings.items()), device, options))
        known += repr(sorted(jax.config.values.items()))
        return self.folder / f"{kind}-{bucket}-{hashlib.sha256(known.encode()).hexdigest()[:32]}"

    def load(self, path: Path) -> jax.stages.Compiled | None:
        """The program in a file; None if there is none, or it cannot be used and is removed."""
        try:
            serialized, in_tree, out_tree = pickle.loads(zlib.decompress(path.read_bytes()))
            return deserialize_and_load(
                serialized, in_tree, out_tree, backend=self.device.client, execution_devices=[self.device]
            )
        except FileNotFoundError:
            return None
        except Exception as error:  # whatever is wrong with it, compiling anew helps
            log.warning("%s cannot be used (%s: %s): compiling anew", path, type(error).__name__, error)
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
            return None

    def save(self, path: Path, program: jax.stages.Compiled) -> None:
        """Write a program, unless it cannot be written: the next start compiles it again then."""
        try:
            data = zlib.compress(pickle.dumps(serialize(program)), level=1)
            path.parent.mkdir(parents=True, exist_ok=True)
            # Under a name of its own first: another process may be writing the same.
            with tempfile.NamedTemporaryFile(dir=path.parent, prefix="part-", delete=False) as file:
                part = Path(file.name)
                try:
                    file.write(data)
                    file.flush()
                    part.replace(path)
                except OSError:
                    with contextlib.suppress(OSError):
                        part.unlink()
                    raise
        except Exception as error:  # programs with host callbacks, for instance, are no files
            log.info("%s was not kept: %s", path, error)


def _compile(lowered: jax.stages.Lowered) -> tuple[jax.stages.Compiled, bool]:
    """The program, and whether XLA compiled it, other than finding it in JAX's cache."""
    with _count_cache_hits() as hits:
        program = lowered.compile(compiler_options=compiler_options(jax.default_backend()))
        return program, not hits()


@cache
def _malloc_trim() -> Callable[[int], int]:
    """glibc's; nothing where there is none."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, TypeError, AttributeError):
        return lambda _: 0


@dataclass(slots=True)
class Compiled:
    """A runner's programs by kind, bucket and variant, and how many of them XLA had to compile."""

    files: ProgramFiles | None = None
    programs: dict[tuple[str, int, str], jax.stages.Compiled] = field(default_factory=dict)
    compilations: int = 0

    def get(
        self, kind: str, bucket: int, lower: Callable[[], jax.stages.Lowered], variant: str = ""
    ) -> jax.stages.Compiled:
        """The program for `(kind, bucket, variant)`; on first use from its file, JAX's cache or the compiler."""
        key = (kind, bucket, variant)
        if key not in self.programs:
            what, start = f"{kind} for {bucket} {UNITS[kind]}{'s' * (bucket != 1)}", time.perf_counter()
            what += f" ({variant})" if variant else ""
            path = self.files.path(kind, bucket, variant) if self.files else None
            program, compiled = None, False
            if self.files and path and path.exists():
                announce(Stage(what))
                program = self.files.load(path)
            if program is None:
                announce(Stage(what, compiled=True))
                lowered = lower()
                program, compiled = _compile(lowered)
                by_text = self.files.path_by_text(kind, bucket, lowered) if self.files else None
                # One that came from JAX's cache lacks its functions when it is written again (XLA:CPU, jax 0.12), but
                # then it was written when it was compiled.
                if compiled and self.files and by_text:
                    self.files.save(by_text, program)
                if path and by_text and by_text.exists():
                    with contextlib.suppress(OSError):
                        path.unlink(missing_ok=True)
                        path.hardlink_to(by_text)
            self.programs[key] = program
            _malloc_trim()(0)  # compiling leaves much behind, and loading some 15 MB
            self.compilations += compiled
            announce(Stage(what, time.perf_counter() - start, compiled=compiled))
        return self.programs[key]
