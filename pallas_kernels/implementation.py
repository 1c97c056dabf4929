"""Which implementation runs: `mosaic`, the kernels for Hopper GPUs, or `xla`, the specification, on everything else."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Literal, get_args

import jax

type Implementation = Literal["auto", "mosaic", "xla"]
IMPLEMENTATIONS: tuple[str, ...] = get_args(Implementation.__value__)
VARIABLE = "EEJAX_KERNELS"
"""Environment variable that decides where the caller leaves it at `auto`; read when a program is traced."""


def device_refusal() -> str | None:
    """Why the kernels cannot run on the device that JAX computes on by default; None where they can."""
    device = jax.config.jax_default_device or jax.local_devices()[0]
    platform = device if isinstance(device, str) else device.platform
    if platform not in ("gpu", "cuda"):
        return f"they are for NVIDIA's Hopper GPUs, and the device is a {platform}"
    capability = str(getattr(device, "compute_capability", "unknown"))
    if not capability.startswith("9."):
        return f"WGMMA exists on Hopper alone (compute capability 9.0), and this GPU has {capability}"
    return None


def resolve(implementation: str, refusal: Callable[[], str | None]) -> Literal["mosaic", "xla"]:
    """The implementation to run.

    Args:
        implementation: as the caller wants it. `auto` is what `EEJAX_KERNELS` says; without that, `mosaic` where the
            device has it and the kernel takes the arguments. `mosaic` runs there or raises, whatever the device:
            a program may be lowered for another one, or interpreted.
        refusal: says why the kernel does not take the arguments; None if it does.

    Raises:
        ValueError: an unknown name, here or in the variable; or `mosaic` was asked for and refuses the arguments.
    """
    source = "implementation"
    if implementation == "auto":
        source, implementation = VARIABLE, os.environ.get(VARIABLE) or "auto"
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"{source} must be one of {', '.join(IMPLEMENTATIONS)}, got {implementation!r}")
    if implementation == "auto":
        return "xla" if device_refusal() or refusal() else "mosaic"
    if implementation == "xla":
        return "xla"
    if why := refusal():
        raise ValueError(f"{source} is 'mosaic', but the kernel does not take these arguments: {why}")
    return "mosaic"
