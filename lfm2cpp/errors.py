"""The errors a user sees. The command line prints the message on one line and exits with `exit_code`.

A message names the thing, the value found, what was expected and the next step.
"""

from __future__ import annotations


class LFM2Error(Exception):
    """Base of every error that is the input's or the environment's fault, not ours."""

    exit_code = 1


class ModelFormatError(LFM2Error):
    """A GGUF file that is damaged, hostile, or made for another architecture."""


class CheckpointError(LFM2Error):
    """A Hugging Face checkpoint that cannot be converted."""


class OutputError(LFM2Error):
    """A file that cannot be written; whatever stood at its path before is untouched."""


class StateFileError(LFM2Error):
    """A saved sequence or session that does not belong to this model, or is damaged."""


class ContextError(LFM2Error):
    """A request that does not fit the context or the memory."""


class UsageError(LFM2Error):
    """A value that no file could make right: bad flags, bad request parameters."""

    exit_code = 2


class CheckFailed(LFM2Error):
    """A check that ran to its end and said no (parity, verification)."""

    exit_code = 3
