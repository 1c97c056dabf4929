"""The machine, its versions, and the device's rates: a large copy and a square bfloat16 product."""

from __future__ import annotations

import argparse
import importlib.metadata
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp

from bench import machine
from bench.gpu.record import report
from bench.kernels.timing import copy_bandwidth, seconds_of
from pallas_kernels import branch_form, cuda_version, device_refusal

PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "flax", "numpy", "torch")
FACTS = "name,driver_version,memory.total,clocks.sm,clocks.mem,power.limit"


def main(arguments: list[str]) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.environment")
    parser.add_argument("--dry-run", action="store_true")
    dry = parser.parse_args(arguments).dry_run
    facts = None
    if shutil.which("nvidia-smi"):
        command = ["nvidia-smi", f"--query-gpu={FACTS}", "--format=csv,noheader"]
        facts = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False).stdout.strip()
    installed = {one.metadata["Name"]: one.version for one in importlib.metadata.distributions()}
    device = jax.local_devices()[0]
    report(
        "environment",
        "machine",
        **machine.provenance(),
        nvidia_smi=facts,
        versions={name: installed[name] for name in PACKAGES if name in installed},
        cuda=cuda_version(),
        compute_capability=str(getattr(device, "compute_capability", None)),
        mosaic_refusal=device_refusal("mosaic"),
        branches=branch_form(),
    )
    copied = copy_bandwidth(2**22 if dry else 2**31)
    report("environment", "copy", gb_s=copied / 1e9)
    size = 256 if dry else 8192
    keys = jax.random.split(jax.random.key(0))
    a, b = (jax.random.normal(key, (size, size), jnp.bfloat16) for key in keys)
    multiply = jax.jit(lambda a, b: jnp.dot(a, b, preferred_element_type=jnp.float32).astype(jnp.bfloat16))
    best = min(seconds_of(lambda: multiply(a, b)) for _ in range(10))
    report("environment", "product", size=size, tflop_s=2 * size**3 / best / 1e12)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
