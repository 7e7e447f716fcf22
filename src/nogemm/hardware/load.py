"""Who else uses this machine: other processes slow down training far more than their share of the cores.

Read from Linux's /proc; elsewhere nothing is known, and nothing is said.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from nogemm.hardware.cpu import usable_cores

BUSY = 0.25  # cores that others use, from which on it is said
STARVED = 0.8  # of its processor time that a product got
_SIZE = 512


@dataclass(frozen=True, kw_only=True)
class Load:
    """What was seen in about a second.

    Attributes:
        cores: that this process may use.
        got: processor time of a product on all of torch's threads / (its time * threads); 1: nobody is in the way.
        others: cores' worth of time that other processes used meanwhile; None: not known.
        busiest: the process among them that used most, such as "python3 (process 12, nice 19)"; "" if none.
        average: the system's load average over the last minute, or None.
    """

    cores: int
    got: float
    others: float | None
    busiest: str
    average: float | None

    @property
    def busy(self) -> bool:
        """Whether figures of this machine are worse than it could do."""
        return (self.others or 0.0) > BUSY or self.got < STARVED

    def __str__(self) -> str:
        """Say it in a line."""
        parts = []
        if self.others is not None and self.others > BUSY:
            who = f", most of it {self.busiest}" if self.busiest else ""
            parts.append(f"other processes use {self.others:.1f} of {self.cores} cores{who}")
        if self.got < STARVED:
            parts.append(f"a product on all threads got {100 * self.got:.0f} % of its processor time")
        if self.average is not None:
            parts.append(f"load average {self.average:.1f}")
        return "; ".join(parts)


class Others:
    """How much other processes work from now on."""

    def __init__(self) -> None:
        self._begun, self._busy, self._own = time.monotonic(), _busy_seconds(), time.process_time()

    def cores(self) -> float | None:
        """Return the cores' worth of time that other processes have used since; None: not known."""
        busy = _busy_seconds()
        if busy is None or self._busy is None:
            return None
        own, wall = time.process_time() - self._own, max(time.monotonic() - self._begun, 1e-9)
        return max(0.0, (busy - self._busy - own) / wall)


def look(seconds: float = 1.0) -> Load:
    """Multiply matrices on torch's threads for about `seconds` and see who else runs."""
    a = torch.ones(_SIZE, _SIZE)
    torch.mm(a, a)  # starts the threads
    threads = torch.get_num_threads()
    before, used, others = time.monotonic(), time.process_time(), Others()
    processes = _process_seconds()
    while time.monotonic() - before < seconds:
        torch.mm(a, a)
    own, wall = time.process_time() - used, time.monotonic() - before
    try:
        average = os.getloadavg()[0]
    except OSError:
        average = None
    got = min(1.0, own / (wall * min(threads, usable_cores())))
    return Load(cores=usable_cores(), got=got, others=others.cores(), busiest=_busiest(processes), average=average)


def _busy_seconds() -> float | None:
    """Return the seconds that all cores together have been working, niced work included, waiting for disks not."""
    try:
        fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    except (OSError, IndexError):
        return None
    user, nice, system, _, _, irq, softirq = map(int, fields[:7])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def _process_seconds() -> dict[str, float]:
    """Return the processor time of every process but this one, by its number."""
    found = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        fields = _stat(stat)
        if fields and stat.parent.name != str(os.getpid()):
            found[stat.parent.name] = (int(fields[12]) + int(fields[13])) / os.sysconf("SC_CLK_TCK")
    return found


def _busiest(before: dict[str, float]) -> str:
    """Name the process that has worked most since `before`, if that is more than a tenth of a second."""
    now = _process_seconds()
    used = {number: seconds - before[number] for number, seconds in now.items() if number in before}
    number = max(used, key=lambda n: used[n], default="")
    if not number or used[number] < 0.1:
        return ""
    fields = _stat(Path(f"/proc/{number}/stat"))
    return f"{fields[0]} (process {number}, nice {fields[17]})" if fields else ""


def _stat(path: Path) -> list[str]:
    """Return a process' name, then the fields of /proc/N/stat from the third on; nothing where it has ended."""
    try:
        _, _, rest = path.read_text(errors="replace").partition("(")
    except OSError:
        return []
    name, _, fields = rest.rpartition(")")
    return [name, *fields.split()]
