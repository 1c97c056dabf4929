"""The command line: `eejax generate`, `info`, `demo`, `tune-exits`, `train-length`, `calibrate`."""

from __future__ import annotations

from eejax.cli.app import main

__all__ = ["main"]
