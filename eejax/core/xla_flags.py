"""XLA's flags, which are read once and so set when `eejax` is imported, and options of our programs. No jax here."""

from __future__ import annotations

from collections.abc import MutableMapping

EXTRA_OPTIONS = "--xla_backend_extra_options="
SMALL_LOOPS = "xla_cpu_small_while_loop_byte_threshold"


def set_xla_flags(environment: MutableMapping[str, str]) -> None:
    """Add eejax's flags to `XLA_FLAGS`; an option that is set there already is kept.

    XLA:CPU turns loops that it estimates to be small into one single-threaded kernel. The vocabulary projection and the
    KV fill-in run in loops of at most one trip, and count as small whatever they read. With a threshold of 0 no loop
    is changed (llama-125m, two cores, batch 1: 13.4 ms a step instead of 17.3 at full depth, 6.7 instead of 10.3 with
    exits).
    """
    flags = environment.get("XLA_FLAGS", "")
    if SMALL_LOOPS in flags:
        return
    option = f"{SMALL_LOOPS}=0"
    if EXTRA_OPTIONS in flags:
        environment["XLA_FLAGS"] = flags.replace(EXTRA_OPTIONS, f"{EXTRA_OPTIONS}{option},", 1)
    else:
        environment["XLA_FLAGS"] = f"{flags} {EXTRA_OPTIONS}{option}".strip()


def compiler_options(backend: str) -> dict[str, str]:
    """Options that decoding and prefill are compiled with on a `backend`, as `jax.default_backend` calls it.

    XLA:GPU counts a donated cache twice, so with a large one it takes memory for scarce and recomputes projections to
    save some (llama-7b with a cache of 32 GiB, compiled for an H100: those of each segment's first block twice).
    """
    return {"xla_disable_hlo_passes": "rematerialization"} if backend == "gpu" else {}
