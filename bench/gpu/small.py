"""What decides on the form of a decode step: products of few columns and RMS norms in two layouts, and branches.

Each figure is the time of one product, norm or branch within a program of many. The weights of the products together
are larger than any cache.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp

from bench.gpu.record import report
from bench.kernels.timing import seconds_of
from eejax.core import compiler_options
from pallas_kernels import control_flow, rms_norm

REPEATS = 7
COLUMNS = (1, 8, 32)
BRANCHES = 100


def best(function: Callable[..., object], *arguments: object) -> float:
    """Seconds of one call, the best of `REPEATS`."""
    program = jax.jit(function).lower(*arguments).compile(compiler_options=compiler_options(jax.default_backend()))
    run = functools.partial(program, *arguments)
    seconds_of(run)
    return min(seconds_of(run) for _ in range(REPEATS))


def products(size: int, wide: int, count: int) -> None:
    """`count` pairs of matrices, `size` to `wide` and back, in both layouts of the activations."""
    keys = jax.random.split(jax.random.key(0), 2 * count)
    ups = [size**-0.5 * jax.random.normal(key, (wide, size)).astype(jnp.bfloat16) for key in keys[:count]]
    downs = [wide**-0.5 * jax.random.normal(key, (size, wide)).astype(jnp.bfloat16) for key in keys[count:]]

    def multiply(x: jax.Array, ups: list[jax.Array], downs: list[jax.Array], axis: int) -> jax.Array:
        # Feature-major activations [D, N] are contracted by W @ x, token-major ones [N, D] by x @ W.T.
        for weight in (one for pair in zip(ups, downs, strict=True) for one in pair):
            sides = (weight, x) if axis == 0 else (x, weight)
            dims = (((1,), (axis,)), ((), ()))
            x = jax.lax.dot_general(*sides, dims, preferred_element_type=jnp.float32).astype(x.dtype)
        return x

    bytes_read = 2 * 2 * size * wide * count
    for columns in COLUMNS:
        for layout, axis in (("feature-major", 0), ("token-major", 1)):
            shape = (size, columns) if axis == 0 else (columns, size)
            x = jax.random.normal(jax.random.key(1), shape, jnp.bfloat16)
            seconds = best(functools.partial(multiply, axis=axis), x, ups, downs)
            name = f"product {layout} {columns}"
            report("small", name, us=1e6 * seconds / (2 * count), gb_s=bytes_read / seconds / 1e9)


def norms(size: int, count: int) -> None:
    """`count` RMS norms, one after another, in both layouts."""
    weights = [1 + 0.01 * jax.random.normal(jax.random.key(i), (size,), jnp.bfloat16) for i in range(count)]

    def normed(x: jax.Array, weights: list[jax.Array], axis: int) -> jax.Array:
        for weight in weights:
            x = rms_norm(weight, x + weight[0], 1e-5, axis=axis)
        return x

    for columns in COLUMNS:
        for layout, axis in (("feature-major", 0), ("token-major", 1)):
            shape = (size, columns) if axis == 0 else (columns, size)
            seconds = best(functools.partial(normed, axis=axis), jnp.ones(shape, jnp.bfloat16), weights)
            report("small", f"norm {layout} {columns}", us=1e6 * seconds / count)


def branches(flags: str) -> None:
    """`BRANCHES` branches that hold one addition each; half of them run."""

    def run(x: jax.Array) -> jax.Array:
        for i in range(BRANCHES):
            x = control_flow.run_if(x[0] % 2 == i % 2, lambda x: x + 3, x)
        return x

    for form in ("cond", "while"):
        os.environ[control_flow.VARIABLE] = form
        jax.clear_caches()  # JAX would reuse the trace of the other form
        seconds = best(run, jnp.zeros((128,), jnp.int32))
        report("small", f"{BRANCHES} branches {form} {flags}", us=1e6 * seconds / BRANCHES)


def main(arguments: list[str]) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.small")
    parser.add_argument("--only-branches", metavar="FLAGS", help="only the branches; name of XLA's flags in results")
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args(arguments)
    if args.only_branches is None:
        products(*(32, 64, 2) if args.dry_run else (4096, 11008, 12))
        norms(*(64, 4) if args.dry_run else (4096, 64))
    branches(args.only_branches or "default")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
