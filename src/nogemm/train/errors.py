"""Errors of training: what stopped it, and what to do next."""

from __future__ import annotations

from nogemm.errors import NogemmError


class DataError(NogemmError, ValueError):
    """Training or evaluation data is missing, empty, or of a form that cannot be read."""


class TrainingError(NogemmError, RuntimeError):
    """Training cannot go on: a loss or gradient is not finite, or what was given does not fit together."""


class DivergedError(TrainingError):
    """A loss or gradient is not finite."""


class TrainingInterrupted(KeyboardInterrupt):
    """Training was stopped by Ctrl-C after its state was saved; the message says how to resume.

    A KeyboardInterrupt, so that `except Exception` does not swallow it.
    """
