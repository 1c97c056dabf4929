#!/usr/bin/env bash
# Wheels of the core's requirements but JAX and NumPy, for a machine without a network: Python 3.12, Linux, x86-64.
#
#   bench/gpu_wheels.sh        fills .gpu-wheels, which git ignores; carry it along with the checkout
#
# bench/gpu_check.sh installs from there what the machine lacks or has too old.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-python3}
mapfile -t needed < <("$PYTHON" - <<'END'
import re
import tomllib

with open("pyproject.toml", "rb") as file:
    for one in tomllib.load(file)["project"]["dependencies"]:
        if re.match(r"[\w-]+", one)[0] not in ("jax", "numpy"):
            print(one)
END
)
rm -rf .gpu-wheels
platforms=()
for tag in manylinux1 manylinux2010 manylinux2014 manylinux_2_17 manylinux_2_24 manylinux_2_27 manylinux_2_28; do
    platforms+=(--platform "${tag}_x86_64")
done
"$PYTHON" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --python-version 3.12 \
    --implementation cp "${platforms[@]}" --dest .gpu-wheels "${needed[@]}"
du -sh .gpu-wheels
