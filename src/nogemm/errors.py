"""The errors that nogemm raises on purpose.

Each is also the built-in error a caller would expect, so `except ValueError` keeps working.
"""


class NogemmError(Exception):
    """Base of every error raised by nogemm itself."""


class ShapeError(NogemmError, ValueError):
    """A tensor's shape does not fit the layer or op it was given to."""


class DtypeError(NogemmError, TypeError):
    """A tensor's dtype is not one the layer or op computes in."""


class ConfigError(NogemmError, ValueError):
    """A configuration value is unknown, out of range, or contradicts another."""


class CheckpointError(NogemmError, RuntimeError):
    """A checkpoint is truncated, altered, too new, or of another layout."""


class NotFiniteError(NogemmError, ArithmeticError):
    """Numbers that must be finite are NaN or infinite; the message names their place."""


class PackedError(NogemmError, RuntimeError):
    """A packed (evaluation-only) layer was asked for something that only an unpacked one can do."""


class NativeError(NogemmError, RuntimeError):
    """The native extension is absent, broken, or does not support what was asked of it."""


class DistributedError(NogemmError, RuntimeError):
    """Another rank ended, did not answer in time, or sent something else than was asked of it."""
