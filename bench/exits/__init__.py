"""`python -m bench exits`: what early exit gives and costs: settings, quality, speed, frontier, tables."""

from bench.exits.command import main as main
