"""Errors and warnings a caller can act on. Every error names the offending value and what is allowed."""

from __future__ import annotations


class EejaxError(Exception):
    """Base of every error that eejax raises on purpose."""


class ConfigError(EejaxError, ValueError):
    """A configuration, option or parameter object holds a value that is not allowed."""


class InvalidRequestError(EejaxError, ValueError):
    """One request cannot be served: its prompt or parameters do not fit this model. Others are unaffected."""


class CapacityError(InvalidRequestError):
    """A request needs more KV cache than the whole cache has."""


class CheckpointError(EejaxError, ValueError):
    """A checkpoint is unreadable, or its leaves do not match its configuration."""


class TokenizerError(EejaxError, ValueError):
    """Tokenizer files are missing or unreadable."""


class ExitCostWarning(UserWarning):
    """Asking exits has cost a model more blocks than leaving at them saved."""
