"""Where Transformers is installed, for the tests that ask it directly. `make oracle` makes that environment."""

from __future__ import annotations

import os
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]


def oracle_python() -> Path | None:
    """The interpreter that has Transformers, or None where there is no such environment.

    `EEJAX_ORACLE_PYTHON` names it; else it is that of `.venv-oracle` in the repository. A name that leads nowhere is an
    error: who sets it wants those tests run.
    """
    named = os.environ.get("EEJAX_ORACLE_PYTHON")
    if not named:
        environment = REPOSITORY / ".venv-oracle"
        return environment / "bin" / "python" if (environment / ".installed").exists() else None  # or half installed
    if not Path(named).exists():
        raise FileNotFoundError(f"EEJAX_ORACLE_PYTHON names {named}, which does not exist")
    return Path(named)
