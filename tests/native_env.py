"""Where the native kernels can be built. A C compiler that then fails to build them is an error, no reason to skip."""

from __future__ import annotations

import os
import shutil

import pytest

from pallas_kernels.native import library

CANDIDATES = [name for name in (os.environ.get("CC"), *library.COMPILERS) if name]
COMPILER = next(filter(None, map(shutil.which, CANDIDATES)), None)
"""The first C compiler there is, or None."""
needs_native = pytest.mark.skipif(COMPILER is None, reason=f"needs a C compiler: one of {', '.join(CANDIDATES)}")
