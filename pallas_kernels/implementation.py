"""Which implementation runs: `mosaic` on Hopper GPUs, `native` on CPUs, `xla`, the specification, everywhere else."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from functools import cache
from typing import Literal, get_args

import jax
from jaxtyping import Array

type Implementation = Literal["auto", "mosaic", "native", "xla"]
IMPLEMENTATIONS: tuple[str, ...] = get_args(Implementation.__value__)
VARIABLE = "EEJAX_KERNELS"
"""Environment variable that decides where the caller says `auto`; read when a program is traced."""

Shaped = Array | jax.ShapeDtypeStruct
"""An argument of which only shape and dtype are read."""

type Refusals = Mapping[str, Callable[[], str | None]]
"""For each implementation but `xla` that an operation has: says why it does not take the arguments; None if it does."""


def default_device() -> jax.Device | str:  # pyright: ignore[reportInvalidTypeForm]
    """The device that JAX computes on by default, or the name of its platform."""
    return jax.config.jax_default_device or jax.local_devices()[0]


def default_platform() -> str:
    """The platform of that device: `cpu`, `gpu` or another."""
    device = default_device()
    return device if isinstance(device, str) else device.platform


@cache
def cuda_version() -> int | None:
    """Version of the CUDA runtime beside JAX's plugin, 12080 for 12.8; None where there is no such plugin."""
    for plugin in ("jax_cuda13_plugin", "jax_cuda12_plugin"):
        try:
            return importlib.import_module(f"{plugin}._versions").cuda_runtime_get_version()
        except (ImportError, RuntimeError):  # not installed, or its runtime library is not
            continue
    return None


def compiler_refusal() -> str | None:
    """Why this CUDA cannot compile kernels for Hopper; None where it can, or where there is none."""
    version = cuda_version()
    # JAX refuses causal masks in its own Mosaic kernels for these (`jax.experimental.pallas.ops.gpu.attention_mgpu`).
    if version is not None and 12080 <= version < 12091:
        major, minor = version // 1000, version % 1000
        return f"ptxas of CUDA 12.8.0 to 12.9.0 miscompiles masks, and this is CUDA {major}.{minor // 10}.{minor % 10}"
    return None


def device_refusal(implementation: str) -> str | None:
    """Why kernels cannot run on the device that JAX computes on by default; None where they can."""
    platform = default_platform()
    if implementation == "native":
        return None if platform == "cpu" else f"they are for CPUs, and the device is a {platform}"
    if platform not in ("gpu", "cuda"):
        return f"they are for NVIDIA's Hopper GPUs, and the device is a {platform}"
    capability = str(getattr(default_device(), "compute_capability", "unknown"))
    if not capability.startswith("9."):
        return f"WGMMA exists on Hopper alone (compute capability 9.0), and this GPU has {capability}"
    return compiler_refusal()


def resolve(implementation: str, refusals: Refusals) -> str:
    """The implementation to run.

    Args:
        implementation: the caller's choice. `auto` is what `EEJAX_KERNELS` says; without that, a kernel where the
            device has one and it takes the arguments. A kernel that is named runs or raises, whatever the device: a
            program may be lowered for another one, or interpreted. The variable is for all operations, so one that has
            no such kernel runs on XLA then.
        refusals: of the kernels that the operation has.

    Raises:
        ValueError: an unknown name, here or in the variable; a kernel that refuses the arguments; or a kernel, named
            by the caller, that the operation does not have.
    """
    source, name = "implementation", _known("implementation", implementation)
    if name == "auto":
        source, name = VARIABLE, _known(VARIABLE, os.environ.get(VARIABLE) or "auto")
        if name not in refusals and name != "auto":
            return "xla"
    if name == "auto":
        return next((name for name, why in refusals.items() if not (device_refusal(name) or why())), "xla")
    if name == "xla":
        return name
    if name not in refusals:
        raise ValueError(f"{source} is {name!r}, but there is no such kernel for this: only {', '.join(refusals)}")
    if name == "mosaic" and (why := compiler_refusal()):
        raise ValueError(f"{source} is {name!r}, but the kernel cannot be compiled: {why}")
    if why := refusals[name]():
        raise ValueError(f"{source} is {name!r}, but the kernel does not take these arguments: {why}")
    return name


def _known(source: str, name: str) -> str:
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"{source} must be one of {', '.join(IMPLEMENTATIONS)}, got {name!r}")
    return name
