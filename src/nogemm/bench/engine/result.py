"""What every result file says about where it comes from."""

from __future__ import annotations

import os
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from nogemm import ops
from nogemm.errors import ConfigError
from nogemm.hardware import machine, machine_line
from nogemm.hardware.held import held_to

DTYPES = ("fp32", "bf16", "int8")


def origin(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the head of a result: machine, versions, instruction set in force, date, load, settings with their seed.

    The load average is the machine's when the run begins; anything much above zero means that the times are not the
    contenders' alone.
    """
    return {
        "machine": machine(),
        "machine_line": machine_line(),
        "isa": ops.isa(),
        "held_to": held_to(),
        "date": datetime.now(UTC).date().isoformat(),
        "load_average": load_average(),
        "settings": settings,
    }


def load_average() -> float | None:
    """Return the machine's load over the last minute, or None where the system does not say."""
    try:
        return round(os.getloadavg()[0], 2)
    except OSError:
        return None


def our_names(dtypes: str) -> list[str]:
    """Name our contenders for dtypes such as "int8" or "int8,fp32": "nogemm-int8", "nogemm-fp32".

    Raises:
        ConfigError: an unknown dtype, or none.
    """
    words = list(dict.fromkeys(word.strip() for word in dtypes.split(",")))
    for word in words:
        if word not in DTYPES:
            raise ConfigError(f"--dtype must be one of {', '.join(DTYPES)}, or several with commas, got {word!r}")
    return [f"nogemm-{word}" for word in words]


def why_not(row: Mapping[str, Any]) -> str:
    """Say why a row has no time; "" if its file gives no reason."""
    return row.get("missing") or row.get("error") or row.get("skipped") or ""


def shown_name(row: Mapping[str, Any]) -> str:
    """Name a row's contender for a table; say where PyTorch stood in for our kernel, what is untrained or cut short."""
    native = ", not native" if row.get("native") is False else ""
    rounds = f", {row['rounds']} rounds only" if "rounds" in row else ""
    return row["contender"] + native + (", untrained" if row.get("trained") is False else "") + rounds
