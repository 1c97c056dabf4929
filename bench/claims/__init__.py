"""`python -m bench claims`: the README's promises (`registry.py`), and the command that measures them."""

from bench.claims.command import main as main
