"""Figures as results show them. Nothing here needs more than Python itself."""

from __future__ import annotations

import math
from typing import Any


def rounded(value: Any) -> Any:
    """Floats to six significant digits, which is more than any of them is good for; not finite ones become null."""
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(one) for one in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
