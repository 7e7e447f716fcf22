"""Errors of a study: what is wrong with its file or its folder, and how to go on."""

from __future__ import annotations

from nogemm.errors import NogemmError


class StudyError(NogemmError, RuntimeError):
    """A study cannot go on: its folder holds other results, is in use, or has no room left."""


class StudyInterrupted(KeyboardInterrupt):
    """A study was stopped by Ctrl-C or SIGTERM after its run was saved; the message says how to go on."""
