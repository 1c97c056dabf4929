"""Where compiled code is kept on disk, and what it depends on besides its sources."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def cache_folder() -> Path | None:
    """Where eejax keeps what it has compiled: `$EEJAX_CACHE_DIR`, else `$XDG_CACHE_HOME/eejax`, else `~/.cache/eejax`.

    None where `EEJAX_CACHE_DIR=off`: nothing is kept.
    """
    wish = os.environ.get("EEJAX_CACHE_DIR")
    if wish == "off":
        return None
    return Path(wish) if wish else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "eejax"


def processor() -> str:
    """A text that differs between processors with different instructions."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return "\n".join(sorted({line for line in lines if line.split("\t")[0] in ("flags", "Features", "model name")}))
