"""What every test runs under: strict promotion, checked shapes, the CPU, a compilation cache of its own, repeatable
hypothesis. `CHECK_SHAPES=off` leaves annotations of shapes unchecked (tests/shapes.py).

`pytest -m gpu` runs the tests that need an NVIDIA GPU; without it they are skipped and jax never looks for one.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# The reference multiplies many small matrices, for which threads that wait for one another cost twenty times the work.
# NumPy reads this when it is first imported; where a plugin of pytest has done so already, it comes too late.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# typer colours what it prints, terminal or not, where one of these is set, and tests read what it prints.
for _name in ("PY_COLORS", "FORCE_COLOR", "GITHUB_ACTIONS"):
    os.environ.pop(_name, None)

# Compilation takes seconds at unforeseeable moments, so there is no deadline per example.
settings.register_profile(
    "ci",
    derandomize=True,
    database=None,
    deadline=None,
    max_examples=20,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.register_profile("explore", parent=settings.get_profile("ci"), derandomize=False, max_examples=200)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

# Files that take longest, which workers of pytest-xdist begin with: otherwise one works long after the others.
LONGEST = (
    "serve/test_equivalence.py",
    "serve/test_company.py",
    "device/test_runner.py",
    "serve/test_llm.py",
    "kernels/test_paged_attention.py",
    "kernels/test_kv_fill.py",
    "tune/test_exit_tuning.py",
    "checkpoints/test_train_demo.py",
    "checkpoints/test_tune_demo.py",
    "cli/test_cli.py",
)

pytest.register_assert_rewrite("tests.serve.engines")

_cache_dirs: list[str] = []


def pytest_configure(config: pytest.Config) -> None:
    """Set what jax and eejax read when they are imported, which is after this."""
    wants_gpu = "gpu" in config.option.markexpr and "not gpu" not in config.option.markexpr
    if not wants_gpu:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        # LLVM takes half the time of a compilation to optimise programs that run for milliseconds here. What XLA makes
        # of a program before that, which tests read, is the same.
        flags = os.environ.get("XLA_FLAGS", "")
        if "xla_backend_optimization_level" not in flags:
            os.environ["XLA_FLAGS"] = f"{flags} --xla_backend_optimization_level=0".strip()
    os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"
    os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)
    if not hasattr(config, "workerinput"):  # a pytest-xdist worker shares the folder of the process that started it
        _cache_dirs.append(tempfile.mkdtemp(prefix="eejax-tests-"))
        os.environ["EEJAX_CACHE_DIR"] = _cache_dirs[-1]
    if os.environ.get("CHECK_SHAPES") != "off":
        from tests import shapes  # imports NumPy

        shapes.install()


def pytest_unconfigure() -> None:
    for path in _cache_dirs:
        shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def unchecked_shapes() -> Iterator[None]:
    """Arguments of the wrong shape reach the function, which says itself what is wrong with them."""
    from jaxtyping import config

    before = config.jaxtyping_disable
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", before)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):
        ranks = {Path(__file__).parent / name: rank for rank, name in enumerate(LONGEST)}
        items.sort(key=lambda item: ranks.get(item.path, len(ranks)))
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import jax

    if jax.default_backend() != "gpu":
        skip = pytest.mark.skip(reason="needs an NVIDIA GPU: run `pytest -m gpu` on a machine that has one")
        for item in marked:
            item.add_marker(skip)
