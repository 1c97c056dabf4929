"""Install the packages that this machine lacks, from a folder of wheels (`bench/gpu_wheels.sh` fills it).

    python -m bench.gpu.wheels FOLDER TARGET

Requirements of the project that are missing here, or too old, are installed into TARGET, without dependencies of their
own: a machine that has JAX and Flax has those.
"""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from bench.gpu.record import report

NEVER = ("jax", "numpy")
"""They belong to the machine's CUDA, or all its packages were built against them."""


def requirements(pyproject: Path) -> list[Requirement]:
    """Requirements of the core."""
    return [Requirement(one) for one in tomllib.loads(pyproject.read_text())["project"]["dependencies"]]


def lacking(needed: list[Requirement]) -> list[Requirement]:
    """Requirements that no installed package meets."""
    found = []
    for one in needed:
        try:
            version = importlib.metadata.version(one.name)
        except importlib.metadata.PackageNotFoundError:
            version = None
        if one.name not in NEVER and (version is None or not one.specifier.contains(version, prereleases=True)):
            found.append(one)
    return found


def wheel_of(one: Requirement, folder: Path) -> Path | None:
    """The wheel of a requirement."""
    name = canonicalize_name(one.name)
    return next((path for path in folder.glob("*.whl") if canonicalize_name(path.name.split("-")[0]) == name), None)


def main(arguments: list[str]) -> int:
    """Returns the exit status: 1 where something is lacking that has no wheel."""
    folder, target = map(Path, arguments)
    needed = lacking(requirements(Path(__file__).parents[2] / "pyproject.toml"))
    wheels = {str(one): wheel_of(one, folder) for one in needed}
    files = [str(path) for path in wheels.values() if path is not None]
    if files:
        target.mkdir(parents=True, exist_ok=True)
        install = ("-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile", "--upgrade")
        subprocess.run([sys.executable, *install, "--target", str(target), *files], check=True)
    missing = [name for name, path in wheels.items() if path is None]
    report("wheels", "installed", files=[Path(one).name for one in files], missing=missing)
    return int(bool(missing))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
