"""The version, which results and environments state."""

__version__ = "0.1.0"
