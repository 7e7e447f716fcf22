"""Say what machine this is and what it can reach."""

from nogemm.hardware.cpu import machine, machine_line

__all__ = ["machine", "machine_line"]
