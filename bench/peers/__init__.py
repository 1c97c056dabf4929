"""`python -m bench peers`: other engines on the same weights and requests. `runners/` has a script for each of them."""

from bench.peers.command import main as main
